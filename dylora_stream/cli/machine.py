"""Commands about the machine and its settings: doctor, config, model, version."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from dylora_stream import __version__
from dylora_stream.cli.options import BootstrapOption, ConfigOption, SetOption, settings_from
from dylora_stream.cli.tables import show

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("doctor", rich_help_panel="Machine")(doctor)
    config = typer.Typer(help="Settings: what they are and where they came from.", no_args_is_help=True)
    config.command("show")(show_config)
    config.callback()(lambda: None)
    model = typer.Typer(help="The frozen backbone.", no_args_is_help=True)
    model.command("fetch")(fetch_model)
    model.callback()(lambda: None)
    app.add_typer(config, name="config", rich_help_panel="Machine")
    app.add_typer(model, name="model", rich_help_panel="Machine")
    app.command("version", rich_help_panel="Machine")(version)


def doctor(
    config: ConfigOption = None, assignments: SetOption = None, bootstrap: BootstrapOption = None
) -> None:
    """Check what the daemon stands on, and say what to do about each thing that fails; exit code 1 if one does."""
    settings = settings_from(config, assignments, bootstrap)
    from dylora_stream.bootstrap import tools
    from dylora_stream.logs import LogConfig, configure_logs
    from dylora_stream.ops.doctor import examine

    configure_logs(LogConfig(level="error", libraries="error"), "doctor")
    checks = examine(tools.doctor_probes(settings))
    table = Table("check", "", "found, or what to do")
    for check in checks:
        table.add_row(check.name, Text("ok", "green") if check.is_ok else Text("fails", "red"), check.detail)
    show(table)
    if not all(check.is_ok for check in checks):
        raise typer.Exit(1)


def show_config(
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not a default.")] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """Each setting, its value, and where it came from; secrets hidden.

    A setting is named section.field in a TOML file (`[section]`, `field = value`) and in --set, and
    DYLORA_SECTION__FIELD in the environment. Defaults are overridden by the file, the file by the environment, the
    environment by flags.
    """
    table = Table("setting", "value", "from")
    for row in settings_from(config, assignments, bootstrap).explain():
        if not changed or row.source != "default":
            table.add_row(row.name, row.value, row.source)
    show(table)


def fetch_model(config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Put the backbone into its folder, once; instant when it is there."""
    from dylora_stream import bootstrap

    folder = bootstrap.fetch_model(settings_from(config, assignments), typer.echo)
    typer.echo(str(folder))


def version() -> None:
    """Print the version."""
    typer.echo(__version__)
