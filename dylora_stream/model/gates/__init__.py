"""Gates: who answers a row. One class a method, all behind `Gate`; `gate_named` makes each by its name."""

from collections.abc import Callable, Mapping

from dylora_stream.core.errors import SettingsError
from dylora_stream.core.routing import SERVED_METHODS, RoutingConfig
from dylora_stream.model.gates.arrow import ArrowGate
from dylora_stream.model.gates.attention import AttentionGate
from dylora_stream.model.gates.base import BackboneGate, Gate, Scene, Student
from dylora_stream.model.gates.classifier import ClassifierGate
from dylora_stream.model.gates.closed_form import ClosedFormGate
from dylora_stream.model.gates.compose import ComposeGate
from dylora_stream.model.gates.flylora import FlyLoRAGate
from dylora_stream.model.gates.gain import GainGate
from dylora_stream.model.gates.hierarchical import HierarchicalGate
from dylora_stream.model.gates.hybrid import HybridGate
from dylora_stream.model.gates.learned import LearnedGate
from dylora_stream.model.gates.mixlora import MixLoRAGate
from dylora_stream.model.gates.mora import MoRAGate
from dylora_stream.model.gates.retriever import RetrieverGate
from dylora_stream.model.gates.ridge import RidgeGate
from dylora_stream.model.gates.sapt import SAPTGate
from dylora_stream.model.gates.smora import SMoRAGate
from dylora_stream.model.gates.uniform import ORTHOGONALITY, SumGate
from dylora_stream.model.gates.xlora import XLoRAGate

__all__ = [
    "GATES",
    "SERVED_GATES",
    "BackboneGate",
    "ClosedFormGate",
    "Gate",
    "HybridGate",
    "Scene",
    "gate_named",
]

_MAKERS: Mapping[str, Callable[[RoutingConfig], Student]] = {
    "base": lambda _: BackboneGate(),
    "sum": lambda _: SumGate(),
    "olora": lambda _: SumGate(ORTHOGONALITY),
    "closed_form": lambda _: ClosedFormGate(),
    "ridge": lambda _: RidgeGate(),
    "router": LearnedGate,
    "hybrid": HybridGate,
    "retriever": lambda _: RetrieverGate(),
    "moa": lambda _: ClassifierGate(),
    "sapt": lambda _: SAPTGate(),
    "gainlora": lambda _: GainGate(),
    "mora": lambda _: MoRAGate(),
    "smora": lambda _: SMoRAGate(),
    "flylora": lambda _: FlyLoRAGate(),
    "arrow": lambda _: ArrowGate(),
    "xlora": lambda _: XLoRAGate(),
    "amlora": lambda _: AttentionGate(),
    "mixlora": lambda _: MixLoRAGate(),
    "compose": lambda _: ComposeGate(),
    "hierarchical": lambda _: HierarchicalGate(),
}

GATES = tuple(_MAKERS)
SERVED_GATES = SERVED_METHODS  # by the daemon; the others are measured with `bench continual`


def gate_named(name: str, config: RoutingConfig) -> Student:
    """A new gate of a method; SettingsError names the ones there are."""
    if name not in _MAKERS:
        raise SettingsError(f"there is no gate {name!r}: use one of {', '.join(GATES)}")
    return _MAKERS[name](config)
