"""The roles: serve, learn, the child, and the supervisor of one machine.

Nothing is imported that a role does not need: learn and the supervisor never load torch.
"""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, TypeVar

import structlog

from dylora_stream.bootstrap.parts import (
    SystemClock,
    check_method,
    create_topics,
    expert_store,
    fetch_model,
    instance_of,
    kafka_of,
    load_backbone,
    mixture_answerer,
    open_ledger,
    router_parts,
    wire_codec,
)
from dylora_stream.bootstrap.services import child_process, learn_service, serve_service
from dylora_stream.core.messages import Topic
from dylora_stream.logs import configure_logs
from dylora_stream.ops.http import Health, HttpPort, HttpRoutes
from dylora_stream.ops.metrics import Metrics
from dylora_stream.ops.supervisor import Role, Supervisor
from dylora_stream.settings import Settings
from dylora_stream.store.identity import Identity, check_folder, claim_folder, claim_identity
from dylora_stream.store.journal import FileJournal
from dylora_stream.stream.broker import EmbeddedIds
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import KafkaConfig, wait_for_broker
from dylora_stream.stream.sink import FixedId, KafkaSink, TransactionalIds
from dylora_stream.stream.source import KafkaSource

__all__ = ["child", "learn", "serve", "supervise"]

log = structlog.get_logger(__name__)

INTERRUPTED, TERMINATED = 130, 143  # exit codes of a second signal, and of a drain that took too long
STALLED_POLLS = 2  # a loop that has not polled for so many times kafka.max_poll_interval_s is not alive


def serve(settings: Settings, *, is_supervised: bool = False) -> None:
    """Answer until told to end. Raises DyloraError."""
    from dylora_stream.model.backbone import held_bytes
    from dylora_stream.serve.service import ServePorts
    from dylora_stream.serve.sharing import SharedAnswerer

    with ExitStack() as closing:
        kafka, identity = _enter(settings, "serve", closing)
        backbone = load_backbone(settings)
        answerer = SharedAnswerer(mixture_answerer(settings, backbone))
        metrics = Metrics(SystemClock())
        ports = ServePorts(
            source=_closing(closing, KafkaSource(kafka, [Topic.REQUESTS], witness=Topic.RESULTS)),
            sink=_closing(closing, KafkaSink(kafka, _transactional_ids(settings, identity))),
            changelog=_closing(closing, KafkaChangelog(kafka, Topic.EXPERTS)),
            answerer=answerer,
            codec=wire_codec(settings, identity.name),
            clock=SystemClock(),
            metrics=metrics,
            journal=FileJournal(settings.store.folder / f"{identity.name}.in-hand"),
        )
        service = serve_service(settings, ports, backbone)
        routes = HttpRoutes(
            health=lambda: _health(
                metrics, kafka, is_ready=service.is_ready, registry=service.registry.number
            ),
            metrics=metrics.text,
            score=lambda text, tenant: answerer.score([text], tenant)[0],
        )
        metrics.watch("gpu_memory_bytes", "", lambda: held_bytes(backbone.device))
        _open_port(settings, routes, closing, "serve")
        _until_signalled(service, settings.serve.drain_deadline_s, is_supervised=is_supervised)


def learn(settings: Settings, *, is_supervised: bool = False) -> None:
    """Learn until told to end. Raises DyloraError."""
    from dylora_stream.learn.service import LearnPorts

    with ExitStack() as closing:
        kafka, identity = _enter(settings, "learn", closing)
        ledger = _closing(closing, open_ledger(settings))
        metrics = Metrics(SystemClock())
        ports = LearnPorts(
            source=_closing(closing, KafkaSource(kafka, [Topic.SAMPLES, Topic.FEEDBACK], own=ledger)),
            sink=_closing(closing, KafkaSink(kafka, _transactional_ids(settings, identity))),
            experts=_closing(closing, KafkaChangelog(kafka, Topic.EXPERTS)),
            ledger=ledger,
            child=_closing(closing, child_process(settings)),
            store=expert_store(settings),
            codec=wire_codec(settings, identity.name),
            clock=SystemClock(),
            metrics=metrics,
        )
        loop = learn_service(settings, ports, kafka.topic(Topic.FEEDBACK))
        routes = HttpRoutes(
            health=lambda: _health(
                metrics, kafka, is_ready=loop.service.is_ready, registry=loop.curator.registry.number
            ),
            metrics=metrics.text,
            stats=loop.curator.summary,
            retire=loop.service.retire,
        )
        metrics.watch("buffer_age_seconds", "", loop.curator.buffer_age_s)
        _open_port(settings, routes, closing, "learn")
        _until_signalled(loop.service, settings.serve.drain_deadline_s, is_supervised=is_supervised)


def child(settings: Settings) -> None:
    """Work through job folders named on standard input; when that closes, end. No Kafka client, no database.

    SIGTERM is for learn, which ends its child by itself: a service manager that sends it to every process of a service
    would have jobs fail that are to be taken up again.
    """
    from dylora_stream.model.jobs import serve_jobs

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logs(settings.log, "child", sys.stderr)
    quiet = replace(settings.model, threads=settings.learn.threads)
    serve_jobs(
        lambda: load_backbone(settings.model_copy(update={"model": quiet})),
        router_parts(settings),
        _lines_while_open(),
        sys.stdout,
        settings.router,
    )


