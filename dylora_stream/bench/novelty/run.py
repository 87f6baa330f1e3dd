"""A whole run: rows chosen and read, the parts that are asked for, the report."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dylora_stream import bootstrap
from dylora_stream.bench.continual.report import check_plots, write
from dylora_stream.bench.continual.watch import watching
from dylora_stream.bench.continual.workbench import Tell
from dylora_stream.bench.novelty import plots, report
from dylora_stream.bench.novelty.alarms import exchangeable, in_time
from dylora_stream.bench.novelty.config import PARTS, NoveltyBenchConfig
from dylora_stream.bench.novelty.cost import measure_cost
from dylora_stream.bench.novelty.folder import choose_in_order, load_folder, load_outliers, made_outliers
from dylora_stream.bench.novelty.judging import Ground, ReadTask, leave_one_out, out_of_scope
from dylora_stream.bench.novelty.learner import Played, StreamLearner, play, trainer
from dylora_stream.bench.novelty.reading import FeatureReader, concatenated
from dylora_stream.bench.novelty.report import Findings
from dylora_stream.bench.novelty.scale import Sizes, measure_scale
from dylora_stream.bench.novelty.script import FLOOD, OUTLIER, REPEAT, Script, outliers_wanted, script_of
from dylora_stream.bench.novelty.tables import show
from dylora_stream.bench.novelty.tally import tally
from dylora_stream.bench.novelty.trained import score_all
from dylora_stream.bench.store import Store, digest, ground_of
from dylora_stream.bench.tasks import Task
from dylora_stream.bootstrap.parts import faiss_index
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText, answer_size, feature_space, row_size
from dylora_stream.settings import Settings

__all__ = ["novelty"]

COPIES = 200  # of the repeated text, and near-copies in the flood


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the parts share."""

    config: NoveltyBenchConfig
    settings: Settings
    backbone: Backbone
    reader: FeatureReader
    ground: Ground
    outliers: tuple[str, ...]
    work: Path
    tell: Tell


