"""Features: fixed functions of backbone, text and answer, never of experts or routing.

A feature row, float32, is read in the same pass that answers (serve) or with the stem alone (children):

    mean8   d     the states behind `model.feature_layers` layers, mean over the prompt's tokens without the first one
                  (its norm is seven times the others' and encodes length); what rows are routed by: stem features
    mean4   d     the same halfway there
    std8    d     standard deviation of the states of mean8 over the same tokens
    tokens, bytes, surface     of the text itself, see `core.lexical`

The novelty scorer measures each block apart and averages (`core.novelty`): left-out tasks of `continual/bare` are told
from known ones with AUROC 0.99, by mean8 alone with 0.75.

An answer row says what kind of answer is right:

    sketch  512   the gradient of the answer's loss with respect to the head, without a backward pass. At answer
                  position t it is the outer product of Wᵀ(softmax - one-hot) with the state h_t; each factor goes
                  through a fixed random projection, the two are multiplied element by element and averaged over the
                  answer (TRAK 2303.14186 and LESS 2402.04333 project per-example gradients too). Of length 1
    state   d     mean of the states h_t
    tokens        of the answer and its text, see `core.lexical`

Of a long answer the beginning is read: how a row is to be answered shows early, and logits over the vocabulary cost
half a gigabyte a thousand answer tokens.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dylora_stream.core.lexical import (
    ANSWER_TOKENS,
    BYTES,
    SURFACE,
    TOKENS,
    answer_tokens,
    hashed_bytes,
    hashed_tokens,
    surface,
)  # fmt: skip
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.identity import FEATURE_VERSION, feature_space_name

__all__ = [
    "FEATURE_VERSION", "SKETCH_SIZE", "EarlyPool", "LabelledText", "StemReading", "answer_batches", "answer_rows",
    "answer_size", "feature_rows", "feature_space", "length_sorted", "longest_row", "read_rows", "read_states",
    "read_stem", "row_size", "split_by_tokens", "states_behind", "stem_features",
]  # fmt: skip

SKETCH_SIZE = 512  # numbers of an answer sketch
SKETCH_SEED = 20_240_229  # of the two projections: part of FEATURE_VERSION
BATCH = 16  # rows of one pass
ANSWER_READ = 256  # tokens of an answer that its row is made from
ANSWER_CHARACTERS = 16 * ANSWER_READ  # ... and of its text, so that a megabyte is not cut into tokens first
PASS_ANSWER_TOKENS = 2048  # of one pass: 1 GB of logits over a vocabulary of 49,000; 16 answers of 128 tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """An input with its right answer."""

    input: str
    output: str


class _StemRead(Exception):
    """Ends a forward pass at the end of the stem, with the states that reached it."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def feature_space(backbone: Backbone) -> str:
    """The name of the space that features of this backbone live in; equal names mean comparable features."""
    return feature_space_name(backbone.read_layers, backbone.digest)


def stem_features(states: Tensor, mask: Tensor) -> Tensor:
    """(B, d) float32: masked mean of states (B, T, d) over the mask (B, T), the first real token left out.

    A text of a single token keeps it.
    """
    kept = mask.bool() & (mask.cumsum(-1) != 1)
    kept |= mask.bool() & (mask.sum(-1, keepdim=True) == 1)
    weights = kept.float()
    return torch.einsum("bt,btd->bd", weights, states.float()) / weights.sum(-1, keepdim=True).clamp(min=1.0)


def row_size(backbone: Backbone) -> int:
    """Numbers of a feature row."""
    return 3 * backbone.width + TOKENS + BYTES + SURFACE


def answer_size(backbone: Backbone) -> int:
    """Numbers of an answer row."""
    return SKETCH_SIZE + backbone.width + ANSWER_TOKENS


