"""How new a row is: distance to the nearest modes of each expert, fused with the router's entropy, as p-values.

1. Rows are whitened with the experts' pooled covariance (Euclidean distances become Mahalanobis ones, 1807.03888), then
   brought to length 1 (Mahalanobis++, 2505.18032), with the logarithm of their length as one coordinate more. Direction
   tells experts apart; with a single expert the centre is its own mean, directions say nothing, and the length does.
   Demo skills, 64 rows an expert, AUROC / share of a new skill found at alpha = 0.05, with one expert and with all but
   one: whitened 0.997 / 0.99, 0.966 / 0.78; length 1 alone 0.922 / 0.54, 0.989 / 1.00; both 0.998 / 0.99, 0.983 / 1.00.
2. An expert is many modes, never one broad Gaussian: its rows themselves while they are few, k-means centres above a
   cap. An index finds the nearest few; where modes have members, they are re-ranked by local (diagonal) Mahalanobis.
3. The distance is divided by what the expert's own held-out rows have at the median, and raised by the router's doubt.
   Entropy is never a score by itself: a softmax over known experts is sharp everywhere, even far from all of them.
4. Cross-conformal p-value (Vovk 2012, 1208.0806; 2104.08279): every distinct row of an expert is scored by a fit that
   has not seen its fold, means, covariance, modes and router alike; p_e = share of them at least as new as the row.
   A row is novel when p_e <= alpha for every expert that has enough rows to say so.

Known rows are called novel at most alpha of the time where they are exchangeable with the expert's own rows. A row that
is scored meets a fit on all rows, a little closer than the folds' fits, so the true rate lies a little below.
Scoring changes nothing; what is called novel never moves the statistics that called it so.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.core.ports import IndexFactory, VectorIndex
from dylora_stream.core.statistics import ExpertStatistics, LinearDiscriminant, entropy, softmax

__all__ = ["NoveltyConfig", "NoveltyScorer", "NoveltyScores", "distinct"]

KMEANS_ROUNDS = 10  # Lloyd's rounds; centres hardly move afterwards
TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class NoveltyConfig:
    """How novelty is scored and decided."""

    alpha: float = 0.05
    """Promised share of known traffic called novel, in (0, 0.5)."""

    folds: int = 10
    """Parts that the cross-conformal calibration leaves out in turn, at least 2. More folds: closer to the promise,
    slower."""

    floor_rows: int = 24
    """Distinct rows under which an expert has no veto; never fewer than 1/alpha - 1, which cannot give p <= alpha
    at all."""

    max_modes: int = 256
    """Modes an expert; above it rows are summarised by k-means."""

    neighbours: int = 1
    """Nearest modes whose distances are averaged."""

    reranked: int = 8
    """Nearest modes that are measured again with their local spread; at least `neighbours`."""

    length_weight: float = 1.0
    """Weight of a whitened row's log length beside its direction, at least 0. From 3 on, direction is drowned."""

    entropy_weight: float = 0.25
    """How much a router in full doubt raises the score: score = distance · (1 + weight · entropy / log experts)."""

    entropy_temperature: float = 8.0
    """Nats of logit difference that count as one; see `RoutingConfig.temperature_dense`."""

    beyond_margin: float = 1.5
    """A row this many times farther than every calibration row of every expert is outside: the backbone answers
    it."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie between 0 and 0.5, not {self.alpha}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, not {self.folds}")
        if not 1 <= self.neighbours <= self.reranked:
            raise ValueError(
                f"neighbours must lie between 1 and reranked ({self.reranked}), not {self.neighbours}"
            )
        if self.max_modes < 2:
            raise ValueError(f"max_modes must be at least 2, not {self.max_modes}")
        if self.entropy_weight < 0 or self.entropy_temperature <= 0:
            raise ValueError("entropy_weight must be at least 0 and entropy_temperature above 0")
        if self.length_weight < 0:
            raise ValueError(f"length_weight must be at least 0, not {self.length_weight}")
        if self.beyond_margin < 1:
            raise ValueError(f"beyond_margin must be at least 1, not {self.beyond_margin}")

    @property
    def floor(self) -> int:
        """Distinct rows from which an expert has a say."""
        return max(self.floor_rows, math.ceil(1.0 / self.alpha) - 1)


@dataclass(frozen=True, slots=True)
class NoveltyScores:
    """Novelty of n rows; higher score = more novel, about 1 for a typical known row.

    p_value is nan where nothing is calibrated; nearest is an index into the experts, -1 without one. `is_beyond`
    rows lie outside of every expert.
    """

    score: np.ndarray  # (n,) float64
    p_value: np.ndarray  # (n,) float64
    entropy: np.ndarray  # (n,) float64, nats
    nearest: np.ndarray  # (n,) int64
    is_novel: np.ndarray  # (n,) bool
    is_beyond: np.ndarray  # (n,) bool


class _Modes:
    """One expert's modes in an index, with their local spread where they summarise many rows."""

    def __init__(
        self, rows: np.ndarray, factory: IndexFactory, config: NoveltyConfig, rng: np.random.Generator
    ) -> None:
        self._config = config
        self._centres, self._spreads = rows, None
        if len(rows) > config.max_modes:
            self._centres, self._spreads = _summarise(rows, config.max_modes, rng)
        self._index: VectorIndex = factory(rows.shape[1])
        self._index.add(np.arange(len(self._centres), dtype=np.int64), self._centres)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """(n,) mean distance to the nearest few modes."""
        wanted = min(self._config.neighbours, len(self._centres))
        if self._spreads is None:
            near, _ = self._index.search(rows, wanted)
            return np.asarray(near.mean(axis=1), dtype=np.float64)
        _, ids = self._index.search(rows, min(self._config.reranked, len(self._centres)))
        deviations = rows[:, None, :] - self._centres[ids]
        local = np.sqrt((deviations**2 / self._spreads[ids]).sum(axis=2))
        return np.asarray(np.sort(local, axis=1)[:, :wanted].mean(axis=1), dtype=np.float64)


