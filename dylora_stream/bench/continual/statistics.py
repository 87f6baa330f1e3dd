"""The numbers of a course, and how sure they are.

    average   mean over tasks of the accuracy after the last task (the last row of the matrix), in percent
    BWT       mean over all tasks but the last of (accuracy after the last task - accuracy right after it was learned),
              in points; below 0 is forgetting
    routing   share of test rows, after the last task, whose largest-weight expert is their own task's

Intervals are a paired bootstrap's: rows are drawn again within each task, the same rows for every method, 10,000 times.
They say how much another test set would change; seeds and orders are averaged first and not drawn again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dylora_stream.bench.continual.evaluate import Cell

__all__ = ["Interval", "Outcome", "Passage", "backward", "bootstrap", "mean_matrix", "mean_of", "rows_of"]

RESAMPLES = 10_000
LEVELS = (2.5, 97.5)  # percentiles of a 95 % interval

Matrix = list[list[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A finished course. cells: (tasks learned - 1, the task's place in the order) → cell, as far as it was asked."""

    method: str
    order: tuple[str, ...]
    seed: int
    cells: Mapping[tuple[int, int], Cell]
    parameters: int
    train_s: float

    @property
    def last(self) -> list[Cell]:
        """The last row of the matrix."""
        return [self.cells[len(self.order) - 1, j] for j in range(len(self.order))]

    @property
    def matrix(self) -> Matrix:
        """(T, T) accuracies in percent, None where it was not asked."""
        places = range(len(self.order))
        return [
            [_percent(self.cells[t, j]) if (t, j) in self.cells else None for j in places] for t in places
        ]

    @property
    def average(self) -> float:
        """See the module."""
        return float(np.mean([cell.is_exact.mean() for cell in self.last])) * 100

    @property
    def bwt(self) -> float | None:
        """See the module; None with one task, or without a diagonal."""
        return backward(self.matrix)

    @property
    def routing(self) -> float | None:
        """See the module, over all rows; None where no row has a leading expert."""
        if any(cell.leaders is None for cell in self.last):
            return None
        leaders = [cell.leaders for cell in self.last if cell.leaders is not None]
        if all((led < 0).all() for led in leaders):
            return None
        return float(np.concatenate([led == j for j, led in enumerate(leaders)]).mean()) * 100


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run's courses, the oracle's by seed where it was computed, and why a method's training failed."""

    passages: list[Passage] = field(default_factory=list)
    oracles: dict[int, Passage] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Of a method's average, and of its difference to the default method's, which is `difference`."""

    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


def backward(matrix: Matrix) -> float | None:
    """BWT of a matrix."""
    moves = [(now, matrix[t][t]) for t, now in enumerate(matrix[-1][:-1])]
    kept = [now - then for now, then in moves if now is not None and then is not None]
    return float(np.mean(kept)) if kept else None


def rows_of(passages: Sequence[Passage]) -> dict[str, np.ndarray]:
    """Task → (n,) each test row's exactness after the last task, averaged over a method's passages."""
    by_task: dict[str, list[np.ndarray]] = {}
    for passage in passages:
        for name, cell in zip(passage.order, passage.last, strict=True):
            by_task.setdefault(name, []).append(cell.is_exact.astype(np.float64))
    return {name: np.mean(rows, axis=0) for name, rows in by_task.items()}


def bootstrap(
    methods: Mapping[str, Mapping[str, np.ndarray]], default: str, rng: np.random.Generator
) -> dict[str, Interval]:
    """Intervals in percent of methods' rows by task (see `rows_of`), all of the same tasks and rows."""
    names = list(methods)
    drawn = np.zeros((RESAMPLES, len(names)))
    tasks = sorted(methods[default])
    for task in tasks:
        rows = np.stack([methods[name][task] for name in names], axis=1)  # (n, methods)
        count = len(rows)
        drawn += (
            rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
            @ rows
            * (100 / count / len(tasks))
        )
    means = {name: float(np.mean([methods[name][task].mean() for task in tasks])) * 100 for name in names}
    low, high = np.percentile(drawn, LEVELS, axis=0)
    base = drawn[:, [names.index(default)]]
    less, more = np.percentile(drawn - base, LEVELS, axis=0)
    return {
        name: Interval(
            low=float(low[n]),
            high=float(high[n]),
            difference=means[name] - means[default],
            difference_low=float(less[n]),
            difference_high=float(more[n]),
        )
        for n, name in enumerate(names)
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of what is there, None where nothing is."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Cell by cell, by place in the order."""
    size = range(len(matrices[0]))
    return [[mean_of([matrix[t][j] for matrix in matrices]) for j in size] for t in size]


def _percent(cell: Cell) -> float:
    return float(cell.is_exact.mean()) * 100
