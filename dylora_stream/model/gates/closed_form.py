"""The closed-form gate: g = argmax over experts of Σ⁻¹μ_e·z - ½μ_eᵀΣ⁻¹μ_e (CoDe-LoRA, 2610.08312).

Against the paper: rows outside of every expert go to the backbone; the paper has no such rows. Maturity plays no part.
"""

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.model.gates.base import Scene, Untrained
from dylora_stream.model.gates.rows import top_one
from dylora_stream.model.stem import StemOutput

__all__ = ["ClosedFormGate"]


class ClosedFormGate(Untrained):
    """One expert a row, by the linear discriminant alone."""

    name = "closed_form"

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The likeliest allowed expert of each row, alone."""
        if scene.discriminant is None:
            return to_backbone(len(stem.mask))
        return top_one(scene.discriminant.logits(stem.features.cpu().numpy()), scene)
