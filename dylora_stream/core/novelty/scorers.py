"""Novelty methods from the literature behind one interface, higher = more novel: `fit`, then `novelty`.

They read the first block of a row, the stem's mean (and the answer's sketch beside it where answers are given), which
is what the papers have: one vector a row. `fused` is the product's own, over all blocks. Leave one task out, inputs
alone, AUROC mean / worst on `continual/bare` (14 tasks, 80 rows each; MNLI, RTE, CB apart) and distinct rows of
`loghub`: see each section. None is calibrated; `NoveltyScorer` does that for `fused`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from dylora_stream.core.novelty.config import NoveltyConfig
from dylora_stream.core.novelty.fused import has_answer
from dylora_stream.core.novelty.layout import FeatureLayout, with_answers
from dylora_stream.core.novelty.scorer import NoveltyScorer, distinct_expert
from dylora_stream.core.novelty.spaces import Background, summarise
from dylora_stream.core.ports import IndexFactory
from dylora_stream.core.statistics import (
    ExpertStatistics,
    LinearDiscriminant,
    Moments,
    Whitening,
    entropy,
)

__all__ = ["SCORERS", "Scorer"]

LOCAL_MODES = 8  # rows a mode of the local scorer
PRIOR_ROWS = 32  # weight of the pooled covariance in an expert's own, in rows
TINY = 1e-9


class Scorer:
    """One method. Subclasses say what it does in whitened coordinates."""

    _method: "ClassVar[type[_Method]]"

    def __init__(self) -> None:
        self._plain: _Whitened | None = None
        self._answered: _Whitened | None = None

    @classmethod
    def fit(
        cls,
        statistics: Sequence[ExpertStatistics],
        index_factory: IndexFactory,
        config: NoveltyConfig,
        rng: np.random.Generator,
    ) -> "Scorer":
        """From at least one expert; twice where all experts have answers, with and without them."""
        scorer = cls()
        experts = [distinct_expert(expert) for expert in statistics]
        rows = [_first_block(e.rows) for e in experts]
        tools = (index_factory, config, rng)
        scorer._plain = _Whitened(cls._method(), rows, tools)
        answers = [e.answers for e in experts]
        if all(a is not None and has_answer(a, len(a)).all() for a in answers):
            joined = [with_answers(e.rows, a) for e, a in zip(experts, answers, strict=True) if a is not None]
            scorer._answered = _Whitened(cls._method(), joined, tools)
        return scorer

    def novelty(self, features: np.ndarray, answers: np.ndarray | None = None) -> np.ndarray:
        """features (n, D), answers (n, A) → (n,) float64. Rows without an answer are scored by their input, on a
        scale of its own: give answers to all rows or to none. Changes nothing."""
        assert self._plain is not None
        rows = _first_block(features)
        result = self._plain.novelty(rows)
        mask = has_answer(answers, len(rows))
        if self._answered is not None and answers is not None and mask.any():
            result[mask] = self._answered.novelty(with_answers(features[mask], answers[mask]))
        return result


class _Method:
    """What one paper does in whitened coordinates."""

    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:
        """parts: one whitened (n_e, d) float64 an expert; tools: index factory, config, generator."""
        raise NotImplementedError

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, d) whitened → (n,)."""
        raise NotImplementedError


class _Whitened:
    """A method behind the whitening with the pooled within-expert covariance."""

    def __init__(self, method: _Method, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:
        self._whitening = Whitening.fit([Moments.of(part) for part in parts])
        self._method = method
        method.learn([self._whitening(part) for part in parts], tools)

    def novelty(self, rows: np.ndarray) -> np.ndarray:
        """(n,) float64."""
        return np.asarray(self._method.distances(self._whitening(rows)), np.float64)


def _first_block(rows: np.ndarray) -> np.ndarray:
    return rows[:, : FeatureLayout.recognised(rows.shape[1]).blocks[0].stop]


def _squared(rows: np.ndarray, means: np.ndarray) -> np.ndarray:
    """(n, E) squared distances of rows (n, d) to means (E, d)."""
    squared = (rows**2).sum(axis=1)[:, None] + (means**2).sum(axis=1) - 2.0 * rows @ means.T
    return np.asarray(np.maximum(squared, 0.0))


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + TINY))


# Tied Mahalanobis (1807.03888): min_e (x - μ_e)ᵀ Σ⁻¹ (x - μ_e), one Σ for all.


