"""Whitened blocks: where distances mean something, and the modes that an index searches there.

A block is whitened with the pooled within-expert covariance (Mahalanobis, 1807.03888; OAS in z-scored space, see
`core.statistics`) and brought to length 1 (Mahalanobis++, 2505.18032). Its length is kept beside it: with one expert
the centre is its own mean, directions say little, and the length does.

Memory: a block of d numbers holds d² float32 (stem blocks of width 576: 1.3 MB each); the index holds SEARCHED float32
a mode, 10 MB for 10,000 modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dylora_stream.core.novelty.config import NoveltyConfig
from dylora_stream.core.novelty.layout import FeatureLayout
from dylora_stream.core.ports import IndexFactory, VectorIndex
from dylora_stream.core.statistics import Moments, pooled_covariance

__all__ = ["Background", "Modes", "RelativeSpace", "Space", "WhitenedBlock", "summarise"]

SEARCHED = 256  # dimensions that the index searches: wider rows go through a fixed random projection
PROJECTION_SEED = 20_221_122
KMEANS_ROUNDS = 10  # Lloyd's rounds; centres hardly move afterwards
TINY = 1e-9


class WhitenedBlock:
    """One block's whitening and, in it, the experts' centres."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: one (n_e, d) an expert."""
        self._centre = np.mean([part.mean(axis=0) for part in parts], axis=0).astype(np.float32)
        self._matrix = _whitening(parts)
        # One product over all rows: many small ones cost more in waking threads than in sums.
        self.fitted, lengths = self(np.concatenate(parts))  # (N, d) directions of the rows it was fitted on
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        self._means = np.stack([part.mean(axis=0) for part in np.split(self.fitted, cuts)])  # (E, d)
        self._squares = (self._means**2).sum(axis=1)
        self._lengths = np.array([part.mean() for part in np.split(lengths, cuts)])  # (E,)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows (n, d) → directions (n, d) float32 of length 1, log lengths (n,)."""
        whitened = (rows.astype(np.float32) - self._centre) @ self._matrix
        lengths = np.linalg.norm(whitened, axis=1, keepdims=True) + np.float32(TINY)
        return whitened / lengths, np.log(lengths[:, 0].astype(np.float64))

    def to_centres(self, directions: np.ndarray) -> np.ndarray:
        """(n, E) distances to the experts' centres."""
        squared = 1.0 + self._squares - 2.0 * (directions @ self._means.T)
        return np.asarray(np.sqrt(np.maximum(squared, 0.0)), np.float64)

    def to_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """(n, E) differences of log length from the experts' means."""
        return np.asarray(np.abs(lengths[:, None] - self._lengths[None]))


def _whitening(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(d, d) float32 upper triangle W, so that (WWᵀ)⁻¹ is the pooled within-expert covariance.

    The scatter is summed in float32 about each expert's own mean: every fold of the calibration needs one, rows are
    hundreds, and the shrinkage is far larger than the rounding.
    """
    centred = np.concatenate([part - part.mean(axis=0) for part in parts]).astype(np.float32)
    freedom = len(centred) - len(parts)
    pooled = Moments(freedom + 1, np.zeros(centred.shape[1]), (centred.T @ centred).astype(np.float64))
    return _inverted(np.linalg.cholesky(pooled_covariance([pooled]).matrix)).T.astype(np.float32)


def _inverted(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangle, by halves: a third of what a general solver takes."""
    size = len(lower)
    if size <= 160:
        return np.asarray(np.linalg.inv(lower))
    half = size // 2
    result = np.zeros_like(lower)
    result[:half, :half] = first = _inverted(lower[:half, :half])
    result[half:, half:] = second = _inverted(lower[half:, half:])
    result[half:, :half] = -second @ (lower[half:, :half] @ first)
    return result


class Modes:
    """The nearest mode of every expert, from one index over all experts' modes."""

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        factory: IndexFactory,
        config: NoveltyConfig,
        rng: np.random.Generator,
    ) -> None:
        """parts: one (n_e, d) float32 an expert, in the space of the search."""
        modes = [
            summarise(part, config.max_modes, rng)[0] if len(part) > config.max_modes else part
            for part in parts
        ]
        self._owner = np.concatenate([np.full(len(part), column) for column, part in enumerate(modes)])
        self._experts, self._wanted = len(parts), min(config.neighbours, len(self._owner))
        self._index: VectorIndex = factory(parts[0].shape[1])
        self._index.add(np.arange(len(self._owner), dtype=np.int64), np.concatenate(modes))

    def nearest(self, rows: np.ndarray) -> np.ndarray:
        """(n, E) distance to the nearest mode; that of the last one looked at where an expert has none among them."""
        near, ids = self._index.search(rows, self._wanted)
        result = np.repeat(near[:, -1:].astype(np.float64), self._experts, axis=1)
        lines = np.repeat(np.arange(len(rows)), self._wanted)
        np.minimum.at(result, (lines, self._owner[ids].ravel()), near.ravel())
        return result


