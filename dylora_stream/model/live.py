"""The experts that are live: their adapters in the pool's slots, their router, and the routed forward pass.

Serve uses it through the answerer; a training child uses it to check a new expert under the gates it is served with.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from dylora_stream.core.errors import ExpertCorrupt, ModelMismatch
from dylora_stream.core.routing import Routing
from dylora_stream.core.statistics import ExpertStatistics
from dylora_stream.model.adapters import Adapter, load_adapter
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.config import PoolConfig
from dylora_stream.model.features import feature_rows, feature_space, row_size
from dylora_stream.model.gates.base import Lesson, Memory, Stage, Student
from dylora_stream.model.mixture import BACKBONE_SLOT, Pool
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.router import Routed, Router, RouterParts
from dylora_stream.model.stem import StemHook, StemOutput

__all__ = ["LiveExperts", "LoadedExpert", "Pass", "read_expert", "stored_rows"]

STATISTICS = "statistics.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoadedExpert:
    """One version of an expert in memory. features: (n, D) float32 feature rows of its training; counts: (n,) int64,
    records that came with the text of each, None where each came once."""

    expert_id: str
    version: int
    adapter: Adapter = field(repr=False)
    features: np.ndarray = field(repr=False)
    is_mature: bool = False
    tenant: str = "default"
    counts: np.ndarray | None = field(default=None, repr=False)
    source: str = ""
    """Digest of the folder it came from: the same source need not be read again."""

    @property
    def name(self) -> str:
        """`id/version`, as logs show it."""
        return f"{self.expert_id}/{self.version}"


@dataclass(slots=True)
class Pass:
    """One routed batch; `routed` and `features` (B, D) are there once the stem has run."""

    routed: Routed | None = None
    features: np.ndarray | None = None


def stored_rows(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(n, D) float32 feature rows of an expert's folder, and their (n,) counts if it has any. Raises ExpertCorrupt."""
    try:
        tensors = load_file(folder / STATISTICS)
        features: np.ndarray = tensors["features"].astype(np.float32, copy=False)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ExpertCorrupt(
            f"{folder / STATISTICS} cannot be read ({type(error).__name__}: {error})"
        ) from error
    if features.ndim != 2 or not len(features) or not np.isfinite(features).all():
        raise ExpertCorrupt(f"{folder / STATISTICS} holds no usable features (shape {features.shape})")
    counts = tensors.get("counts")
    if counts is not None and (counts.shape != (len(features),) or (counts < 1).any()):
        raise ExpertCorrupt(f"{folder / STATISTICS} holds no usable counts (shape {counts.shape})")
    return features, counts


def read_expert(folder: Path, expert_id: str, version: int) -> LoadedExpert:
    """An expert from its folder. Raises ExpertCorrupt."""
    features, counts = stored_rows(folder)
    return LoadedExpert(
        expert_id=expert_id, version=version, adapter=load_adapter(folder), features=features, counts=counts
    )


