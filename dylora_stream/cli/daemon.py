"""Commands that stay: run, broker, and the training child that learn starts."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dylora_stream.cli.options import BootstrapOption, ConfigOption, SetOption, settings_from

__all__ = ["register"]


class RoleChoice(StrEnum):
    """What `run` runs."""

    BOTH = "both"
    SERVE = "serve"
    LEARN = "learn"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("run", rich_help_panel="Daemon")(run)
    app.command("broker", rich_help_panel="Daemon")(broker)
    app.command("child", hidden=True)(child)


def run(
    role: Annotated[
        RoleChoice, typer.Option(help="serve answers, learn trains; both: one of each, supervised.")
    ] = (RoleChoice.BOTH),
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Answer requests and learn from them, until Ctrl-C or SIGTERM.

    Both signals drain: what was taken is finished and committed, then the process ends; a second one ends it at
    once. On many machines start `--role serve` as often as there is work, and one `--role learn`, with one
    store.experts for all.
    """
    settings = settings_from(config, assignments, bootstrap)
    from dylora_stream import bootstrap as roles

    if role is RoleChoice.BOTH:
        raise typer.Exit(roles.supervise(settings, is_supervised=supervised))
    if role is RoleChoice.SERVE:
        roles.serve(settings, is_supervised=supervised)
    else:
        roles.learn(settings, is_supervised=supervised)


def broker(
    port: Annotated[int, typer.Option(help="Port on loopback.", min=1, max=65_535)] = 9092,
    data: Annotated[
        Path | None, typer.Option(help="Folder to keep topics in; else `broker` in the data folder.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Start the embedded broker in the foreground, for one machine; it keeps its topics over restarts.

    It speaks Kafka's protocol well enough for one daemon, a demo and tests. Where nothing may be lost or repeated,
    whatever fails, and for several serve workers, use a real Kafka.
    """
    from dylora_stream.bootstrap.tools import embedded_broker

    settings = settings_from(config, assignments)
    with embedded_broker(settings, data, port) as server:
        typer.echo(f"Kafka on {server.bootstrap_servers}, data in {server.data_dir}; Ctrl-C ends it")
        raise typer.Exit(server.wait())


def child(config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Run the job folders named on standard input, one a line; JSON lines on standard output. learn starts it."""
    settings = settings_from(config, assignments)
    from dylora_stream import bootstrap

    bootstrap.child(settings)
