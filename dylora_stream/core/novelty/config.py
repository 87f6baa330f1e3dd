"""The knobs of novelty."""

import math
from dataclasses import dataclass

__all__ = ["NoveltyConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoveltyConfig:
    """How novelty is scored and decided."""

    alpha: float = 0.05
    """Promised share of known traffic called novel, in (0, 0.5)."""

    folds: int = 10
    """Parts that the cross-conformal calibration leaves out in turn, at least 2. More folds: closer to the promise,
    slower."""

    floor_rows: int = 24
    """Distinct rows under which an expert has no veto. Nothing is said at all while the experts with a say have fewer
    than 1/alpha - 1 together, which cannot give p <= alpha."""

    max_modes: int = 256
    """Modes an expert; above it rows are summarised by k-means."""

    neighbours: int = 64
    """Nearest modes of all experts that are looked at; an expert without one among them is as far as the last."""

    neighbour_weight: float = 0.25
    """Weight of the nearest mode's distance beside the distance to the expert's centre, at least 0. Centres alone are
    as good while an expert is one skill; the modes stay for experts that widened."""

    length_weight: float = 1.0
    """Weight of a whitened row's log length beside its direction where there is one expert, at least 0; with E
    experts it is divided by E², because directions then tell more (loghub, inputs, AUROC with and without: one expert
    0.963, 0.920; two 0.964, 0.975; three 0.962, 0.969)."""

    relative_weight: float = 0.2
    """Weight of the relative Mahalanobis distance of input and answer beside the answer's blocks, at least 0."""

    entropy_temperature: float = 8.0
    """Nats of logit difference that count as one; see `RoutingConfig.temperature_dense`."""

    beyond_margin: float = 1.5
    """A row whose score is this many times the largest of every calibration row is outside: the backbone answers
    it."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie between 0 and 0.5, not {self.alpha}")
        for name, least in (("folds", 2), ("max_modes", 2), ("neighbours", 1), ("beyond_margin", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("neighbour_weight", "length_weight", "relative_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature must be above 0, not {self.entropy_temperature}")

    @property
    def least_calibration(self) -> int:
        """Held-out rows from which a p-value can reach alpha."""
        return math.ceil(1.0 / self.alpha) - 1
