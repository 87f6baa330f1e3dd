"""The check before a version goes live: which rows are held out, and what must be better on them.

Rows are held out by the hash of their input, so that a row held out from version 1 is held out from version 2 as well,
and equal inputs stand on one side. Losses are compared row by row (paired t): rows differ more than versions do.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.core.statistics import binomial

__all__ = ["CheckConfig", "Verdict", "compare", "held_out", "is_apart", "is_drift", "serves_as_well"]

SURELY = 0.01  # chance at which rows that are told apart as wanted are refused


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """What a new expert or version must show."""

    heldout_share: float = 0.2
    """Share of a buffer's rows that is never trained on, 0..0.5: 16 of 80."""
    heldout_min: int = 8
    """Rows held out at least, as long as that leaves as many for training."""
    routing: float = 0.9
    """Share of an expert's rows that are told apart from other experts by their inputs alone, 0..1; a new one is
    refused where its rows (leave-one-out) show surely less."""
    known_exact: float = 0.9
    """Share of held-out rows that the bare backbone answers exactly, from which it needs no expert, 0..1."""
    known_loss: float = 0.02
    """Nats a token; the same, by loss."""
    drift_loss: float = 0.1
    """An expert serves rows already when their loss lies at most this far on the way from its own held-out loss to the
    backbone's loss on these rows, 0..1; and from that of an expert of their own, once there is one to compare with."""
    drift_exact: float = 0.25
    """... and its exact share is at most this below its own (two standard errors of 16 rows), and at least one half."""
    drift_experts: int = 3
    """Experts that are asked, the nearest ones; each costs a pass over the held-out rows."""
    seed_t: float = 2.0
    """Paired t of the loss against backbone and served experts that a first version must reach (2.0: p ≈ 0.03)."""
    seed_gain: float = 0.05
    """... and the mean gain, nats a token: a skill is learned or it is not."""
    consolidate_t: float = 1.0
    """Paired t against the served version that a later version must reach."""
    exact_slack: float = 0.1
    """A version may lose at most this share of exact answers."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout_share <= 0.5:
            raise ValueError(f"heldout_share is {self.heldout_share}: it must lie above 0 and at most at 0.5")
        for name in ("heldout_min", "drift_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("routing", "known_exact", "drift_loss", "drift_exact", "exact_slack"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether `after` is better than `before` on the same rows, and by how much (mean nats a token, paired t)."""

    is_better: bool
    gain: float
    t: float


def held_out(inputs: Sequence[str], config: CheckConfig) -> np.ndarray:
    """(n,) bool: rows that are not trained on. The same input falls on the same side, but for `heldout_min`."""
    shares = np.array([_position(text) for text in inputs])
    chosen = shares < config.heldout_share
    least = min(config.heldout_min, len(inputs) // 2)
    if chosen.sum() < least:
        chosen = shares <= np.sort(shares)[least - 1]
    if len(inputs) and chosen.all():
        chosen = shares < shares.max()
    return np.asarray(chosen)


def compare(before: np.ndarray, after: np.ndarray, *, min_t: float, min_gain: float = 0.0) -> Verdict:
    """Paired comparison of losses (n,): better when the mean falls by more than `min_gain` with at least `min_t`."""
    gains = before.astype(np.float64) - after.astype(np.float64)
    gain = float(gains.mean())
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else math.inf
    error = spread / math.sqrt(len(gains))
    t = gain / error if error > 0 else math.copysign(1e6, gain) if gain else 0.0
    return Verdict(is_better=gain > min_gain and t >= min_t, gain=gain, t=t)


def is_drift(
    found: tuple[float, float], own: tuple[float, float], backbone_loss: float, config: CheckConfig
) -> bool:
    """Whether an expert serves new rows, (loss, exact share) `found`, about as well as its `own` held-out ones."""
    (loss, exact), (own_loss, own_exact) = found, own
    near = own_loss + config.drift_loss * max(backbone_loss - own_loss, 0.0)
    return loss <= near and exact >= max(own_exact - config.drift_exact, 0.5)


def serves_as_well(
    rival: tuple[np.ndarray, float], own: tuple[np.ndarray, float], backbone: np.ndarray, config: CheckConfig
) -> bool:
    """Whether an expert serves rows as well as one that was trained on their kind: (losses (n,), exact share) each of
    held-out rows, and the backbone's losses.

    The new one must be better by no more than a later version is asked for, and the rival not far behind in loss or in
    exact answers: of eight rows one that is very bad proves nothing by its t (a rival with 0.25 exact for 0.75 once
    passed by that alone). Two experts of one skill cost twice, and share its rows between them.
    """
    (losses, exact), (own_losses, own_exact) = rival, own
    ahead = compare(losses, own_losses, min_t=config.consolidate_t, min_gain=config.seed_gain)
    way = max(float(backbone.mean() - own_losses.mean()), 0.0)
    is_near = ahead.gain <= config.drift_loss * way and exact >= own_exact - config.drift_exact
    return not ahead.is_better and is_near


def is_apart(share: float, rows: int, config: CheckConfig) -> bool:
    """Whether the share of so many rows that are told apart may be what is wanted, and only chance kept it below.

    A share of 0.9 asked of 48 rows themselves refused skills that are told apart 0.9 of the time, and handed their rows
    to a neighbour: ARI on five orders of loghub 0.69 instead of 0.77, on two of `continual/bare` 0.86 instead of 0.79.
    """
    if not 0 < config.routing < 1:
        return share >= config.routing
    return binomial(round(share * rows), rows, config.routing) > SURELY


def _position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
