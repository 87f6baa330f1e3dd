"""Sufficient statistics of experts, and what follows from them in closed form: covariance, whitening, discriminant.

Count, mean and scatter say all that a Gaussian of an expert needs; adding rows one at a time, in any order, or
merging two halves gives what one batch fit gives. They are kept in float64: scatter is a difference of large numbers.

The pooled within-expert covariance is shrunk in z-scored space with OAS (Chen et al. 2010, 0907.4698), which needs
the scatter alone, not the rows, so that it too is order-free. Standardising first makes the target a diagonal: stem
features have a few dimensions with hundred times the variance of the others, and a scaled identity would drown the
rest.

The linear discriminant is CoDe-LoRA's (2610.08312): Σ⁻¹μ_e·z - ½μ_eᵀΣ⁻¹μ_e, computed in whitened coordinates, where
Σ = I. It does not train anything and holds no prior: how often an expert was seen says nothing about the next record.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dylora_stream.core.messages import DEFAULT_TENANT

__all__ = [
    "ExpertStatistics", "LinearDiscriminant", "Moments", "Separation", "Whitening", "binomial", "entropy",
    "pooled_covariance", "separation", "softmax",
]  # fmt: skip

VARIANCE_FLOOR = 1e-4  # share of the median variance: a dimension that never moved must not decide by itself


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean (d,) and scatter (d, d) = Σ (x - mean)(x - mean)ᵀ, float64.

    Invariant: updating n times, merging parts, and fitting once agree.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dimensions: int) -> "Moments":
        """Nothing seen yet."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    @classmethod
    def of(cls, rows: np.ndarray) -> "Moments":
        """The moments of rows: (n, d)."""
        if len(rows) == 0:
            return cls.empty(rows.shape[1])
        exact = rows.astype(np.float64)
        mean = exact.mean(axis=0)
        centred = exact - mean
        return cls(len(rows), mean, centred.T @ centred)

    def updated(self, rows: np.ndarray) -> "Moments":
        """With these rows (n, d) added."""
        return self.merged(Moments.of(np.atleast_2d(rows)))

    def merged(self, other: "Moments") -> "Moments":
        """Both together (Chan's parallel update)."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


@dataclass(frozen=True, kw_only=True)
class ExpertStatistics:
    """What the router and the novelty scorer know of one expert. rows: (n, d) float32, its training features; answers:
    (n, A) float32, features of their answers, nan or zero where a row has none; counts: (n,) int64, records that came
    with each row's text, None where each came once."""

    expert_id: str
    rows: np.ndarray
    tenant: str = DEFAULT_TENANT
    is_mature: bool = False
    answers: np.ndarray | None = None
    counts: np.ndarray | None = None

    @cached_property
    def moments(self) -> Moments:
        """Count, mean and scatter of the rows."""
        return Moments.of(self.rows)

    @property
    def count(self) -> int:
        """Rows."""
        return self.moments.count

    @property
    def mean(self) -> np.ndarray:
        """(d,) float64."""
        return self.moments.mean

    @property
    def scatter(self) -> np.ndarray:
        """(d, d) float64."""
        return self.moments.scatter


@dataclass(frozen=True, slots=True)
class Covariance:
    """A shrunk covariance: scale ⊙ ((1 - shrinkage)·R + shrinkage·I) ⊙ scale, with R the sample correlation."""

    matrix: np.ndarray  # (d, d)
    scale: np.ndarray  # (d,) standard deviations
    shrinkage: float  # 0 = the sample's, 1 = diagonal
    freedom: int  # degrees of freedom behind it


def pooled_covariance(moments: Sequence[Moments]) -> Covariance:
    """The within-expert covariance over all experts, OAS-shrunk towards its diagonal.

    Rows less experts are its degrees of freedom; with none (each expert one row) it is the identity.
    """
    dimensions = len(moments[0].mean)
    freedom = sum(max(part.count - 1, 0) for part in moments)
    if freedom == 0:
        return Covariance(np.eye(dimensions), np.ones(dimensions), 1.0, 0)
    sample = sum((part.scatter for part in moments), np.zeros((dimensions, dimensions))) / freedom
    variances = np.diag(sample)
    floor = VARIANCE_FLOOR * float(np.median(variances)) or VARIANCE_FLOOR
    scale = np.sqrt(np.maximum(variances, floor))
    correlation = sample / np.outer(scale, scale)
    shrinkage = _oas(correlation, freedom)
    shrunk = (1.0 - shrinkage) * correlation
    shrunk[np.diag_indices(dimensions)] = 1.0
    return Covariance(shrunk * np.outer(scale, scale), scale, shrinkage, freedom)


def _oas(correlation: np.ndarray, freedom: int) -> float:
    """The oracle-approximating shrinkage weight of a correlation matrix, in [0.01, 1]."""
    size = len(correlation)
    squares, trace = float((correlation**2).sum()), float(np.trace(correlation))
    above = (1.0 - 2.0 / size) * squares + trace**2
    below = (freedom + 1.0 - 2.0 / size) * (squares - trace**2 / size)
    return 1.0 if below <= 0 else float(np.clip(above / below, 0.01, 1.0))


