"""What was found, as a table with the aims beside the numbers, as JSON, and as a plot over the pool's sizes."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dylora_stream.bench.throughput.config import AIMS, Aim
from dylora_stream.bench.throughput.measuring import Bench

__all__ = ["document", "plot", "table", "write"]

OVERHEAD_AIM = Aim(bound=1.0)  # ms a record


def document(bench: Bench) -> dict[str, Any]:
    """The report: ratios and all pairs in ms (the reference's, ours), and what else was noted."""
    return {
        "ratios": {name: round(ratio, 4) for name, ratio in bench.ratios.items()},
        **bench.notes,
        "dtype": bench.dtype,
        "threads": torch.get_num_threads(),
        "pairs": {name: [list(pair) for pair in pairs] for name, pairs in bench.pairs.items()},
    }


def write(bench: Bench) -> None:
    """To the report's file, if one was asked for; after each part, so that Ctrl-C leaves what is done."""
    if bench.config.report is not None:
        bench.config.report.write_text(json.dumps(document(bench), indent=1) + "\n", encoding="utf-8")


def table(bench: Bench) -> Table:
    """A row a number."""
    drawn = Table(
        title="Medians of pairs in turn",
        caption="ratio: time over the reference's; train_… and kafka_…: speed over the reference's",
    )
    for name in ("what", "ratio", "aim", "", "reference, ms", "ours, ms", "pairs"):
        drawn.add_column(name, justify="left" if name in ("what", "") else "right")
    for name, ratio in bench.ratios.items():
        pairs = bench.pairs[name]
        middle = [f"{statistics.median(times):,.0f}" for times in zip(*pairs, strict=True)]
        drawn.add_row(name, f"{ratio:.3f}", *_aim(AIMS.get(name), ratio), *middle, str(len(pairs)))
    overhead = bench.notes.get("overhead_ms")
    if overhead is not None:
        drawn.add_row("overhead, ms a record", f"{overhead:.2f}", *_aim(OVERHEAD_AIM, overhead), "", "", "")
    return drawn


def _aim(aim: Aim | None, value: float) -> tuple[str, str]:
    if aim is None:
        return "", ""
    return str(aim), "[green]met[/]" if aim.is_met(value) else "[red]missed[/]"


def plot(bench: Bench) -> Path | None:
    """Ratio over the pool's size, as a PNG beside the report; None where there is nothing to draw or to draw with."""
    lines = _lines(bench)
    if bench.config.report is None or not lines:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        bench.console.print("No plot: matplotlib is not installed (pip install 'dylora-stream[bench]')")
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for dtype, points in lines.items():
        (drawn,) = axes.plot(*zip(*points, strict=True), marker="o", label=f"one pool, {dtype}")
        for name, style in (("peft_mixed", "--"), ("peft_one", ":")):
            for found, ratio in bench.ratios.items():
                if found.startswith(name) and found.endswith(dtype):
                    axes.axhline(ratio, color=drawn.get_color(), linestyle=style, label=found)
    axes.axhline(1.0, color="black", linewidth=0.8)
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    axes.set_xlabel("experts in the pool")
    axes.set_ylabel("time over the bare model's")
    batch = bench.config.sizes
    axes.set_title(f"{batch.rows} rows of {batch.tokens} tokens, each row another expert, rank {batch.rank}")
    axes.legend()
    path = bench.config.report.with_suffix(".png")
    figure.savefig(path, dpi=150)
    return path


def _lines(bench: Bench) -> dict[str, list[tuple[int, float]]]:
    """dtype → (experts in the pool, ratio), by size."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, ratio in bench.ratios.items():
        if found := re.fullmatch(r"mixed_(\d+)_(\w+)", name):
            lines.setdefault(found[2], []).append((int(found[1]), ratio))
    return {dtype: sorted(points) for dtype, points in lines.items()}
