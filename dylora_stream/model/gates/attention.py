"""AM-LoRA (2409.19611): attention over the experts' outputs, made sparse by an L1 term.

The exact form was not found. Built here, at each layer and token, x and A x divided by the root mean square of x:

    q = Q x / √d_in,   k_e = K_e (A_e x)         Q shared by the experts of a layer, K_e (h, r)
    g = softmax over members of q·k_e / √h
    penalty λ · mean(1 - max_e g_e)              the L1 norm of all attention but the largest: of a softmax
                                                 the whole L1 norm is 1 whatever it attends to

A_e x stands for the expert's output, of which it holds everything in r numbers. Experts train alone; then Q and all
K move on stored rows of all experts, as the paper's attention does on each new task. K starts at 0: every expert the
same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dylora_stream.core.routing import Routing
from dylora_stream.model.backbone import Tokens
from dylora_stream.model.gates.base import Lesson, Scene, Stage
from dylora_stream.model.gates.learning import Learning, by_ranks, learn_by_answers
from dylora_stream.model.gates.members import member_softmax, members_of
from dylora_stream.model.gates.rows import everyone
from dylora_stream.model.gates.table import ExpertTable, Tabled
from dylora_stream.model.mixture import LayerView
from dylora_stream.model.stem import StemOutput

__all__ = ["AttentionGate", "AttentionRanks"]

QUERY, KEY = "query", "key"  # Q (h, d_in) a layer; K (h, r) a layer and expert
HEAD = 16  # h
SPARSITY = 0.1  # λ; the paper's value was not found
TINY = 1e-12  # of a mean square: the root's slope at 0 is infinite


class AttentionRanks:
    """A `RankGate` that gives all ranks of an expert one weight."""

    def __init__(self, table: ExpertTable) -> None:
        self._table = table
        self._mask: Tensor | None = None
        self._off: list[Tensor] = []

    def weigh(self, view: LayerView) -> Tensor:
        """(B, T, D, 1)."""
        x = view.inputs.float()
        size = (x.square().mean(-1, keepdim=True) + TINY).sqrt()  # (B, T, 1); padding may be all 0
        matrix = self._table.get(QUERY, view.layer).to(x.device)
        query = nn.functional.linear(x / size, matrix) * x.shape[-1] ** -0.5  # (B, T, h)
        low = view.low.float() / size[..., None]  # (B, T, D, r)
        keys = torch.einsum("btdr,dhr->btdh", low, self._table.stacked(KEY, view))
        logits = torch.einsum("bth,btdh->btd", query, keys) * HEAD**-0.5
        attention = member_softmax(logits, members_of(view)[..., 0])
        if self._mask is not None:
            self._off.append((1 - attention.amax(-1))[self._mask].mean())
        return attention[..., None]

    @contextmanager
    def watched(self, mask: Tensor) -> Iterator[None]:
        """Within: `off` collects, over the tokens of mask (B, T) bool."""
        self._mask, self._off = mask, []
        try:
            yield
        finally:
            self._mask = None

    def off(self) -> Tensor:
        """Mean attention beside the largest, over the layers of the last watched pass."""
        return torch.stack(self._off).mean()

    def forget(self) -> None:
        """Let go of the last watched pass."""
        self._off = []


class AttentionGate(Tabled):
    """All experts, softly, a token and layer, by what they would say."""

    name = "amlora"
    trained_parts = (QUERY, KEY)

    def __init__(self, learning: Learning | None = None, sparsity: float = SPARSITY) -> None:
        super().__init__()
        self.ranks = AttentionRanks(self._table)
        self._learning, self._sparsity = learning or Learning(), sparsity

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """Everyone: the layers decide."""
        del stem
        return everyone(scene)

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """A key a layer for the new expert; then all move, if there are two experts to tell apart."""
        self._table.follow(stage)
        self._grow(stage, lesson)
        if len(stage.slots) < 2:
            return
        gating = by_ranks(stage, self.ranks)

        @contextmanager
        def watched(tokens: Tokens) -> Iterator[None]:
            with gating(tokens), self.ranks.watched(tokens.attention_mask.bool()):
                yield

        config = replace(self._learning, penalty=lambda: self._sparsity * self.ranks.off())
        learn_by_answers(stage, lesson, watched, self._table.tensors(self.trained_parts), config)
        self.ranks.forget()
        self._table.changed()

    def _grow(self, stage: Stage, lesson: Lesson) -> None:
        generator = torch.Generator().manual_seed(lesson.seed)
        device = stage.backbone.device
        for layer, (d_in, _) in stage.pool.shapes.items():
            if not self._table.has(QUERY, layer):
                query = torch.randn((HEAD, d_in), generator=generator)
                self._table.put((QUERY, layer, ""), query.to(device))
            key = torch.zeros((HEAD, stage.pool.rank), device=device)
            self._table.put((KEY, layer, lesson.expert_id), key)
