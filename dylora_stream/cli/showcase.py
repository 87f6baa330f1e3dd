"""Commands that show: demo, rehearse and bench."""

from pathlib import Path
from typing import Annotated

import typer

from dylora_stream.cli.continual import continual
from dylora_stream.cli.novelty import novelty
from dylora_stream.cli.options import (
    ConfigOption,
    FormatOption,
    LimitOption,
    SetOption,
    numbers_of,
    parts_of,
    report_target,
    settings_from,
)
from dylora_stream.ops.files import FileFormat

__all__ = ["register"]

ReportOption = Annotated[
    Path | None,
    typer.Option(callback=report_target, help="Also write the numbers to this file, as JSON."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("demo", rich_help_panel="Showing")(demo)
    app.command("rehearse", rich_help_panel="Showing")(rehearse)
    bench = typer.Typer(help="Measurements, each from one run on this machine.", no_args_is_help=True)
    bench.command("throughput")(throughput)
    bench.command("continual")(continual)
    bench.command("novelty")(novelty)
    bench.callback()(lambda: None)
    app.add_typer(bench, name="bench", rich_help_panel="Showing")


def demo(
    report: ReportOption = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of NAME.train.jsonl to play instead."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of each skill at most.")] = None,
    kill_at: Annotated[
        int | None, typer.Option(min=1, help="SIGKILL serve after this many records, and go on.")
    ] = None,
    kill_learn_at: Annotated[int | None, typer.Option(min=1, help="The same to learn.")] = None,
    folder: Annotated[
        Path,
        typer.Option(help="Where this run keeps everything; what an earlier demo left there is removed."),
    ] = Path(".dylora/demo"),
    deadline: Annotated[
        float | None,
        typer.Option(
            min=1, help="Seconds after which no more records are sent; else 280 for each kind, at least 900."
        ),
    ] = None,
) -> None:
    """Play a stream of real records through the whole daemon and show what it learned.

    Starts a broker of its own (Apache Kafka where KAFKA_HOME names its folder), serve and learn; skills arrive one
    after another and come back later, and nothing in a record names its skill. Exit code 1 when a record was lost or
    repeated.
    """
    from rich.console import Console

    from dylora_stream.demo.run import DemoConfig
    from dylora_stream.demo.run import demo as play
    from dylora_stream.logs import LogConfig, configure_logs

    configure_logs(LogConfig(level="warning"), "demo")
    chosen = DemoConfig(
        folder=folder,
        data=data,
        rows=rows,
        kill_serve_at=kill_at,
        kill_learn_at=kill_learn_at,
        report=report,
        deadline_s=deadline,
    )
    raise typer.Exit(play(chosen, Console()))


def rehearse(
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, readable=True, help="Requests, as produce takes them."),
    ],
    file_format: FormatOption = FileFormat.AUTO,
    limit: LimitOption = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Records answered before learn has its turn; more are faster.")
    ] = 16,
    keep: Annotated[
        Path | None,
        typer.Option(help="A new folder that keeps database, jobs and experts; else they go with the run."),
    ] = None,
    report: ReportOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """What would the daemon make of my records? Plays a file through serve and learn in this process.

    No broker is needed, and nothing outside the run's own folder is touched. Each record is answered before anything
    is learned of it; a batch waits until all trainings of the one before it are done, so that a run can be repeated.
    Records that name their right answer (`output`) teach. Ctrl-C shows what came of it until then.
    """
    from rich.console import Console

    from dylora_stream.demo.rehearsal import RehearsalConfig
    from dylora_stream.demo.rehearsal import rehearse as play
    from dylora_stream.ops.files import ReadOptions

    options = ReadOptions(format=file_format, limit=limit)
    chosen = RehearsalConfig(file=file, options=options, batch=batch, keep=keep, report=report)
    play(chosen, settings_from(config, assignments), Console())


def throughput(
    report: ReportOption = None,
    records: Annotated[int, typer.Option(min=8, help="Requests of one round of the part kafka.")] = 128,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART,…",
            help="Some of mixed, decode, answer, train, kafka, overhead and accuracy; else all but the last.",
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=5, help="Pairs of a short comparison.")] = 7,
    train_data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="For the part accuracy: a folder of NAME.train.jsonl and NAME.test.jsonl, at least five tasks, which "
            "are trained our way and by PEFT.",
        ),
    ] = None,
    train_tasks: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Some of that folder's tasks; else all of them.")
    ] = None,
    train_seeds: Annotated[str, typer.Option(metavar="N,…", help="One training of every task each.")] = "0",
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """What experts cost over the bare model: mixed batches, generation, answers, training, and Kafka to Kafka.

    Each number comes from pairs that ran in turn, A, B, A, B …, and stands beside PEFT's where PEFT does the same.
    """
    from rich.console import Console

    from dylora_stream.bench.throughput import USUAL_PARTS, ThroughputConfig
    from dylora_stream.bench.throughput import throughput as measure

    try:
        chosen = ThroughputConfig(
            only=parts_of(only) if only is not None else USUAL_PARTS,
            pairs=pairs,
            records=records,
            report=report,
            train_data=train_data,
            train_tasks=parts_of(train_tasks),
            train_seeds=numbers_of(train_seeds, "--train-seeds"),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from None
    measure(chosen, settings_from(config, assignments), Console())
