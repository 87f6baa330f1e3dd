"""The fused distance of a row to each expert: block distances on one scale, averaged.

Terms: distance to the expert's centre in each block, to its nearest mode over all blocks, difference of length; the
same again for the answer where there is one, and with it the relative Mahalanobis distance (2106.09022) of stem mean
and gradient sketch taken together, the only term that knows how far the far ones are. A term is brought to mean 0 and
deviation 1 by what held-out rows have to their own expert, and the terms are averaged:
z_e = Σ_t w_t (d_te - m_te) / s_te / Σ_t w_t.

Input terms share m and s between experts (an expert whose own rows scatter more is not forgiven more); for answers they
are half the expert's own, because some experts have three answers and some have a new one in each row. The relative
distance has a long tail: its m and s are quantiles over all experts.

The relative term (AUROC on two splits of training rows, without and with): loghub 0.948, 0.940 and 0.956, 0.960, found
at 0.05 0.86, 0.83 and 0.98, 0.96; `bare` 0.9995 and 0.9994, without markers 0.9954 and 0.9947 (weight 0.5: 0.9920).
With deviations in place of quantiles loghub has 0.951, 0.935. Of inputs alone it is no gain on loghub (0.941 and
0.937) and left out.

Lost (leave one task out, AUROC mean / worst, inputs of `continual/bare`): every expert's own m and s 0.987 / 0.936
against 0.993 / 0.969; a logistic model over the terms, learned on pairs of known experts, 0.953 against 0.953 with
three blocks and worse with more terms (it learns to tell known experts apart); margins to the second expert as terms
0.952. Terms weighted by how well they tell known experts apart (loghub with answers): 0.948, by Fisher's criterion
0.942, against 0.948.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.core.novelty.config import NoveltyConfig
from dylora_stream.core.novelty.layout import FeatureLayout, with_answers
from dylora_stream.core.novelty.spaces import RelativeSpace, Space
from dylora_stream.core.ports import IndexFactory
from dylora_stream.core.statistics import ExpertStatistics

__all__ = ["Fit", "Fusion", "has_answer"]

OWN_SHARE = 0.5  # weight of an expert's own location and spread in those of its answer terms
SPREAD_FLOOR = 0.02  # of a term: distances lie between 0 and 2


def has_answer(answers: np.ndarray | None, rows: int) -> np.ndarray:
    """(rows,) whether a row has answer features: neither nan nor all zero."""
    if answers is None or not answers.shape[1]:
        return np.zeros(rows, dtype=bool)
    return np.asarray(np.isfinite(answers).all(axis=1) & answers.any(axis=1))


class Fit:
    """Whitening, centres and modes of all experts from one set of rows: raw terms, before any calibration."""

    def __init__(
        self,
        experts: Sequence[ExpertStatistics],
        factory: IndexFactory,
        config: NoveltyConfig,
        rng: np.random.Generator,
    ) -> None:
        rows = [expert.rows for expert in experts]
        layout = FeatureLayout.recognised(rows[0].shape[1])
        self._experts = len(experts)
        self._inputs = Space.fit(rows, layout, factory, config, rng)
        given = {column: _answered(expert) for column, expert in enumerate(experts)}
        parts = {column: pair for column, pair in given.items() if pair is not None}
        self._answered = list(parts)
        self._answers: Space | None = None
        if parts:
            answers = [pair[1] for pair in parts.values()]
            layout = FeatureLayout.recognised(answers[0].shape[1], is_answer=True)
            self._answers = Space.fit(answers, layout, factory, config, rng)
            self._relative = RelativeSpace([with_answers(*pair) for pair in parts.values()])

    def input_terms(self, features: np.ndarray) -> np.ndarray:
        """features (n, D) → (n, E, B + 2)."""
        return self._inputs.terms(features)

    def answer_terms(self, features: np.ndarray, answers: np.ndarray | None) -> np.ndarray | None:
        """features (n, D), answers (n, A) → (n, E, B' + 3); nan for rows and experts without answers; None where
        nothing can be said."""
        mask = has_answer(answers, len(features))
        if self._answers is None or answers is None:
            return None
        result = np.full((len(features), self._experts, len(self._answers.blocks) + 3), np.nan)
        if mask.any():
            relative = self._relative.distances(with_answers(features[mask], answers[mask]))
            terms = np.concatenate([self._answers.terms(answers[mask]), relative[..., None]], axis=-1)
            result[np.ix_(np.flatnonzero(mask), np.array(self._answered))] = terms
        return result


def _answered(expert: ExpertStatistics) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows that have an answer, and their answers; None without any."""
    mask = has_answer(expert.answers, len(expert.rows))
    return (expert.rows[mask], expert.answers[mask]) if expert.answers is not None and mask.any() else None


@dataclass(frozen=True, slots=True)
class Scale:
    """Location, spread (E, T) and weight (T,) of one kind of terms."""

    location: np.ndarray
    spread: np.ndarray
    weight: np.ndarray

    @classmethod
    def fit(
        cls, terms: np.ndarray, owner: np.ndarray, own_share: float, config: NoveltyConfig
    ) -> "Scale | None":
        """terms (n, E, T) of held-out rows, owner (n,): from the distances of rows to their own experts."""
        own = terms[np.arange(len(owner)), owner]  # (n, T)
        usable = np.isfinite(own).all(axis=1)
        experts, blocks = terms.shape[1], terms.shape[2] - 2
        if usable.sum() < 2:
            return None
        own, owner = own[usable], owner[usable]
        seen = [own[owner == column] for column in range(experts) if (owner == column).any()]
        medians, variances = np.stack([np.median(p, axis=0) for p in seen]), [p.var(axis=0) for p in seen]
        median, variance = medians.mean(axis=0), np.mean(variances, axis=0)
        location, spread = np.tile(median, (experts, 1)), np.tile(variance, (experts, 1))
        for column in np.unique(owner).tolist():
            part = own[owner == column]
            location[column] = own_share * np.median(part, axis=0) + (1.0 - own_share) * median
            spread[column] = own_share * part.var(axis=0) + (1.0 - own_share) * variance
        nearest, length = config.neighbour_weight * blocks, config.length_weight * blocks / experts**2
        weight = np.append(np.ones(blocks), [nearest, length])
        return cls(location, np.sqrt(spread + SPREAD_FLOOR**2), weight)

    @classmethod
    def of_tailed(cls, terms: np.ndarray, owner: np.ndarray, weight: float) -> "Scale | None":
        """terms (n, E) of which a few rows of every expert lie very far: one location and one spread, by quantiles."""
        own = terms[np.arange(len(owner)), owner]
        own = own[np.isfinite(own)]
        if len(own) < 2:
            return None
        low, middle, high = np.quantile(own, [0.16, 0.5, 0.84])  # a normal distribution's mean and deviation
        shape = (terms.shape[1], 1)
        spread = np.hypot((high - low) / 2, SPREAD_FLOOR)
        return cls(np.full(shape, middle), np.full(shape, spread), np.array([weight]))

    def beside(self, other: "Scale") -> "Scale":
        """The terms of both."""
        return Scale(
            np.concatenate([self.location, other.location], axis=1),
            np.concatenate([self.spread, other.spread], axis=1),
            np.concatenate([self.weight, other.weight]),
        )

    def weighted(self, terms: np.ndarray) -> np.ndarray:
        """terms (n, E, T) → (n, E) weighted sum of standardised terms; nan where a term is."""
        return np.asarray(((terms - self.location) / self.spread) @ self.weight)


@dataclass(frozen=True, slots=True)
class Fusion:
    """How terms become one number a row and expert."""

    inputs: Scale | None
    answers: Scale | None

    @classmethod
    def fit(
        cls, inputs: np.ndarray, answers: np.ndarray | None, owner: np.ndarray, config: NoveltyConfig
    ) -> "Fusion":
        """From the terms of held-out rows and their owners."""
        of_inputs = Scale.fit(inputs, owner, 0.0, config)
        if answers is None:
            return cls(of_inputs, None)
        terms, relative = answers[..., :-1], answers[..., -1]
        of_answers = Scale.fit(terms, owner, OWN_SHARE, config)
        tailed = Scale.of_tailed(relative, owner, config.relative_weight * (terms.shape[-1] - 2))
        return cls(of_inputs, of_answers.beside(tailed) if of_answers and tailed else None)

    def __call__(self, inputs: np.ndarray, answers: np.ndarray | None) -> np.ndarray:
        """(n, E): 0 for a typical known row at its own expert, 1 a deviation of the average term farther."""
        if self.inputs is None:
            return np.asarray(inputs[..., :-1].mean(axis=-1))
        total, weight = self.inputs.weighted(inputs), self.inputs.weight.sum()
        if answers is None or self.answers is None:
            return np.asarray(total / weight)
        more = self.answers.weighted(answers)
        known = np.isfinite(more)
        both = (total + np.where(known, more, 0.0)) / (weight + self.answers.weight.sum())
        return np.asarray(np.where(known, both, total / weight))
