"""Logs: one line an event, on stderr, JSON for machines and colour for people.

The event's name is a constant in snake case, listed with its meaning in `EVENTS`; a test compares the list with the
code. `FIELDS` stand first and always mean the same. What a record says is never logged above debug: `hide_payload`
takes it out even where somebody forgot. Lines of the standard library's loggers (kafka, transformers) go through the
same formatter.
"""

import logging
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import structlog

__all__ = ["EVENTS", "FIELDS", "LogConfig", "configure_logs"]

FIELDS = ("time", "level", "event", "instance", "position", "expert", "version", "job", "trace_id")

PAYLOAD_FIELDS = frozenset({"answer", "input", "output", "payload", "text", "value"})

EVENTS = {
    "batch_shortened": "a batch took longer than a minute to answer; the next ones have fewer records",
    "broker_unreachable": "no bootstrap server answers; it is tried again until kafka.connect_timeout_s is over",
    "child_started": "learn has a new training child",
    "dead_lettered": "records of a batch could not be answered and went to the dead letters",
    "drain_overdue": "a role did not end within serve.drain_deadline_s and ends at once; what it had is taken again",
    "embedded_broker_shared": "workers of one role may wait for each other on the embedded broker: use a real Kafka",
    "event_dropped": "a worker's own event could not be published; nothing depends on it",
    "expert_load_failed": "part of a registry cannot be served; its old version, if any, stays",
    "experts_adopted": "learn goes by other experts than its database knew; `unpublished` ones are published again",
    "group_moved_on": "the group was reassigned while records were polled; they are left to their new owner",
    "http_failed": "a request to the operator's port met an error that nobody expected; it was answered with it",
    "http_listening": "the operator's port is open at this address",
    "journal_not_written": "what is in hand cannot be written down: a record that ends the process is not found out",
    "lag_unknown": "the lag could not be read just now; the metric is NaN until it can",
    "library_line": "a line of a library's logger; `logger` names it, `message` is its text",
    "manifest_unreadable": "a record of the experts topic is neither manifest nor registry; it is left out",
    "model_fetched": "a step of putting the backbone into its folder",
    "offsets_lost": "positions were gone from their topics and reading starts anew, as kafka.start_from says",
    "outbox_in_doubt": "what an aborted transaction published cannot be read yet; learn's messages wait for it",
    "partitions_started": "partitions without a committed offset are read from these offsets on",
    "poison_suspected": "the process before ended while it answered these records; they are answered one by one",
    "reference_unreadable": "what similarities are measured against was damaged; the next sketch job writes it anew",
    "registry_activated": "another set of experts is served from here on",
    "requests_made_anew": "records of the requests topic are told apart from those of the same position before",
    "role_fell": "serve or learn ended by itself and is started again after a pause",
    "role_killed": "a role did not end in time and was killed",
    "role_started": "the supervisor started serve or learn",
    "row_given_up": "the child fails whenever it sketches this row, alone too; it is not learned from",
    "sample_unreadable": "a record of the samples topic is not a sample; it is left out",
    "topic_created": "a missing topic was created",
    "training_completed": "a job ended with a decision",
    "training_failed": "a job ended without a result; the stream goes on",
    "training_progress": "how far a job is",
    "training_started": "a job was handed to the child",
    "transaction_aborted": "nothing of a batch happened; its records are taken again",
    "worker_started": "a role takes records",
    "worker_stopped": "a role has finished what it had and left",
}

Level = Literal["debug", "info", "warning", "error"]
EventDict = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is logged, and how it looks."""

    level: Level = "info"
    """Least severity of our own lines; debug may show what records say."""

    libraries: Level = "warning"
    """Least severity of the libraries' lines (kafka, transformers, ...)."""

    format: Literal["auto", "json", "pretty"] = "auto"
    """auto: pretty on a terminal, JSON elsewhere."""


def configure_logs(config: LogConfig, instance: str, stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's lines to `stream` (stderr), one formatter for both."""
    target = stream or sys.stderr
    is_pretty = config.format == "pretty" or (config.format == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(_formatter(is_pretty=is_pretty))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.libraries.upper())
    logging.getLogger("kafka.net.selector").setLevel(
        logging.ERROR
    )  # it warns of every pause of a busy machine
    logging.getLogger("kafka.admin.client").setLevel(
        max(root.level, logging.INFO)
    )  # at debug it shows passwords
    logging.getLogger("dylora_stream").setLevel(config.level.upper())
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared_processors(),
            hide_payload,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(instance=instance)


def hide_payload(_logger: object, method: str, event: EventDict) -> EventDict:
    """Take out the fields that say what a record says, unless the line is for debugging."""
    if method != "debug":
        for name in PAYLOAD_FIELDS & event.keys():
            event[name] = "(hidden)"
    return event


def fixed_fields_first(_logger: object, _method: str, event: EventDict) -> EventDict:
    """`FIELDS` in their order, then the others in theirs."""
    known = {name: event[name] for name in FIELDS if name in event}
    return known | {name: value for name, value in event.items() if name not in known}


def _shared_processors() -> list[structlog.typing.Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.StackInfoRenderer(),
    ]


def _formatter(*, is_pretty: bool) -> structlog.stdlib.ProcessorFormatter:
    """JSON carries an exception as text in the field `exception`; the pretty one prints it below the line."""
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if is_pretty:
        last: list[structlog.typing.Processor] = [drop, structlog.dev.ConsoleRenderer(timestamp_key="time")]
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
        last = [drop, structlog.processors.format_exc_info, fixed_fields_first, renderer]
    foreign: list[structlog.typing.Processor] = [
        *_shared_processors(),
        structlog.stdlib.ExtraAdder(),
        _name_logger,
    ]
    return structlog.stdlib.ProcessorFormatter(processors=last, foreign_pre_chain=foreign)


def _name_logger(_logger: object, _method: str, event: EventDict) -> EventDict:
    """A library's line is the event `library_line`, so that event names stay a closed list."""
    record = event.get("_record")
    event["logger"] = record.name if isinstance(record, logging.LogRecord) else "unknown"
    event["message"] = event.get("event", "")
    event["event"] = "library_line"
    return event
