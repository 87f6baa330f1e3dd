"""What Prometheus sees: one class whose verbs the loops call, with a registry of its own.

Counters and histograms are fed as things happen; what another part knows better (lag, memory, buffers) is asked for
when a scrape comes, through `watch`, so that a slow answer never holds the stream up between scrapes.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dylora_stream.core.events import EventType
from dylora_stream.core.experts import Maturity, Registry
from dylora_stream.core.messages import Answer, DeadLetter, Request, Sample
from dylora_stream.core.ports import Clock, LoadFailure

__all__ = ["AnsweredBatch", "Metrics"]

LATENCY_BUCKETS_S = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)  # one forward pass to a cold CPU
LAG_EVERY_S = 5.0  # a round trip to the broker
WINDOW_RECORDS = 500  # what the rates look back on: minutes of a small stream, seconds of a large one


class AnsweredBatch(Protocol):
    """What metrics read of a batch that is on the broker."""

    @property
    def answers(self) -> Sequence[tuple[Request, Answer]]:
        """Requests with their answers."""

    @property
    def dead_letters(self) -> Sequence[DeadLetter]:
        """Records that could not be answered."""


class Metrics:
    """All metrics of one process. Thread-safe: the loops write, the HTTP port reads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._last_poll_s: float | None = None
        self._lag_due_s = 0.0
        self._lock = threading.Lock()
        self._was_novel: deque[bool] = deque(maxlen=WINDOW_RECORDS)
        self._was_correct: deque[bool] = deque(maxlen=WINDOW_RECORDS)
        self._watched: dict[str, tuple[Gauge, Callable[[], float]]] = {}
        self.registry = CollectorRegistry(auto_describe=True)
        self._make_counters()
        self._make_gauges()

    def _make_counters(self) -> None:
        self._latency = self._histogram("latency_seconds", "From poll to committed results, a batch")
        self._records = self._counter("records", "Answered records by policy", ["policy"])
        self._by_expert = self._counter("expert_records", "Answered records by leading expert", ["expert"])
        self._novel = self._counter("novel_records", "Records that no expert fits")
        self._dead = self._counter(
            "dead_letters", "Records that could not be answered, by reason", ["reason"]
        )
        self._aborts = self._counter(
            "transaction_aborts", "Transactions that did not happen; their records are taken again"
        )
        self._skills = self._counter("new_skills", "Experts spawned for a new skill")
        self._jobs = self._counter("training_jobs", "Training jobs by kind and outcome", ["kind", "outcome"])
        self._samples = self._counter("samples", "Samples taken in by learn, by reason", ["reason"])
        self._events = self._counter("events", "Lifecycle events by type", ["type"])

    def _make_gauges(self) -> None:
        self._experts = self._gauge(
            "experts", "Experts of the registry being served, by maturity", ["maturity"]
        )
        self._not_loaded = self._gauge(
            "experts_not_loaded",
            "What of that registry could not be loaded; older versions go on in their place",
        )
        self._registry_number = self._gauge(
            "registry_number", "Number of the registry being served, -1 before the first"
        )
        self._registry_number.set(-1)
        self._poll_age = self._gauge("last_poll_age_seconds", "Since the source was last asked for records")
        self._novelty_rate = self._gauge(
            "novelty_rate", f"Share of novel records among the last {WINDOW_RECORDS}"
        )
        self._accuracy = self._gauge(
            "prequential_accuracy",
            f"Share answered exactly right among the last {WINDOW_RECORDS} with a right answer",
        )
        self._lag = self._gauge("lag_records", "Records not yet taken, summed over this worker's partitions")
        self._lag.set(float("nan"))  # not known before the first poll
        self.watch("gpu_memory_bytes", "Memory that torch holds on the GPU; 0 on a CPU", lambda: 0.0)
        self.watch("buffer_age_seconds", "Age of the oldest row that waits for an expert", lambda: 0.0)

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Ask `read` for this gauge at each scrape; naming a gauge again replaces who is asked."""
        gauge = self._watched[name][0] if name in self._watched else self._gauge(name, meaning)
        self._watched[name] = (gauge, read)

    def polled(self, lag_records: Callable[[], float]) -> None:
        """The source was asked. Its lag is asked for now and then, here, because its client is the loop's alone."""
        now_s = self._last_poll_s = self._clock.monotonic_s()
        if now_s >= self._lag_due_s:
            self._lag_due_s = now_s + LAG_EVERY_S
            self._lag.set(lag_records())

    def answered(self, outcome: AnsweredBatch, latency_s: float) -> None:
        """A batch is on the broker."""
        self._latency.observe(latency_s)
        for request, answer in outcome.answers:
            self._count_answer(request, answer)
        for letter in outcome.dead_letters:
            self._dead.labels(letter.reason).inc()

    def _count_answer(self, request: Request, answer: Answer) -> None:
        self._records.labels(answer.policy).inc()
        if answer.expert is not None:
            self._by_expert.labels(answer.expert.expert).inc()
        if answer.novelty.is_novel:
            self._novel.inc()
            self.happened(EventType.SAMPLE_NOVEL)
        with self._lock:
            self._was_novel.append(answer.novelty.is_novel)
            if request.output is not None:
                self._was_correct.append(answer.output.strip() == request.output.strip())

    def aborted(self) -> None:
        """A transaction did not happen."""
        self._aborts.inc()

    def activated(self, registry: Registry, failed: Sequence[LoadFailure] = ()) -> None:
        """A registry is being served, but for what of it could not be loaded."""
        self._registry_number.set(registry.number)
        self._not_loaded.set(len(failed))
        for maturity in Maturity:
            self._experts.labels(maturity).set(
                sum(expert.maturity is maturity for expert in registry.experts)
            )

    def sampled(self, samples: Sequence[Sample]) -> None:
        """Samples were committed by learn."""
        for sample in samples:
            self._samples.labels(sample.reason).inc()

    def job_ended(self, kind: str, outcome: str) -> None:
        """A job has its end: `promoted`, `rejected`, `failed`, ..."""
        self._jobs.labels(kind, outcome).inc()

    def happened(self, kind: EventType) -> None:
        """A lifecycle event was published."""
        self._events.labels(kind).inc()
        if kind is EventType.EXPERT_SPAWNED:
            self._skills.inc()

    def seconds_since_poll(self) -> float:
        """Age of the last poll; since construction before the first. What liveness looks at."""
        return self._clock.monotonic_s() - (
            self._started_s if self._last_poll_s is None else self._last_poll_s
        )

    def text(self) -> bytes:
        """The exposition for a scrape. A watched value that cannot be read is NaN; the others are still shown."""
        self._poll_age.set(self.seconds_since_poll())
        with self._lock:
            self._novelty_rate.set(_share(self._was_novel))
            self._accuracy.set(_share(self._was_correct))
        for gauge, read in self._watched.values():
            gauge.set(_read(read))
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"dylora_{name}", meaning, list(labels), registry=self.registry)

    def _gauge(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"dylora_{name}", meaning, list(labels), registry=self.registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"dylora_{name}", meaning, buckets=LATENCY_BUCKETS_S, registry=self.registry)


def _share(flags: Sequence[bool]) -> float:
    """NaN while there is nothing to take a share of."""
    return sum(flags) / len(flags) if flags else float("nan")


def _read(read: Callable[[], float]) -> float:
    try:
        return float(read())
    except Exception:  # noqa: BLE001 - a scrape must not fail because one part is busy closing
        return float("nan")
