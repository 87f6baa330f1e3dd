"""What is measured, how large, and what is aimed at. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from dylora_stream.core.recipes import SEEDING
from dylora_stream.model.config import Dtype

__all__ = ["AIMS", "LEAST_PAIRS", "PARTS", "USUAL_PARTS", "Aim", "Sizes", "ThroughputConfig"]

USUAL_PARTS = ("mixed", "decode", "answer", "train", "kafka", "overhead")
PARTS = (*USUAL_PARTS, "accuracy")  # needs a folder of tasks, and minutes a task
LEAST_PAIRS = 5  # a median of fewer moves too much


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A bound on a ratio."""

    bound: float
    is_least: bool = False

    def is_met(self, value: float) -> bool:
        """Whether a number keeps it."""
        return value >= self.bound if self.is_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.is_least else '≤'} {self.bound:.2f}"


AIMS = {
    "mixed_32_float32": Aim(bound=1.05),
    "mixed_32_bfloat16": Aim(bound=1.05),
    "mixed_256_float32": Aim(bound=1.08),
    "mixed_256_bfloat16": Aim(bound=1.08),
    "dense4_float32": Aim(bound=1.20),
    "dense4_bfloat16": Aim(bound=1.20),
    "decode_32": Aim(bound=1.20),
    "decode_256": Aim(bound=1.20),
    "answer_choices": Aim(bound=1.12),
    "answer_generate": Aim(bound=1.20),
    "train_short_answers": Aim(bound=1.5, is_least=True),
    "train_long_answers": Aim(bound=1.2, is_least=True),
    "kafka_to_kafka": Aim(bound=0.85, is_least=True),
    "kafka_to_kafka_choices": Aim(bound=0.85, is_least=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is. The defaults are what the README reports."""

    rows: int = 16
    """Of a batch that is passed or generated for."""
    tokens: int = 64
    """Of a row of a batch that is passed."""
    rank: int = 8
    """Of the experts in these batches."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Of the backbones that pass batches; everything else runs in the configured one."""
    main_pools: tuple[int, ...] = (32, 256)
    """Experts in the pool, in every dtype and while decoding. The first is PEFT's and the dense rows' too."""
    pools: tuple[int, ...] = (1, 4, 16, 32, 64, 256)
    """Experts in the pool, in the configured dtype: the plot's points."""
    members: int = 4
    """Experts of a dense row."""
    prompt_tokens: int = 32
    new_tokens: int = 16
    requests: int = 32
    """Records that are answered at once."""
    distinct: int = 200
    """Texts that the experts of the answering parts know, and those of the overhead's records."""
    train_rows: int = 32
    train_epochs: int = SEEDING.epochs
    short: tuple[int, int] = (100, 4)
    """Tokens of a prompt (± a fifth) and of its answer, end token included."""
    long: tuple[int, int] = (80, 40)
    """The same where answers are a third of the tokens."""
    data_tasks: int = 5
    """Tasks that a dataset folder must have."""
    data_rows: int = 64
    """Training rows of each; twice as many are tested."""
    data_tokens: int = 256
    """Tokens of a row at most; longer ones are passed over, for both ways alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputConfig:
    """What the command line says."""

    only: tuple[str, ...] = USUAL_PARTS
    pairs: int = 7
    """Of the short comparisons; trainings and Kafka take LEAST_PAIRS."""
    records: int = 128
    overhead_records: int = 2000
    report: Path | None = None
    train_data: Path | None = None
    train_tasks: tuple[str, ...] = ()
    """Of that folder; none: all of them."""
    train_seeds: tuple[int, ...] = (0,)
    """One training of every task each."""
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        unknown = [part for part in self.only if part not in PARTS]
        if unknown or not self.only:
            raise ValueError(f"there is no part {', '.join(unknown)!r}: use some of {','.join(PARTS)}")
        if ("accuracy" in self.only) != (self.train_data is not None):
            raise ValueError("the part accuracy and a folder of tasks, --train-data FOLDER, go together")
        if self.pairs < LEAST_PAIRS:
            raise ValueError(f"{self.pairs} pairs are too few for a median: at least {LEAST_PAIRS}")
