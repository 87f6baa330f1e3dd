"""The paper's gate, dense while experts are young and sparse once they are mature, on closed form plus a small network.

logits = discriminant + temperature · network(token states): the network starts at zero, so that the gate begins as the
closed form, and speaks in the tempered logits in which rows are shared. `core.routing.decide` holds the rule. Maturity,
not training, moves a row from dense to sparse: a temperature learned with the rest converges too slowly (ICML 2024,
dense-to-sparse gating).
"""

import torch

from dylora_stream.core.routing import Routing, RoutingConfig, decide, to_backbone
from dylora_stream.model.gates.base import Scene, Untrained
from dylora_stream.model.stem import StemOutput

__all__ = ["HybridGate"]


class HybridGate(Untrained):
    """Dense for rows that a nascent expert takes part in, top-1 for a mature winner, backbone for rows beyond all."""

    name = "hybrid"

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config

    @torch.no_grad()
    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The hybrid rule on the sum of both routers."""
        if scene.discriminant is None:
            return to_backbone(len(stem.mask))
        logits = scene.discriminant.logits(stem.features.cpu().numpy())
        if scene.network is not None:
            columns = scene.network(stem.states, stem.mask, scene.discriminant.expert_ids)
            logits = logits + self._config.temperature_dense * columns.double().cpu().numpy()
        return decide(logits, scene.is_mature, scene.is_beyond, scene.allowed, self._config)
