"""The learned router alone: softmax(MLP(token states) / τ), dense while experts are young and sparse once mature.

The network of `hybrid` without the closed form it leans on there: attention pooling over the stem's token states, a
hidden layer, a column an expert. For each new expert a column is trained by cross-entropy of the route on stored rows
of all experts, each expert weighing the same; the shared layers are trained with the first two experts' columns and
then stay, old columns are frozen. `core.routing.decide` holds the rule that reads the logits.

Against the design: the answers' loss beside the route's is left out. It has no labels to add where the experts' rows
are stored, and a pass through the pool costs more than all steps here together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing, RoutingConfig, decide, to_backbone
from dylora_stream.model.exemplars import Exemplars, read_exemplars
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.network import COLUMN, RouterNetwork
from dylora_stream.model.stem import StemOutput

__all__ = ["LearnedConfig", "LearnedGate"]

PREFIX = "network."  # before the network's own names in the state


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedConfig:
    """How the network is trained."""

    rate: float = 2e-3
    """Adam's rate."""
    steps: int = 300
    """Full-batch steps; each costs milliseconds. More than the hybrid's: there is no closed form to begin at."""
    exemplars: int = 64
    """Stored rows of each expert, at most."""
    max_tokens: int = 8192
    """Tokens of all exemplars together."""
    decay: float = 1e-2
    """Weight decay."""

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"router.rate is {self.rate}: it must be above 0")
        for name in ("steps", "exemplars", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"router.{name} is {getattr(self, name)}: it must be at least 1")
        if self.decay < 0:
            raise ValueError(f"router.decay is {self.decay}: it must not be negative")


class LearnedGate(Untrained):
    """Dense to sparse on the network's logits."""

    name = "router"

    def __init__(self, routing: RoutingConfig, config: LearnedConfig | None = None) -> None:
        self._routing, self._config = routing, config or LearnedConfig()
        self._network: RouterNetwork | None = None

    @property
    def parameters(self) -> int:
        """Of the network."""
        return sum(p.numel() for p in self._network.parameters()) if self._network is not None else 0

    @torch.no_grad()
    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The hybrid rule on the network's logits, which are in tempered nats already."""
        if self._network is None or not scene.expert_ids:
            return to_backbone(len(stem.mask))
        network = self._network.to(stem.states.device)  # what was restored lies where its file was read
        tempered = network(stem.states, stem.mask, scene.expert_ids).double().cpu().numpy()
        logits = self._routing.temperature_dense * tempered
        return decide(logits, scene.is_mature, scene.is_beyond, scene.allowed, self._routing)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """Train the new expert's column; with one expert there is nothing to tell apart yet."""
        if self._network is None:
            self._network = RouterNetwork(stage.backbone.width, seed=lesson.seed).to(stage.backbone.device)
        stored = {name: memory.rows[: self._config.exemplars] for name, memory in lesson.memory.items()}
        names = [name for name, rows in stored.items() if rows]
        moved = self._network.opened(lesson.expert_id, names)
        if len(names) > 1 and lesson.expert_id in names:
            read = read_exemplars(stage.backbone, [stored[name] for name in names], self._config.max_tokens)
            _train(self._network, moved, names, read, self._config)
            self._network.is_fitted = True
        self._network.requires_grad_(requires_grad=False)

    def state(self) -> dict[str, Tensor]:
        """The network's tensors, and whether its shared layers are fitted."""
        if self._network is None:
            return {}
        tensors = {PREFIX + name: value.detach() for name, value in self._network.state_dict().items()}
        return {**tensors, "is_fitted": torch.tensor(self._network.is_fitted)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """A network with these columns."""
        tensors = {name.removeprefix(PREFIX): t for name, t in state.items() if name.startswith(PREFIX)}
        if not tensors:
            return
        network = RouterNetwork(len(tensors["query"]))
        for name in sorted(tensors):
            if name.startswith(f"columns.{COLUMN}"):
                network.add_column(name.removeprefix(f"columns.{COLUMN}"))
        network.load_state_dict(tensors)
        network.is_fitted = bool(state["is_fitted"])
        self._network = network.requires_grad_(requires_grad=False)


@torch.enable_grad()
def _train(
    network: RouterNetwork,
    moved: list[nn.Parameter],
    names: list[str],
    read: Exemplars,
    config: LearnedConfig,
) -> None:
    """Cross-entropy of the route, every expert weighing the same."""
    owners = read.owners.to(network.query.device)
    weights = 1.0 / torch.bincount(owners, minlength=len(names)).clamp(min=1).float()
    optimizer = torch.optim.AdamW(moved, lr=config.rate, weight_decay=config.decay)
    for _ in range(config.steps):
        logits = torch.cat([network(s, m, names) for s, m in zip(read.states, read.masks, strict=True)])
        loss = nn.functional.cross_entropy(logits, owners, weight=weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
