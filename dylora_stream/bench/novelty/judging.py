"""Scores of rows whose task was left out, against rows of the tasks that were kept.

Each task is left out in turn: experts are the training rows of the others, known are the others' test rows, novel are
the test rows of the one left out. Decisions come from the scorer that the daemon uses, at each promised rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dylora_stream.bench.continual.workbench import Tell
from dylora_stream.bench.novelty.config import ALPHAS
from dylora_stream.bench.novelty.metrics import area, curve, false_positives
from dylora_stream.bench.novelty.reading import ReadRows, concatenated
from dylora_stream.core.novelty import SCORERS, NoveltyConfig, NoveltyScorer
from dylora_stream.core.ports import IndexFactory
from dylora_stream.core.statistics import ExpertStatistics

__all__ = [
    "FUSED", "Ground", "LeftOut", "Promise", "Rating", "ReadTask", "found", "leave_one_out", "out_of_scope",
    "statistics_of",
]  # fmt: skip

FUSED = "fused"  # the scorer that the daemon uses


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """A task's rows with features, each part in its file's order."""

    train: ReadRows
    test: ReadRows


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What every scorer of a run is fitted with."""

    tasks: Mapping[str, ReadTask]
    config: NoveltyConfig
    index_factory: IndexFactory
    seed: int = 0
    tell: Tell = lambda _what, _step, _steps: None


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One scorer on one pair of known and novel rows. curve: (101,), see `metrics.curve`."""

    auroc: float
    fpr95: float
    curve: np.ndarray

    @classmethod
    def of(cls, known: np.ndarray, novel: np.ndarray) -> "Rating":
        """From scores (n,) and (m,)."""
        return cls(auroc=area(known, novel), fpr95=false_positives(known, novel), curve=curve(known, novel))


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What happened when a task was left out: ratings by scorer, share of its rows called novel by promised rate.

    That share is nan where no expert has rows enough to say anything at the rate.
    """

    ratings: Mapping[str, Rating]
    detected: Mapping[float, float]


def statistics_of(tasks: Mapping[str, ReadRows]) -> list[ExpertStatistics]:
    """An expert a task."""
    return [
        ExpertStatistics(expert_id=name, rows=rows.features, answers=rows.answers)
        for name, rows in tasks.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The daemon's scorer at each promised rate, and which experts have a say there."""

    scorers: Mapping[float, NoveltyScorer]
    has_say: Mapping[float, np.ndarray]
    """(E,) bool by rate: experts with distinct rows enough to say something."""

    @classmethod
    def of(cls, tasks: Mapping[str, ReadRows], ground: Ground) -> "Promise":
        """Fitted on an expert a task; one fit serves all rates at which the same experts have a say."""
        counts = np.array([len(rows.distinct()) for rows in tasks.values()])
        experts = statistics_of(tasks)
        fits: dict[bytes, NoveltyScorer] = {}
        scorers, has_say = {}, {}
        for alpha in ALPHAS:
            config = replace(ground.config, alpha=alpha)
            has_say[alpha] = counts >= config.floor_rows
            key = has_say[alpha].tobytes()
            if key not in fits:
                rng = np.random.default_rng(ground.seed)
                fits[key] = NoveltyScorer.fit(experts, None, ground.index_factory, config, rng)
            scorers[alpha] = fits[key]
        return cls(scorers=scorers, has_say=has_say)

    def p_values(self, rows: ReadRows, alpha: float) -> np.ndarray:
        """(n,) at this rate; nan where no expert has a say."""
        return self.scorers[alpha].score(rows.features, answers=rows.answers).p_value


def leave_one_out(ground: Ground) -> dict[str, LeftOut] | None:
    """By left-out task; None for a folder of one task, where nothing is known when it is left out."""
    if len(ground.tasks) < 2:
        return None
    result = {}
    for number, name in enumerate(ground.tasks):
        ground.tell(f"leaving out {name}", number, len(ground.tasks))
        others = {other: task for other, task in ground.tasks.items() if other != name}
        fitted = {other: task.train for other, task in others.items()}
        promise = Promise.of(fitted, ground)
        known = concatenated([task.test for task in others.values()])
        novel = ground.tasks[name].test
        result[name] = LeftOut(
            ratings=_ratings(statistics_of(fitted), (known, novel), ground, promise.scorers[max(ALPHAS)]),
            detected={alpha: found(promise.p_values(novel, alpha), alpha) for alpha in ALPHAS},
        )
    return result


def out_of_scope(ground: Ground, outliers: ReadRows) -> dict[str, Rating]:
    """Test rows of all tasks against outliers, which have no answers, so that nothing has any here."""
    ground.tell("out of scope", 0, 1)
    experts = statistics_of({name: task.train.unanswered() for name, task in ground.tasks.items()})
    known = concatenated([task.test for task in ground.tasks.values()]).unanswered()
    return _ratings(experts, (known, outliers.unanswered()), ground)


def found(p_values: np.ndarray, alpha: float) -> float:
    """Share called novel at this rate; nan where nothing is calibrated."""
    return float("nan") if np.isnan(p_values).all() else float((p_values <= alpha).mean())


def _ratings(
    experts: Sequence[ExpertStatistics],
    rows: tuple[ReadRows, ReadRows],
    ground: Ground,
    daemon: NoveltyScorer | None = None,
) -> dict[str, Rating]:
    """By scorer; rows: (known, novel). `daemon`, where it is fitted already, is the fused one."""
    ratings = {}
    for name, method in SCORERS.items():
        if name == FUSED and daemon is not None:
            known, novel = (daemon.score(part.features, answers=part.answers).score for part in rows)
        else:
            rng = np.random.default_rng(ground.seed)
            scorer = method.fit(experts, ground.index_factory, ground.config, rng)
            known, novel = (scorer.novelty(part.features, part.answers) for part in rows)
        ratings[name] = Rating.of(known, novel)
    return ratings
