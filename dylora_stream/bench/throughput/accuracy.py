"""Held-out accuracy of experts trained our way and by a PEFT loop: equal rows, first weights, batches, rates and steps.

A single training's accuracy moves by up to 0.09 with the last bit of its arithmetic, so that every task is trained
several times, each time from other first weights and in another order, which both ways share. What is trained is kept
in `bench/throughput` of the data folder: a run that was stopped goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch

from dylora_stream.bench.store import Store, digest, ground_of
from dylora_stream.bench.throughput.data import TaskRows, read_tasks
from dylora_stream.bench.throughput.measuring import Bench
from dylora_stream.bench.throughput.report import write
from dylora_stream.bench.throughput.training import Contest
from dylora_stream.core.recipes import SEEDING
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.training import score_rows

__all__ = ["mean_over_tasks", "measure_accuracy"]

Hits = dict[str, np.ndarray]  # by who trained: (test rows,) bool


def measure_accuracy(bench: Bench) -> None:
    """`train_accuracy`, written after every training, with the whole seeding recipe."""
    config = bench.config
    assert config.train_data is not None  # see ThroughputConfig
    backbones = bench.backbone(), bench.bare()
    tasks = read_tasks(config.train_data, backbones[0], config.sizes, config.train_tasks)
    store = Store(bench.settings.store.folder / "bench" / "throughput")
    found: dict[str, list[Hits]] = {task.name: [] for task in tasks}
    for seed in config.train_seeds:
        for task in tasks:
            hits = _kept_or_trained(store, backbones, task, seed)
            found[task.name].append(hits)
            bench.console.print(f"  {task.name}, seed {seed}: {_shares([hits])}")
            bench.notes["train_accuracy"] = _summary(found)
            write(bench)
    gain = bench.notes["train_accuracy"]["ours_over_peft"]
    bench.console.print(
        f"  {len(tasks)} tasks, {len(config.train_seeds)} trainings each: ours over PEFT "
        f"{gain['mean']:+.4f} ± {gain['margin_95']:.4f}"
    )


def _kept_or_trained(store: Store, backbones: tuple[Backbone, Backbone], task: TaskRows, seed: int) -> Hits:
    backbone = backbones[0]
    key = digest(
        **ground_of(backbone),
        recipe=asdict(SEEDING),
        seed=seed,
        train=[[row.input, row.output] for row in task.train],
        test=[[row.input, row.output] for row in task.test],
    )
    kept = store.tensors("accuracy", key)
    if kept is not None:
        return {who: tensor.numpy() for who, tensor in kept.items()}
    hits = _trained_both_ways(backbones, task, seed)
    store.put_tensors("accuracy", key, {who: torch.from_numpy(each) for who, each in hits.items()})
    return hits


def _trained_both_ways(backbones: tuple[Backbone, Backbone], task: TaskRows, seed: int) -> Hits:
    """PEFT's adapters stay in float32, as it has them, because in bfloat16 small steps are lost to rounding."""
    contest = Contest(backbones, task.train, SEEDING, seed)
    contest.plain(dtype=torch.float32)
    adapters = {"base": None, "ours": contest.trained.adapter, "peft": contest.theirs()}
    return {who: score_rows(backbones[0], task.test, adapter).is_exact for who, adapter in adapters.items()}


def _shares(trainings: Sequence[Hits]) -> dict[str, float]:
    """Exact match by who trained, over all trainings."""
    return {who: round(float(np.mean([hits[who] for hits in trainings])), 4) for who in trainings[0]}


def _summary(found: Mapping[str, Sequence[Hits]]) -> dict[str, object]:
    done = {name: trainings for name, trainings in found.items() if trainings}
    tasks = {name: _shares(trainings) for name, trainings in done.items()}
    gain, margin = mean_over_tasks(
        [
            np.stack([hits["ours"].astype(float) - hits["peft"] for hits in trainings])
            for trainings in done.values()
        ]
    )
    return {
        "mean": {
            who: round(float(np.mean([each[who] for each in tasks.values()])), 4)
            for who in ("base", "ours", "peft")
        },
        "ours_over_peft": {"mean": round(gain, 4), "margin_95": round(margin, 4)},
        "trainings": {name: [_shares([hits]) for hits in trainings] for name, trainings in done.items()},
        "tasks": tasks,
    }


def mean_over_tasks(gains: Sequence[np.ndarray]) -> tuple[float, float]:
    """The mean of the tasks' means and its 95 % margin; each of gains: (trainings, rows) of a task.

    The margin is that of test rows, and of trainings where a task has several.
    """
    variances = []
    for gain in gains:
        trainings, rows = gain.shape
        variance = gain.mean(axis=0).var() / rows
        if trainings > 1:
            variance += gain.mean(axis=1).var(ddof=1) / trainings
        variances.append(variance)
    return float(np.mean([gain.mean() for gain in gains])), float(
        1.96 * np.sqrt(np.sum(variances)) / len(gains)
    )