def _lines_while_open() -> Iterator[str]:
    """Lines of standard input. With its end the process ends, in the middle of a job too: learn is gone, and a new one
    has it done anew while this one would keep a core from it.
    """
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        # Not `sys.stdin`, whose lock Python's own end would find taken.
        with open(sys.stdin.fileno(), encoding="utf-8", closefd=False) as stdin:
            for line in stdin:
                lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True, name="jobs").start()
    while True:
        yield lines.get()


def supervise(settings: Settings, *, is_supervised: bool = False) -> int:
    """One serve and one learn on this machine; the exit code. Starts them once the broker answers: a role that cannot
    reach it at the beginning would be started again for ever. `is_supervised`: ends as well when standard input closes.
    """
    check_method(settings)
    configure_logs(settings.log, "supervisor")
    check_folder(settings.store.folder)
    lock = claim_folder(settings.store.folder)
    fetch_model(settings, lambda line: log.info("model_fetched", detail=line))
    wait_for_broker(kafka_of(settings, "supervisor"))
    base = (sys.executable, "-m", "dylora_stream", "run", "--supervised")
    roles = [
        Role(name=name, command=(*base, "--role", name, *settings.arguments)) for name in ("serve", "learn")
    ]
    supervisor = Supervisor(roles, settings.serve.drain_deadline_s)
    end = supervisor.end  # one object: the thread holds it weakly
    if is_supervised:
        _watch_pipe(end)
    with lock:
        return supervisor.run()


class _Service(Protocol):
    def run(self) -> None: ...

    def drain(self) -> None: ...


def _until_signalled(service: _Service, drain_deadline_s: float, *, is_supervised: bool) -> None:
    """Run; the first signal drains, the second ends at once; so does a supervisor's pipe that closes, by draining.

    A drain that takes longer than its deadline ends as if killed: what was not committed is taken again. A supervised
    role goes on draining at a second signal: a service manager sends one to every process of a service, the supervisor
    passes its own on, and it kills what is to end at once.
    """
    signals = 0

    def drain() -> None:
        service.drain()
        overdue = threading.Timer(drain_deadline_s, _end_overdue, [drain_deadline_s])
        overdue.daemon = True
        overdue.start()

    def on_signal(_number: int, _frame: object) -> None:
        nonlocal signals
        signals += 1
        if signals > 1 and not is_supervised:
            os._exit(INTERRUPTED)
        drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if is_supervised:
        _watch_pipe(drain)
    service.run()


def _watch_pipe(end: Callable[[], None]) -> None:
    """`end` is called when whoever started this process closes its standard input, however that comes."""
    threading.Thread(target=_read_to_end, args=(weakref.ref(end),), daemon=True, name="pipe").start()


def _read_to_end(found: "weakref.ref[Callable[[], None]]") -> None:
    """Python's own end must not meet this thread: it reads past `sys.stdin`, whose lock would be taken (a crash), and
    holds nothing of the role (reported as leaked).
    """
    while os.read(sys.stdin.fileno(), 1024):
        pass
    end = found()
    if end is not None:
        end()


def _end_overdue(drain_deadline_s: float) -> None:
    log.warning("drain_overdue", deadline_s=drain_deadline_s)
    os._exit(TERMINATED)


def _enter(settings: Settings, role: str, closing: ExitStack) -> tuple[KafkaConfig, Identity]:
    """Settings that the daemon can serve, logs, identity, a reachable broker and its topics."""
    check_method(settings)
    identity = claim_identity(settings.store.folder, role, instance_of(settings))
    closing.callback(identity.lock.close)
    configure_logs(settings.log, identity.name)
    kafka = kafka_of(settings, identity.name, f"{_group(settings)}.{role}")
    wait_for_broker(kafka)
    create_topics(settings)
    if kafka.is_embedded and not identity.name.endswith("-0"):
        log.warning("embedded_broker_shared", role=role)
    return kafka, identity


def _group(settings: Settings) -> str:
    """Daemons of several prefixes are several groups: the joins of one would hold up the other."""
    return settings.kafka.group or settings.kafka.prefix.strip(".") or "dylora"


def _transactional_ids(settings: Settings, identity: Identity) -> TransactionalIds:
    folder = settings.store.folder
    name = f"{settings.kafka.prefix}{identity.name}"
    if kafka_of(settings, identity.name).is_embedded:
        return EmbeddedIds(name, folder / f"{identity.name}.transactions")
    return FixedId(name)


def _open_port(settings: Settings, routes: HttpRoutes, closing: ExitStack, role: str) -> None:
    if not settings.http.is_enabled:
        return
    http = HttpPort(settings.http, routes, is_next=role == "learn")
    closing.callback(http.close)
    log.info("http_listening", address=http.address)
    told = settings.store.folder / f"{role}.http"
    told.write_text(http.address)
    closing.callback(_take_back, told, http.address)


def _take_back(told: Path, address: str) -> None:
    """Whoever has the port next may be another folder's daemon; another worker of this one has written its own."""
    with suppress(OSError):
        if told.read_text() == address:
            told.unlink()


def _health(metrics: Metrics, kafka: KafkaConfig, *, is_ready: bool, registry: int) -> Health:
    """A batch that takes longer than the group allows is for serve to shorten: a restart would take it as it was."""
    age_s = metrics.seconds_since_poll()
    return Health(
        is_alive=age_s < STALLED_POLLS * kafka.max_poll_interval_s,
        is_ready=is_ready,
        details={"last_poll_age_s": age_s, "registry": registry},
    )


class _Closable(Protocol):
    def close(self) -> None: ...


Port = TypeVar("Port", bound=_Closable)


def _closing(closing: ExitStack, port: Port) -> Port:
    closing.callback(port.close)
    return port
