"""Calibrated novelty: the fused distance as a conformal p-value, and what is novel.

1. Cross-conformal (Vovk 2012, 1208.0806): every distinct row of an expert is scored by a fit that has not seen its
   fold, whitening, centres and modes alike. The score of a row is its fused distance to the nearest expert with a say.
2. p = (1 + held-out records of the experts at least as far) / (1 + their number) (2104.08279), ties broken by a hash
   of the row. A row is novel when p <= alpha. Known traffic that is exchangeable with the experts' records taken
   together is called novel at most alpha of the time. A record whose text came several times would, held out, still
   meet its like: it counts in the number, and as far from nobody. That is bounded, because a producer may send
   everything twice: of new texts at most twice alpha are called novel, whatever repeats.
3. Rows with an answer meet the calibration of rows with answers, rows without one that of inputs alone.

Lost: one calibration an expert, novel when every expert says p_e <= alpha. It promises the rate for each expert by
itself, but three odd rows among the 43 of one log system let it veto everything: detection at 0.05 on loghub's
distinct rows 0.28 (inputs alone) against 0.91, false alarms 0.03 against 0.05. With the pooled calibration the expert
with the most false alarms has about 0.12.

Lost: each text once, however often it came. Log lines repeat, and of records as they come far fewer than alpha were
called novel: on loghub's training rows 0.018 for 0.05 and 0.002 for 0.01 (as it is, 0.050 and 0.007), and of a
left-out system's rows 0.26 at 0.01 (0.80).

A fit on all rows is a little closer to known rows than the folds' fits, so the true rate lies a little below alpha.
Scoring changes nothing; what is called novel never moves the statistics that called it so.

Cost, one core, 16 rows: 3.5 ms against 10 experts of 100 rows, 13.6 ms against 10,000 modes in all, of a pass of
400 ms; the lexical features take another 4.4 ms. A fit costs folds + 1 whitenings of each block.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dylora_stream.core.novelty.config import NoveltyConfig
from dylora_stream.core.novelty.fused import Fit, Fusion, has_answer
from dylora_stream.core.novelty.layout import FeatureLayout
from dylora_stream.core.ports import IndexFactory
from dylora_stream.core.statistics import ExpertStatistics, LinearDiscriminant, entropy, softmax

__all__ = ["NoveltyScorer", "NoveltyScores", "distinct", "distinct_expert"]

SCORE_UNIT = 4.0  # deviations that multiply a score by e: a typical known row has 1, a far one 3 to 10
LARGEST_EXPONENT = 100.0


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


@dataclass(frozen=True, slots=True)
class _Repeats:
    """How texts that came again are counted, by the experts that are calibrated together.

    One stands for nobody as long as those that came once are half of all records, else for a `share` of a record; and
    no more than twice as many records as texts are `counted`, as a share of them.
    """

    share: float
    counted: float

    @classmethod
    def of(cls, counts: np.ndarray) -> "_Repeats":
        """counts (n,) records of each distinct text."""
        all_records, came_once = max(float(counts.sum()), 1.0), int((counts == 1).sum())
        records = min(all_records, 2.0 * len(counts))
        missing = (records / 2 - came_once) / max(len(counts) - came_once, 1)
        return cls(share=min(max(missing, 0.0), 1.0), counted=records / all_records)


@dataclass(frozen=True, slots=True)
class _Distances:
    """An expert's held-out distances."""

    ordered: np.ndarray  # (n,) ascending
    reached: np.ndarray  # (n + 1,) records that the first 0 … n of them stand for
    records: float  # that were held out, with those whose text is known all the same

    @classmethod
    def of(cls, distances: np.ndarray, counts: np.ndarray, repeats: "_Repeats") -> "_Distances":
        """distances (n,) of distinct texts, counts (n,) records of each."""
        order = np.argsort(distances, kind="stable")
        stands_for = np.where(counts == 1, 1.0, repeats.share)[order]
        return cls(
            distances[order], np.append(0.0, np.cumsum(stands_for)), float(counts.sum()) * repeats.counted
        )

    def beyond(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) records that are farther than each distance, and at least as far."""
        right, left = (np.searchsorted(self.ordered, distances, side=side) for side in ("right", "left"))
        return self.reached[-1] - self.reached[right], self.reached[-1] - self.reached[left]


@dataclass(frozen=True, slots=True)
class _Calibration:
    """Held-out distances of one kind of rows (inputs alone, or with answers): a sorted array an expert."""

    to_a_say: tuple["_Distances", ...]  # to the nearest expert with a say; none for an expert without one
    largest: np.ndarray  # (E,) the largest distance to any expert; inf where nothing was held out

    def p_values(
        self, distances: np.ndarray, asked: np.ndarray, uniform: np.ndarray, least: int
    ) -> np.ndarray:
        """distances (n,), asked (n, E) whose rows count, uniform (n,) → (n,); nan for fewer than `least` such rows."""
        above, ties, count = (np.zeros(len(distances)) for _ in range(3))
        for column, held_out in enumerate(self.to_a_say):
            farther, as_far = held_out.beyond(distances)
            above += asked[:, column] * farther
            ties += asked[:, column] * (as_far - farther)
            count += asked[:, column] * held_out.records
        return np.where(count >= max(least, 1), (1.0 + above + uniform * ties) / (count + 1.0), np.nan)


class NoveltyScorer:
    """Scores rows against the experts of a registry; immutable once fitted."""

    def __init__(
        self,
        fit: Fit | None,
        fusion: Fusion | None,
        calibrations: tuple[_Calibration, _Calibration] | None,
        discriminant: LinearDiscriminant | None,
        config: NoveltyConfig,
    ) -> None:
        self._fit, self._fusion, self._calibrations = fit, fusion, calibrations
        self._discriminant, self._config = discriminant, config

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

        `discriminant` gives the entropy; it may read the first columns of a row only. None fits it here.
        """
        if not statistics:
            return cls(None, None, None, None, config)
        experts = [distinct_expert(expert) for expert in statistics]
        whole = Fit(experts, index_factory, config, rng)
        held_out = _held_out(experts, index_factory, config, rng)
        fusion = Fusion.fit(held_out.inputs, held_out.answers, held_out.owner, config)
        calibrations = (
            _calibrate(experts, held_out, fusion(held_out.inputs, None), config),
            _calibrate(experts, held_out, fusion(held_out.inputs, held_out.answers), config),
        )
        return cls(
            whole, fusion, calibrations, discriminant or LinearDiscriminant.fit(_routing(experts)), config
        )

    def score(
        self, features: np.ndarray, allowed: np.ndarray | None = None, answers: np.ndarray | None = None
    ) -> NoveltyScores:
        """features: (n, D) float32; allowed: (n, E) bool, all where None; answers: (n, A) float32, nan or zero for a
        row without one. Changes nothing; equal rows get equal scores."""
        rows = len(features)
        if self._fit is None or self._fusion is None or self._calibrations is None:
            return _unknown(rows)
        experts = len(self._calibrations[0].to_a_say)
        allowed = np.ones((rows, experts), dtype=bool) if allowed is None else allowed
        if not allowed.any():
            return _unknown(rows)
        inputs, answered = self._fit.input_terms(features), has_answer(answers, rows)
        more = self._fit.answer_terms(features, answers) if answered.any() else None
        distances = np.where(allowed, self._fusion(inputs, more), np.inf)  # (n, E)
        nearest, reached = distances.argmin(axis=1), allowed.any(axis=1)
        least = np.where(reached, distances.min(axis=1), 0.0)
        p_value, is_beyond = self._judged(distances, allowed, answered, _uniform(features))
        return NoveltyScores(
            score=np.where(reached, np.exp(np.minimum(least / SCORE_UNIT, LARGEST_EXPONENT)), 0.0),
            p_value=p_value,
            entropy=self._entropy(features, allowed),
            nearest=np.where(reached, nearest, -1),
            is_novel=~(p_value > self._config.alpha),  # nan: everything may found a cluster
            is_beyond=is_beyond,
        )

    def _judged(
        self, distances: np.ndarray, allowed: np.ndarray, answered: np.ndarray, uniform: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """((n,) p-values, (n,) is beyond), each row by the calibration of its kind."""
        assert self._calibrations is not None
        p_value, is_beyond = np.full(len(distances), np.nan), np.ones(len(distances), dtype=bool)
        margin = SCORE_UNIT * np.log(self._config.beyond_margin)
        for calibration, mask in zip(self._calibrations, (~answered, answered), strict=True):
            if not mask.any():
                continue
            has_say = np.array([part.records > 0 for part in calibration.to_a_say])
            asked = allowed[mask] & has_say
            near = np.where(asked, distances[mask], np.inf).min(axis=1)
            p_value[mask] = calibration.p_values(near, asked, uniform[mask], self._config.least_calibration)
            limit = np.where(allowed[mask], calibration.largest, -np.inf).max(axis=1) + margin
            is_beyond[mask] = ~allowed[mask].any(axis=1) | (distances[mask].min(axis=1) > limit)
        return p_value, is_beyond

    def _entropy(self, features: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """(n,) of the router's posterior over the allowed experts, nats; 0 where there is at most one."""
        assert self._discriminant is not None
        read = features[:, : len(self._discriminant.whitening.centre)]
        logits = np.where(allowed, self._discriminant.logits(read), -np.inf)
        logits[~allowed.any(axis=1)] = 0.0
        result = entropy(softmax(logits / self._config.entropy_temperature))
        return np.where(allowed.any(axis=1), result, 0.0)


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Terms of the experts' rows, each by a fit without its fold, whose row each is, and how often it came."""

    inputs: np.ndarray  # (n, E, T)
    answers: np.ndarray | None  # (n, E, T'), nan without an answer
    owner: np.ndarray  # (n,)
    counts: np.ndarray  # (n,)


def _held_out(
    experts: Sequence[ExpertStatistics],
    factory: IndexFactory,
    config: NoveltyConfig,
    rng: np.random.Generator,
) -> _HeldOut:
    """Folds of every expert's rows; an expert's only row is never held out, and one of fewer rows than folds never
    loses its last row."""
    sizes = [len(expert.rows) for expert in experts]  # not `count`, whose scatter is D² numbers
    folds = [rng.permutation(size) % config.folds if size > 1 else np.full(size, -1) for size in sizes]
    inputs, answers, owner, counts = [], [], [], []
    for fold in range(config.folds):
        masks = [part == fold for part in folds]
        if not any(mask.any() for mask in masks):
            continue
        part = Fit([_chosen(e, ~mask) for e, mask in zip(experts, masks, strict=True)], factory, config, rng)
        held = [_chosen(expert, mask) for expert, mask in zip(experts, masks, strict=True)]
        rows = np.concatenate([expert.rows for expert in held])
        inputs.append(part.input_terms(rows))
        given = _answers(held, experts)
        answers.append(None if given is None else part.answer_terms(rows, given))
        owner.append(np.repeat(np.arange(len(held)), [len(expert.rows) for expert in held]))
        counts.append(np.concatenate([_counts(expert) for expert in held]))
    if not inputs:
        nobody = np.zeros(0, dtype=np.int64)
        return _HeldOut(np.zeros((0, len(experts), 3)), None, nobody, nobody)
    known = [part for part in answers if part is not None]
    joined = np.concatenate(known) if len(known) == len(answers) else None
    return _HeldOut(np.concatenate(inputs), joined, np.concatenate(owner), np.concatenate(counts))


def _calibrate(
    experts: Sequence[ExpertStatistics], held_out: _HeldOut, distances: np.ndarray, config: NoveltyConfig
) -> _Calibration:
    """distances (n, E) of the held-out rows → what a row that is scored is compared with.

    A row is known to serve with all experts of its tenant in play, so it is held against those.
    """
    tenants = np.array([expert.tenant for expert in experts], dtype=object)
    counts = np.bincount(held_out.owner, minlength=len(experts))
    has_say = counts >= config.floor_rows
    to_a_say: list[_Distances] = []
    largest = np.full(len(experts), np.inf)
    for column, expert in enumerate(experts):
        mine, ours = held_out.owner == column, tenants == expert.tenant
        if mine.any():
            largest[column] = distances[mine][:, ours].min(axis=1).max()
        heard, voters = mine & has_say[column], ours & has_say
        nearest = distances[heard][:, voters].min(axis=1, initial=np.inf)
        repeats = _Repeats.of(held_out.counts[voters[held_out.owner]])
        to_a_say.append(_Distances.of(nearest, held_out.counts[heard], repeats))
    return _Calibration(tuple(to_a_say), largest)


def _answers(held: Sequence[ExpertStatistics], experts: Sequence[ExpertStatistics]) -> np.ndarray | None:
    """(n, A) answers of held-out rows, nan for experts without any; None when no expert has some."""
    sizes = {expert.answers.shape[1] for expert in experts if expert.answers is not None}
    if not sizes:
        return None
    size = sizes.pop()
    parts = [
        e.answers if e.answers is not None else np.full((len(e.rows), size), np.nan, np.float32) for e in held
    ]
    return np.concatenate(parts)


def _chosen(expert: ExpertStatistics, mask: np.ndarray) -> ExpertStatistics:
    """The same expert with these rows only."""
    answers = None if expert.answers is None else expert.answers[mask]
    counts = None if expert.counts is None else expert.counts[mask]
    return replace(expert, rows=expert.rows[mask], answers=answers, counts=counts)


def _counts(expert: ExpertStatistics) -> np.ndarray:
    """(n,) records that came with the text of each row."""
    return np.ones(len(expert.rows), dtype=np.int64) if expert.counts is None else expert.counts


def _routing(experts: Sequence[ExpertStatistics]) -> list[ExpertStatistics]:
    """The experts as the router reads them: the first block of their rows."""
    stop = FeatureLayout.recognised(experts[0].rows.shape[1]).blocks[0].stop
    return [replace(expert, rows=expert.rows[:, :stop], answers=None) for expert in experts]


def _unknown(rows: int) -> NoveltyScores:
    """What is said where there is no expert: novel, outside, nearest to nobody."""
    everything, blank = np.ones(rows, dtype=bool), np.zeros(rows)
    return NoveltyScores(blank, np.full(rows, np.nan), blank, np.full(rows, -1), everything, everything)


def distinct(rows: np.ndarray) -> np.ndarray:
    """The distinct rows of (n, d), in order of first appearance."""
    return np.asarray(rows[_first(rows)])


def distinct_expert(expert: ExpertStatistics) -> ExpertStatistics:
    """The same expert with each of its rows once, the answer of its first appearance, and the records of all."""
    _, first, which = np.unique(expert.rows, axis=0, return_index=True, return_inverse=True)
    if len(first) == len(expert.rows):
        return expert
    order = np.argsort(first)
    records = np.bincount(which.ravel(), weights=_counts(expert)).astype(np.int64)
    return replace(_chosen(expert, first[order]), counts=records[order])


def _first(rows: np.ndarray) -> np.ndarray:
    """Where distinct rows first appear, ascending."""
    _, first = np.unique(rows, axis=0, return_index=True)
    return np.asarray(np.sort(first))


def _uniform(features: np.ndarray) -> np.ndarray:
    """(n,) numbers in [0, 1) that break ties, drawn from each row's bytes: the same row gets the same p-value for
    ever."""
    digests = [
        hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.ascontiguousarray(features)
    ]
    return np.array([int.from_bytes(digest, "big") / 2.0**64 for digest in digests])
