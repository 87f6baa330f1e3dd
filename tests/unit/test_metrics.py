"""Metrics: what the loops say is what a scrape shows."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from dylora_stream.bootstrap.roles import _health
from dylora_stream.core.events import EventType
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.messages import (
    Answer,
    DeadLetter,
    Novelty,
    Policy,
    Position,
    RawRecord,
    Request,
    RoutingWeight,
)
from dylora_stream.model.backbone import held_bytes
from dylora_stream.ops.metrics import Metrics
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.testing import ManualClock


@dataclass
class Batch:
    """A batch that is on the broker."""

    answers: list[tuple[Request, Answer]]
    dead_letters: list[DeadLetter] = field(default_factory=list)


def answered(output: str, right: str | None = None, *, novel: bool = False) -> tuple[Request, Answer]:
    """One answer by expert e1, with or without a right one to compare."""
    answer = Answer(
        output=output,
        policy=Policy.SPARSE,
        weights=(RoutingWeight(expert="e1", version=1, weight=1.0),),
        novelty=Novelty(score=1.0, p_value=None, entropy=0.0, nearest=None, is_novel=novel),
        features=np.zeros(2, np.float32),
    )
    return Request(position=Position("t", 0, 0), input="x", output=right), answer


def shown(metrics: Metrics) -> dict[str, float]:
    """Every sample of a scrape, `name{label=value}`."""
    samples = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def test_answers_are_counted_by_policy_expert_and_correctness() -> None:
    """One batch feeds counters, rates and the latency histogram."""
    metrics = Metrics(ManualClock())
    record = RawRecord(position=Position("t", 0, 1), key=None, value=b"")
    letter = DeadLetter(record=record, stage="decode", reason="too_large", message="too large", attempts=1)
    batch = Batch([answered("a", "a "), answered("a", "b"), answered("a", novel=True)], [letter, letter])
    metrics.answered(batch, 0.2)
    found = shown(metrics)
    assert found["dylora_records_total{policy=sparse}"] == 3
    assert found["dylora_expert_records_total{expert=e1}"] == 3
    assert found["dylora_novel_records_total"] == 1
    assert found["dylora_novelty_rate"] == pytest.approx(1 / 3)
    assert found["dylora_prequential_accuracy"] == 0.5
    assert found["dylora_dead_letters_total{reason=too_large}"] == 2
    assert found["dylora_latency_seconds_count"] == 1
    assert found["dylora_latency_seconds_sum"] == pytest.approx(0.2)


def test_rates_are_not_zero_before_there_is_anything() -> None:
    """No record yet is NaN, not a perfect or a hopeless rate."""
    found = shown(Metrics(ManualClock()))
    assert np.isnan(found["dylora_novelty_rate"])
    assert np.isnan(found["dylora_prequential_accuracy"])
    assert found["dylora_registry_number"] == -1
    assert np.isnan(found["dylora_lag_records"])


@pytest.mark.parametrize(("device", "held"), [("cpu", 0), ("cuda", 5)])
def test_the_memory_of_a_gpu_is_torch_s_own_number(
    device: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What serve is wired to; on a CPU torch is not even asked."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5)
    metrics = Metrics(ManualClock())
    metrics.watch("gpu_memory_bytes", "", lambda: held_bytes(torch.device(device)))
    assert shown(metrics)["dylora_gpu_memory_bytes"] == held


def test_poll_age_grows_with_the_clock_and_ends_with_a_poll() -> None:
    """Liveness looks at the age of the last poll."""
    clock = ManualClock()
    metrics = Metrics(clock)
    clock.advance(3)
    assert shown(metrics)["dylora_last_poll_age_seconds"] == pytest.approx(3)
    metrics.polled(lambda: 7)
    clock.advance(1)
    assert metrics.seconds_since_poll() == pytest.approx(1)


def test_active_experts_follow_the_registry() -> None:
    """A registry sets the gauge of every maturity, also back to zero."""

    def version(name: str, maturity: Maturity) -> ExpertVersion:
        storage = StoredFolder(path="p", sha256="s")
        return ExpertVersion(
            expert_id=name, skill_id=name, version=1, parent=None, storage=storage, maturity=maturity
        )

    metrics = Metrics(ManualClock())
    metrics.activated(
        Registry(experts=(version("a", Maturity.NASCENT), version("b", Maturity.MATURE)), number=4)
    )
    metrics.activated(Registry(experts=(version("b", Maturity.MATURE),), number=5))
    found = shown(metrics)
    assert found["dylora_experts{maturity=nascent}"] == 0
    assert found["dylora_experts{maturity=mature}"] == 1
    assert found["dylora_registry_number"] == 5


def test_watched_values_are_read_at_the_scrape() -> None:
    """A watched value is asked for when somebody looks; a reader that fails is NaN and breaks nothing else."""
    memory = [7.0]
    metrics = Metrics(ManualClock())
    metrics.watch("rows", "", lambda: memory[0])
    metrics.watch("buffer_age_seconds", "", lambda: 1 / 0)
    assert shown(metrics)["dylora_rows"] == 7
    memory[0] = 9
    found = shown(metrics)
    assert found["dylora_rows"] == 9
    assert np.isnan(found["dylora_buffer_age_seconds"])
    assert found["dylora_gpu_memory_bytes"] == 0


def test_jobs_events_and_aborts_are_counted() -> None:
    """The verbs of learn and of the transactions."""
    metrics = Metrics(ManualClock())
    metrics.job_ended("seed", "promoted")
    metrics.happened(EventType.EXPERT_SPAWNED)
    metrics.aborted()
    found = shown(metrics)
    assert found["dylora_training_jobs_total{kind=seed,outcome=promoted}"] == 1
    assert found["dylora_events_total{type=expert.spawned}"] == 1
    assert found["dylora_new_skills_total"] == 1
    assert found["dylora_transaction_aborts_total"] == 1


def test_two_processes_worth_of_metrics_do_not_meet() -> None:
    """Each object has a registry of its own."""
    one, other = Metrics(ManualClock()), Metrics(ManualClock())
    one.aborted()
    assert shown(other)["dylora_transaction_aborts_total"] == 0


def test_lag_is_asked_for_in_the_loop_and_not_at_every_poll() -> None:
    """The client belongs to the loop's thread, and a round trip is not free."""
    clock = ManualClock()
    metrics = Metrics(clock)
    asked: list[int] = []

    def lag() -> int:
        asked.append(1)
        return 7

    for _ in range(10):
        metrics.polled(lag)
        clock.advance(1)
    assert shown(metrics)["dylora_lag_records"] == 7
    assert len(asked) == 2


def test_a_batch_that_takes_longer_than_its_group_waits_is_no_reason_to_restart_a_role() -> None:
    """After the restart the same batch would come again; twice the time is a loop that stands still."""
    clock = ManualClock()
    metrics, kafka = Metrics(clock), KafkaConfig(bootstrap_servers="h:1", max_poll_interval_s=900.0)
    for advance_s, is_alive in ((1000.0, True), (1000.0, False)):
        clock.advance(advance_s)
        assert _health(metrics, kafka, is_ready=True, registry=0).is_alive is is_alive
