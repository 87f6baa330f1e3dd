"""How much of the bare model's speed is left when the daemon stands around it.

One run, no training under way, the same records: the bare backbone (length-sorted `generate`, the best of three batch
sizes) and the daemon from Kafka to Kafka take turns; the ratio of a round is bare seconds over daemon seconds, and the
median of the rounds is reported. Free text and `choices` apart. Four mature experts whose B is zero are live, so that
routing, scoring and the pool's products are paid for while the texts stay those of the bare model. Last, with a tiny
model, the processor time that the daemon itself takes for a record.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dylora_stream import bootstrap
from dylora_stream.demo.skills import load_skills
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import length_sorted
from dylora_stream.settings import Settings, load_settings

__all__ = ["ThroughputConfig", "throughput"]

BATCHES = (8, 16, 32)  # of the bare backbone
CHOICES = 4  # a record
EXPERTS = 4
DISTINCT = 200  # texts of the overhead's records, which its experts know


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputConfig:
    """What the command line says."""

    records: int = 128
    rounds: int = 3
    overhead_records: int = 2000
    report: Path | None = None


@dataclass(frozen=True, slots=True)
class _Load:
    """One kind of records, and how the bare backbone answers all of them in batches of a size."""

    name: str
    requests: list[dict[str, Any]]
    bare: Callable[[int], None]


def throughput(config: ThroughputConfig, settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, print, write; the report."""
    torch.manual_seed(0)
    backbone = bootstrap.load_backbone(settings)
    free = _requests(config.records)
    chosen = _with_choices(free)
    loads = (
        _Load("kafka_to_kafka", free, lambda batch: _generate(backbone, settings, free, batch)),
        _Load("kafka_to_kafka_choices", chosen, lambda batch: _rank(backbone, chosen, batch)),
    )
    table = Table(title=f"{config.records} records, median of {config.rounds} rounds")
    for name in ("what", "bare, records/s", "best batch", "Kafka to Kafka, records/s", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, bootstrap.demo_broker(Path(folder) / "broker") as servers:
        for load in loads:
            here = _here(settings, servers, Path(folder), load.name)
            batch, pairs = _rounds(load, config, here, backbone, console)
            ratios[load.name] = statistics.median(bare_s / daemon_s for bare_s, daemon_s in pairs)
            bare, daemon = (config.records / statistics.median(times) for times in zip(*pairs, strict=True))
            table.add_row(load.name, f"{bare:.1f}", str(batch), f"{daemon:.1f}", f"{ratios[load.name]:.2f}")
        overhead_ms = _overhead_ms(config, _here(settings, servers, Path(folder), "overhead"), Path(folder))
    console.print(table)
    console.print(f"The daemon's own processor time with a tiny model: {overhead_ms:.2f} ms a record")
    rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
    document = {"ratios": rounded, "overhead_ms": round(overhead_ms, 4)}
    if config.report is not None:
        config.report.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"Report: {config.report}")
    return document


def _rounds(
    load: _Load, config: ThroughputConfig, here: Settings, backbone: Backbone, console: Console
) -> tuple[int, list[tuple[float, float]]]:
    """The bare backbone's best batch size, and (bare seconds, daemon seconds) of rounds in turn."""
    bootstrap.create_topics(here)
    with bootstrap.Traffic(here) as traffic:
        traffic.send(load.requests)
    console.print(f"{load.name}: choosing the bare backbone's batch size ...")
    batch = min(BATCHES, key=lambda size: _seconds(load.bare, size))
    texts = [str(row["input"]) for row in load.requests]
    pairs = []
    for number in range(config.rounds):
        bare_s = _seconds(load.bare, batch)
        with bootstrap.zero_experts(here, backbone, texts, EXPERTS) as answerer:
            passage = bootstrap.serve_through(here, answerer, config.records, f"{load.name}-{number}")
        pairs.append((bare_s, passage.seconds))
        console.print(f"  round {number + 1}: bare {bare_s:.1f} s, Kafka to Kafka {passage.seconds:.1f} s")
    return batch, pairs


def _requests(count: int) -> list[dict[str, Any]]:
    """Real inputs of all skills in turn, without answers."""
    skills = load_skills()
    return [{"input": skills[n % len(skills)].rows[n // len(skills)][0]} for n in range(count)]


def _with_choices(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same inputs, each with the answers of four other rows to choose from."""
    outputs = [output for skill in load_skills() for _, output in skill.rows[: len(requests)]]
    return [
        row | {"choices": list(dict.fromkeys(outputs[n * CHOICES : (n + 1) * CHOICES]))}
        for n, row in enumerate(requests)
    ]


def _here(settings: Settings, servers: str, folder: Path, name: str) -> Settings:
    flags = [
        *(f"{row.name}={row.value}" for row in settings.explain() if row.source.startswith("flag")),
        f"kafka.bootstrap_servers={servers}",
        f"kafka.prefix=bench.{name}.",
        f"store.folder={folder}",
        f"model.folder={bootstrap.model_path(settings)}",
    ]
    return load_settings(flags=flags)


def _seconds(run: Callable[[int], None], batch: int) -> float:
    began = time.monotonic()
    run(batch)
    return time.monotonic() - began


@torch.no_grad()
def _generate(backbone: Backbone, settings: Settings, requests: Sequence[dict[str, Any]], batch: int) -> None:
    """transformers' own greedy generate, length-sorted."""
    prompts = backbone.prompt_ids([row["input"] for row in requests])
    for rows in length_sorted([len(prompt) for prompt in prompts], batch):
        tokens = backbone.pad([prompts[row] for row in rows])
        backbone.model.generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            max_new_tokens=settings.generation.max_new_tokens,
            do_sample=False,
            pad_token_id=backbone.eos_id,
        )


@torch.no_grad()
def _rank(backbone: Backbone, requests: Sequence[dict[str, Any]], batch: int) -> None:
    """Every prompt with every choice behind it, length-sorted, logits at the choices only."""
    pairs = [(row["input"], choice) for row in requests for choice in row["choices"]]
    prompts = backbone.prompt_ids([text for text, _ in pairs])
    targets = backbone.target_ids([choice for _, choice in pairs])
    lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    for rows in length_sorted(lengths, batch):
        tokens = backbone.pad([prompts[row] for row in rows], [targets[row] for row in rows])
        backbone.answer_logits(tokens).log_softmax(-1)


def _overhead_ms(config: ThroughputConfig, settings: Settings, folder: Path) -> float:
    """Processor time outside the model, a record."""
    tiny = bootstrap.tiny_model(settings, folder / "tiny")
    settings = settings.model_copy(
        update={
            "model": replace(settings.model, folder=tiny, stem_layers=1),
            "generation": replace(settings.generation, max_new_tokens=2),
        }
    )
    bootstrap.create_topics(settings)
    requests = _requests(DISTINCT)
    with bootstrap.Traffic(settings) as traffic:
        traffic.send(requests * (config.overhead_records // DISTINCT))
    backbone = bootstrap.load_backbone(settings)
    with bootstrap.zero_experts(settings, backbone, [row["input"] for row in requests], EXPERTS) as answerer:
        passage = bootstrap.serve_through(settings, answerer, config.overhead_records, "overhead")
    return (passage.cpu_s - passage.model_cpu_s) * 1000 / passage.records
