"""How much of the bare model's speed is left when the daemon stands around it, and what the daemon itself takes.

No training under way, the same records: the bare backbone (length-sorted `generate`, the best of three batch sizes) and
the daemon from Kafka to Kafka take turns; the ratio of a round is bare seconds over daemon seconds. Free text and
`choices` apart. Four mature experts whose B is zero are live, so that routing, scoring and the pool's products are paid
for while the texts stay those of the bare model. With a tiny model, the processor time that the daemon itself takes
for a record.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dylora_stream import bootstrap
from dylora_stream.bench.throughput.bare import generate_plainly, rank_plainly
from dylora_stream.bench.throughput.config import LEAST_PAIRS
from dylora_stream.bench.throughput.measuring import Bench, seconds
from dylora_stream.bench.throughput.records import EXPERTS, plain_records, with_choices
from dylora_stream.model.backbone import Backbone
from dylora_stream.settings import Settings
from dylora_stream.stream.kafka import KafkaConfig

__all__ = ["measure_daemon", "measure_overhead"]

BATCHES = (8, 16, 32)  # of the bare backbone


@dataclass(frozen=True, slots=True)
class _Load:
    """One kind of records, and how the bare backbone answers all of them in batches of a size."""

    name: str
    requests: list[dict[str, Any]]
    bare: Callable[[int], None]


def measure_daemon(bench: Bench) -> None:
    """kafka_to_kafka and kafka_to_kafka_choices."""
    backbone, bare = bench.backbone(), bench.bare()
    free = plain_records(bench.config.records)
    chosen = with_choices(free)
    inputs = [row["input"] for row in free]
    pairs = [(row["input"], choice) for row in chosen for choice in row["choices"]]
    longest = bench.settings.generation.max_new_tokens
    loads = (
        _Load("kafka_to_kafka", free, lambda batch: generate_plainly(bare, inputs, longest, batch)),
        _Load("kafka_to_kafka_choices", chosen, lambda batch: rank_plainly(bare, pairs, batch)),
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        bootstrap.demo_broker(Path(folder) / "broker") as servers,
    ):
        for load in loads:
            here = _here(bench.settings, servers, Path(folder), load.name)
            rounds = _rounds(bench, load, here, backbone)
            _tell_rates(bench, load, rounds)
            bench.keep(load.name, rounds, is_speed=True)


def _tell_rates(bench: Bench, load: _Load, rounds: Sequence[tuple[float, float]]) -> None:
    """Records a second of both, medians of the rounds."""
    bare, daemon = (len(load.requests) / statistics.median(times) for times in zip(*rounds, strict=True))
    bench.notes[f"{load.name}_records_per_s"] = {"bare": round(bare, 2), "kafka_to_kafka": round(daemon, 2)}
    bench.console.print(f"  records/s: bare {bare:.1f}, Kafka to Kafka {daemon:.1f}")


def _rounds(bench: Bench, load: _Load, here: Settings, backbone: Backbone) -> list[tuple[float, float]]:
    """(bare seconds, daemon seconds) of rounds in turn, the bare backbone with its best batch size."""
    bootstrap.create_topics(here)
    with bootstrap.Traffic(here) as traffic:
        traffic.send(load.requests)
    bench.console.print(f"  {load.name}: choosing the bare backbone's batch size ...")
    batch = min(BATCHES, key=lambda size: seconds(lambda: load.bare(size)))
    bench.notes[f"{load.name}_bare_batch"] = batch
    texts = [str(row["input"]) for row in load.requests]
    pairs = []
    for number in range(LEAST_PAIRS):
        bare_s = seconds(lambda: load.bare(batch))
        with bootstrap.zero_experts(here, backbone, texts, EXPERTS) as answerer:
            passage = bootstrap.serve_through(here, answerer, len(load.requests), f"{load.name}-{number}")
        pairs.append((bare_s, passage.seconds))
        bench.console.print(
            f"  round {number + 1}: bare {bare_s:.1f} s, Kafka to Kafka {passage.seconds:.1f} s"
        )
    return pairs


def measure_overhead(bench: Bench) -> None:
    """overhead_ms: processor time outside the model, a record."""
    with (
        tempfile.TemporaryDirectory() as folder,
        bootstrap.demo_broker(Path(folder) / "broker") as servers,
    ):
        here = _tiny(_here(bench.settings, servers, Path(folder), "overhead"), Path(folder))
        bootstrap.create_topics(here)
        distinct, count = bench.config.sizes.distinct, bench.config.overhead_records
        requests: Sequence[dict[str, Any]] = plain_records(distinct)
        with bootstrap.Traffic(here) as traffic:
            traffic.send([*requests] * (count // distinct))
        backbone = bootstrap.load_backbone(here)
        texts = [row["input"] for row in requests]
        with bootstrap.zero_experts(here, backbone, texts, EXPERTS) as answerer:
            passage = bootstrap.serve_through(here, answerer, count, "overhead")
    bench.notes["overhead_ms"] = round((passage.cpu_s - passage.model_cpu_s) * 1000 / passage.records, 4)


def _here(settings: Settings, servers: str, folder: Path, name: str) -> Settings:
    """The same settings on the bench's own broker, whatever the operator's asks of its clients."""
    kafka = KafkaConfig(bootstrap_servers=servers, prefix=f"bench.{name}.")
    return bootstrap.settings_within(settings, folder).model_copy(update={"kafka": kafka})


def _tiny(settings: Settings, folder: Path) -> Settings:
    tiny = bootstrap.tiny_model(settings, folder / "tiny")
    return settings.model_copy(
        update={
            "model": replace(settings.model, folder=tiny, stem_layers=1),
            "generation": replace(settings.generation, max_new_tokens=2),
        }
    )
