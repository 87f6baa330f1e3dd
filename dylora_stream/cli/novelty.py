"""The command `bench novelty`."""

from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from dylora_stream.cli.options import ConfigOption, SetOption, parts_of, report_target, settings_from
from dylora_stream.core.errors import SettingsError

__all__ = ["novelty"]

LIBRARIES = ("matplotlib", "scipy", "sklearn")


class Labels(StrEnum):
    """Whether answers are seen."""

    YES = "yes"
    NO = "no"


DataOption = Annotated[
    Path,
    typer.Option(
        help="A folder of NAME.train.jsonl and NAME.test.jsonl, a row a line, input and output; outliers.jsonl, input "
        "alone, if there are any."
    ),
]
LabelsOption = Annotated[Labels, typer.Option(help="Whether scorers and clusters see the rows' answers.")]
StripOption = Annotated[
    bool, typer.Option("--strip-markers", help="Take markers (Title:, sentence 1:) off the inputs' lines.")
]
RowsOption = Annotated[
    int | None, typer.Option(min=4, help="Rows of each file; short for --train-rows and --test-rows.")
]
TrainRowsOption = Annotated[int, typer.Option(min=4, help="Rows of each task to fit experts on.")]
TestRowsOption = Annotated[int, typer.Option(min=4, help="Rows of each task to judge.")]
MaxTokensOption = Annotated[
    int, typer.Option(min=8, help="Of a row, answer included; longer rows are passed over and counted.")
]
DrawsOption = Annotated[int, typer.Option(min=1, help="Fresh splits over which false alarms are averaged.")]
ScaleOption = Annotated[int, typer.Option(min=1, help="Rows that learn is fed, to see what it holds.")]
SeedOption = Annotated[int, typer.Option(help="Of rows, splits and the stream.")]
TrainOption = Annotated[
    bool, typer.Option("--train", help="Train the stream's experts and check them as the daemon does.")
]
TwinsOption = Annotated[
    str | None, typer.Option(metavar="A,B,…", help="Tasks that are one skill: reported apart.")
]
FamiliesOption = Annotated[
    str | None,
    typer.Option(
        metavar="A+B,C+D,…",
        help="Tasks that one expert serves as well as two, as --only experts finds: one skill each in the stream.",
    ),
]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        metavar="PART,…",
        help="Some of leave-one-out, alarms, stream, cost, scale, experts; else all but the last, which trains an "
        "expert a task and says which tasks are one family.",
    ),
]
WorkOption = Annotated[
    Path | None, typer.Option(help="Where what is read is kept; else bench/novelty in store.folder.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        callback=report_target, help="Also write the numbers to this file, as JSON, and plots beside it."
    ),
]


def novelty(
    data: DataOption,
    labels: LabelsOption = Labels.YES,
    strip_markers: StripOption = False,
    rows: RowsOption = None,
    train_rows: TrainRowsOption = 120,
    test_rows: TestRowsOption = 100,
    max_tokens: MaxTokensOption = 256,
    draws: DrawsOption = 20,
    scale_rows: ScaleOption = 20_000,
    seed: SeedOption = 0,
    train: TrainOption = False,
    twins: TwinsOption = None,
    families: FamiliesOption = None,
    only: OnlyOption = None,
    work: WorkOption = None,
    report: ReportOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """How well new kinds of records are told from known ones, and gathered into skills, one expert each.

    Leaves each task out in turn, measures false alarms against what is promised, and plays a stream through the
    daemon's own learn loop. Features are read once; a run that was stopped goes on where it was.
    """
    from rich.console import Console

    bench = _bench()
    asked = bench.NoveltyBenchConfig(
        data=data,
        has_labels=labels is Labels.YES,
        is_stripped=strip_markers,
        is_training=train,
        only=parts_of(only) if only is not None else bench.config.USUAL_PARTS,
        twins=parts_of(twins),
        families=tuple(tuple(family.split("+")) for family in parts_of(families)),
        train_rows=rows or train_rows,
        test_rows=rows or test_rows,
        max_tokens=max_tokens,
        draws=draws,
        scale_rows=scale_rows,
        seed=seed,
        work=work,
        report=report,
    )
    bench.novelty(asked, settings_from(config, assignments), Console())


def _bench() -> ModuleType:
    """`dylora_stream.bench.novelty`, or what to install for it."""
    try:
        from dylora_stream.bench import novelty as bench
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LIBRARIES:
            raise
        raise SettingsError(f"bench novelty needs {error.name}: install dylora-stream[bench]") from error
    return bench