def novelty(config: NoveltyBenchConfig, settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, print, write; the report."""
    if config.report is not None:
        check_plots()
    tasks, outliers = (
        load_folder(config),
        load_outliers(config),
    )  # what is wrong there is said before the model loads
    backbone = bootstrap.load_backbone(settings)
    work = config.work or settings.store.folder / "bench" / "novelty"
    try:
        with watching(console) as watch:
            watch.begin(1 + len(config.only))
            watch.stage("reading")
            reader = FeatureReader(backbone, Store(work), watch.tell)
            chosen, passed_over = _choose(config, tasks, backbone)
            ground = Ground(
                tasks={name: _read(reader, name, parts, config) for name, parts in chosen.items()},
                config=settings.novelty,
                index_factory=faiss_index(),
                seed=config.seed,
                tell=watch.tell,
            )
            run = _Run(
                config=config,
                settings=settings,
                backbone=backbone,
                reader=reader,
                ground=ground,
                outliers=outliers,
                work=work,
                tell=watch.tell,
            )
            watch.finish()
            found = Findings(tasks=list(tasks), twins=config.twins, facts=_facts(run, passed_over))
            found.notes += _notes(run)
            played = None
            for part in (part for part in PARTS if part in config.only):
                watch.stage(part)
                played = _measure(part, run, found) or played
                watch.finish()
    except KeyboardInterrupt:
        console.print(f"Stopped. What is read lies in {work}; the same command goes on from there.")
        raise
    return _reported(report.document_of(found), config, console, played)


def _measure(part: str, run: _Run, found: Findings) -> tuple[Script, Played] | None:
    """One part into the findings; the stream's records, where it is that part."""
    if part == "leave-one-out":
        found.left_out = leave_one_out(run.ground)
        if run.outliers:
            texts = [LabelledText(input=text, output="") for text in run.outliers]
            found.out_of_scope = out_of_scope(
                run.ground, run.reader.read(texts, "outliers", has_answers=False)
            )
    elif part == "alarms":
        found.alarms = exchangeable(run.ground, run.config.draws)
        found.in_time = in_time(run.ground)
    elif part == "cost":
        found.cost = measure_cost(run.ground, run.backbone)
    elif part == "scale":
        sizes = Sizes(
            rows=run.config.scale_rows,
            features=row_size(run.backbone),
            answers=answer_size(run.backbone),
        )
        with tempfile.TemporaryDirectory() as folder:
            found.scale = measure_scale(run.settings, sizes, Path(folder), run.tell)
    elif part == "experts":
        found.trained = score_all(run.ground, run.backbone, run.settings.seeding, Store(run.work))
    else:
        script = _script(run)
        with _folder(run) as folder:
            is_training, kept = run.config.is_training, folder / "trained"
            train = trainer(run.settings, run.backbone, run.tell, kept) if is_training else None
            learner = StreamLearner(run.settings, run.backbone, script, folder, train)
            played = play(learner, script, run.tell)
        found.tally = tally(script, played, run.config.skills)
        return script, played
    return None


def _choose(
    config: NoveltyBenchConfig, tasks: Mapping[str, Task], backbone: Backbone
) -> tuple[dict[str, tuple[tuple[LabelledText, ...], tuple[LabelledText, ...]]], dict[str, int]]:
    """Rows used of each task's two files, and how many were too long."""
    chosen, passed_over = {}, {}
    for name, task in tasks.items():
        rng = np.random.default_rng([config.seed, *name.encode()])
        train = choose_in_order(task.train, config.train_rows, config.max_tokens, backbone, rng)
        test = choose_in_order(task.test, config.test_rows, config.max_tokens, backbone, rng)
        chosen[name] = (train.rows, test.rows)
        passed_over[name] = train.passed_over + test.passed_over
    return chosen, passed_over


def _read(
    reader: FeatureReader,
    name: str,
    parts: tuple[tuple[LabelledText, ...], tuple[LabelledText, ...]],
    config: NoveltyBenchConfig,
) -> ReadTask:
    train, test = (
        reader.read(rows, f"{name}, {what}", has_answers=config.has_labels)
        for rows, what in zip(parts, ("train", "test"), strict=True)
    )
    return ReadTask(train=train, test=test)


def _script(run: _Run) -> Script:
    """All rows, with the folder's outliers or made ones, a text repeated and a flood."""
    tasks = {name: concatenated([task.train, task.test]) for name, task in run.ground.tasks.items()}
    texts = {name: rows.texts for name, rows in tasks.items()}
    rng = np.random.default_rng(run.config.seed)
    wanted = outliers_wanted(sum(len(rows) for rows in tasks.values()))
    made = made_outliers(texts, wanted + 2, run.backbone, rng)
    repeated, flooding = made.pop(0), made.pop(0)
    strays = {
        OUTLIER: _told_of(run.outliers[:wanted], made) if run.outliers else made,
        REPEAT: [repeated] * COPIES,
        FLOOD: [
            LabelledText(input=f"{flooding.input} {number}", output=flooding.output)
            for number in range(COPIES)
        ],
    }
    read = {
        label: run.reader.read(rows, label, has_answers=run.config.has_labels)
        for label, rows in strays.items()
    }
    return script_of(tasks, read, rng)


def _told_of(texts: tuple[str, ...], made: list[LabelledText]) -> list[LabelledText]:
    """Outliers of the folder with the answers of the made ones."""
    return [LabelledText(input=text, output=row.output) for text, row in zip(texts, made, strict=False)]


@contextmanager
def _folder(run: _Run) -> Iterator[Path]:
    """Where the stream's jobs and experts lie: kept where experts are trained, so that no training is done twice.

    A job's own digest holds what changes while a daemon lives; the folder's name holds the rest.
    """
    if run.config.is_training:
        settings, backbone = run.settings, run.backbone
        ground = digest(
            **ground_of(backbone),
            router=asdict(settings.router),
            novelty=asdict(settings.novelty),
        )
        yield run.work / "stream" / f"{feature_space(backbone)}-{ground}"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _reported(
    document: dict[str, Any],
    config: NoveltyBenchConfig,
    console: Console,
    played: tuple[Script, Played] | None,
) -> dict[str, Any]:
    """Shown, and written where asked for."""
    show(document, console)
    if config.report is not None:
        write(document, config.report)
        paths = [config.report, *plots.plot(document, config.report)]
        if played is not None:
            paths.append(plots.plot_clusters(*played, config.report))
        for path in paths:
            console.print(f"Report: {path}")
    return document


def _facts(run: _Run, passed_over: Mapping[str, int]) -> dict[str, Any]:
    """What was measured, how."""
    tasks = run.ground.tasks
    return {
        "tasks": list(tasks),
        "labels": run.config.has_labels,
        "strip_markers": run.config.is_stripped,
        "trained": run.config.is_training,
        "train_rows": {name: len(task.train) for name, task in tasks.items()},
        "test_rows": {name: len(task.test) for name, task in tasks.items()},
        "distinct_train_rows": {name: len(task.train.distinct()) for name, task in tasks.items()},
        "passed_over": dict(passed_over),
        "max_tokens": run.config.max_tokens,
        "draws": run.config.draws,
        "seed": run.config.seed,
        "backbone": {"name": run.backbone.name, "feature_space": feature_space(run.backbone)},
    }


def _notes(run: _Run) -> list[str]:
    """What a reader of the tables has to know."""
    notes = []
    if len(run.ground.tasks) < 2:
        notes.append("One task: nothing can be left out, so AUROC and detection are not there.")
    if run.config.twins:
        notes.append(
            f"{', '.join(run.config.twins)} count as one skill: each is left out too, but reported apart."
        )
    if run.config.families:
        joined = ", ".join(" + ".join(family) for family in run.config.families)
        notes.append(f"One skill each in the stream: {joined}.")
    if "stream" in run.config.only:
        source = "the folder's" if run.outliers else "made of scattered words and tokens"
        notes.append(
            f"Stream: outliers are {source}; {COPIES} repeats of one text and a flood of {COPIES} near-copies in one "
            "second are in it. "
            + (
                "Experts are trained and checked on held-out rows."
                if run.config.is_training
                else "Experts are statistics: of the checks before training, only telling apart is made."
            )
        )
    return notes
