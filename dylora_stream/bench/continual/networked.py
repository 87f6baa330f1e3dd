"""The hybrid gate with its network, which the daemon's training child trains: here a part of the gate's lessons.

As `hybrid` all experts are mature, as they are when a stream has settled: the gate takes one expert a row, by closed
form plus network. As `hybrid_young` none is: every row is shared by the nearest experts and the backbone, which says
what the dense start of an expert's life costs or brings.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dylora_stream.core.routing import Routing, RoutingConfig
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.config import PoolConfig
from dylora_stream.model.features import row_size
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.gates.hybrid import HybridGate
from dylora_stream.model.live import LiveExperts, LoadedExpert
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.router import RouterParts
from dylora_stream.model.router_training import RouterLesson, RouterTraining, train_router
from dylora_stream.model.stem import StemOutput

__all__ = ["YOUNG", "NetworkedGate"]

YOUNG = "hybrid_young"


class NetworkedGate(Untrained):
    """A `Student` around the hybrid gate."""

    def __init__(self, config: RoutingConfig, parts: RouterParts, *, is_young: bool = False) -> None:
        self.name = YOUNG if is_young else "hybrid"
        self._config, self._parts, self._is_young = config, parts, is_young
        self._gate = HybridGate(config)
        self._network: RouterNetwork | None = None

    @property
    def parameters(self) -> int:
        """Of the network."""
        return sum(tensor.numel() for tensor in self._network.parameters()) if self._network else 0

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The hybrid gate's decision with this network."""
        is_mature = np.zeros_like(scene.is_mature) if self._is_young else scene.is_mature
        network = self._network and self._network.to(
            stem.states.device
        )  # restored, it lies where its file was read
        return self._gate.decide(stem, replace(scene, network=network, is_mature=is_mature))

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """`train_router`, as a training job does it."""
        live = LiveExperts(
            stage.backbone, PoolConfig(slots=len(stage.slots), rank=stage.pool.rank), self._parts
        )
        try:
            live.install([_loaded(stage, name, lesson) for name in stage.slots])
            exemplars = {name: memory.rows for name, memory in lesson.memory.items()}
            told = RouterLesson(expert_id=lesson.expert_id, exemplars=exemplars, seed=lesson.seed)
            self._network = train_router(live, self._network, told, self._config, RouterTraining()).network
        finally:
            live.close()

    def state(self) -> dict[str, Tensor]:
        """The network's."""
        if self._network is None:
            return {}
        return {**self._network.state_dict(), "is_fitted": torch.tensor(self._network.is_fitted)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Student`."""
        if not state:
            return
        weights = {name: tensor for name, tensor in state.items() if name != "is_fitted"}
        network = RouterNetwork(len(weights["query"]))
        for name in weights:
            if found := re.fullmatch(r"columns\.of:(.*)", name, re.DOTALL):
                network.add_column(found[1])
        network.load_state_dict(weights)
        network.requires_grad_(requires_grad=False)
        network.is_fitted = bool(state["is_fitted"])
        self._network = network


def _loaded(stage: Stage, name: str, lesson: Lesson) -> LoadedExpert:
    """An expert as it stands in its slot. Of its feature rows, the stem part: novelty is not asked here."""
    slot, pool = stage.slots[name], stage.pool
    blocks = {layer: pool.blocks(slot, layer) for layer in pool.shapes}
    tensors = {layer: (a.float().cpu(), b.float().cpu()) for layer, (a, b) in blocks.items()}
    features = lesson.memory[name].features
    rest = row_size(stage.backbone) - features.shape[1]
    return LoadedExpert(
        expert_id=name,
        version=1,
        adapter=Adapter(rank=pool.rank, tensors=tensors),
        features=np.pad(features, ((0, 0), (0, rest))),
        is_mature=True,
    )
