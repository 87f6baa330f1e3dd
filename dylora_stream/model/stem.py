"""A record is read on its way through the stem: the hook that lets a router set who answers a row."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import EarlyPool, StemReading, stem_features

__all__ = ["StemHook", "StemOutput"]


@dataclass(frozen=True, slots=True)
class StemOutput:
    """What the router sees: states (B, T, d) in the stem, mask (B, T) of the prompt, features (B, d) float32.

    `early` (B, d) float32 is the same pooled halfway there, where a pass was watched.
    """

    states: Tensor
    mask: Tensor
    features: Tensor
    early: Tensor | None = None

    @classmethod
    def of(cls, states: Tensor, mask: Tensor) -> "StemOutput":
        """With the features computed."""
        return cls(states, mask, stem_features(states, mask))

    def reading(self) -> StemReading:
        """For `feature_rows`; needs a watched pass."""
        assert self.early is not None
        return StemReading(states=self.states, mask=self.mask, mean=self.features, early=self.early)


class StemHook:
    """Calls a decision where records are read, below every adapted layer, once a routed forward pass.

    The layer itself sees a 4-D mask or none, so the 2-D one is given by context. Later passes of the same context (one
    token each, while decoding) keep what was decided.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._pending: tuple[Tensor, Callable[[StemOutput], None]] | None = None
        self._early = EarlyPool(backbone)
        layer = backbone.layers[backbone.read_layers]
        self._handle = layer.register_forward_pre_hook(self._at_stem, with_kwargs=True)

    @contextmanager
    def routing(self, mask: Tensor, decide: Callable[[StemOutput], None]) -> Iterator[None]:
        """Within: the next forward pass calls `decide`, which sets the gates. mask: (B, T) of the prompt's tokens."""
        self._pending = (mask, decide)
        try:
            with self._early.watching(mask):
                yield
        finally:
            self._pending = None

    def close(self) -> None:
        """Take the hook off the model. May be called twice."""
        self._handle.remove()
        self._early.close()

    def _at_stem(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._pending is None:
            return
        (mask, decide), self._pending = self._pending, None
        states = args[0] if args else kwargs["hidden_states"]
        decide(StemOutput(states, mask, stem_features(states, mask), self._early.mean))
