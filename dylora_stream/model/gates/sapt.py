"""Shared attention over experts (SAPT, ACL 2024, 2401.08295): g = softmax(K q / √d), dense.

    q = LayerNorm(W_up silu(W_down z)),  K: one key an expert

Keys and query are trained by the answers' loss under these weights and by KL(stored route ‖ route) on rows of old
experts, where the stored route is the mean route that the expert's rows had when it was learned, 0 for later experts.
The new expert's rows have no route yet; theirs is the expert itself until the answers' loss has spoken.

Against the paper: its pseudo-replay (rows written by a generator) is replaced by real stored rows; its experts train
under the attention, here they train alone and are shared with other methods; the KL term takes hundreds of steps on
stored features, which are nearly free, before the few steps of both losses through the model. As in the paper all
keys and the query move with each expert: the KL term, not freezing, keeps old routes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing, to_backbone
from dylora_stream.model.gates.base import Lesson, Scene, Stage, Untrained
from dylora_stream.model.gates.learning import Learning, by_stem, learn_by_answers
from dylora_stream.model.gates.rows import Scaling, column_of, shared
from dylora_stream.model.stem import StemOutput

__all__ = ["SAPTConfig", "SAPTGate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SAPTConfig:
    """Sizes and training."""

    width: int = 64
    """d of query and keys, and of the query's hidden layer."""
    steps: int = 300
    """Of the KL term alone, on stored features."""
    rate: float = 5e-3
    """Adam's, in these steps."""
    kl_weight: float = 1.0
    """Of the KL term beside the answers' loss."""
    learning: Learning = Learning(rate=1e-3)  # noqa: RUF009 - frozen
    """The steps through the model."""

    def __post_init__(self) -> None:
        for name in ("width", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"sapt.{name} is {getattr(self, name)}: it must be at least 1")
        if not self.rate > 0:
            raise ValueError(f"sapt.rate is {self.rate}: it must be above 0")
        if self.kl_weight < 0:
            raise ValueError(f"sapt.kl_weight is {self.kl_weight}: it must not be negative")


class SAPTGate(Untrained):
    """Every row to all experts, by attention."""

    name = "sapt"

    def __init__(self, config: SAPTConfig | None = None) -> None:
        self._config = config or SAPTConfig()
        self._scaling: Scaling | None = None
        self._down = self._up = torch.zeros(0)  # (h, d), (h, h)
        self._keys: dict[str, Tensor] = {}  # in the order the experts came
        self._routes: dict[str, Tensor] = {}  # expert → its rows' mean route over the experts of then

    @property
    def parameters(self) -> int:
        """Keys and query."""
        return sum(tensor.numel() for tensor in self._moved())

    @torch.no_grad()
    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Attention over the experts."""
        if not self._keys or not scene.expert_ids:
            return to_backbone(len(stem.mask))
        weights = self._route(self._scaled(stem.features)).double().numpy()
        return shared(column_of(dict(zip(self._keys, weights.T, strict=True)), scene, 0.0), scene)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """A key for the new expert; then 1. the KL term alone, 2. with the answers' loss, 3. the new stored route."""
        self._open(lesson)
        rows = {name: self._scaled(torch.from_numpy(m.features)) for name, m in lesson.memory.items()}
        rows = {name: rows[name] for name in self._keys if name in rows}
        if len(self._keys) > 1:
            self._align(rows)  # 1
            self._answer(stage, lesson, rows)  # 2
        self._routes[lesson.expert_id] = self._route(rows[lesson.expert_id]).mean(dim=0)  # 3

    def state(self) -> dict[str, Tensor]:
        """Scaling, query, keys, routes, and the order in which the experts came."""
        if self._scaling is None:
            return {}
        order = {f"order:{name}": torch.tensor(place) for place, name in enumerate(self._keys)}
        keys = {f"key:{name}": key for name, key in self._keys.items()}
        routes = {f"route:{name}": route for name, route in self._routes.items()}
        return {**self._scaling.state(), "down": self._down, "up": self._up, **order, **keys, **routes}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """All of it."""
        self._scaling = Scaling.restored(state)
        if self._scaling is None:
            return
        places = {key.removeprefix("order:"): int(state[key]) for key in state if key.startswith("order:")}
        names = sorted(places, key=places.__getitem__)
        self._down, self._up = state["down"].clone(), state["up"].clone()
        self._keys = {name: state[f"key:{name}"].clone() for name in names}
        self._routes = {name: state[f"route:{name}"] for name in names}

    def _open(self, lesson: Lesson) -> None:
        generator = torch.Generator().manual_seed(lesson.seed)
        width = self._config.width
        if self._scaling is None:
            self._scaling = Scaling.of(lesson.own.features)
            wide = len(self._scaling.mean)
            self._down = torch.randn((width, wide), generator=generator) * wide**-0.5
            self._up = torch.randn((width, width), generator=generator) * width**-0.5
        self._keys[lesson.expert_id] = torch.randn(width, generator=generator) * width**-0.5

    def _moved(self) -> list[Tensor]:
        return [self._down, self._up, *self._keys.values()] if self._keys else []

    def _scaled(self, features: Tensor) -> Tensor:
        assert self._scaling is not None
        return self._scaling(features).float()

    def _route(self, scaled: Tensor) -> Tensor:
        """(B, E) over the experts in the order they came."""
        hidden = nn.functional.silu(scaled @ self._down.t()) @ self._up.t()
        query = nn.functional.layer_norm(hidden, (self._config.width,))
        return (query @ torch.stack(list(self._keys.values())).t() * self._config.width**-0.5).softmax(-1)

    def _divergence(self, rows: Mapping[str, Tensor]) -> Tensor:
        """The mean over experts of KL(stored route ‖ route)."""
        parts = []
        for name, scaled in rows.items():
            stored = self._routes.get(name)
            if stored is None:
                stored = nn.functional.one_hot(torch.tensor(len(self._keys) - 1)).float()
            target = nn.functional.pad(stored, (0, len(self._keys) - len(stored))).expand(len(scaled), -1)
            route = self._route(scaled).clamp(min=torch.finfo(torch.float32).tiny)
            parts.append(nn.functional.kl_div(route.log(), target, reduction="batchmean"))
        return torch.stack(parts).mean()

    @torch.enable_grad()
    def _align(self, rows: Mapping[str, Tensor]) -> None:
        moved = [tensor.requires_grad_() for tensor in self._moved()]
        optimizer = torch.optim.Adam(moved, lr=self._config.rate)
        for _ in range(self._config.steps):
            loss = self._divergence(rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        for tensor in moved:
            tensor.requires_grad_(False)

    def _answer(self, stage: Stage, lesson: Lesson, rows: Mapping[str, Tensor]) -> None:
        slots = torch.tensor([stage.slots[name] for name in self._keys])

        def decide(stem: StemOutput) -> None:
            weights = self._route(self._scaled(stem.features))
            stage.pool.set_gates(slots.expand(len(weights), -1), weights)

        learning = replace(
            self._config.learning, penalty=lambda: self._config.kl_weight * self._divergence(rows)
        )
        learn_by_answers(stage, lesson, by_stem(stage, decide), self._moved(), learning)
