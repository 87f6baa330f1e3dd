"""Scoring a task's test rows: does greedy decoding give exactly the right answer?

`score_rows` asks this with the right tokens before each position, which is the same question: the first wrong token
makes both inexact. Long answers are judged by exact match too.

A row that a gate gives to one expert with weight 1 is answered by that expert alone, so its exactness is computed once
an expert and row, and shared between all gates, orders and the oracle. Every other row takes a real gated pass.

Batches hold rows of one task, as `score_rows` sorts them: a gate that let rows of a batch decide together would be told
the task by it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from dylora_stream.bench.continual.workbench import Workbench
from dylora_stream.bench.store import digest
from dylora_stream.core.messages import Policy
from dylora_stream.core.novelty import distinct
from dylora_stream.core.routing import NULL_EXPERT, Routing
from dylora_stream.core.statistics import ExpertStatistics, LinearDiscriminant
from dylora_stream.model.backbone import Tokens
from dylora_stream.model.features import length_sorted, read_states
from dylora_stream.model.gates.base import Gate, Scene
from dylora_stream.model.stem import StemOutput
from dylora_stream.model.training import score_rows

__all__ = ["SHARED", "TIED", "Cell", "Examiner", "joined", "leaders", "scene_of", "sole"]

TIED = -2  # leader of a row that several experts share alike
SHARED = -3  # in the place of a sole expert
UNKNOWN = -1  # exactness that was not computed yet
BATCH = 16  # rows of one pass through the stem
STEM_BYTES = 512 * 2**20  # of stems kept in memory; beyond it they are computed again


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A task's test rows at one point of a course. is_exact: (n,) bool.

    leaders: (n,) int64, the place in the order of each row's largest-weight expert, NULL_EXPERT for the backbone, TIED;
    None for methods without experts by row.
    """

    is_exact: np.ndarray
    leaders: np.ndarray | None = None


class Examiner:
    """Scores for one workbench."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._stems: dict[str, list[tuple[list[int], StemOutput]]] = {}
        self._room = STEM_BYTES

    def alone(self, key: str | None, name: str, rows: Sequence[int] | None = None) -> np.ndarray:
        """(len(rows),) bool: exactness of a task's test rows (None: all) under one expert, or the backbone (None).

        Only what is not known yet is computed.
        """
        bench, exam = self._bench, self._bench.exams[name]
        place = digest(**bench.ground, exam=exam.digest, expert=key)
        known = np.array(bench.store.value("alone", place) or [UNKNOWN] * len(exam.kept), dtype=np.int64)
        wanted = np.arange(len(exam.kept)) if rows is None else np.asarray(rows, dtype=np.int64)
        missing = wanted[known[wanted] == UNKNOWN]
        if len(missing):
            bench.tell(f"scoring {len(missing)} rows of {name}", 0, 0)
            adapter = None if key is None else bench.adapter(key)
            known[missing] = score_rows(bench.backbone, [exam.kept[row] for row in missing], adapter).is_exact
            bench.store.put_value("alone", place, known.tolist())
        return known[wanted].astype(bool)

    def gated(self, gate: Gate, scene: Scene, experts: Sequence[str], name: str) -> Cell:
        """A task's test rows under a gate; `experts` are the keys of the experts in slots 1, 2, …"""
        if gate.ranks is not None:
            return self._routed_in_pass(gate, scene, name)
        routing = self._decided(gate, scene, name)
        owner = sole(routing)
        is_exact = np.zeros(len(routing), dtype=bool)
        for expert in np.unique(owner[owner != SHARED]).tolist():
            rows = np.flatnonzero(owner == expert).tolist()
            key = None if expert == NULL_EXPERT else experts[expert]
            is_exact[rows] = self.alone(key, name, rows)
        rest = np.flatnonzero(owner == SHARED)
        if len(rest):
            is_exact[rest] = self._preset(routing, rest, name)
        return Cell(is_exact=is_exact, leaders=leaders(routing))

    def _decided(self, gate: Gate, scene: Scene, name: str) -> Routing:
        """The routing of all rows, by their prompts."""
        with torch.no_grad():
            parts = [(rows, gate.decide(stem, _of_rows(scene, len(rows)))) for rows, stem in self._stem(name)]
        return joined(parts)

    def _preset(self, routing: Routing, rows: np.ndarray, name: str) -> np.ndarray:
        """(len(rows),) bool in real passes with the gates as decided."""
        bench = self._bench
        slots = torch.from_numpy(routing.experts[rows] + 1)
        weights = torch.from_numpy(_weights(routing)[rows])

        def enter(chosen: list[int], _tokens: Tokens) -> AbstractContextManager[None]:
            return bench.pool.gated(slots[chosen], weights[chosen])

        bench.tell(f"scoring {len(rows)} rows of {name} in gated passes", 0, 0)
        kept = bench.exams[name].kept
        return score_rows(bench.backbone, [kept[row] for row in rows], gate=enter).is_exact

    def _routed_in_pass(self, gate: Gate, scene: Scene, name: str) -> Cell:
        """Real passes, decided at the stem of each."""
        bench, parts = self._bench, list[tuple[list[int], Routing]]()

        @contextmanager
        def enter(chosen: list[int], tokens: Tokens) -> Iterator[None]:
            def decide(stem: StemOutput) -> None:
                routing = gate.decide(stem, _of_rows(scene, len(chosen)))
                parts.append((chosen, routing))
                slots, weights = torch.from_numpy(routing.experts + 1), torch.from_numpy(_weights(routing))
                bench.pool.set_gates(slots, weights, gate.ranks)

            try:
                with bench.hook.routing(tokens.prompt_mask(), decide):
                    yield
            finally:
                bench.pool.no_gates()

        bench.tell(f"scoring {name} in gated passes", 0, 0)
        is_exact = score_rows(bench.backbone, bench.exams[name].kept, gate=enter).is_exact
        return Cell(is_exact=is_exact, leaders=leaders(joined(parts)))

    def _stem(self, name: str) -> list[tuple[list[int], StemOutput]]:
        """(row numbers, stem of their prompts) by batch; kept while there is room, as the stem never changes."""
        if name in self._stems:
            return self._stems[name]
        backbone = self._bench.backbone
        self._bench.tell(f"reading {name}'s test rows", 0, 0)
        prompts = backbone.prompt_ids([row.input for row in self._bench.exams[name].kept])
        batches = []
        for rows in length_sorted([len(prompt) for prompt in prompts], BATCH):
            tokens = backbone.pad([prompts[row] for row in rows])
            batches.append((rows, StemOutput.of(read_states(backbone, tokens), tokens.attention_mask)))
        size = sum(stem.states.nbytes for _, stem in batches)
        if size <= self._room:
            self._stems[name], self._room = batches, self._room - size
        return batches


