"""A whole run: every course of every seed, order and method, and the report.

Seeds are the outermost loop and methods the innermost one, so that what methods share is there early and a killed run
leaves whole comparisons.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from dylora_stream import bootstrap
from dylora_stream.bench.continual import report
from dylora_stream.bench.continual.config import ContinualConfig
from dylora_stream.bench.continual.courses import Course, course_of
from dylora_stream.bench.continual.evaluate import Cell, Examiner
from dylora_stream.bench.continual.parts import methods_named, workbench
from dylora_stream.bench.continual.statistics import Outcome, Passage
from dylora_stream.bench.continual.watch import Silence, watching
from dylora_stream.bench.continual.workbench import Workbench
from dylora_stream.bench.tasks import load_tasks
from dylora_stream.core.errors import TrainingFailed
from dylora_stream.settings import Settings

__all__ = ["continual", "passages_of"]


def continual(config: ContinualConfig, settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, print, write; the report."""
    config = replace(config, methods=methods_named(config.methods))
    if config.report is not None:
        report.check_plots()
    load_tasks(config.data, config.orders[0])  # what is wrong there is said before the backbone is loaded
    backbone = bootstrap.load_backbone(settings)
    work = config.work or settings.store.folder / "bench" / "continual"
    try:
        with watching(console) as watch, workbench(config, settings, backbone, work, watch.tell) as bench:
            outcome = passages_of(bench, config, watch)
    except KeyboardInterrupt:
        console.print(f"Stopped. What is finished lies in {work}; the same command goes on from there.")
        raise
    document = report.document_of(outcome, settings.router.method, _facts(config, bench))
    report.show(document, console)
    if config.report is not None:
        report.write(document, config.report)
        for path in (config.report, *report.plot(document, config.report)):
            console.print(f"Report: {path}")
    return document


def passages_of(bench: Workbench, config: ContinualConfig, watch: Silence) -> Outcome:
    """All courses, and the oracle's where experts that trained alone are there."""
    examiner = Examiner(bench)
    watch.begin(len(config.seeds) * len(config.orders) * len(config.methods) * len(config.orders[0]))
    outcome = Outcome()
    for seed in config.seeds:
        has_alone = False
        for order in config.orders:
            for method in config.methods:
                course = course_of(bench, examiner, method, order, seed)
                try:
                    outcome.passages.append(_passage(course, config, watch, (method, order, seed)))
                except TrainingFailed as error:
                    outcome.failures[method] = str(error)
                else:
                    has_alone |= course.is_alone
        if has_alone:
            way = ("oracle", config.orders[0], seed)
            oracle = course_of(bench, examiner, *way)
            outcome.oracles[seed] = _passage(oracle, config, Silence(), way)
    return outcome


def _passage(
    course: Course, config: ContinualConfig, watch: Silence, way: tuple[str, tuple[str, ...], int]
) -> Passage:
    """The course gone through, the diagonal and the last row asked, or all cells."""
    method, order, seed = way
    cells: dict[tuple[int, int], Cell] = {}
    for t, name in enumerate(order):
        watch.stage(f"seed {seed}, {method}: {name}, {t + 1} of {len(order)}")
        course.learn(t)
        is_whole_row = t == len(order) - 1 or (config.is_whole_matrix and course.has_diagonal)
        asked = range(len(order)) if is_whole_row else [t] if course.has_diagonal else []
        cells |= {(t, j): course.answer(t, order[j]) for j in asked}
        watch.finish()
    parameters, train_s = course.cost()
    return Passage(method=method, order=order, seed=seed, cells=cells, parameters=parameters, train_s=train_s)


def _facts(config: ContinualConfig, bench: Workbench) -> dict[str, Any]:
    """What was measured, how."""
    passed_over = {name: {"test": rows.passed_over} for name, rows in bench.exams.items()}
    for (name, seed), rows in bench.lessons.items():
        passed_over[name][f"train, seed {seed}"] = rows.passed_over
    return {
        "tasks": list(config.orders[0]),
        "orders": [list(order) for order in config.orders],
        "seeds": list(config.seeds),
        "train_rows": {name: len(bench.lessons[name, config.seeds[0]].kept) for name in bench.exams},
        "test_rows": {name: len(rows.kept) for name, rows in bench.exams.items()},
        "max_tokens": config.max_tokens,
        "passed_over": passed_over,
        "memory": config.memory,
        "recipe": asdict(bench.recipe),
        "stem_layers": bench.backbone.stem_layers,
        "targets": config.targets,
        "backbone": {
            "name": bench.backbone.name,
            "digest": bench.backbone.digest,
            "parameters": sum(tensor.numel() for tensor in bench.backbone.model.parameters()),
            "dtype": str(bench.backbone.dtype),
        },
        "notes": _notes(config, passed_over),
    }


def _notes(config: ContinualConfig, passed_over: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What a reader of the tables has to know."""
    notes = [
        "A row counts when greedy decoding would give exactly its answer, however long that is.",
        "Intervals: paired bootstrap over test rows; seeds and orders are averaged first.",
        "Oracle route: each row by its own task's expert, which trained alone.",
    ]
    if "hybrid" in config.methods:
        notes.append("hybrid: all experts count as mature, and the network is trained as the daemon does.")
    long = {name: rows for name, rows in passed_over.items() if any(rows.values())}
    if long:
        counts = "; ".join(
            f"{name} {', '.join(f'{n} ({part})' for part, n in rows.items())}" for name, rows in long.items()
        )
        notes.append(f"Rows above {config.max_tokens} tokens passed over: {counts}.")
    return notes
