"""Training the router's network when an expert is added or changed: one column, cheaply, on what is stored.

loss = cross-entropy of the route on stored exemplars of all experts, the same number of each
     + task_weight · loss of the answer on the new expert's rows, under the dense gates, through the gates' weights.

Only the new expert's column moves; old columns and, once fitted, the shared layers are frozen, so that old routes
change only where the new expert competes. The shared layers are fitted together with the columns the first time there
are two experts to tell apart: with one there is nothing to learn from.

The closed form that the network adds to is cross-fitted here: a discriminant is sure of the rows it was fitted on, and
the network would learn nothing from those.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dylora_stream.core.routing import RoutingConfig
from dylora_stream.core.statistics import ExpertStatistics, LinearDiscriminant
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.exemplars import read_exemplars
from dylora_stream.model.features import LabelledText, split_by_tokens
from dylora_stream.model.live import LiveExperts
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.stem import StemOutput
from dylora_stream.model.tokenised import padded, tokenised
from dylora_stream.model.training import STEP_ANSWER_TOKENS

__all__ = ["RouterLesson", "RouterTrained", "RouterTraining", "dense_shares", "train_router"]

FOLDS = 4  # of the cross-fitted closed form
CALM = 1e-3  # Adam's epsilon: gradients far under it, on routes that are right already, move nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTraining:
    """How the network is trained."""

    rate: float = 2e-3
    """Adam's rate on the column; low, as everything it competes with is frozen."""
    steps: int = 60
    """Full-batch steps on exemplars; each costs a millisecond."""
    exemplars: int = 64
    """Stored rows of each expert, at most."""
    max_tokens: int = 8192
    """Tokens of all exemplars together, which bounds the passes through the stem; longer texts mean fewer rows."""
    task_batches: int = 3
    """Batches of the new rows whose answer loss goes through the gates; each is a forward and a backward pass."""
    task_rows: int = 6
    """Rows of such a batch."""
    task_weight: float = 0.3
    """Of the answer's loss beside the route's."""
    decay: float = 1e-2
    """Weight decay: the closed form is right unless the exemplars say otherwise."""

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}: it must be above 0")
        for name in ("steps", "exemplars", "max_tokens", "task_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("task_batches", "task_weight", "decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLesson:
    """What is learned: the expert that is new or changed, and stored rows of every live expert, itself among them."""

    expert_id: str
    exemplars: Mapping[str, Sequence[LabelledText]]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTrained:
    """The new network, and routing accuracy on the exemplars with the closed form cross-fitted: alone, and with it."""

    network: RouterNetwork
    accuracy_closed_form: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Lines:
    """Exemplars at the stem: states and masks by batch, cross-fitted tempered logits (n, E), right experts (n,)."""

    states: list[Tensor]
    masks: list[Tensor]
    closed_form: Tensor
    owners: Tensor

    def logits(self, network: RouterNetwork, expert_ids: Sequence[str]) -> Tensor:
        parts = [
            network(states, mask, expert_ids) for states, mask in zip(self.states, self.masks, strict=True)
        ]
        return self.closed_form + torch.cat(parts)


def train_router(
    live: LiveExperts,
    network: RouterNetwork | None,
    lesson: RouterLesson,
    routing: RoutingConfig,
    config: RouterTraining,
) -> RouterTrained:
    """A network with the lesson's expert in it; `network` itself is not changed. `live` holds all experts, it included.

    Experts without stored rows take part with their closed form alone. With one expert nothing is trained.
    """
    began = time.perf_counter()
    backbone = live.backbone
    fresh = _copied(network, backbone, lesson)
    tenant = _tenant(live, lesson.expert_id)
    rivals = [expert.expert_id for expert in live.experts if expert.tenant == tenant]
    expert_ids = [expert_id for expert_id in rivals if lesson.exemplars.get(expert_id)]
    if len(expert_ids) < 2 or lesson.expert_id not in expert_ids:
        return RouterTrained(
            network=fresh, accuracy_closed_form=1.0, accuracy=1.0, seconds=time.perf_counter() - began
        )
    lines = _read(backbone, [(name, lesson.exemplars[name]) for name in expert_ids], routing, config)
    parameters = fresh.opened(lesson.expert_id, expert_ids)
    optimizer = torch.optim.AdamW(parameters, lr=config.rate, eps=CALM, weight_decay=config.decay)
    weights = 1.0 / torch.bincount(lines.owners, minlength=len(expert_ids)).clamp(min=1).float()
    tasks = _tasks(backbone, lesson, config)
    with torch.enable_grad():
        for step in range(config.steps):
            loss = nn.functional.cross_entropy(lines.logits(fresh, expert_ids), lines.owners, weight=weights)
            # Answers' batches are spread evenly over the steps.
            if (step + 1) * config.task_batches // config.steps > step * config.task_batches // config.steps:
                loss = loss + config.task_weight * _task_loss(
                    live, fresh, lesson.expert_id, next(tasks), routing
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    fresh.requires_grad_(requires_grad=False)
    fresh.is_fitted = True
    with torch.no_grad():
        alone = (lines.closed_form.argmax(1) == lines.owners).float().mean()
        together = (lines.logits(fresh, expert_ids).argmax(1) == lines.owners).float().mean()
    return RouterTrained(
        network=fresh,
        accuracy_closed_form=float(alone),
        accuracy=float(together),
        seconds=time.perf_counter() - began,
    )


def dense_shares(logits: Tensor, routing: RoutingConfig) -> tuple[Tensor, Tensor]:
    """(experts (n, m) int64, weights (n, m)) of tempered logits (n, E): `core.routing`'s dense rule, with gradients."""
    seats = min(routing.top_k - 1, logits.shape[1])
    top = logits.topk(seats, dim=1)
    return top.indices, top.values.softmax(1) * (1.0 - routing.null_share)


def _copied(network: RouterNetwork | None, backbone: Backbone, lesson: RouterLesson) -> RouterNetwork:
    """A copy to train, or a new network."""
    fresh = RouterNetwork(backbone.width, seed=lesson.seed)
    if network is not None:
        for expert_id in network.expert_ids:
            fresh.add_column(expert_id)
        fresh.load_state_dict(network.state_dict())
        fresh.is_fitted = network.is_fitted
    fresh.add_column(lesson.expert_id)
    return fresh.to(backbone.device)


def _read(
    backbone: Backbone,
    exemplars: Sequence[tuple[str, Sequence[LabelledText]]],
    routing: RoutingConfig,
    config: RouterTraining,
) -> _Lines:
    """Exemplars through the stem, once, and their closed form."""
    read = read_exemplars(backbone, [rows[: config.exemplars] for _, rows in exemplars], config.max_tokens)
    logits = _cross_fitted(read.features, read.owners.numpy(), [name for name, _ in exemplars])
    tempered = torch.from_numpy((logits / routing.temperature_dense).astype(np.float32)).to(backbone.device)
    return _Lines(read.states, read.masks, tempered, read.owners.to(backbone.device))


def _cross_fitted(features: np.ndarray, owners: np.ndarray, expert_ids: Sequence[str]) -> np.ndarray:
    """(n, E) closed-form logits, each row's from a discriminant that has not seen it; an expert's only row is seen."""
    logits = np.zeros((len(features), len(expert_ids)))
    rank = np.zeros(len(owners), dtype=np.int64)  # of a row within its expert
    for owner in range(len(expert_ids)):
        rank[owners == owner] = np.arange((owners == owner).sum())
    for fold in range(FOLDS):
        held_out = rank % FOLDS == fold
        statistics = []
        for owner, expert_id in enumerate(expert_ids):
            mine = owners == owner
            rows = features[mine & ~held_out] if (mine & ~held_out).any() else features[mine]
            statistics.append(ExpertStatistics(expert_id=expert_id, rows=rows))
        logits[held_out] = LinearDiscriminant.fit(statistics).logits(features[held_out])
    return logits - logits.max(axis=1, keepdims=True)


def _tenant(live: LiveExperts, expert_id: str) -> str:
    """Of a live expert: it competes with its tenant's experts alone."""
    return next(expert.tenant for expert in live.experts if expert.expert_id == expert_id)


def _tasks(backbone: Backbone, lesson: RouterLesson, config: RouterTraining) -> Iterator[Tokens]:
    """Batches of the new expert's rows with their answers, for ever, in a seeded order."""
    rows = lesson.exemplars[lesson.expert_id]
    rng = np.random.default_rng(lesson.seed)
    while True:
        chosen = rng.choice(len(rows), size=min(config.task_rows, len(rows)), replace=False)
        batch = tokenised(backbone, [rows[row] for row in chosen])
        fitting, *_ = split_by_tokens([len(row.target) for row in batch], STEP_ANSWER_TOKENS)
        yield padded(backbone, [batch[place] for place in fitting])


def _task_loss(
    live: LiveExperts, network: RouterNetwork, expert_id: str, tokens: Tokens, routing: RoutingConfig
) -> Tensor:
    """Mean answer loss under the dense gates; gradients reach the network through the gates' weights alone."""
    discriminant = live.router.discriminant
    assert discriminant is not None
    is_other = torch.from_numpy(~live.router.allowed([_tenant(live, expert_id)]))

    def decide(stem: StemOutput) -> None:
        closed_form = torch.from_numpy(discriminant.logits(stem.features.detach().cpu().numpy()))
        tempered = (closed_form / routing.temperature_dense).float().to(stem.states.device)
        logits = tempered + network(stem.states, stem.mask, discriminant.expert_ids)
        logits = logits.masked_fill(is_other.to(logits.device), -torch.inf)
        experts, weights = dense_shares(logits, routing)
        live.pool.set_gates(live.slots_of(experts.cpu().numpy()), weights)

    try:
        with live.hook.routing(tokens.prompt_mask(), decide):
            logits = live.backbone.answer_logits(tokens).float()
    finally:
        live.pool.no_gates()
    return nn.functional.cross_entropy(logits, tokens.answer_ids())