def scene_of(features: Sequence[tuple[str, np.ndarray]]) -> Scene:
    """Mature experts (id, training features (n, d)), open to every row, with no row beyond them; for one row."""
    statistics = [ExpertStatistics(expert_id=name, rows=distinct(rows)) for name, rows in features]
    return Scene(
        allowed=np.ones((1, len(features)), dtype=bool),
        is_beyond=np.zeros(1, dtype=bool),
        is_mature=np.ones(len(features), dtype=bool),
        discriminant=LinearDiscriminant.fit(statistics),
        network=None,
        expert_ids=tuple(name for name, _ in features),
    )


def sole(routing: Routing) -> np.ndarray:
    """(n,) int64: the expert that answers a row alone with weight 1, NULL_EXPERT for the backbone, else SHARED."""
    is_expert = (routing.experts != NULL_EXPERT) & (routing.weights != 0)
    first = np.arange(len(routing)), is_expert.argmax(1)
    count = is_expert.sum(1)
    is_whole = (count == 1) & (routing.weights[first] == 1) & (routing.rank_weights is None)
    return np.where(is_whole, routing.experts[first], np.where(count == 0, NULL_EXPERT, SHARED))


def leaders(routing: Routing) -> np.ndarray:
    """(n,) int64: each row's largest-weight expert, see `Cell`."""
    weights = np.where(routing.experts == NULL_EXPERT, -np.inf, routing.weights)
    best = weights.max(1)
    first = routing.experts[np.arange(len(routing)), weights.argmax(1)]
    tied = (weights == best[:, None]).sum(1) > 1
    return np.where(best <= 0, NULL_EXPERT, np.where(tied, TIED, first)).astype(np.int64)


def joined(parts: Sequence[tuple[list[int], Routing]]) -> Routing:
    """Batches (row numbers, routing) as one routing in the rows' order, padded to the most members."""
    rows = sum(len(chosen) for chosen, _ in parts)
    members = max(routing.experts.shape[1] for _, routing in parts)
    experts = np.full((rows, members), NULL_EXPERT, dtype=np.int64)
    weights = np.zeros((rows, members), dtype=np.float32)
    policies = [Policy.BACKBONE] * rows
    has_ranks = any(routing.rank_weights is not None for _, routing in parts)
    ranks = max(
        (routing.rank_weights.shape[2] for _, routing in parts if routing.rank_weights is not None), default=1
    )
    by_rank = np.zeros((rows, members, ranks), dtype=np.float32)
    for chosen, routing in parts:
        width = routing.experts.shape[1]
        experts[chosen, :width], weights[chosen, :width] = routing.experts, routing.weights
        whole = routing.weights[:, :, None] if routing.rank_weights is None else routing.rank_weights
        by_rank[chosen, :width] = whole
        for row, policy in zip(chosen, routing.policies, strict=True):
            policies[row] = policy
    return Routing(experts, weights, tuple(policies), by_rank if has_ranks else None)


def _weights(routing: Routing) -> np.ndarray:
    return routing.weights if routing.rank_weights is None else routing.rank_weights


def _of_rows(scene: Scene, rows: int) -> Scene:
    """The same scene for a batch of so many rows."""
    return replace(
        scene, allowed=np.repeat(scene.allowed[:1], rows, axis=0), is_beyond=np.zeros(rows, dtype=bool)
    )
