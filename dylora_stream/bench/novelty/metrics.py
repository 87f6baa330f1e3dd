"""Numbers from scores and from assignments: areas, rates, agreement. Higher score = more novel."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom
from sklearn.metrics import (
    adjusted_rand_score,
    homogeneity_score,
    normalized_mutual_info_score,
    roc_auc_score,
    roc_curve,
)

__all__ = ["Agreement", "agreement", "area", "curve", "false_positives", "interval", "on_grid"]

GRID = np.linspace(0.0, 1.0, 101)  # false-positive rates at which curves are averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well experts follow tasks over the same records; all in [0, 1], ARI may be a little below 0."""

    purity: float
    homogeneity: float
    nmi: float
    ari: float


def area(known: np.ndarray, novel: np.ndarray) -> float:
    """AUROC: how often a novel row (m,) scores above a known one (n,); ties count half."""
    labels, scores = _pooled(known, novel)
    return float(roc_auc_score(labels, scores))


def false_positives(known: np.ndarray, novel: np.ndarray, found: float = 0.95) -> float:
    """Share of known rows at or above the threshold that `found` of the novel ones reach (FPR95)."""
    ranked = np.sort(novel)
    threshold = ranked[int((1.0 - found) * len(ranked) + 1e-9)]
    return float((known >= threshold).mean())


def curve(known: np.ndarray, novel: np.ndarray) -> np.ndarray:
    """(101,) true-positive rates at false-positive rates 0, 0.01 … 1."""
    labels, scores = _pooled(known, novel)
    false, true, _ = roc_curve(labels, scores)
    return np.asarray(np.interp(GRID, false, true))


def on_grid(p_values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """(len(grid),) share of p-values at or below each nominal rate; nan counts as novel."""
    return np.array([1.0 - float((p_values > rate).mean()) for rate in grid])


def interval(rate: float, rows: int, level: float = 0.99) -> tuple[float, float]:
    """Shares between which a binomial count of `rows` tries at `rate` falls with that probability."""
    low, high = binom.interval(level, rows, rate)
    return float(low) / rows, float(high) / rows


def agreement(tasks: Sequence[str], experts: Sequence[str]) -> Agreement:
    """Of each record's task with its expert."""
    owners: dict[str, Counter[str]] = {}
    for task, expert in zip(tasks, experts, strict=True):
        owners.setdefault(expert, Counter())[task] += 1
    majority = sum(counts.most_common(1)[0][1] for counts in owners.values())
    return Agreement(
        purity=majority / len(tasks),
        homogeneity=float(homogeneity_score(tasks, experts)),
        nmi=float(normalized_mutual_info_score(tasks, experts)),
        ari=float(adjusted_rand_score(tasks, experts)),
    )


def _pooled(known: np.ndarray, novel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of both; infinities become the largest numbers, in their order."""
    labels = np.repeat([0, 1], [len(known), len(novel)])
    return labels, np.nan_to_num(np.concatenate([known, novel]).astype(np.float64))
