"""The closed-form gate: g = argmax over experts of Σ⁻¹μ_e·z - ½μ_eᵀΣ⁻¹μ_e (CoDe-LoRA, 2610.08312).

Against the paper: rows outside of every expert go to the backbone; the paper has no such rows. Maturity plays no part.
"""

import numpy as np

from dylora_stream.core.messages import Policy
from dylora_stream.core.routing import NULL_EXPERT, Routing, to_backbone
from dylora_stream.model.gates.base import Scene, Untrained
from dylora_stream.model.mixture import StemOutput

__all__ = ["ClosedFormGate"]


class ClosedFormGate(Untrained):
    """One expert a row, by the linear discriminant alone."""

    name = "closed_form"

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The likeliest allowed expert of each row, alone."""
        has_expert = scene.allowed.any(axis=1) & ~scene.is_beyond
        if scene.discriminant is None or not has_expert.any():
            return to_backbone(len(stem.mask))
        logits = scene.discriminant.logits(stem.features.cpu().numpy())
        winner = np.where(scene.allowed, logits, -np.inf).argmax(axis=1)
        experts = np.where(has_expert, winner, NULL_EXPERT)[:, None].astype(np.int64)
        policies = tuple(Policy.SPARSE if served else Policy.BACKBONE for served in has_expert.tolist())
        return Routing(experts, np.ones_like(experts, dtype=np.float32), policies)
