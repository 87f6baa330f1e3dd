"""The README tells of nothing that is not there."""

import json
import re
from pathlib import Path

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

from dylora_stream.cli import app
from dylora_stream.core.events import EventType
from dylora_stream.core.messages import Topic
from dylora_stream.ops.metrics import Metrics
from dylora_stream.settings import OTHER_VARIABLES, Settings, setting_names
from dylora_stream.stream.schemas import RequestData, ResultData
from dylora_stream.testing import ManualClock

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) + re.findall(r"`([^`\n]+)`", README)
PLACEHOLDERS = {"section.field"}


def found(pattern: str) -> set[str]:
    """What a pattern finds in the README's code, inline and in blocks."""
    return {match for code in CODE for match in re.findall(pattern, code)}


def command_of(words: list[str]) -> tuple[typer.core.TyperCommand, list[str]]:
    """The command that these words name, and what follows it."""
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words[0]]  # type: ignore[attr-defined]
        words = words[1:]
    return command, words  # type: ignore[return-value]


@pytest.mark.parametrize("line", sorted(found(r"dylora-stream [^#\n]*")))
def test_each_command_exists_with_its_options(line: str) -> None:
    """Words after the program's name are commands, --words their options."""
    command, rest = command_of(line.split()[1:])
    assert not hasattr(command, "commands"), f"{line}: there is no such command"
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options


def test_each_option_in_the_commands_table_belongs_to_its_command() -> None:
    """The second column speaks of the first one's command."""
    rows = re.findall(r"^\| `dylora-stream ([^`]+)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) > 10
    for name, text in rows:
        command, _ = command_of(name.split())
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"`(--[a-z-]+)", text)) <= options, name


def test_each_setting_exists() -> None:
    """Names of the form section.field."""
    sections = "|".join([*Settings.model_fields, "section"])
    named = found(rf"(?<![\w./])(?:{sections})\.[a-z_]+\b(?!\.)")
    assert len(named) > 15
    assert named - PLACEHOLDERS - set(EventType) <= set(setting_names())


def test_each_variable_exists() -> None:
    """Names that begin with DYLORA_."""
    known = {"DYLORA_" + name.replace(".", "__").upper() for name in setting_names()}
    assert found(r"\bDYLORA_[A-Z_]+") - {"DYLORA_SECTION__FIELD"} <= known | OTHER_VARIABLES


def test_each_event_and_topic_exists() -> None:
    """Lifecycle events by their short name, topics by their name on the broker."""
    kinds = "|".join(sorted({kind.split(".")[0] for kind in EventType}))
    named = {code for code in CODE if re.fullmatch(rf"(?:{kinds})\.[a-z_]+", code)}
    assert len(named) > 5
    assert named <= set(EventType)
    assert {code.removeprefix("dylora.") for code in CODE if re.fullmatch(r"dylora\.[a-z-]+", code)} == set(
        Topic
    )


def test_each_metric_exists() -> None:
    """Names that begin with dylora_, without the suffixes that Prometheus adds."""
    text = Metrics(ManualClock()).text().decode()
    known = {family.name for family in text_string_to_metric_families(text)}
    named = found(r"\bdylora_[a-z_]+") - {"dylora_stream"}
    assert len(named) > 10
    assert named <= known


def test_each_make_target_and_variable_exists() -> None:
    """`make …` names a target, NAME=… a variable of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert found(r"^make ([a-z]+)") | found(r"\nmake ([a-z]+)") <= targets
    assert found(r"\b([A-Z]+(?:_ARGS)?)='?-?") - {"DEMO_ARGS", "TEST_ARGS", "TORCH"} == set()


def test_the_request_and_the_result_are_as_the_code_has_them() -> None:
    """Both JSON examples pass the strict models."""
    request, result = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL))
    assert request.keys() <= RequestData.model_fields.keys()
    RequestData.model_validate_json(json.dumps(request))
    assert result.keys() == ResultData.model_fields.keys()
    ResultData.model_validate_json(json.dumps(result))
