"""What `deploy/` gives to operators fits the program."""

import configparser
from pathlib import Path

from typer.testing import CliRunner

from dylora_stream.cli import app
from dylora_stream.core.errors import ModelError, SettingsError
from dylora_stream.settings import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"


def the_unit() -> configparser.SectionProxy:
    """The service's section of the systemd unit."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "dylora-stream.service")
    return unit["Service"]


def test_the_settings_are_read_and_fit_the_unit() -> None:
    """A drain has its time before systemd kills, and the data folder is the unit's."""
    settings, unit = load_settings(DEPLOY / "dylora.toml"), the_unit()
    assert float(unit["TimeoutStopSec"]) > settings.serve.drain_deadline_s
    assert str(settings.store.folder) == f"/var/lib/{unit['StateDirectory']}"


def test_the_unit_starts_a_command_that_there_is() -> None:
    """With its option, and nothing starts again what only a person can mend."""
    unit = the_unit()
    _, *words = unit["ExecStart"].split()
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0
    codes = {int(code) for code in unit["RestartPreventExitStatus"].split()}
    assert codes == {SettingsError.exit_code, ModelError.exit_code}
