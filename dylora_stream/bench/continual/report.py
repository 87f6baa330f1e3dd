"""What a run says: one JSON document, tables on the terminal, plots beside the JSON file.

Percent values are in 0..100. A matrix is by place in the order: row t after the t-th task, column j the j-th task.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dylora_stream.bench.continual.statistics import (
    Outcome,
    Passage,
    bootstrap,
    mean_matrix,
    mean_of,
    rows_of,
)
from dylora_stream.core.errors import SettingsError, TrainingFailed

__all__ = ["check_plots", "document_of", "plot", "show", "write"]

Document = dict[str, Any]


def document_of(outcome: Outcome, default: str, facts: Mapping[str, Any]) -> Document:
    """The report; `facts` are taken over as they are. Differences are to `default`, or to the first method without it.

    A method whose training failed is left out whole and named in the notes. Raises TrainingFailed where none is left.
    """
    oracles, methods = outcome.oracles, dict[str, list[Passage]]()
    for passage in outcome.passages:
        if passage.method not in outcome.failures:
            methods.setdefault(passage.method, []).append(passage)
    if not methods:
        raise TrainingFailed(f"no method was trained to the end: {outcome.failures}")
    default = default if default in methods else next(iter(methods))
    failed = [f"{name} is left out: {why}." for name, why in outcome.failures.items()]
    facts = {**facts, "notes": [*facts["notes"], *failed]}
    rng = np.random.default_rng(0)
    intervals = bootstrap({name: rows_of(own) for name, own in methods.items()}, default, rng)
    entries = {}
    for name, own in methods.items():
        interval = intervals[name]
        entries[name] = {
            "average": mean_of([passage.average for passage in own]),
            "low": interval.low,
            "high": interval.high,
            "bwt": mean_of([passage.bwt for passage in own]),
            "routing": mean_of([passage.routing for passage in own]),
            "oracle_route": mean_of([oracles[p.seed].average for p in own if p.seed in oracles]),
            "matrix": mean_matrix([passage.matrix for passage in own]),
            "train_s": mean_of([passage.train_s for passage in own]),
            "parameters": own[0].parameters,
            "difference": {
                "to": default,
                "mean": interval.difference,
                "low": interval.difference_low,
                "high": interval.difference_high,
            },
            "by_task": {task: float(rows.mean()) * 100 for task, rows in rows_of(own).items()},
            "runs": [_run(passage, oracles.get(passage.seed)) for passage in own],
        }
    return _rounded({"methods": entries, "default": default, **facts})


def _run(passage: Passage, oracle: Passage | None) -> Document:
    return {
        "order": list(passage.order),
        "seed": passage.seed,
        "average": passage.average,
        "bwt": passage.bwt,
        "routing": passage.routing,
        "oracle_route": oracle.average if oracle else None,
        "matrix": passage.matrix,
        "train_s": passage.train_s,
        "parameters": passage.parameters,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(inner) for inner in value]
    return value


def show(document: Document, console: Console) -> None:
    """The tables."""
    ranked = dict(sorted(document["methods"].items(), key=lambda item: -item[1]["average"]))
    runs = len(next(iter(ranked.values()))["runs"])
    table = _table(
        f"{len(document['tasks'])} tasks, mean of {runs} runs, best first",
        ("method", "average", "95 %", "BWT", "routing", "oracle route"),
    )
    beside = _table(
        f"Beside {document['default']}, points; and what it costs",
        ("method", "average", "95 %", "parameters", "training, s"),
    )
    for name, entry in ranked.items():
        table.add_row(
            name,
            f"{entry['average']:.1f}",
            f"{entry['low']:.1f}…{entry['high']:.1f}",
            *(_cell(entry[key], signed=key == "bwt") for key in ("bwt", "routing", "oracle_route")),
        )
        gap = entry["difference"]
        points = (f"{gap['mean']:+.1f}", f"{gap['low']:+.1f}…{gap['high']:+.1f}")
        cost = (f"{entry['parameters']:,}", f"{entry['train_s']:.0f}")
        beside.add_row(name, *(points if name != document["default"] else ("", "")), *cost)
    console.print(table)
    console.print(beside)
    console.print(_by_task(ranked, document["tasks"]))
    for note in document["notes"]:
        console.print(note, style="dim", markup=False)


def _by_task(methods: Mapping[str, Document], tasks: Sequence[str]) -> Table:
    """Accuracies, the longer list downwards."""
    title = "Accuracy after the last task, %"
    if len(tasks) < len(methods):
        table = _table(title, ("method", *tasks))
        for name, entry in methods.items():
            table.add_row(name, *(f"{entry['by_task'][task]:.1f}" for task in tasks))
        return table
    table = _table(title, ("task", *methods))
    for task in tasks:
        table.add_row(task, *(f"{entry['by_task'][task]:.1f}" for entry in methods.values()))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    """The first column is a name, the others are numbers."""
    table = Table(title=title)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _cell(value: float | None, *, signed: bool) -> str:
    if value is None:
        return ""
    return f"{value:+.1f}" if signed else f"{value:.1f}"


def write(document: Document, path: Path) -> None:
    """The document as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def check_plots() -> None:
    """Whether plots can be drawn: asked before hours of work. Raises SettingsError."""
    try:
        import matplotlib as mpl  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise SettingsError(
            "plots need matplotlib: install dylora-stream[bench], or leave --report away to print tables alone"
        ) from error


def plot(document: Document, beside: Path) -> list[Path]:
    """Two PNGs beside a file: averages with their intervals, and forgetting. The files' paths."""
    ranked = sorted(document["methods"].items(), key=lambda item: item[1]["average"])
    averages = [(name, entry["average"]) for name, entry in ranked]
    reach = [
        [max(0.0, entry["average"] - entry["low"]) for _, entry in ranked],
        [max(0.0, entry["high"] - entry["average"]) for _, entry in ranked],
    ]
    forgetting = [(name, -entry["bwt"]) for name, entry in ranked if entry["bwt"] is not None]
    paths = [beside.with_name(f"{beside.stem}-{what}.png") for what in ("average", "forgetting")]
    _bars(averages, reach, "average accuracy after the last task, %, with 95 % intervals", paths[0])
    if not forgetting:
        return paths[:1]
    _bars(forgetting, None, "forgetting (-BWT), points", paths[1])
    return paths


def _bars(bars: Sequence[tuple[str, float]], reach: list[list[float]] | None, label: str, path: Path) -> None:
    from matplotlib.figure import Figure  # draws with Agg: no window, no state

    figure = Figure(figsize=(8, 1 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in bars], [value for _, value in bars], xerr=reach, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    figure.savefig(path, dpi=120)