@dataclass(frozen=True, slots=True)
class Space:
    """All blocks of one kind of rows (inputs, or answers), and their modes."""

    layout: FeatureLayout
    blocks: tuple[WhitenedBlock, ...]
    modes: Modes

    @classmethod
    def fit(
        cls,
        parts: Sequence[np.ndarray],
        layout: FeatureLayout,
        factory: IndexFactory,
        config: NoveltyConfig,
        rng: np.random.Generator,
    ) -> "Space":
        """parts: one (n_e, D) an expert."""
        columns = zip(*(layout.parts(part) for part in parts), strict=True)
        blocks = tuple(WhitenedBlock(block) for block in columns)
        searched = _searched([block.fitted for block in blocks])
        for block in blocks:
            del block.fitted
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        return cls(layout, blocks, Modes(np.split(searched, cuts), factory, config, rng))

    def terms(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, D) → (n, E, B + 2): distance to each expert's centre in each block, to its nearest mode over all
        blocks, and difference of length averaged over the blocks."""
        embedded = [block(part) for block, part in zip(self.blocks, self.layout.parts(rows), strict=True)]
        pairs = list(zip(self.blocks, embedded, strict=True))
        centres = [block.to_centres(directions) for block, (directions, _) in pairs]
        lengths = np.mean([block.to_lengths(length) for block, (_, length) in pairs], axis=0)
        nearest = self.modes.nearest(_searched([directions for directions, _ in embedded]))
        return np.stack([*centres, nearest, lengths], axis=-1)


class Background:
    """One Gaussian over all experts' rows, in the whitening of their pooled covariance: what relative Mahalanobis
    (2106.09022) takes from the distance to an expert.

    Its covariance is the within-expert one, here the identity, plus that of the experts' means: with a shrinkage of its
    own, distances differ most where rows are new, and the score turns round (AUROC 0.11 on bare). (I + MᵀM)⁻¹ by
    Woodbury.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: one whitened (n_e, d) an expert."""
        self.means = np.stack([part.mean(axis=0) for part in parts])  # (E, d)
        shares = np.array([len(part) for part in parts]) / sum(len(part) for part in parts)
        self._middle = shares @ self.means
        self._between = np.sqrt(shares)[:, None] * (self.means - self._middle)  # M: (E, d)
        self._inner = np.linalg.inv(np.eye(len(parts)) + self._between @ self._between.T)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, d) whitened → (n,) squared."""
        deviations = rows - self._middle
        along = deviations @ self._between.T  # (n, E)
        return np.asarray((deviations**2).sum(axis=1) - np.einsum("ne,ef,nf->n", along, self._inner, along))


class RelativeSpace:
    """Relative Mahalanobis distances of the first blocks of input and answer, side by side."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: one (n_e, d) an expert."""
        self._centre = np.mean([part.mean(axis=0) for part in parts], axis=0).astype(np.float32)
        self._matrix = _whitening(parts)
        self._background = Background([self._whitened(part) for part in parts])

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, d) → (n, E): how much farther each expert is than all of them taken together."""
        whitened, means = self._whitened(rows), self._background.means
        squared = (whitened**2).sum(axis=1)[:, None] + (means**2).sum(axis=1) - 2.0 * whitened @ means.T
        return np.asarray(squared - self._background.distances(whitened)[:, None])

    def _whitened(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray((rows.astype(np.float32) - self._centre) @ self._matrix, np.float64)


def _searched(directions: Sequence[np.ndarray]) -> np.ndarray:
    """(n, at most SEARCHED) float32: the blocks' directions side by side, projected where they are wide.

    Distances survive a Gaussian projection to 256 numbers within 5 % or so (Johnson-Lindenstrauss).
    """
    joined = np.concatenate(directions, axis=1) * np.float32(len(directions) ** -0.5)
    if joined.shape[1] <= SEARCHED:
        return np.ascontiguousarray(joined, np.float32)
    return np.asarray(joined @ _projection(joined.shape[1]), np.float32)


@cache
def _projection(dimensions: int) -> np.ndarray:
    rng = np.random.default_rng(PROJECTION_SEED)
    return rng.standard_normal((dimensions, SEARCHED), dtype=np.float32) * np.float32(SEARCHED**-0.5)


def summarise(rows: np.ndarray, modes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
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
