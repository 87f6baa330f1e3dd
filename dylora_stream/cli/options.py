"""Options that several commands share, and the settings that they make."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dylora_stream.ops.files import FileFormat

if TYPE_CHECKING:
    from dylora_stream.settings import Settings

__all__ = [
    "BootstrapOption", "ConfigOption", "FormatOption", "LimitOption", "SetOption", "numbers_of", "parts_of",
    "report_target", "settings_from",
]  # fmt: skip

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with settings; else the one that DYLORA_CONFIG names, else ./dylora.toml if it is there.",
        rich_help_panel="Settings",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="One setting, as `config show` names it; wins over the file and the environment. Repeatable.",
        rich_help_panel="Settings",
    ),
]
BootstrapOption = Annotated[
    str | None,
    typer.Option(
        "--bootstrap",
        metavar="HOST:PORT",
        help="The Kafka to use; short for --set kafka.bootstrap_servers=…",
        rich_help_panel="Settings",
    ),
]
FormatOption = Annotated[
    FileFormat, typer.Option("--format", help="auto goes by the suffix; lines takes each line as plain text.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Records to take; all without it.")]


def parts_of(text: str | None, separator: str = ",") -> tuple[str, ...]:
    """What a value with commas lists."""
    return tuple(part.strip() for part in (text or "").split(separator) if part.strip())


def numbers_of(text: str, option: str) -> tuple[int, ...]:
    """The same of whole numbers, each once; refused, naming the option, where there is another thing or nothing."""
    try:
        if numbers := tuple(dict.fromkeys(int(part) for part in parts_of(text))):
            return numbers
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is not numbers with commas", param_hint=option)


def report_target(report: Path | None) -> Path | None:
    """The file of --report, its folder made: what cannot be written is refused before hours of work, not after them."""
    if report is None:
        return None
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        is_new = not report.exists()
        report.open("a").close()
        if is_new:
            report.unlink()
    except OSError as error:
        raise typer.BadParameter(f"{report} cannot be written ({error.strerror})") from error
    return report


def settings_from(
    config: Path | None, assignments: list[str] | None, bootstrap: str | None = None
) -> "Settings":
    """The settings of a command; SettingsError says what is wrong. Logs go to stderr from here on, quietly: a command's
    result is what it prints. The daemon's roles set their own.
    """
    from dylora_stream.logs import LogConfig, configure_logs
    from dylora_stream.settings import load_settings

    flags = list(assignments or [])
    if bootstrap is not None:
        flags.append(f"kafka.bootstrap_servers={bootstrap}")
    settings = load_settings(config, flags)
    is_default = settings.log.level == LogConfig().level
    configure_logs(replace(settings.log, level="warning") if is_default else settings.log, "command")
    return settings