@dataclass(frozen=True, slots=True)
class Whitening:
    """z = (x - centre) @ matrix, so that Mahalanobis distances under the covariance are Euclidean ones."""

    centre: np.ndarray  # (d,)
    matrix: np.ndarray  # (d, d)
    shrinkage: float
    freedom: int

    @classmethod
    def fit(cls, moments: Sequence[Moments]) -> "Whitening":
        """From the pooled within-expert covariance; centred on the experts' mean of means."""
        covariance = pooled_covariance(moments)
        lower = np.linalg.cholesky(covariance.matrix)
        matrix = np.linalg.solve(lower, np.eye(len(lower))).T
        centre = np.mean([part.mean for part in moments], axis=0)
        return cls(centre, matrix, covariance.shrinkage, covariance.freedom)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, d) → (n, d) float64."""
        return np.asarray((rows.astype(np.float64) - self.centre) @ self.matrix)


@dataclass(frozen=True)
class LinearDiscriminant:
    """One linear score an expert, from pooled statistics alone; the experts' order is the columns' order."""

    whitening: Whitening
    means: np.ndarray  # (E, d) whitened
    expert_ids: tuple[str, ...]

    @classmethod
    def fit(cls, statistics: Sequence[ExpertStatistics]) -> "LinearDiscriminant":
        """From at least one expert."""
        whitening = Whitening.fit([expert.moments for expert in statistics])
        means = whitening(np.stack([expert.mean for expert in statistics]))
        return cls(whitening, means, tuple(expert.expert_id for expert in statistics))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """features (n, d) float32 → (n, E) float64; only differences within a row mean something."""
        weight, bias = self.affine
        return np.asarray(features.astype(np.float64) @ weight.T + bias)

    @cached_property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(weight (E, d), bias (E,)) so that logits = features @ weight.T + bias: d·E products a row, not d²."""
        weight = self.means @ self.whitening.matrix.T
        return weight, -0.5 * (self.means**2).sum(axis=1) - weight @ self.whitening.centre

    def posterior(self, features: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """(n, E), rows sum to 1."""
        return softmax(self.logits(features) / temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf is allowed where at least one entry of the row is finite."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def binomial(successes: int, trials: int, chance: float) -> float:
    """The distribution function: the probability of so many successes or fewer; chance within (0, 1)."""
    ways = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        for k in range(successes + 1)
    )
    hit, miss = math.log(chance), math.log1p(-chance)
    return sum(math.exp(way + k * hit + (trials - k) * miss) for k, way in enumerate(ways))


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Of each row, in nats: (n, E) → (n,)."""
    safe = np.where(probabilities > 0, probabilities, 1.0)
    return np.asarray(-(probabilities * np.log(safe)).sum(axis=-1))


@dataclass(frozen=True, slots=True)
class Separation:
    """Whether rows could be routed to an expert of their own, each judged without itself."""

    accuracy: float  # share of the new rows that go to the new expert
    rival: str | None  # the expert that takes most of the others

    def __str__(self) -> str:
        return f"{self.accuracy:.2f}" + (f", confused with {self.rival}" if self.rival else "")


def separation(statistics: Sequence[ExpertStatistics], new_rows: np.ndarray) -> Separation:
    """Route each new row (n, d) by a discriminant fitted on the experts and the other new rows.

    Leaving a row out moves its own mean and takes a rank-one term from the pooled covariance, so each row's distances
    follow in closed form (Sherman-Morrison) from one fit; shrinkage and scales stay as fitted on all. With u the
    row's whitened deviation, c its share of the covariance, and v_e the deviation from expert e:
    d²_e = v_eᵀv_e + c(uᵀv_e)²/(1 - c·uᵀu).
    """
    if not statistics:
        return Separation(1.0, None)
    count = len(new_rows)
    if count < 2:
        return Separation(0.0, statistics[0].expert_id)
    parts = [expert.moments for expert in statistics] + [Moments.of(new_rows)]
    whitening = Whitening.fit(parts)
    means, rows = whitening(np.stack([part.mean for part in parts])), whitening(new_rows)
    own = rows - means[-1]  # (n, d)
    # With all of u along one direction, c·uᵀu reaches 1 - shrinkage at most; the cap only guards the floor's rounding.
    share = (1.0 - whitening.shrinkage) * count / (count - 1) / max(whitening.freedom, 1)
    weight = share / np.maximum(1.0 - share * (own**2).sum(axis=1), 1e-3)  # (n,)
    deviations = rows[:, None, :] - means[None]  # (n, E + 1, d)
    deviations[:, -1] = own * (count / (count - 1))
    along = np.einsum("nd,ned->ne", own, deviations)
    distances = (deviations**2).sum(axis=2) + weight[:, None] * along**2
    winners = distances.argmin(axis=1)
    lost = winners[winners < len(statistics)]
    rival = statistics[int(np.bincount(lost).argmax())].expert_id if len(lost) else None
    return Separation(float((winners == len(statistics)).mean()), rival)