class EarlyPool:
    """Keeps the mean of states halfway to where records are read, while asked to; a hook that is always there."""

    def __init__(self, backbone: Backbone) -> None:
        self._mask: Tensor | None = None
        self.mean: Tensor | None = None  # (B, d) float32 of the last pass that was watched
        layer = backbone.layers[backbone.read_layers // 2]
        self._handle = layer.register_forward_pre_hook(self._read, with_kwargs=True)

    @contextmanager
    def watching(self, mask: Tensor) -> Iterator[None]:
        """Within: the next pass is read by the mask (B, T) of its prompts; later ones are not."""
        self._mask, self.mean = mask, None
        try:
            yield
        finally:
            self._mask = None

    def close(self) -> None:
        """Take the hook off the model. May be called twice."""
        self._handle.remove()

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._mask is not None:
            self.mean = stem_features(args[0] if args else kwargs["hidden_states"], self._mask)
            self._mask = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StemReading:
    """What a pass showed of its prompts. states: (B, T, d), as `read_states`; mask: (B, T); mean, early: (B, d)
    float32."""

    states: Tensor
    mask: Tensor
    mean: Tensor
    early: Tensor


def feature_rows(reading: StemReading, tokens: Tokens, texts: Sequence[str]) -> np.ndarray:
    """(B, D) float32 feature rows of a batch whose prompts render these texts."""
    spread = stem_features((reading.states.float() - reading.mean[:, None]) ** 2, reading.mask).sqrt()
    ids = [row[kept].tolist() for row, kept in zip(tokens.input_ids, reading.mask.bool(), strict=True)]
    pooled = torch.cat([reading.mean, reading.early, spread], dim=1).cpu().numpy()
    return np.concatenate(
        [pooled, hashed_tokens(ids, TOKENS), hashed_bytes(texts, BYTES), surface(texts)], axis=1
    )


def read_states(backbone: Backbone, tokens: Tokens) -> Tensor:
    """(B, T, d): the states that records are read from."""
    return states_behind(backbone, backbone.read_layers, tokens)


@torch.no_grad()
def states_behind(backbone: Backbone, layers: int, tokens: Tokens) -> Tensor:
    """(B, T, d): what the first so many layers give, computed without those above them."""

    def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _StemRead(args[0] if args else kwargs["hidden_states"])

    handle = backbone.layers[layers].register_forward_pre_hook(leave, with_kwargs=True)
    try:
        backbone.body(**tokens.inputs(), use_cache=False)
    except _StemRead as read:
        return read.states
    finally:
        handle.remove()
    raise AssertionError("the body ran past its own layers")


def read_stem(backbone: Backbone, inputs: Sequence[str]) -> np.ndarray:
    """(n, d) float32 stem features of raw inputs, in their order."""
    features = np.zeros((len(inputs), backbone.width), dtype=np.float32)
    prompts = backbone.prompt_ids(inputs)
    for chosen in length_sorted([len(prompt) for prompt in prompts], BATCH):
        tokens = backbone.pad([prompts[row] for row in chosen])
        features[chosen] = stem_features(read_states(backbone, tokens), tokens.attention_mask).cpu().numpy()
    return features


def read_rows(backbone: Backbone, inputs: Sequence[str]) -> np.ndarray:
    """(n, D) float32 feature rows of raw inputs, in their order; runs nothing above."""
    rows = np.zeros((len(inputs), row_size(backbone)), dtype=np.float32)
    prompts, early = backbone.prompt_ids(inputs), EarlyPool(backbone)
    try:
        for chosen in length_sorted([len(prompt) for prompt in prompts], BATCH):
            tokens = backbone.pad([prompts[row] for row in chosen])
            mask = tokens.attention_mask
            with early.watching(mask):
                states = read_states(backbone, tokens)
            assert early.mean is not None
            mean = stem_features(states, mask)
            reading = StemReading(states=states, mask=mask, mean=mean, early=early.mean)
            rows[chosen] = feature_rows(reading, tokens, [inputs[row] for row in chosen])
    finally:
        early.close()
    return rows


@torch.no_grad()
def answer_rows(
    backbone: Backbone, rows: Sequence[LabelledText], progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """(n, A) float32 answer rows under the bare backbone, each from the first `ANSWER_READ` tokens of its answer."""
    found = np.zeros((len(rows), answer_size(backbone)), dtype=np.float32)
    prompts = backbone.prompt_ids([row.input for row in rows])
    targets = _beginnings(backbone, prompts, [row.output for row in rows])
    words = answer_tokens(targets, [row.output for row in rows])
    project_gradient, project_state = _projections(backbone.width, backbone.device)
    done = 0
    for chosen in answer_batches(prompts, targets, BATCH):
        tokens = backbone.pad([prompts[row] for row in chosen], [targets[row] for row in chosen])
        states, gradients = _head_gradients(backbone, tokens)
        products = (gradients @ project_gradient) * (states @ project_state)  # (answer tokens, SKETCH_SIZE)
        counts = [len(targets[row]) for row in chosen]
        sketches = nn.functional.normalize(_means(products, counts), dim=-1)
        read = torch.cat([sketches, _means(states, counts)], dim=1).cpu().numpy()
        found[chosen] = np.concatenate([read, words[chosen]], axis=1)
        done += len(chosen)
        if progress is not None:
            progress(done, len(rows))
    return found


def length_sorted(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Row numbers in batches of near-equal length, short ones first; the same lengths give the same batches."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def answer_batches(
    prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], batch: int
) -> list[list[int]]:
    """Row numbers as `length_sorted` batches them; a batch with more than `PASS_ANSWER_TOKENS` is several."""
    lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    parts: list[list[int]] = []
    for chosen in length_sorted(lengths, batch):
        places = split_by_tokens([len(targets[row]) for row in chosen], PASS_ANSWER_TOKENS)
        parts += [[chosen[place] for place in part] for part in places]
    return parts


def split_by_tokens(counts: Sequence[int], most: int) -> list[list[int]]:
    """Places of a batch in order, in parts of at most so many tokens; a row with more is a part of its own."""
    parts: list[list[int]] = []
    tokens = 0
    for place, count in enumerate(counts):
        if not parts or tokens + count > most:
            parts.append([])
            tokens = 0
        parts[-1].append(place)
        tokens += count
    return parts


def longest_row(backbone: Backbone) -> int:
    """Tokens, answer included, that the model has positions for."""
    config = backbone.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _beginnings(
    backbone: Backbone, prompts: Sequence[Sequence[int]], outputs: Sequence[str]
) -> list[list[int]]:
    """Token ids of each answer's beginning: what is read of it, and has a place behind its prompt."""
    whole = backbone.target_ids([output[:ANSWER_CHARACTERS] for output in outputs])
    places = [longest_row(backbone) - len(prompt) for prompt in prompts]
    return [ids[: max(1, min(ANSWER_READ, room))] for ids, room in zip(whole, places, strict=True)]


def _means(values: Tensor, counts: Sequence[int]) -> Tensor:
    """(B, k) mean of each row's answer tokens; values: (answer tokens, k)."""
    return torch.stack([part.mean(0) for part in values.split(list(counts))])


def _head_gradients(backbone: Backbone, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(states h_t, d loss / d h_t), each (answer tokens, d) float32: Wᵀ(softmax - one-hot).

    Where a model scales or caps its logits (Granite, Gemma 2) it is the gradient of the plain softmax all the same: the
    same fixed function of every row, if not that of the model's own loss.
    """
    states = backbone.body(**tokens.inputs(), use_cache=False)[0][tokens.answer_positions()]
    errors = torch.softmax(backbone.head(states).float(), dim=-1)
    ids = tokens.answer_ids()
    errors[torch.arange(len(ids), device=ids.device), ids] -= 1.0
    weight: Any = backbone.head.weight
    return states.float(), (errors.to(weight.dtype) @ weight).float()


def _projections(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two fixed Gaussian projections (d, SKETCH_SIZE), the same in every process."""
    rng = np.random.default_rng(SKETCH_SEED)
    first, second = (rng.standard_normal((width, SKETCH_SIZE), dtype=np.float32) for _ in range(2))
    scale = np.float32(width**-0.5)
    return torch.from_numpy(first * scale).to(device), torch.from_numpy(second * scale).to(device)
