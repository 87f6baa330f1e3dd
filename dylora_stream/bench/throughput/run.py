"""All parts after one another."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console

from dylora_stream.bench.throughput.accuracy import measure_accuracy
from dylora_stream.bench.throughput.answering import measure_answering
from dylora_stream.bench.throughput.config import ThroughputConfig
from dylora_stream.bench.throughput.daemon import measure_daemon, measure_overhead
from dylora_stream.bench.throughput.decoding import measure_decoding
from dylora_stream.bench.throughput.measuring import Bench
from dylora_stream.bench.throughput.mixed import measure_mixed
from dylora_stream.bench.throughput.report import document, plot, table, write
from dylora_stream.bench.throughput.training import measure_training
from dylora_stream.settings import Settings

__all__ = ["throughput"]

MEASURES: Mapping[str, Callable[[Bench], None]] = {
    "mixed": measure_mixed,
    "decode": measure_decoding,
    "answer": measure_answering,
    "train": measure_training,
    "kafka": measure_daemon,
    "overhead": measure_overhead,
    "accuracy": measure_accuracy,
}  # by config.PARTS


def throughput(config: ThroughputConfig, settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, print, write; the report."""
    torch.manual_seed(0)
    bench = Bench(config=config, settings=settings, console=console)
    for part in config.only:
        console.print(f"{part} ...")
        MEASURES[part](bench)
        write(bench)
    console.print(table(bench))
    if config.report is not None:
        console.print(f"Report: {config.report}")
    if (drawn := plot(bench)) is not None:
        console.print(f"Plot: {drawn}")
    return document(bench)
