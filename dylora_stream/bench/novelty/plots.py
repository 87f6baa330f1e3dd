"""Pictures beside the report: ROC curves, promised against actual alarm rates, the stream's records on a plane."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # draws with Agg: no window, no state
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dylora_stream.bench.novelty.judging import FUSED
from dylora_stream.bench.novelty.learner import Played
from dylora_stream.bench.novelty.metrics import GRID
from dylora_stream.bench.novelty.script import STRAYS, Script

__all__ = ["plot", "plot_clusters"]

DOTS_PER_INCH = 120
COMPONENTS = 50  # principal ones, before the plane is chosen in which skills lie apart
COLOURS = 20  # of matplotlib's tab20


def plot(document: Mapping[str, Any], beside: Path) -> list[Path]:
    """ROC and calibration as PNGs beside a file, where the document has them. The files' paths."""
    details, paths = document["details"], []
    if details.get("roc"):
        paths.append(_lines(details["roc"], beside.with_name(f"{beside.stem}-roc.png")))
    if "false_alarm" in details:
        path = beside.with_name(f"{beside.stem}-calibration.png")
        paths.append(_calibration(details["false_alarm"], path))
    return paths


def plot_clusters(script: Script, played: Played, beside: Path) -> Path:
    """The stream at even moments: a dot a record, by the expert that has it then; hollow where nobody has."""
    plane = _plane(script.rows.features[script.lines], script.labels)
    shade = {expert: f"C{number}" if number < 10 else None for number, expert in enumerate(played.experts)}
    figure = Figure(figsize=(4 * len(played.snapshots), 4.2), layout="constrained")
    for axes, owners in zip(
        np.atleast_1d(figure.subplots(1, len(played.snapshots))), played.snapshots, strict=True
    ):
        for expert in dict.fromkeys(owners):
            mine = np.array([owner == expert for owner in owners])
            dots = plane[: len(owners)][mine]
            if expert is None:
                axes.scatter(*dots.T, s=8, facecolors="none", edgecolors="grey", linewidths=0.4)
            else:
                axes.scatter(*dots.T, s=6, color=shade.get(expert))
        axes.set_title(f"after {len(owners)} records: {len({o for o in owners if o})} experts", fontsize=9)
        axes.set(xticks=[], yticks=[])
        for label in dict.fromkeys(script.labels[: len(owners)]):
            own = np.array([name == label for name in script.labels[: len(owners)]])
            axes.annotate(label, np.median(plane[: len(owners)][own], axis=0), fontsize=6)
    path = beside.with_name(f"{beside.stem}-clusters.png")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


def _plane(features: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """(n, 2): where tasks lie apart best; the two widest directions where there are fewer than three."""
    scaled = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)
    count = min(COMPONENTS, *scaled.shape)
    components = PCA(n_components=count, random_state=0).fit_transform(scaled)
    is_task = np.array([label not in STRAYS for label in labels])
    tasks = np.array(labels)[is_task]
    if len(set(tasks.tolist())) < 3:
        return np.asarray(components[:, :2])
    discriminant = LinearDiscriminantAnalysis(n_components=2, solver="eigen", shrinkage=0.1)
    return np.asarray(discriminant.fit(components[is_task], tasks).transform(components))


def _lines(curves: Mapping[str, Sequence[float]], path: Path) -> Path:
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(GRID, curve, color=f"C{number}", linewidth=2.5 if name == FUSED else 1.0, label=name)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.6)
    axes.set(xlabel="known rows called novel", ylabel="rows of a left-out task called novel")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


def _calibration(alarms: Mapping[str, Any], path: Path) -> Path:
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    limit = max(alarms["nominal"])
    axes.plot([0, limit], [0, limit], color="grey", linewidth=0.6, label="promised")
    axes.plot(alarms["nominal"], alarms["actual"], label="exchangeable rows")
    axes.set(xlabel="promised false-alarm rate", ylabel="known rows called novel")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path
