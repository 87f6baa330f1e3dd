"""Logs: fixed fields, a closed catalogue, nothing of what a record says."""

import ast
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from dylora_stream.logs import EVENTS, FIELDS, LogConfig, configure_logs

PACKAGE = Path(__file__).parents[2] / "dylora_stream"
METHODS = {"debug", "info", "warning", "error", "exception", "critical"}


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """As a terminal says."""
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("dylora_stream")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], level, own = before
    root.setLevel(level)
    ours.setLevel(own)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    """The JSON lines written so far."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def logged_names() -> set[str]:
    """The first argument of every log call in the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            logger = node.func.value
            name = getattr(logger, "id", getattr(logger, "attr", ""))
            if node.func.attr in METHODS and name.lstrip("_") in ("log", "logger"):
                assert isinstance(node.args[0], ast.Constant), (
                    f"{path}:{node.lineno} logs a name that is not constant"
                )
                found.add(str(node.args[0].value))
    return found


def test_the_catalogue_is_what_the_code_logs() -> None:
    """Every event that is logged is listed with its meaning, and nothing else is."""
    assert logged_names() | {"library_line"} == set(EVENTS)


def test_lines_for_machines_have_the_fixed_fields_first() -> None:
    """JSON where no terminal is; names and their order are the same everywhere."""
    stream = io.StringIO()
    configure_logs(LogConfig(), "serve-0", stream)
    log = structlog.get_logger("dylora_stream.serve")
    log.info("worker_started", records=3, expert="e1", position="t:0:1")
    (line,) = lines(stream)
    assert list(line) == [*(name for name in FIELDS if name in line), "records"]
    assert line["instance"] == "serve-0"
    assert line["event"] == "worker_started"


def test_lines_for_people_are_no_json() -> None:
    """A terminal gets the pretty form."""
    stream = Terminal()
    configure_logs(LogConfig(), "serve-0", stream)
    structlog.get_logger("dylora_stream.serve").info("worker_started")
    assert "worker_started" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        lines(stream)


def test_a_librarys_line_goes_the_same_way() -> None:
    """The standard library's loggers share the formatter, under an event name of their own and their own level."""
    stream = io.StringIO()
    configure_logs(LogConfig(libraries="warning"), "serve-0", stream)
    logging.getLogger("kafka.client").warning("node %s is gone", 3)
    logging.getLogger("kafka.client").info("chatter")
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["message"]) == (
        "library_line",
        "kafka.client",
        "node 3 is gone",
    )


def test_no_level_shows_what_the_brokers_client_says_of_its_settings() -> None:
    """At debug it would tell the password."""
    stream = io.StringIO()
    configure_logs(LogConfig(libraries="debug"), "serve-0", stream)
    logging.getLogger("kafka.admin.client").debug("configuration: %s", {"sasl_plain_password": "hunter2"})
    logging.getLogger("kafka.client").debug("chatter")
    assert [line["message"] for line in lines(stream)] == ["chatter"]


def test_what_a_record_says_is_hidden_above_debug() -> None:
    """A forgotten `input=` does not put a customer's text into the logs."""
    stream = io.StringIO()
    configure_logs(LogConfig(level="debug"), "serve-0", stream)
    log = structlog.get_logger("dylora_stream.serve")
    log.info("dead_lettered", input="secret text")
    log.debug("dead_lettered", input="secret text")
    first, second = lines(stream)
    assert (first["input"], second["input"]) == ("(hidden)", "secret text")


def test_the_level_holds_back_what_is_below_it() -> None:
    """A quiet level is quiet."""
    stream = io.StringIO()
    configure_logs(LogConfig(level="error"), "serve-0", stream)
    structlog.get_logger("dylora_stream.serve").warning("transaction_aborted")
    assert stream.getvalue() == ""


def test_an_exception_is_one_field_of_the_line() -> None:
    """A traceback does not tear a JSON line apart."""
    stream = io.StringIO()
    configure_logs(LogConfig(), "serve-0", stream)
    log = structlog.get_logger("dylora_stream.serve")
    try:
        int("broken")
    except ValueError:
        log.exception("training_failed")
    (line,) = lines(stream)
    assert "ValueError: invalid literal" in str(line["exception"])
