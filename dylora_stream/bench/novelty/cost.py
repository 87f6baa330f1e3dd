"""What novelty costs beside the pass that it rides on: 16 rows of 64 tokens, experts of the folder, and many modes.

Counted are feature rows out of the pass's states, and their scores against all experts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dylora_stream.bench.novelty.judging import Ground
from dylora_stream.core.novelty import NoveltyScorer
from dylora_stream.core.statistics import ExpertStatistics
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import StemReading, feature_rows, read_states, stem_features

__all__ = ["Cost", "measure_cost"]

ROWS, TOKENS = 16, 64
EXPERTS, MODES = 10, 10_000
ROUNDS = 9  # of pass and scoring in turn; the median counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Milliseconds a record, and shares of a pass of the bare backbone over the same rows."""

    pass_ms: float
    ms: float
    share: float
    ms_of_many: float
    share_of_many: float


def measure_cost(ground: Ground, backbone: Backbone) -> Cost:
    """With 10 experts of the folder's rows, and with 10 of `MODES` rows in all, each row a mode."""
    ground.tell("cost", 0, ROUNDS)
    quick = replace(ground, config=replace(ground.config, max_modes=MODES // EXPERTS, folds=2))
    few = _scorer(_experts(ground, None), ground)
    many = _scorer(_experts(ground, MODES // EXPERTS), quick)
    batch = _Batch(backbone, ground.seed)
    timed = []
    for step in range(ROUNDS):
        ground.tell("cost", step, ROUNDS)
        timed.append(
            [_seconds(batch.run), _seconds(lambda: batch.score(few)), _seconds(lambda: batch.score(many))]
        )
    whole, own, crowd = np.median(timed[1:] or timed, axis=0).tolist()  # the first round warms up
    return Cost(
        pass_ms=whole / ROWS * 1000,
        ms=own / ROWS * 1000,
        share=own / whole,
        ms_of_many=crowd / ROWS * 1000,
        share_of_many=crowd / whole,
    )


class _Batch:
    """Rows of tokens drawn at random: a pass of the bare backbone, and what novelty adds to it."""

    def __init__(self, backbone: Backbone, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._backbone = backbone
        self._tokens = backbone.pad(rng.integers(len(backbone.tokenizer), size=(ROWS, TOKENS)).tolist())
        self._texts = [backbone.decode(row.tolist()) for row in self._tokens.input_ids]
        self._states = read_states(backbone, self._tokens)

    @torch.no_grad()
    def run(self) -> None:
        """The pass."""
        self._backbone.body(**self._tokens.inputs(), use_cache=False)

    @torch.no_grad()
    def score(self, scorer: NoveltyScorer) -> None:
        """Feature rows out of states that are there, and their scores."""
        mask = self._tokens.attention_mask
        mean, early = stem_features(self._states, mask), stem_features(self._states, mask)
        reading = StemReading(states=self._states, mask=mask, mean=mean, early=early)
        scorer.score(feature_rows(reading, self._tokens, self._texts))


def _experts(ground: Ground, size: int | None) -> list[ExpertStatistics]:
    """Ten experts: the folder's tasks, in turn, or `size` rows each, made of theirs with a little noise."""
    rng = np.random.default_rng(ground.seed)
    tables = [task.train.features for task in ground.tasks.values()]
    spread = 0.1 * np.concatenate(tables).std(axis=0)
    experts = []
    for number in range(EXPERTS):
        table = tables[number % len(tables)]
        if size is not None or number >= len(tables):
            drawn = table[rng.integers(len(table), size=size or len(table))]
            table = (drawn + spread * rng.standard_normal(drawn.shape)).astype(np.float32)
        experts.append(ExpertStatistics(expert_id=f"e-{number}", rows=table))
    return experts


def _scorer(experts: list[ExpertStatistics], ground: Ground) -> NoveltyScorer:
    rng = np.random.default_rng(ground.seed)
    return NoveltyScorer.fit(experts, None, ground.index_factory, ground.config, rng)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
