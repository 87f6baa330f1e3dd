"""Who answers a row: from router logits and maturities to experts and weights. Pure; scores nothing, learns nothing.

The hybrid rule is the paper's. A mature winner takes its row alone (SPARSE). A nascent winner shares it with the next
experts and with the backbone, a permanent null expert that has no blocks (DENSE): its weights are young, and a share
for the backbone limits what a bad one can do. A mature winner shares as well with a nascent expert that is close behind
and has a seat, so that a young one is not starved by an established neighbour. A row far outside of every expert is the
backbone's (BACKBONE).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dylora_stream.core.messages import Policy
from dylora_stream.core.statistics import softmax

__all__ = [
    "METHODS", "NULL_EXPERT", "SERVED_METHODS", "Method", "Routing", "RoutingConfig", "decide", "to_backbone",
]  # fmt: skip

NULL_EXPERT = -1  # the backbone's index among the experts

Method = Literal[
    "base", "sum", "olora", "closed_form", "ridge", "router", "hybrid", "retriever", "moa", "sapt", "gainlora",
    "mora", "smora", "flylora", "arrow", "xlora", "amlora", "mixlora", "compose", "hierarchical",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)
# What they learn follows from the installed experts' adapters and features: any worker can repeat it, in install order.
# The others learn from stored rows, or their experts train in their company, which the daemon does not do.
SERVED_METHODS: tuple[Method, ...] = ("hybrid", "closed_form", "base", "ridge", "retriever", "moa", "arrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How rows are shared."""

    method: Method = "hybrid"
    """The gate, one a method of the field. The daemon serves SERVED_METHODS, `bench continual` measures all."""

    top_k: int = 3
    """Members of a dense row, the backbone among them; at least 2. The paper's two experts, and the null expert."""

    temperature_dense: float = 8.0
    """Nats of logit difference that count as one. A discriminant in hundreds of dimensions is over-confident: its
    differences are tens to hundreds of nats."""

    null_share: float = 0.15
    """The backbone's part of a dense row, in (0, 0.5). A sure router gives the leader 1 - this."""

    close_share: float = 0.2
    """Posterior (at `temperature_dense`) from which a nascent expert behind a mature winner shares the row, in (0,
    0.5]."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.top_k < 2:
            raise ValueError(f"top_k must be at least 2 (one expert and the backbone), not {self.top_k}")
        if not self.temperature_dense > 0:
            raise ValueError(f"temperature_dense must be above 0, not {self.temperature_dense}")
        if not 0 < self.null_share < 0.5:
            raise ValueError(f"null_share must lie between 0 and 0.5, not {self.null_share}")
        if not 0 < self.close_share <= 0.5:
            raise ValueError(f"close_share must lie in (0, 0.5], not {self.close_share}")


@dataclass(frozen=True, slots=True)
class Routing:
    """Experts and weights of n rows.

    experts: (n, m) int64, index into the registry's experts, -1 = the backbone. weights: (n, m) float32. Members
    stand in descending order of weight. Padding is expert -1 with weight 0. rank_weights: (n, m, r) float32 where a
    gate weighs ranks by row; they take the place of `weights`, which then says how much of a member is used.
    Invariant: a dense row has at least two members with weight, unless there is one expert; a sparse row has one.
    """

    experts: np.ndarray
    weights: np.ndarray
    policies: tuple[Policy, ...]
    rank_weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.policies)

    def members(self, row: int) -> list[tuple[int, float]]:
        """(expert index, weight) of each member with weight, largest first."""
        pairs = zip(self.experts[row].tolist(), self.weights[row].tolist(), strict=True)
        return [(expert, weight) for expert, weight in pairs if weight > 0]


def to_backbone(rows: int) -> Routing:
    """All rows to the bare backbone."""
    experts = np.full((rows, 1), NULL_EXPERT, dtype=np.int64)
    return Routing(experts, np.ones((rows, 1), dtype=np.float32), (Policy.BACKBONE,) * rows)


def decide(
    logits: np.ndarray,
    is_mature: np.ndarray,
    is_beyond: np.ndarray,
    allowed: np.ndarray,
    config: RoutingConfig,
) -> Routing:
    """The hybrid rule.

    logits: (n, E); is_mature: (E,) bool; is_beyond: (n,) bool, rows outside of every expert; allowed: (n, E) bool,
    False for other tenants' experts.
    """
    rows, experts = logits.shape
    has_expert = allowed.any(axis=1) & ~is_beyond if experts else np.zeros(rows, dtype=bool)
    if not has_expert.any():
        return to_backbone(rows)
    masked = np.where(allowed, logits, -np.inf)
    masked[~has_expert] = 0.0
    posterior = softmax(masked / config.temperature_dense)  # (n, E)
    winner = masked.argmax(axis=1)
    best = np.argsort(-posterior, axis=1, kind="stable")[:, : config.top_k - 1]  # who has a seat
    shares = np.take_along_axis(posterior, best, axis=1)
    nascent_near = (~is_mature[best] & (shares >= config.close_share)).any(axis=1)
    is_sparse = has_expert & is_mature[winner] & ~nascent_near
    is_dense = has_expert & ~is_sparse

    members, weights = _share(best, shares, config)
    members[is_sparse, 0] = winner[is_sparse]
    for mask in (is_sparse, ~has_expert):
        weights[mask] = 0.0
        weights[mask, 0] = 1.0
        members[mask, 1:] = NULL_EXPERT
    members[~has_expert, 0] = NULL_EXPERT
    policies = np.where(
        is_dense, Policy.DENSE.value, np.where(is_sparse, Policy.SPARSE.value, Policy.BACKBONE.value)
    )
    return Routing(members, weights.astype(np.float32), tuple(Policy(policy) for policy in policies.tolist()))


def _share(best: np.ndarray, shares: np.ndarray, config: RoutingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Members (n, top_k) and weights (n, top_k) of dense rows: the best experts (n, m) and the backbone, by weight."""
    rows, seats = best.shape
    shares = shares / shares.sum(axis=1, keepdims=True) * (1.0 - config.null_share)
    members = np.full((rows, config.top_k), NULL_EXPERT, dtype=np.int64)
    weights = np.zeros((rows, config.top_k))
    members[:, :seats], weights[:, :seats] = best, shares
    weights[:, seats] = config.null_share
    order = np.argsort(-weights, axis=1, kind="stable")
    members, weights = np.take_along_axis(members, order, axis=1), np.take_along_axis(weights, order, axis=1)
    members[weights == 0] = NULL_EXPERT
    return members, weights
