"""Commands for what could not be answered: dead letters, shown and sent again."""

from itertools import islice
from typing import Annotated

import typer
from rich.table import Table

from dylora_stream.cli.options import BootstrapOption, ConfigOption, SetOption, settings_from
from dylora_stream.cli.tables import show
from dylora_stream.ops.files import FileRecord

__all__ = ["register"]

ReasonOption = Annotated[
    str | None, typer.Option("--reason", help="Those with this reason alone, as `list` names it.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    letters = typer.Typer(help="Records that could not be answered.", no_args_is_help=True)
    letters.command("list")(list_letters)
    letters.command("replay")(replay_letters)
    app.add_typer(letters, name="dead-letters", rich_help_panel="Looking")


def list_letters(
    reason: ReasonOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many; all without it.")] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """Each one's position, the stage that refused it, and why. What it says is not shown: see `record dead-letters`."""
    from dylora_stream.bootstrap.recording import dead_letters

    found = dead_letters(settings_from(config, assignments, bootstrap))
    table = Table("position", "stage", "reason", "message")
    for letter in islice((each for each in found if reason in (None, each.reason)), limit):
        table.add_row(str(letter.record.position), letter.stage, letter.reason, letter.message)
    show(table if table.rows else f"No dead letter{f' for the reason {reason}' if reason else ''}.")


def replay_letters(
    reason: ReasonOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """Send the requests among them again, byte for byte, once their cause is gone.

    They stay in the topic, so that a second time sends them twice: --reason helps to choose.
    """
    from dylora_stream.bootstrap.recording import dead_letters, is_whole
    from dylora_stream.bootstrap.tools import sender

    settings = settings_from(config, assignments, bootstrap)
    sent = passed_over = 0
    with sender(settings) as send:
        for letter in dead_letters(settings):
            if reason not in (None, letter.reason):
                continue
            if not is_whole(letter, settings):
                passed_over += 1
                continue
            record = letter.record
            send(FileRecord(value=record.value, key=record.key, headers=record.headers))
            sent += 1
    typer.echo(f"{sent} requests sent again" + (f", {passed_over} passed over" * bool(passed_over)))
    if passed_over:
        typer.echo("Passed over: what is no request, or was too large to be kept whole.")
