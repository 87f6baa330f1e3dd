"""What "nothing in particular" looks like to a backbone: the middle that similarities between rows are measured from.

Raw stem features of any two texts have a cosine near 0.9, because they share where text lies at all. The reference is
the mean and spread of features, and the mean of answer sketches, over texts that belong to no skill: strings of tokens
drawn evenly from the vocabulary, the second part of each standing as the answer. Drawn with a fixed seed, so it is a
function of the backbone alone and part of its feature space; no text is shipped.
"""

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dylora_stream.core.durable import put_in_place
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText, answer_rows, read_rows

__all__ = ["reference_texts", "write_reference"]

TEXTS = 96
SHORTEST, LONGEST = 8, 32  # tokens of a text, answer included
SEED = 20_260_101


def reference_texts(backbone: Backbone) -> list[LabelledText]:
    """The texts; a quarter of each is its answer."""
    rng = np.random.default_rng(SEED)
    special = set(backbone.tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(backbone.tokenizer)) if token not in special])
    texts = []
    for _ in range(TEXTS):
        drawn = rng.choice(ordinary, int(rng.integers(SHORTEST, LONGEST + 1)))
        text = str(backbone.tokenizer.decode(drawn.tolist()))
        cut = max(1, len(text) * 3 // 4)
        texts.append(LabelledText(input=text[:cut], output=text[cut:] or text[-1:] or "x"))
    return texts


def write_reference(backbone: Backbone, path: Path) -> None:
    """As safetensors: input_mean (d,), input_std (d,), sketch_mean (s,), float32. Nothing to do if it is there."""
    if path.exists():
        return
    texts = reference_texts(backbone)
    features = read_rows(backbone, [text.input for text in texts])
    sketches = answer_rows(backbone, texts)
    numbers = {
        "input_mean": features.mean(axis=0),
        "input_std": features.std(axis=0),
        "sketch_mean": sketches.mean(axis=0),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: np.ascontiguousarray(value, dtype=np.float32) for name, value in numbers.items()}, aside)
    put_in_place(aside, path)
