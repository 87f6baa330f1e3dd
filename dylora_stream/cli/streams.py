"""Commands that send or read whole streams: produce, record, replay; and score."""

import dataclasses
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dylora_stream.cli.options import (
    BootstrapOption,
    ConfigOption,
    FormatOption,
    LimitOption,
    SetOption,
    settings_from,
)
from dylora_stream.core.errors import DyloraError
from dylora_stream.core.messages import Topic
from dylora_stream.ops.files import (
    FileFormat,
    FileRecord,
    ReadOptions,
    count_rows,
    paced,
    read_records,
    record_row,
    timed,
)

if TYPE_CHECKING:
    from dylora_stream.settings import Settings

__all__ = ["register"]

FileArgument = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="The file to send.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("produce", rich_help_panel="Streams")(produce)
    app.command("record", rich_help_panel="Streams")(record)
    app.command("replay", rich_help_panel="Streams")(replay)
    app.command("score", rich_help_panel="Streams")(score)


def produce(
    file: FileArgument,
    file_format: FormatOption = FileFormat.AUTO,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Records a second; as fast as it goes without it.")
    ] = None,
    shuffle: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Send in an order drawn from this seed instead of the file's."),
    ] = None,
    limit: LimitOption = None,
    key_field: Annotated[
        str | None, typer.Option(help="Field that becomes the record's key; equal keys stay in order.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """Send a file's rows to the requests topic: JSONL, CSV, Parquet, or plain lines.

    A row needs `input`; it may have `output` (the right answer: it teaches), `choices`, `id`, `tenant`, `skill`.
    """
    from dylora_stream.bootstrap import SystemClock

    options = ReadOptions(format=file_format, key_field=key_field, limit=limit, shuffle_seed=shuffle)
    records = paced(read_records(file, options), rate, SystemClock(), time.sleep)
    _send(records, count_rows(file, options), settings_from(config, assignments, bootstrap))


def record(
    topic: Annotated[Topic, typer.Argument(help="What to read.")],
    file: Annotated[Path, typer.Argument(help="A new file; JSONL, a record a line.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what comes, until Ctrl-C or --limit.")
    ] = False,
    limit: LimitOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """Write a topic to a file, from its beginning to where it ends now: values, keys, headers and times.

    `replay` sends such a file again, byte for byte.
    """
    from dylora_stream.bootstrap.recording import recorded

    records = recorded(settings_from(config, assignments, bootstrap), topic, follow=follow)
    try:
        out = file.open("x", encoding="utf-8", buffering=1 if follow else -1)
    except FileExistsError as error:
        raise DyloraError(f"{file} exists already: give another name, or remove it first") from error
    except OSError as error:
        raise DyloraError(f"{file} cannot be written: {error.strerror}") from error
    written = 0
    try:
        with out:
            for each in islice(records, limit):
                out.write(record_row(each) + "\n")
                written += 1
    except BaseException as error:
        if not written:
            file.unlink()
        if isinstance(error, OSError):
            raise DyloraError(f"{file} cannot be written: {error.strerror}") from error
        raise
    finally:
        if file.exists():
            typer.echo(f"{written} records in {file}")


def replay(
    file: FileArgument,
    file_format: FormatOption = FileFormat.AUTO,
    speed: Annotated[
        float,
        typer.Option(
            min=0.0, help="1 keeps the gaps between the records' times, 10 is ten times as fast, 0 at once."
        ),
    ] = 0.0,
    keep_times: Annotated[
        bool,
        typer.Option(
            "--keep-times",
            help="Send the records' own times too. A broker deletes records whose time is older than the topic's "
            "retention, within seconds.",
        ),
    ] = False,
    limit: LimitOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """Send recorded records again, in file order, with their keys and headers.

    A row has `value` or `value_base64`, and `key`, `headers`, `timestamp_ms`; a row with `input` is sent as a request.
    """
    from dylora_stream.bootstrap import SystemClock

    options = ReadOptions(format=file_format, limit=limit)
    records: Iterable[FileRecord] = read_records(file, options)
    if speed > 0:
        records = timed(records, speed, SystemClock(), time.sleep)
    if not keep_times:
        records = (dataclasses.replace(record, timestamp_ms=None) for record in records)
    _send(records, count_rows(file, options), settings_from(config, assignments, bootstrap))


def score(
    text: Annotated[str, typer.Argument(help="The input to score; - scores each line of standard input.")],
    tenant: Annotated[str, typer.Option(help="Whose experts to compare with.")] = "default",
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Ask the running serve worker how new an input is; one JSON object a line, nothing is answered or learned.

    A higher score is more novel; p_value is null until an expert is calibrated.
    """
    import json

    from dylora_stream.bootstrap import tools

    settings = settings_from(config, assignments)
    lines = (line.rstrip("\n") for line in sys.stdin) if text == "-" else [text]
    for line in lines:
        if line.strip():
            typer.echo(json.dumps(tools.score(settings, line, tenant), ensure_ascii=False))


def _send(records: Iterable[FileRecord], total: int, settings: "Settings") -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dylora_stream.bootstrap.tools import sender

    columns = (TextColumn("sending"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    sent = 0
    try:
        with (
            Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress,
            sender(settings) as send,
        ):
            task = progress.add_task("sending", total=total)
            for record in records:
                send(record)
                sent += 1
                progress.advance(task)
    except BaseException:
        if sent:
            typer.echo(
                f"stopped after {sent} records: they may be on the broker, and a second run sends them again",
                err=True,
            )
        raise
    typer.echo(f"{sent} records sent")
