"""How often known traffic is called novel: where rows are exchangeable, as promised; in the order of time, as it is.

Exchangeable: a task's rows, repeats among them, are pooled and split afresh in each draw, `FITTED` of them to fit and
calibrate on, the others to judge. The promise is made for rows of an expert that has rows enough to say something at
that rate; rows of an expert under its floor are counted apart.
In time: experts are fitted on the training files; the test files' rows come in their order, a row of each in turn.
Here too, only rows of experts that have a say are counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.bench.novelty.config import ALPHAS
from dylora_stream.bench.novelty.judging import Ground, Promise, found
from dylora_stream.bench.novelty.metrics import on_grid
from dylora_stream.bench.novelty.reading import ReadRows, concatenated
from dylora_stream.core.conformal import AdaptiveAlpha, AdaptiveConfig

__all__ = ["NOMINAL", "Alarms", "InTime", "exchangeable", "in_time", "in_turn"]

FITTED = 0.8  # of a task's rows
NOMINAL = np.linspace(0.0, 0.2, 41)  # promised rates of the calibration plot


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """Rates of known rows called novel, by promised rate."""

    rates: Mapping[float, float]
    """Mean over draws, of rows whose expert has a say; nan where none has."""
    spread: Mapping[float, float]
    """Standard deviation over draws."""
    rows: Mapping[float, int]
    """Rows that are judged in a draw and whose expert has a say."""
    unsaid: Mapping[float, tuple[int, float]]
    """Rows a draw whose expert has none, and how often they are called novel (nan without such rows)."""
    actual: np.ndarray
    """(41,) actual rates at `NOMINAL` ones, at the widest promise."""
    by_task: Mapping[str, Mapping[float, float]]


@dataclass(frozen=True, kw_only=True)
class InTime:
    """Rates in the order of time, by promised rate."""

    plain: Mapping[float, float]
    adaptive: Mapping[float, float]
    rows: Mapping[float, int]


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """One draw at one promised rate, a line a judged row: its task, whether its expert has a say, what was said."""

    tasks: np.ndarray  # (n,) names
    has_say: np.ndarray  # (n,) bool
    is_novel: np.ndarray  # (n,) bool
    p_value: np.ndarray  # (n,) float64


def exchangeable(ground: Ground, draws: int) -> Alarms:
    """Over so many draws."""
    pools = {name: concatenated([task.train, task.test]) for name, task in ground.tasks.items()}
    rng = np.random.default_rng(ground.seed)
    drawn: dict[float, list[_Draw]] = {alpha: [] for alpha in ALPHAS}
    for number in range(draws):
        ground.tell("drawing splits anew", number, draws)
        splits = {name: _split(pool, rng) for name, pool in pools.items()}
        promise = Promise.of({name: fit for name, (fit, _) in splits.items()}, ground)
        for alpha in ALPHAS:
            drawn[alpha].append(_judge(splits, promise, alpha))
    return Alarms(
        rates={alpha: _mean([_rate(draw, draw.has_say) for draw in own]) for alpha, own in drawn.items()},
        spread={alpha: float(np.std([_rate(d, d.has_say) for d in own])) for alpha, own in drawn.items()},
        rows={alpha: int(own[0].has_say.sum()) for alpha, own in drawn.items()},
        unsaid={
            alpha: (int((~own[0].has_say).sum()), _mean([_rate(draw, ~draw.has_say) for draw in own]))
            for alpha, own in drawn.items()
        },
        actual=np.mean([on_grid(d.p_value[d.has_say], NOMINAL) for d in drawn[max(ALPHAS)]], axis=0),
        by_task={
            name: {a: _mean([_rate(d, d.tasks == name) for d in own]) for a, own in drawn.items()}
            for name in pools
        },
    )


def in_time(ground: Ground) -> InTime:
    """Test rows in order, plain and with the rate corrected after each row, which is known to be known."""
    ground.tell("in the order of time", 0, 1)
    promise = Promise.of({name: task.train for name, task in ground.tasks.items()}, ground)
    plain, adaptive, counts = {}, {}, {}
    for alpha in ALPHAS:
        pairs = zip(ground.tasks.values(), promise.has_say[alpha], strict=True)
        tests = [task.test for task, has_say in pairs if has_say]
        plain[alpha] = adaptive[alpha] = float("nan")
        counts[alpha] = sum(len(test) for test in tests)
        if tests:
            rows = concatenated(tests).take(in_turn([len(test) for test in tests]))
            p_values = promise.p_values(rows, alpha)
            plain[alpha] = found(p_values, alpha)
            adaptive[alpha] = float(_adapted(p_values, alpha).mean())
    return InTime(plain=plain, adaptive=adaptive, rows=counts)


def in_turn(counts: Sequence[int]) -> np.ndarray:
    """Line numbers of parts that stand one after another, taken evenly: each part's first rows come first."""
    shares = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.argsort(shares, kind="stable")


def _adapted(p_values: np.ndarray, target: float) -> np.ndarray:
    """(n,) bool: what is called novel at the rate that the rows before it led to."""
    control = AdaptiveAlpha(AdaptiveConfig(target=target))
    called = np.zeros(len(p_values), dtype=bool)
    for row, p_value in enumerate(p_values):
        called[row] = control.calls(float(p_value))
        control.update(bool(called[row]))
    return called


def _split(pool: ReadRows, rng: np.random.Generator) -> tuple[ReadRows, ReadRows]:
    """Rows to fit on, at least one, and rows to judge."""
    order = rng.permutation(len(pool))
    cut = max(1, round(FITTED * len(pool)))
    return pool.take(order[:cut]), pool.take(order[cut:])


def _judge(splits: Mapping[str, tuple[ReadRows, ReadRows]], promise: Promise, alpha: float) -> _Draw:
    counts = [len(rows) for _, rows in splits.values()]
    p_values = promise.p_values(concatenated([rows for _, rows in splits.values()]), alpha)
    return _Draw(
        tasks=np.repeat(np.array(list(splits)), counts),
        has_say=np.repeat(promise.has_say[alpha], counts),
        is_novel=~(p_values > alpha),
        p_value=p_values,
    )


def _rate(draw: _Draw, mask: np.ndarray) -> float:
    return float(draw.is_novel[mask].mean()) if mask.any() else float("nan")


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
