"""What learn holds, keeps and takes when more rows come than can ever be learned: novel, answered, no two alike.

The daemon's curator and database in a folder of their own, fed in batches as its loop feeds them; features are drawn at
random, in the size that the backbone's have.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dylora_stream.bench.continual.workbench import Tell
from dylora_stream.bootstrap.parts import expert_store, faiss_index, open_ledger, statistics_loader
from dylora_stream.core.clustering import Reference
from dylora_stream.core.ledger import JobKind, JobRecord, Ledger
from dylora_stream.core.messages import DEFAULT_TENANT, Novelty, Policy, Position, Sample, SampleReason
from dylora_stream.learn.curator import Curator, CuratorConfig
from dylora_stream.learn.knowledge import Knowledge
from dylora_stream.settings import Settings
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import ManualClock

__all__ = ["Scale", "Sizes", "measure_scale"]

BATCH = 256  # records of a poll, and rows of a sketch job
PARTS = 8  # of the stream; after each, clusters are made anew
PACE_S = 0.1  # of record time between two records
TOPIC = "scale"
MEGABYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is fed: rows, and the numbers of a row's features and of its answer's."""

    rows: int
    features: int
    answers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What it came to."""

    rows: int
    held: int
    """Rows in memory at the end."""
    held_mb: float
    """Their features, and their answers' as if each had some."""
    disk_mb: float
    ms_first: float
    """A record in the stream's first eighth, decided and committed."""
    ms_last: float
    """The same in its last eighth."""
    recluster_s: float
    """The longest pass over the rows that wait."""
    load_s: float
    """Reading everything back, as a start does."""


def measure_scale(settings: Settings, sizes: Sizes, folder: Path, tell: Tell) -> Scale:
    """Feed so many rows into a database in `folder`, which is empty."""
    settings = settings.model_copy(update={"store": replace(settings.store, folder=folder, experts="")})
    ledger = open_ledger(settings)
    try:
        feeder = _Feeder(settings, ledger, sizes)
        each = max(sizes.rows // BATCH // PARTS, 1)
        took: list[float] = []
        passes: list[float] = []
        for _part in range(PARTS):
            for _ in range(each):
                tell("feeding rows", len(took), PARTS * each)
                took.append(_seconds(feeder.feed))
            passes.append(_seconds(feeder.sketch))
        held = sum(feeder.curator.summary()["rows"].values())
        return Scale(
            rows=len(took) * BATCH,
            held=held,
            held_mb=held * 4 * (sizes.features + sizes.answers) / MEGABYTE,
            disk_mb=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / MEGABYTE,
            ms_first=1000 * float(np.mean(took[:each])) / BATCH,
            ms_last=1000 * float(np.mean(took[-each:])) / BATCH,
            recluster_s=max(passes),
            load_s=_seconds(ledger.load),
        )
    finally:
        ledger.close()


class _Feeder:
    """A curator on a database, and rows for it."""

    def __init__(self, settings: Settings, ledger: Ledger, sizes: Sizes) -> None:
        self._ledger, self._sizes = ledger, sizes
        self._rng, self._clock = np.random.default_rng(0), ManualClock()
        self._sent = 0
        knowledge = Knowledge(statistics_loader(expert_store(settings)), faiss_index(), settings.novelty)
        rules = CuratorConfig(
            lifecycle=settings.lifecycle, clustering=settings.clustering, slots=settings.pool.slots
        )
        codec = WireCodec(source="/dylora/bench")
        state = ledger.load(settings.lifecycle.expert_texts)
        self.curator = Curator(state, knowledge, codec, self._clock, rules)
        mean, answers = np.zeros(sizes.features), np.zeros(sizes.answers)
        self.curator.refer_to(Reference(input_mean=mean, input_std=mean + 1.0, sketch_mean=answers))

    def feed(self) -> None:
        """A batch of rows, taken and committed."""
        samples = [self._sample(row) for row in self._drawn(self._sizes.features)]
        changes = self.curator.take(samples, [], {(TOPIC, 0): self._sent})
        self._ledger.commit(changes)
        self._clock.advance(BATCH * PACE_S)

    def sketch(self) -> None:
        """The answers of the last batch's rows are there: they are clustered, and all clusters are made anew."""
        newest = [str(Position(TOPIC, 0, number)) for number in range(self._sent - BATCH, self._sent)]
        job = JobRecord(
            job_id=f"sketch-{self._sent}",
            kind=JobKind.SKETCH,
            tenant=DEFAULT_TENANT,
            created_ms=self._clock.now_ms(),
            positions=tuple(newest),
        )
        sketches = dict(zip(newest, self._drawn(self._sizes.answers), strict=True))
        self._ledger.commit(self.curator.sketched(job, sketches))

    def _drawn(self, size: int) -> np.ndarray:
        """(BATCH, size) float32."""
        return self._rng.standard_normal((BATCH, size)).astype(np.float32)

    def _sample(self, features: np.ndarray) -> Sample:
        number, self._sent = self._sent, self._sent + 1
        return Sample(
            position=Position(TOPIC, 0, number),
            id=None,
            tenant=DEFAULT_TENANT,
            input=f"input {number}",
            output=f"output {number}",
            choices=(),
            reason=SampleReason.NOVEL,
            timestamp_ms=self._clock.now_ms(),
            answer="",
            policy=Policy.BACKBONE,
            expert=None,
            version=0,
            novelty=Novelty(score=1.0, p_value=None, entropy=0.0, nearest=None, is_novel=True),
            feature_space="",
            features=features,
        )


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
