"""How a pass computes attention: by plain products where they are faster, else by the model's fused kernel.

On a CPU in bfloat16 plain products take, of the fused kernel's time (SmolLM2-135M, 2 cores):

    a pass over 16 rows of 64 tokens, 16 of 150, 4 of 512               0.94, 0.90, 0.91
    the same, padded rows of 40 to 64, 100 to 150, 400 to 512           0.96, 0.87, 0.92
    a token behind rows of 64, 150 and 512                              0.76, 0.61, 0.67
    the same behind padded rows: the fused kernel's other way           1.07, 1.14, 0.94; 32 rows of 60 to 140 1.32
    training an expert, batches of 8 rows of 104 tokens                 0.75

For a row of 2048 tokens they take 1.15; in float32 both are equal, and on a GPU the fused kernel is better. Plain
products keep their scores, one layer's at a time or, where gradients are wanted, every layer's: they are for passes
whose scores fit.
"""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["attend_plainly", "attends_plainly"]

PLAIN, FUSED = "eager", "sdpa"  # their names in transformers
SCORE_BYTES = 6  # of one score: float32 before, bfloat16 behind the softmax
MOST_BYTES = 1 << 30  # of a pass's scores
MOST_TOKENS = 512  # of a row in one pass


def attend_plainly(model: Any) -> None:
    """From now on each pass of a loaded model takes the faster way. Nothing is done where that is the fused kernel
    always, or where the model has an attention of its own.
    """
    is_fused = getattr(model.config, "_attn_implementation", None) == FUSED
    if not is_fused or model.device.type != "cpu" or model.dtype != torch.bfloat16 or not _can_switch(model):
        return
    model.base_model.register_forward_pre_hook(_choose, with_kwargs=True)


def attends_plainly(model: Any) -> bool:
    """Whether passes of this model may go by plain products."""
    return _choose in model.base_model._forward_pre_hooks.values()  # noqa: SLF001 - nothing else tells


def _choose(body: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a pass of the body; keeps nothing, so that a copy of the model chooses for itself."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        return
    rows, tokens = ids.shape
    mask = kwargs.get("attention_mask")
    seen = tokens if mask is None else mask.shape[-1]  # those of the cache among them
    config = body.config
    layers = config.num_hidden_layers if torch.is_grad_enabled() else 1
    size = SCORE_BYTES * rows * config.num_attention_heads * layers * tokens * seen
    is_faster = tokens <= MOST_TOKENS if tokens > 1 else mask is None or bool(mask.all())
    wanted = PLAIN if is_faster and size <= MOST_BYTES else FUSED
    if config._attn_implementation != wanted:  # noqa: SLF001 - there is a setter and no getter
        body.set_attn_implementation(wanted)


def _can_switch(model: Any) -> bool:
    """Whether the model takes both names; it ends with the fused kernel."""
    needed = ("num_hidden_layers", "num_attention_heads")
    if not all(hasattr(model.config, name) for name in needed) or model.base_model.config is not model.config:
        return False
    try:
        model.set_attn_implementation(PLAIN)
        took = model.config._attn_implementation == PLAIN  # noqa: SLF001
        model.set_attn_implementation(FUSED)
    except (ValueError, NotImplementedError, AttributeError, ImportError):
        return False
    return took
