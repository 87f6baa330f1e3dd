"""Gates: who answers a row. One class a method, all behind `Gate`."""

from dylora_stream.core.errors import SettingsError
from dylora_stream.core.routing import RoutingConfig
from dylora_stream.model.gates.base import BackboneGate, Gate, Scene
from dylora_stream.model.gates.closed_form import ClosedFormGate
from dylora_stream.model.gates.hybrid import HybridGate

__all__ = ["GATES", "BackboneGate", "ClosedFormGate", "Gate", "HybridGate", "Scene", "gate_named"]

GATES = ("hybrid", "closed_form", "base")


def gate_named(name: str, config: RoutingConfig) -> Gate:
    """The gate of a setting; SettingsError names the ones there are."""
    if name == "hybrid":
        return HybridGate(config)
    if name == "closed_form":
        return ClosedFormGate()
    if name == "base":
        return BackboneGate()
    raise SettingsError(f"there is no gate {name!r}: use one of {', '.join(GATES)}")
