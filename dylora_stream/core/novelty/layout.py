"""The layout of a feature row: one vector, made of blocks that are whitened and measured each by itself.

Stem states, hashed text and surface counts differ in scale and in how tightly they scatter; one whitening over all of
them lets the widest decide. Each block is measured alone and the distances are averaged.
"""

from dataclasses import dataclass

import numpy as np

from dylora_stream.core.lexical import ANSWER_TOKENS, BYTES, SURFACE, TOKENS

__all__ = ["SKETCH", "Block", "FeatureLayout", "with_answers"]

SKETCH = 512  # numbers of an answer's gradient sketch
STEM_BLOCKS = (
    "mean",
    "middle",
    "spread",
)  # at the stem's depth, at half of it, deviation at the stem's depth
LEXICAL = (("tokens", TOKENS), ("bytes", BYTES), ("surface", SURFACE))


@dataclass(frozen=True, slots=True)
class Block:
    """Columns [start, stop) of a row."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """Blocks in the order of their columns, without gaps. The first one is the stem's mean: what the router reads."""

    blocks: tuple[Block, ...]

    @classmethod
    def of_sizes(cls, *sizes: tuple[str, int]) -> "FeatureLayout":
        """Blocks one behind the other."""
        stops = np.cumsum([size for _, size in sizes]).tolist()
        return cls(
            tuple(Block(name, stop - size, stop) for (name, size), stop in zip(sizes, stops, strict=True))
        )

    @classmethod
    def of_inputs(cls, width: int) -> "FeatureLayout":
        """The input row of a backbone of this width."""
        return cls.of_sizes(*((name, width) for name in STEM_BLOCKS), *LEXICAL)

    @classmethod
    def of_answers(cls, width: int) -> "FeatureLayout":
        """The answer row: gradient sketch, mean final state at the answer, hashed answer."""
        return cls.of_sizes(("sketch", SKETCH), ("state", width), ("answer", ANSWER_TOKENS))

    @classmethod
    def recognised(cls, dimensions: int, *, is_answer: bool = False) -> "FeatureLayout":
        """The layout that rows of this many numbers have; one block where they fit none.

        Widths of backbones are multiples of 8, and the lexical blocks' sizes are odd in sum.
        """
        rest = dimensions - (SKETCH + ANSWER_TOKENS if is_answer else sum(size for _, size in LEXICAL))
        parts = 1 if is_answer else len(STEM_BLOCKS)
        if rest > 0 and rest % (8 * parts) == 0:
            return (cls.of_answers if is_answer else cls.of_inputs)(rest // parts)
        return cls.of_sizes(("row", dimensions))

    @property
    def dimensions(self) -> int:
        """Numbers of a row."""
        return self.blocks[-1].stop

    def parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """rows (n, D) → one (n, size) view a block."""
        return [rows[:, block.start : block.stop] for block in self.blocks]


def with_answers(rows: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """First blocks side by side, stem mean and gradient sketch: rows (n, D), answers (n, A) → (n, b + s)."""
    first = FeatureLayout.recognised(rows.shape[1]).blocks[0]
    sketch = FeatureLayout.recognised(answers.shape[1], is_answer=True).blocks[0]
    return np.concatenate([rows[:, : first.stop], answers[:, : sketch.stop]], axis=1)
