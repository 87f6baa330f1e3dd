"""How attention is computed while an expert trains.

The fused kernel keeps no scores and computes them anew on the way back. On a CPU in bfloat16 that way back alone took a
fifth of a training (8 rows of 104 tokens; with plain products 6.8 s instead of 9.1 s; in float32 both are equal, and on
a GPU the fused kernel is the better one). Plain products keep the scores, so they are for rows that are not too long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dylora_stream.model.backbone import Backbone

__all__ = ["plain_attention"]

PLAIN = "eager"  # its name in transformers
SCORE_BYTES = 6  # of one score that is kept: float32 before, bfloat16 behind the softmax
MOST_BYTES = 1 << 30


@contextmanager
def plain_attention(backbone: Backbone, rows: int, longest: int) -> Iterator[None]:
    """Within: plain products where they are faster and their scores fit; rows of a batch, tokens of the longest row."""
    model = backbone.model
    before = model.config._attn_implementation  # noqa: SLF001 - there is a setter and no getter
    heads = int(getattr(model.config, "num_attention_heads", 0))
    size = SCORE_BYTES * rows * heads * len(backbone.layers) * longest**2
    is_faster = backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16
    if not is_faster or not heads or size > MOST_BYTES:
        yield
        return
    try:
        model.set_attn_implementation(PLAIN)
    except (ValueError, NotImplementedError, AttributeError):  # a model with an attention of its own
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)
