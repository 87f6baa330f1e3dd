"""Turn and turn about: how two things are timed against each other, and where the numbers are kept."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

from dylora_stream import bootstrap
from dylora_stream.bench.throughput.config import LEAST_PAIRS, ThroughputConfig
from dylora_stream.model.backbone import Backbone, choose_dtype
from dylora_stream.model.config import Dtype, ModelConfig
from dylora_stream.settings import Settings

__all__ = ["Bench", "in_turn", "seconds"]

Run = Callable[[], object]


def seconds(run: Run) -> float:
    """How long a run takes, on whatever device it runs."""
    _synchronise()
    began = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - began


def in_turn(runs: Sequence[Run], rounds: int) -> list[tuple[float, ...]]:
    """Seconds of each run in each round: A, B, A, B …"""
    return [tuple(seconds(run) for run in runs) for _ in range(rounds)]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One run of the bench: what to measure it on, and what was found. `notes` is free JSON beside the numbers."""

    config: ThroughputConfig
    settings: Settings
    console: Console
    ratios: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # ms: the reference's, ours
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The configured one, `auto` resolved."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return str(choose_dtype(self.settings.model.dtype, device)).removeprefix("torch.")

    def backbone(self, dtype: Dtype | None = None) -> Backbone:
        """A freshly loaded backbone, as the daemon has it."""
        return self._loaded(replace(self.settings.model, dtype=dtype or self.settings.model.dtype))

    def bare(self, dtype: Dtype | None = None) -> Backbone:
        """A freshly loaded backbone, as transformers has it: its attention is the fused kernel's."""
        dtype = dtype or self.settings.model.dtype
        return self._loaded(replace(self.settings.model, dtype=dtype, attention="fused"))

    @torch.no_grad()
    def compare(self, name: str, reference: Run, ours: Run, alike: Run | None = None) -> None:
        """Ours over the reference: both warmed up, then in turn. `alike`: the reference with our attention, in turn
        with the two; ours over it is NAME_same_attention.
        """
        runs = (reference, ours) if alike is None else (reference, ours, alike)
        in_turn(runs, 1)
        rounds = in_turn(runs, self.config.pairs)
        self.keep(name, [(times[0], times[1]) for times in rounds])
        if alike is not None:
            self.keep(f"{name}_same_attention", [(times[2], times[1]) for times in rounds])

    def keep(self, name: str, pairs: Sequence[tuple[float, float]], *, is_speed: bool = False) -> None:
        """(reference's, ours) in seconds; the ratio is of ours over the reference's times, or, as speed, under them."""
        assert len(pairs) >= LEAST_PAIRS
        each = [reference / ours if is_speed else ours / reference for reference, ours in pairs]
        self.ratios[name] = statistics.median(each)
        self.pairs[name] = [(round(a * 1000, 3), round(b * 1000, 3)) for a, b in pairs]
        ms, ours_ms = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
        self.console.print(f"  {name}: {self.ratios[name]:.3f} ({ms:,.0f} ms, {ours_ms:,.0f} ms)")

    def _loaded(self, model: ModelConfig) -> Backbone:
        return bootstrap.load_backbone(self.settings.model_copy(update={"model": model}))
