"""A stream to learn from: tasks one after another, old ones coming back, and what must never become a skill.

    task A ──────── task B ──────── task C ────────  the rest of all
       outliers, anywhere · one text repeated, all along · a flood of near-copies, in a second of record time

Each task's rows keep their file's order; its last quarter is held back and comes again among later tasks' rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.bench.novelty.alarms import in_turn
from dylora_stream.bench.novelty.reading import ReadRows, concatenated

__all__ = ["FLOOD", "OUTLIER", "REPEAT", "STRAYS", "Script", "outliers_wanted", "script_of"]

OUTLIER, REPEAT, FLOOD = "(outlier)", "(repeat)", "(flood)"  # labels of records of no task
STRAYS = (OUTLIER, REPEAT, FLOOD)
OUTLIER_SHARE = 0.05
HELD_BACK = 0.25  # of a task's rows, to come again
RETURN_CHANCE = 0.25  # of an old row before each new one: a fifth of the traffic
PACE_MS = 1000  # of record time between two records
FLOOD_MS = 1000  # from a flood's first record to its last
FLOOD_AT = 2 / 3  # of the stream


@dataclass(frozen=True, kw_only=True)
class Script:
    """A record a line: its row in `rows`, its task or stray label, and its time."""

    rows: ReadRows
    lines: np.ndarray  # (n,) int64
    labels: tuple[str, ...]
    times_ms: np.ndarray  # (n,) int64, from 0

    def __len__(self) -> int:
        return len(self.labels)


def outliers_wanted(records: int) -> int:
    """How many outliers go with so many records of tasks."""
    return max(1, round(OUTLIER_SHARE * records))


def script_of(
    tasks: Mapping[str, ReadRows], strays: Mapping[str, ReadRows], rng: np.random.Generator
) -> Script:
    """The stream of these tasks and strays; `strays[REPEAT]` holds its text as often as it comes."""
    parts = {**tasks, **strays}
    starts = dict(zip(parts, np.cumsum([0, *(len(rows) for rows in parts.values())]), strict=False))
    names = [str(name) for name in rng.permutation(list(tasks))]
    course = [
        (float(place), starts[name] + row, name)
        for place, (name, row) in enumerate(_arrivals(names, tasks, rng))
    ]
    places = {
        OUTLIER: np.sort(rng.uniform(0, len(course), len(strays[OUTLIER]))),
        REPEAT: np.linspace(0, len(course), len(strays[REPEAT])) + 0.1,
        FLOOD: np.full(len(strays[FLOOD]), FLOOD_AT * len(course)),
    }
    for label, own in places.items():
        course += [(float(place), starts[label] + row, label) for row, place in enumerate(own)]
    course.sort(key=lambda record: record[0])
    labels = tuple(label for _, _, label in course)
    return Script(
        rows=concatenated(list(parts.values())),
        lines=np.array([line for _, line, _ in course], dtype=np.int64),
        labels=labels,
        times_ms=_times(labels),
    )


def _arrivals(
    names: Sequence[str], tasks: Mapping[str, ReadRows], rng: np.random.Generator
) -> list[tuple[str, int]]:
    """(task, row) in the order they come."""
    cuts = {name: max(1, round((1 - HELD_BACK) * len(tasks[name]))) for name in names}
    back = {name: list(range(cuts[name], len(tasks[name]))) for name in names}
    course: list[tuple[str, int]] = []
    for number, name in enumerate(names):
        for row in range(cuts[name]):
            old = [other for other in names[:number] if back[other]]
            if old and rng.random() < RETURN_CHANCE:
                other = old[int(rng.integers(len(old)))]
                course.append((other, back[other].pop(0)))
            course.append((name, row))
    rest = [(name, row) for name in names for row in back[name]]
    return course + [rest[line] for line in in_turn([len(back[name]) for name in names]).tolist()]


def _times(labels: Sequence[str]) -> np.ndarray:
    """(n,) int64."""
    flood = max(labels.count(FLOOD), 1)
    steps = [FLOOD_MS // flood if label == FLOOD else PACE_MS for label in labels]
    return np.cumsum([0, *steps[1:]]).astype(np.int64)