class _Tied(_Method):
    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:  # noqa: ARG002 - one interface
        self._means = np.stack([part.mean(axis=0) for part in parts])

    def distances(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(_squared(rows, self._means).min(axis=1))


# Per-expert Mahalanobis: the same with each expert's own Σ_e and its log determinant. Diagonal in the pooled whitening,
# shrunk towards it with PRIOR_ROWS (ours: tens of rows never give a full covariance of hundreds of dimensions).


class _PerExpert(_Method):
    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:  # noqa: ARG002 - one interface
        self._means = np.stack([part.mean(axis=0) for part in parts])
        scatter = np.stack(
            [((part - mean) ** 2).sum(axis=0) for part, mean in zip(parts, self._means, strict=True)]
        )
        counts = np.array([len(part) for part in parts])[:, None]
        self._spreads = (scatter + PRIOR_ROWS) / (counts + PRIOR_ROWS)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        pairs = zip(self._means, self._spreads, strict=True)
        each = [((rows - mean) ** 2 / spread).sum(axis=1) + np.log(spread).sum() for mean, spread in pairs]
        return np.asarray(np.min(each, axis=0))


# Relative Mahalanobis (2106.09022): the tied distance less the distance to one Gaussian over all rows.


class _Relative(_Tied):
    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:
        super().learn(parts, tools)
        self._background = Background(parts)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(super().distances(rows) - self._background.distances(rows))


# Mahalanobis++ (2505.18032): the tied distance between rows of length 1 (ours: after whitening, which is where stem
# features have a meaningful length).


class _PlusPlus(_Tied):
    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:
        super().learn([_unit(part) for part in parts], tools)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        return super().distances(_unit(rows))


# Deep nearest neighbours (2204.06507): distance to the nearest of all experts' rows, rows of length 1.


class _Neighbours(_Method):
    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:
        factory: IndexFactory = tools[0]
        rows = np.concatenate([_unit(part) for part in parts]).astype(np.float32)
        self._index = factory(rows.shape[1])
        self._index.add(np.arange(len(rows), dtype=np.int64), rows)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._index.search(_unit(rows).astype(np.float32), 1)[0][:, 0])


# Local Mahalanobis: rows of length 1, k-means modes an expert, each with its own diagonal spread; the index finds the
# nearest few and they are measured again.


class _Local(_Method):
    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:
        factory, config, rng = tools
        found = [summarise(_unit(p).astype(np.float32), _modes(len(p), config.max_modes), rng) for p in parts]
        self._centres = np.concatenate([centres for centres, _ in found])
        self._spreads = np.concatenate([spreads for _, spreads in found])
        self._index = factory(self._centres.shape[1])
        self._index.add(np.arange(len(self._centres), dtype=np.int64), self._centres)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        unit = _unit(rows).astype(np.float32)
        _, ids = self._index.search(unit, min(8, len(self._centres)))
        deviations = (unit[:, None] - self._centres[ids]) ** 2 / self._spreads[ids]
        return np.asarray(np.sqrt(deviations.sum(axis=2)).min(axis=1))


def _modes(rows: int, most: int) -> int:
    return max(1, min(rows // LOCAL_MODES, most))


# Entropy of the router's posterior. A softmax over known experts is sharp everywhere, even far from all of them.


class _Entropy(_Method):
    def learn(self, parts: Sequence[np.ndarray], tools: tuple[Any, ...]) -> None:
        self._temperature = tools[1].entropy_temperature
        experts = [
            ExpertStatistics(expert_id=str(column), rows=part.astype(np.float32))
            for column, part in enumerate(parts)
        ]
        self._discriminant = LinearDiscriminant.fit(experts)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        return entropy(self._discriminant.posterior(rows, self._temperature))


class Tied(Scorer):
    """Tied Mahalanobis distance (1807.03888). bare 0.67 with the daemon's first features, loghub 0.890 / 0.835."""

    _method = _Tied


class PerExpert(Scorer):
    """Mahalanobis distance with a covariance an expert."""

    _method = _PerExpert


class Relative(Scorer):
    """Relative Mahalanobis distance (2106.09022). bare 0.74 with the daemon's first features."""

    _method = _Relative


class MahalanobisPlusPlus(Scorer):
    """Mahalanobis++ (2505.18032). loghub 0.969 / 0.925: the best single one."""

    _method = _PlusPlus


class Neighbours(Scorer):
    """Nearest neighbours of length 1 (2204.06507). bare 0.84 with the daemon's first features, loghub 0.966 / 0.919."""

    _method = _Neighbours


class Local(Scorer):
    """Local, mode-wise Mahalanobis distance."""

    _method = _Local


class Entropy(Scorer):
    """Entropy of the router's posterior; 0 with one expert. Never shows novelty by itself."""

    _method = _Entropy


class Fused:
    """The score of `NoveltyScorer`, uncalibrated: all blocks, centres, modes, answers. See `core.novelty.fused`."""

    def __init__(self, scorer: NoveltyScorer) -> None:
        self._scorer = scorer

    @classmethod
    def fit(
        cls,
        statistics: Sequence[ExpertStatistics],
        index_factory: IndexFactory,
        config: NoveltyConfig,
        rng: np.random.Generator,
    ) -> "Fused":
        """From at least one expert."""
        return cls(NoveltyScorer.fit(statistics, None, index_factory, config, rng))

    def novelty(self, features: np.ndarray, answers: np.ndarray | None = None) -> np.ndarray:
        """features (n, D), answers (n, A) → (n,) float64. Changes nothing."""
        return self._scorer.score(features, None, answers).score


SCORERS: Mapping[str, type[Scorer | Fused]] = MappingProxyType(
    {
        "tied": Tied,
        "per_expert": PerExpert,
        "relative": Relative,
        "mahalanobis_pp": MahalanobisPlusPlus,
        "neighbours": Neighbours,
        "local": Local,
        "entropy": Entropy,
        "fused": Fused,
    }
)
