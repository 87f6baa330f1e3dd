"""How much of the bare model's speed is left when the daemon stands around it.

One run, no training under way, the same records: the bare backbone (length-sorted `generate`, the best of three batch
sizes) and the daemon from Kafka to Kafka take turns; the ratio of a round is bare seconds over daemon seconds, and the
median of the rounds is reported. Free text and `choices` apart. Four experts whose B is zero are live, so that routing,
scoring and the pool's products are paid for while the texts stay those of the bare model. Last, with a tiny model, the
processor time that the daemon itself takes for a record.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputConfig:
    """What the command line says."""

    records: int = 128
    rounds: int = 3
    overhead_records: int = 2000
    report: Path | None = None


def throughput(config: ThroughputConfig, settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, print, write; the report."""
    torch.manual_seed(0)
    backbone = bootstrap.load_backbone(settings)
    free = _requests(config.records)
    chosen = _with_choices(free)
    kinds: dict[str, tuple[list[dict[str, Any]], Callable[[int], None]]] = {
        "kafka_to_kafka": (free, lambda batch: _generate(backbone, settings, free, batch)),
        "kafka_to_kafka_choices": (chosen, lambda batch: _rank(backbone, chosen, batch)),
    }
    ratios: dict[str, float] = {}
    table = Table(title=f"{config.records} records, median of {config.rounds} rounds")
    for name in ("what", "bare, records/s", "best batch", "Kafka to Kafka, records/s", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    with tempfile.TemporaryDirectory() as folder, bootstrap.demo_broker(Path(folder) / "broker") as servers:
        for name, (requests, bare) in kinds.items():
            console.print(f"{name}: choosing the bare backbone's batch size ...")
            best = min(BATCHES, key=lambda batch: _seconds(bare, batch))
            here = _here(settings, servers, Path(folder), name)
            bootstrap.create_topics(here)
            with bootstrap.Traffic(here) as traffic:
                traffic.send(requests)
            pairs = []
            for number in range(config.rounds):
                bare_s = _seconds(bare, best)
                with bootstrap.zero_experts(
                    here, backbone, [row["input"] for row in free], EXPERTS
                ) as answerer:
                    passage = bootstrap.serve_through(here, answerer, config.records, f"{name}-{number}")
                pairs.append((bare_s, passage.seconds))
                console.print(
                    f"  round {number + 1}: bare {bare_s:.1f} s, Kafka to Kafka {passage.seconds:.1f} s"
                )
            ratios[name] = statistics.median(bare_s / daemon_s for bare_s, daemon_s in pairs)
            rates = [config.records / statistics.median(column) for column in zip(*pairs, strict=True)]
            table.add_row(name, f"{rates[0]:.1f}", str(best), f"{rates[1]:.1f}", f"{ratios[name]:.2f}")
        overhead_ms = _overhead_ms(config, _here(settings, servers, Path(folder), "overhead"), Path(folder))
    console.print(table)
    console.print(f"The daemon's own processor time with a tiny model: {overhead_ms:.2f} ms a record")
    document = {
        "ratios": {key: round(value, 4) for key, value in ratios.items()},
        "overhead_ms": round(overhead_ms, 4),
    }
    if config.report is not None:
        config.report.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"Report: {config.report}")
    return document


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
        f"store.folder={folder / name}",
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
    with bootstrap.Traffic(settings) as traffic:
        traffic.send(_requests(200) * (config.overhead_records // 200))
    answerer = bootstrap.mixture_answerer(settings, bootstrap.load_backbone(settings))
    passage = bootstrap.serve_through(settings, answerer, config.overhead_records, "overhead")
    return (passage.cpu_s - passage.model_cpu_s) * 1000 / passage.records