class _Fit:
    """Router and modes of all experts from one set of rows: raw fused scores, before any calibration."""

    def __init__(
        self,
        statistics: Sequence[ExpertStatistics],
        discriminant: LinearDiscriminant,
        factory: IndexFactory,
        config: NoveltyConfig,
        rng: np.random.Generator,
    ) -> None:
        self._discriminant, self._config = discriminant, config
        self._modes = [_Modes(self._embed(expert.rows), factory, config, rng) for expert in statistics]

    def _embed(self, features: np.ndarray) -> np.ndarray:
        rows = self._discriminant.whitening(features)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True) + TINY
        polar = np.concatenate([rows / lengths, self._config.length_weight * np.log(lengths)], axis=1)
        return polar.astype(np.float32)

    def entropy(self, features: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """(n,) of the router's posterior over the allowed experts, nats; 0 where there is at most one."""
        logits = np.where(allowed, self._discriminant.logits(features), -np.inf)
        logits[~allowed.any(axis=1)] = 0.0
        result = entropy(softmax(logits / self._config.entropy_temperature))
        return np.where(allowed.any(axis=1), result, 0.0)

    def fused(self, features: np.ndarray, allowed: np.ndarray, doubt: np.ndarray) -> np.ndarray:
        """(n, E) distance to each allowed expert, raised by the router's doubt; inf elsewhere."""
        rows = self._embed(features)
        experts = max(int(allowed.sum(axis=1).max(initial=0)), 2)
        raised = 1.0 + self._config.entropy_weight * doubt / math.log(experts)
        result = np.full(allowed.shape, np.inf)
        for column, modes in enumerate(self._modes):
            mask = allowed[:, column]
            if mask.any():
                result[mask, column] = modes.distances(rows[mask]) * raised[mask]
        return result


class NoveltyScorer:
    """Scores rows against the experts of a registry; immutable once fitted."""

    def __init__(self, fit: _Fit | None, calibration: Sequence[np.ndarray], config: NoveltyConfig) -> None:
        self._fit, self._config = fit, config
        self._calibration = (
            calibration  # a sorted array an expert: fused scores of its distinct rows, held out
        )
        self._median = np.array(
            [max(float(np.median(scores)), TINY) if len(scores) else 1.0 for scores in calibration]
        )
        self._has_say = np.array([len(scores) >= config.floor for scores in calibration], dtype=bool)

    @classmethod
    def fit(
        cls,
        statistics: Sequence[ExpertStatistics],
        discriminant: LinearDiscriminant | None,
        index_factory: IndexFactory,
        config: NoveltyConfig,
        rng: np.random.Generator,
    ) -> "NoveltyScorer":
        """Modes from all rows, calibration from the folds. The experts' order is the columns' order in `score`.

        `discriminant` is the one fitted on the same statistics; None fits it here.
        """
        if not statistics:
            return cls(None, (), config)
        experts = [_with_rows(expert, distinct(expert.rows)) for expert in statistics]
        whole = _Fit(experts, discriminant or LinearDiscriminant.fit(experts), index_factory, config, rng)
        return cls(whole, _calibrate(experts, index_factory, config, rng), config)

    def score(self, features: np.ndarray, allowed: np.ndarray | None = None) -> NoveltyScores:
        """features: (n, d) float32; allowed: (n, E) bool, all where None. Changes nothing; equal rows get equal
        scores."""
        rows, experts = len(features), len(self._calibration)
        allowed = np.ones((rows, experts), dtype=bool) if allowed is None else allowed
        if self._fit is None or not allowed.any():
            everything = np.ones(rows, dtype=bool)
            blank = np.zeros(rows)
            return NoveltyScores(
                blank, np.full(rows, np.nan), blank, np.full(rows, -1), everything, everything
            )
        doubt = self._fit.entropy(features, allowed)
        fused = self._fit.fused(features, allowed, doubt)
        relative = fused / self._median
        reached = allowed.any(axis=1)
        nearest = np.where(reached, relative.argmin(axis=1), -1)
        p_value = self._p_values(fused, allowed, _uniform(features))
        return NoveltyScores(
            score=np.where(reached, relative.min(axis=1), 0.0),
            p_value=p_value,
            entropy=doubt,
            nearest=nearest,
            is_novel=~(p_value > self._config.alpha),  # nan: everything may found a cluster
            is_beyond=self._beyond(fused, allowed),
        )

    def _p_values(self, fused: np.ndarray, allowed: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """(n,) the largest p-value among the experts that have a say; nan without one."""
        result = np.full(len(fused), np.nan)
        for column in np.flatnonzero(self._has_say).tolist():
            scores = self._calibration[column]
            above = len(scores) - np.searchsorted(scores, fused[:, column], side="right")
            ties = len(scores) - np.searchsorted(scores, fused[:, column], side="left") - above
            p_value = (1.0 + above + uniform * ties) / (len(scores) + 1)
            mask = allowed[:, column]
            result[mask] = np.fmax(result[mask], p_value[mask])
        return result

    def _beyond(self, fused: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """(n,) whether the row is farther than every calibration row of every expert, by the margin."""
        largest = np.array([scores[-1] if len(scores) else np.inf for scores in self._calibration])
        return np.asarray((~allowed | (fused > self._config.beyond_margin * largest)).all(axis=1))


def _calibrate(
    experts: Sequence[ExpertStatistics],
    factory: IndexFactory,
    config: NoveltyConfig,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Sorted fused scores of every expert's rows, each by a fit without its fold; empty for an expert of one row."""
    folds = [rng.permutation(expert.count) % config.folds for expert in experts]
    scores: list[list[np.ndarray]] = [[] for _ in experts]
    for fold in range(config.folds):
        kept = [
            _with_rows(e, e.rows[f != fold]) if e.count > 1 else e
            for e, f in zip(experts, folds, strict=True)
        ]
        # An expert of fewer rows than folds never loses its last row: permutation spreads them over distinct folds.
        part = _Fit(kept, LinearDiscriminant.fit(kept), factory, config, rng)
        for column, expert in enumerate(experts):
            held_out = expert.rows[folds[column] == fold]
            if expert.count < 2 or not len(held_out):
                continue
            # A row is known to serve with all experts of its tenant in play, so its doubt is measured against those.
            everyone = np.array([[other.tenant == expert.tenant for other in experts]] * len(held_out))
            fused = part.fused(held_out, everyone, part.entropy(held_out, everyone))
            scores[column].append(fused[:, column])
    return [np.sort(np.concatenate(parts)) if parts else np.zeros(0) for parts in scores]


def _with_rows(expert: ExpertStatistics, rows: np.ndarray) -> ExpertStatistics:
    return ExpertStatistics(
        expert_id=expert.expert_id, rows=rows, tenant=expert.tenant, is_mature=expert.is_mature
    )


def distinct(rows: np.ndarray) -> np.ndarray:
    """The distinct rows of (n, d), in order of first appearance."""
    _, first = np.unique(rows, axis=0, return_index=True)
    return rows[np.sort(first)]


def _uniform(features: np.ndarray) -> np.ndarray:
    """(n,) numbers in [0, 1) that break ties, drawn from each row's bytes: the same row gets the same p-value for
    ever."""
    digests = [
        hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.ascontiguousarray(features)
    ]
    return np.array([int.from_bytes(digest, "big") / 2.0**64 for digest in digests])


def _summarise(rows: np.ndarray, modes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """k-means: centres (modes, d) float32 and local variances (modes, d), shrunk towards the average of all modes.

    A mode of few members borrows the common spread: with n members its own has weight n/(n + 8).
    """
    centres = rows[rng.choice(len(rows), modes, replace=False)]
    for _ in range(KMEANS_ROUNDS):
        owner = _nearest(rows, centres)
        counts = np.bincount(owner, minlength=modes)
        sums = np.zeros((modes, rows.shape[1]))
        np.add.at(sums, owner, rows)
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres).astype(
            np.float32
        )
    owner = _nearest(rows, centres)
    counts = np.bincount(owner, minlength=modes)
    squares = np.zeros((modes, rows.shape[1]))
    np.add.at(squares, owner, (rows - centres[owner]) ** 2)
    common = np.maximum(squares.sum(axis=0) / len(rows), TINY)
    return centres, ((squares + 8.0 * common) / (counts[:, None] + 8.0)).astype(np.float32)


def _nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n,) index of each row's nearest centre."""
    distances = (centres**2).sum(axis=1) - 2.0 * rows @ centres.T
    return np.asarray(distances.argmin(axis=1))