class LiveExperts:
    """Experts in slots behind one router. `install` swaps all of it between batches. Not thread-safe, but `prepared`
    may run beside `serving`."""

    def __init__(self, backbone: Backbone, pool: PoolConfig, parts: RouterParts) -> None:
        self.backbone = backbone
        self.feature_space = feature_space(backbone)
        self.pool = Pool(backbone, pool)
        self.hook = StemHook(backbone)
        self._parts = parts
        self._experts: tuple[LoadedExpert, ...] = ()
        self._router = Router((), None, parts, backbone.width)
        self._gate = parts.gate  # taught by the live experts
        self._slots = np.zeros(0, dtype=np.int64)  # of each expert

    @property
    def experts(self) -> tuple[LoadedExpert, ...]:
        """What is live, in the order of routing's indices."""
        return self._experts

    @property
    def router(self) -> Router:
        """The router of the live experts."""
        return self._router

    def check(self, expert: LoadedExpert) -> None:
        """Whether an expert fits backbone and pool. Raises ModelMismatch."""
        self.pool.check(expert.adapter)
        if expert.features.shape[1] != row_size(self.backbone):
            raise ModelMismatch(
                f"{expert.name} has features of another backbone or version: {expert.features.shape[1]} numbers"
            )

    def install(self, experts: Sequence[LoadedExpert], network: RouterNetwork | None = None) -> None:
        """Make exactly these experts live: `prepared`, and the swap at once."""
        self.prepared(experts, network)()

    def prepared(
        self, experts: Sequence[LoadedExpert], network: RouterNetwork | None = None
    ) -> Callable[[], None]:
        """What is slow, and may run beside serving, is done; what is returned makes exactly these experts live.

        An expert that is live already keeps its slot, and its blocks are not written again. A gate may read the slots,
        so they are written before it learns. Only where no slot is free is that left for the swap.
        """
        if len(experts) > self.pool.slots:
            raise ModelMismatch(
                f"{len(experts)} experts do not fit into {self.pool.slots} slots: raise pool.slots"
            )
        for expert in experts:
            self.check(expert)
        router, slots = self._router_of(experts, network), self._places(experts)
        new = self._new(experts, slots)
        if any(slot in self._slots for slot, _ in new):
            return lambda: self._replace(experts, slots, router)
        for slot, expert in new:
            self.pool.fill(slot, expert.adapter)
        gate = self._taught(experts, slots)
        return lambda: self._go_live(experts, slots, router, gate)

    def _replace(self, experts: Sequence[LoadedExpert], slots: Sequence[int], router: Router) -> None:
        """Write over slots that are in use, and back should the gate fail to learn."""
        try:
            for slot, expert in self._new(experts, slots):
                self.pool.write(slot, expert.adapter)
            gate = self._taught(experts, slots)
        except Exception:
            for old, slot in zip(self._experts, self._slots.tolist(), strict=True):
                self.pool.write(slot, old.adapter)
            raise
        self._go_live(experts, slots, router, gate)

    def _go_live(
        self, experts: Sequence[LoadedExpert], slots: Sequence[int], router: Router, gate: Student
    ) -> None:
        self._experts, self._router, self._gate = tuple(experts), router.gated(gate), gate
        self._slots = np.array(slots, dtype=np.int64)

    def _places(self, experts: Sequence[LoadedExpert]) -> list[int]:
        """A slot each: the one it has, or a free one, those of experts that leave last."""
        held = {id(old.adapter): slot for old, slot in zip(self._experts, self._slots.tolist(), strict=True)}
        kept = {id(expert.adapter) for expert in experts} & held.keys()
        leaving = [slot for key, slot in held.items() if key not in kept]
        free = [slot for slot in range(1, self.pool.slots + 1) if slot not in held.values()] + leaving
        return [held[id(expert.adapter)] if id(expert.adapter) in kept else free.pop(0) for expert in experts]

    def _new(self, experts: Sequence[LoadedExpert], slots: Sequence[int]) -> list[tuple[int, LoadedExpert]]:
        """The experts that are not in their slots yet."""
        held = {
            (id(old.adapter), slot) for old, slot in zip(self._experts, self._slots.tolist(), strict=True)
        }
        pairs = zip(slots, experts, strict=True)
        return [(slot, expert) for slot, expert in pairs if (id(expert.adapter), slot) not in held]

    def _taught(self, experts: Sequence[LoadedExpert], slots: Sequence[int]) -> Student:
        """A gate taught by these experts, one after another; it goes on from the live one where nothing else changed.

        The lessons depend on the experts and their order alone, so that every worker has the same gate.
        """

        def sources(group: Sequence[LoadedExpert]) -> list[tuple[str, int, int]]:
            return [(expert.expert_id, id(expert.adapter), id(expert.features)) for expert in group]

        known, wanted = sources(self._experts), sources(experts)
        if known == wanted:
            return self._gate
        begin = len(known) if wanted[: len(known)] == known else 0
        gate = copy.deepcopy(self._gate if begin else self._parts.gate)
        places = {expert.expert_id: slot for expert, slot in zip(experts, slots, strict=True)}
        memory = {expert.expert_id: Memory(rows=(), features=self._stem_part(expert)) for expert in experts}
        for place in range(begin, len(experts)):
            met = [expert.expert_id for expert in experts[: place + 1]]
            stage = Stage(
                backbone=self.backbone,
                pool=self.pool,
                hook=self.hook,
                slots={name: places[name] for name in met},
            )
            gate.learn(
                stage,
                Lesson(expert_id=met[-1], memory={name: memory[name] for name in met}, seed=place),
            )
        return gate

    @contextmanager
    def serving(self, tokens: Tokens, inputs: Sequence[str], tenants: Sequence[str]) -> Iterator[Pass]:
        """In it, the next forward pass, of these tokens, is routed at its stem by its prompts, once."""
        current, allowed = Pass(), self._router.allowed(tenants)

        def decide(stem: StemOutput) -> None:
            current.features = feature_rows(stem.reading(), tokens, inputs)
            current.routed = self._router.route(stem, current.features, allowed)
            self.pool.set_gates(*self.gates(current.routed.routing), self._gate.ranks)

        try:
            with self.hook.routing(tokens.prompt_mask(), decide):
                yield current
        finally:
            self.pool.no_gates()

    def gates(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """(slots (B, m) int64, weights (B, m) or (B, m, r) float32) of a routing."""
        weights = routing.weights if routing.rank_weights is None else routing.rank_weights
        return self.slots_of(routing.experts), torch.from_numpy(weights)

    def slots_of(self, experts: np.ndarray) -> Tensor:
        """Slots of experts' indices, -1 being the backbone; int64 in the shape given."""
        return torch.from_numpy(np.append(self._slots, BACKBONE_SLOT)[experts])

    def gate(
        self, inputs: Sequence[str], tenant: str
    ) -> Callable[[list[int], Tokens], AbstractContextManager[Pass]]:
        """The gates as served, for `training.score_rows` of these inputs: routed by the prompts, answers unseen."""

        def enter(chosen: list[int], tokens: Tokens) -> AbstractContextManager[Pass]:
            return self.serving(tokens, [inputs[row] for row in chosen], [tenant] * len(chosen))

        return enter

    def _stem_part(self, expert: LoadedExpert) -> np.ndarray:
        """(n, d): what routers learn from."""
        return expert.features[:, : self.backbone.width]

    def _router_of(self, experts: Sequence[LoadedExpert], network: RouterNetwork | None) -> Router:
        """Fitted anew only where an expert came, went, or has other rows: that takes seconds."""

        def rows(group: Sequence[LoadedExpert]) -> list[tuple[str, str, int]]:
            return [(expert.expert_id, expert.tenant, id(expert.features)) for expert in group]

        if rows(experts) == rows(self._experts):
            return self._router.refreshed([expert.is_mature for expert in experts], network)
        return Router([_statistics(expert) for expert in experts], network, self._parts, self.backbone.width)

    def close(self) -> None:
        """Take every hook off the backbone. May be called twice."""
        self.pool.close()
        self.hook.close()


def _statistics(expert: LoadedExpert) -> ExpertStatistics:
    return ExpertStatistics(
        expert_id=expert.expert_id,
        rows=expert.features,
        tenant=expert.tenant,
        is_mature=expert.is_mature,
        counts=expert.counts,
    )
