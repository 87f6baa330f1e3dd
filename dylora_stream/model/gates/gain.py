"""An open or shut gate for each expert by itself (GainLoRA, NeurIPS 2025): g_e = |2 sigmoid(4 cos(f_e(z), k_e)) - 1|.

f_e is a small network of its own, f_e(z) = W₂ silu(W₁ z), trained together with the expert and k_e by the answers'
loss, the old experts taking part under their own gates, frozen. A new expert must stay shut on old rows: k_e starts,
and stays, orthogonal to what f_e gives on them, and f_e may not change that. With U, V and F the principal directions
of old rows at W₁'s and W₂'s input and at f's output, after each step

    W₁ ← W₁⁰ + (W₁ - W₁⁰)(I - UUᵀ),  W₂ ← W₂⁰ + (W₂ - W₂⁰)(I - VVᵀ),  k ← k - FFᵀk

so that f_e on the span of old rows, and with it g_e = 0 there, is what it was before the training, to the share of the
rows' energy that the directions hold.

Against the paper: updates are projected after the optimizer's step, since Adam's scaling would turn a projected
gradient out of its plane again; the features are the stem's, not the embeddings'; k_e starts at the new rows' mean
output less its part in F (a random key would begin almost shut); the bases come from stored rows and not from a running
memory of gradients; the new LoRA weights are not projected, only their gate.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.model.backbone import Tokens
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.gates.rows import Scaling, column_of, each_of, shared
from dylora_stream.model.gates.uniform import Among
from dylora_stream.model.mixture import YOUNG_SLOT, Pairs
from dylora_stream.model.stem import StemOutput

__all__ = ["GainConfig", "GainGate"]

SHARPNESS = 4.0  # of the cosine within the sigmoid, the paper's: g reaches 0.96


@dataclass(frozen=True, slots=True, kw_only=True)
class GainConfig:
    """Sizes."""

    width: int = 128
    """Of the hidden layer, of f's output and of the keys."""
    energy: float = 0.99
    """Share of old rows' squared length that is kept apart; what is left lets a new gate open a little."""

    def __post_init__(self) -> None:
        if self.width < 2:
            raise ValueError(f"gainlora.width is {self.width}: it must be at least 2")
        if not 0 < self.energy < 1:
            raise ValueError(f"gainlora.energy is {self.energy}: it must lie between 0 and 1")


@dataclass(frozen=True, slots=True)
class _Door:
    """f_e and k_e."""

    first: Tensor  # (h, d) W₁
    second: Tensor  # (h, h) W₂
    key: Tensor  # (h,)

    def hidden(self, scaled: Tensor) -> Tensor:
        return nn.functional.silu(scaled @ self.first.t())

    def output(self, scaled: Tensor) -> Tensor:
        return self.hidden(scaled) @ self.second.t()

    def __call__(self, scaled: Tensor) -> Tensor:
        """scaled (B, d) → (B,) in [0, 1)."""
        cosine = nn.functional.cosine_similarity(self.output(scaled), self.key[None], dim=-1)
        return (2.0 * torch.sigmoid(SHARPNESS * cosine) - 1.0).abs()


class GainGate(Untrained):
    """Every row to each expert whose gate is open to it."""

    name = "gainlora"

    def __init__(self, config: GainConfig | None = None) -> None:
        self._config = config or GainConfig()
        self._scaling: Scaling | None = None
        self._doors: dict[str, _Door] = {}
        self._young: tuple[str, _Door] | None = None  # in training

    @property
    def parameters(self) -> int:
        """All f and k."""
        return sum(d.first.numel() + d.second.numel() + d.key.numel() for d in self._doors.values())

    @torch.no_grad()
    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Each expert's own weight; they do not sum to 1."""
        if self._scaling is None or not scene.expert_ids:
            return to_backbone(len(stem.mask))
        scaled = self._scaling(stem.features).float()
        weights = {name: door(scaled).double().numpy() for name, door in self._doors.items()}
        return shared(column_of(weights, scene, 0.0), scene)

    def company(self, stage: Stage, lesson: Lesson) -> "_Gated":
        """The old experts under their gates, and the new one's gate, in training."""
        self._scaling = self._scaling or Scaling.of(lesson.own.features)
        scaled = {
            name: self._scaling(torch.from_numpy(memory.features)).float()
            for name, memory in lesson.memory.items()
        }
        own = scaled.pop(lesson.expert_id)
        door, apart = _opened(own, list(scaled.values()), lesson.seed, self._config)
        self._young = (lesson.expert_id, door)
        old = [(stage.slots[name], door) for name, door in self._doors.items() if name in stage.slots]
        return _Gated(stage, self._scaling, old, door, apart)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """Keep the gate that the expert trained with."""
        del stage
        if self._young is None or self._young[0] != lesson.expert_id:
            raise ValueError(f"{lesson.expert_id} was not trained in this gate's company")
        door, self._young = self._young[1], None
        self._doors[lesson.expert_id] = _Door(
            door.first.detach().clone(), door.second.detach().clone(), door.key.detach().clone()
        )

    def state(self) -> dict[str, Tensor]:
        """Scaling, and f and k of each expert."""
        scaling = self._scaling.state() if self._scaling is not None else {}
        kinds = ("first", "second", "key")
        return scaling | {
            f"{k}:{name}": getattr(door, k) for k in kinds for name, door in self._doors.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """All of it."""
        self._scaling = Scaling.restored(state)
        first, second, key = (each_of(state, kind) for kind in ("first", "second", "key"))
        self._doors = {name: _Door(first[name], second[name], key[name]) for name in first}


@dataclass(frozen=True, slots=True)
class _Apart:
    """What a new gate may not move, as orthonormal columns: of W₁'s input, W₂'s input, and f's output."""

    inputs: Tensor  # (d, m) U
    hidden: Tensor  # (h, m) V
    outputs: Tensor  # (h, m) F


class _Gated(Among):
    """A `training.Company` under the gates."""

    def __init__(
        self, stage: Stage, scaling: Scaling, old: Sequence[tuple[int, _Door]], young: _Door, apart: _Apart
    ) -> None:
        super().__init__(stage)
        self._hook, self._scaling, self._apart = stage.hook, scaling, apart
        self._doors = [*(door for _, door in old), young]
        self._members = torch.tensor([*(slot for slot, _ in old), YOUNG_SLOT])
        self._young = young
        self._first, self._second = young.first.detach().clone(), young.second.detach().clone()

    def parameters(self) -> Sequence[nn.Parameter]:
        """f and k of the new expert."""
        return [
            p for p in (self._young.first, self._young.second, self._young.key) if isinstance(p, nn.Parameter)
        ]

    @contextmanager
    def batch(self, tokens: Tokens) -> Iterator[None]:
        """The gates are set at the stem's end."""

        def decide(stem: StemOutput) -> None:
            scaled = self._scaling(stem.features).float()
            weights = torch.stack([door(scaled) for door in self._doors], dim=1)
            self._pool.set_gates(self._members.expand(len(weights), -1), weights)

        with self._hook.routing(tokens.prompt_mask(), decide):
            yield

    def penalty(self, pairs: Pairs) -> Tensor | None:
        """None."""
        del pairs
        return None

    @torch.no_grad()
    def stepped(self) -> None:
        """Take out of each update what would reach old rows."""
        young, apart = self._young, self._apart
        young.first.copy_(self._first + _without(young.first - self._first, apart.inputs))
        young.second.copy_(self._second + _without(young.second - self._second, apart.hidden))
        young.key.copy_(_without(young.key[None], apart.outputs)[0])


@torch.no_grad()
def _opened(own: Tensor, old: Sequence[Tensor], seed: int, config: GainConfig) -> tuple[_Door, _Apart]:
    """A new gate, shut on old rows (n, d) and open on its own, and what it may not move."""
    generator = torch.Generator().manual_seed(seed)
    width, wide = config.width, own.shape[1]
    first = torch.randn((width, wide), generator=generator) * wide**-0.5
    second = torch.randn((width, width), generator=generator) * width**-0.5
    door = _Door(nn.Parameter(first), nn.Parameter(second), nn.Parameter(torch.zeros(width)))
    rows = torch.cat([own[:0], *old])
    apart = _Apart(
        _directions(rows, config.energy),
        _directions(door.hidden(rows), config.energy),
        _directions(door.output(rows), config.energy),
    )
    door.key.copy_(_without(door.output(own).mean(dim=0)[None], apart.outputs)[0])
    return door, apart


def _without(rows: Tensor, directions: Tensor) -> Tensor:
    """rows (n, d) (I - D Dᵀ)."""
    return rows - rows @ directions @ directions.t()


def _directions(rows: Tensor, energy: float) -> Tensor:
    """(d, m) the fewest principal directions, not centred, that hold this share of the energy; at most half of all."""
    if not len(rows):
        return torch.zeros((rows.shape[1], 0))
    _, lengths, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    held = (lengths**2).cumsum(0) / (lengths**2).sum()
    count = min(int((held < energy).sum()) + 1, rows.shape[1] // 2)
    return directions[:count].t().float()
