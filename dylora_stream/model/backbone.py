"""The frozen language model, its tokenizer, and where the stem ends.

Any Hugging Face causal language model: the decoder layers are found as the longest ModuleList of its body, linear
layers as `Linear` and GPT-2's `Conv1D`. Nothing here changes a weight. Rows are padded on the left, so that answers
end where generation goes on; padding is known by the attention mask alone (SmolLM2's pad and end token are one id).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from dylora_stream.core.errors import ModelError, ModelNotFound, SettingsError
from dylora_stream.model.attention import attend_plainly
from dylora_stream.model.config import Attention, ModelConfig
from dylora_stream.model.fetch import explain_load_error, fetch_backbone, is_model_folder
from dylora_stream.model.identity import DEFAULT_TEMPLATE, folder_digest
from dylora_stream.model.process import prepare_process

__all__ = [
    "DEFAULT_TEMPLATE", "IGNORED", "Backbone", "PromptTemplate", "Tokens", "capture_input", "fetch_backbone",
    "held_bytes", "linear_shape", "load_backbone",
]  # fmt: skip

IGNORED = -100  # label of a position that is not part of an answer
PROBED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """How an input becomes a prompt. Part of every expert's manifest.

    Blanks at the template's end belong to the answer, because tokenizers join a blank with the word behind it.
    """

    text: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        if self.text.count("{input}") != 1:
            raise ValueError(f"the prompt template must contain {{input}} exactly once: {self.text!r}")

    def render(self, text: str) -> str:
        """The prompt of one input."""
        before, after = self.text.split("{input}")
        return before + text + after.rstrip(" ")

    def target(self, output: str) -> str:
        """The answer's text as the model has to write it."""
        after = self.text.split("{input}")[1]
        return after[len(after.rstrip(" ")) :] + output.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A left-padded batch. All (B, T) int64; `labels` is IGNORED outside the answers."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What a forward pass takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def prompt_mask(self) -> Tensor:
        """(B, T): the prompts' tokens; answers are unseen when a row is routed."""
        return self.attention_mask * (self.labels == IGNORED)

    def answer_positions(self) -> Tensor:
        """(B, T) bool: the positions whose next token belongs to an answer, i.e. where logits are needed."""
        needed = torch.zeros_like(self.labels, dtype=torch.bool)
        needed[:, :-1] = self.labels[:, 1:] != IGNORED
        return needed

    def answer_ids(self) -> Tensor:
        """(answer tokens,) int64, row by row: the labels behind `answer_positions`."""
        return self.labels[self.labels != IGNORED]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A loaded, frozen model. `digest` names weights, configuration and tokenizer together."""

    model: Any
    tokenizer: Any
    stem_layers: int  # never adapted
    read_layers: int  # of the stem, passed before a record is read
    digest: str
    name: str
    dtype: torch.dtype
    attention: Attention = "auto"
    template: PromptTemplate = field(default_factory=PromptTemplate)
    has_plain_head: bool = (
        True  # logits are head(states) with nothing after it (Gemma 2 caps, Granite scales)
    )
    targets: tuple[str, ...] = ()  # parts of the names of the layers to adapt; none: all above the stem
    lone_blank: int | None = (
        None  # a token that answers begin with only where they are cut apart from prompts
    )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    @property
    def body(self) -> Any:
        """The model without its head."""
        return self.model.base_model

    @property
    def head(self) -> nn.Module:
        """The projection onto the vocabulary."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return _decoder_layers(self.body)

    @property
    def width(self) -> int:
        """Numbers of one hidden state."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def upper_linears(self) -> dict[str, nn.Module]:
        """Full name → linear layer above the stem, in the model's order: what experts adapt."""
        names = {id(module): name for name, module in self.model.named_modules()}
        upper = [module for layer in list(self.layers)[self.stem_layers :] for module in layer.modules()]
        linears: dict[str, nn.Module] = {
            names[id(module)]: module for module in upper if isinstance(module, nn.Linear | Conv1D)
        }
        parts = self.targets or ("",)
        return {name: layer for name, layer in linears.items() if any(part in name for part in parts)}

    def prompt_ids(self, inputs: Sequence[str]) -> list[list[int]]:
        """Token ids of the rendered prompts; a leading special token only where the tokenizer adds one.

        Some add the end token behind (`add_eos_token`): the answer has to come first.
        """
        if not inputs:
            return []
        prompts = [self.template.render(text) for text in inputs]
        ids: list[list[int]] = self.tokenizer(prompts)["input_ids"]
        rows = (row[:-1] if row[-1:] == [self.eos_id] else row for row in ids)
        return [row or [self.eos_id] for row in rows]

    def target_ids(self, outputs: Sequence[str]) -> list[list[int]]:
        """Token ids of answers, each ended by the end token."""
        if not outputs:
            return []
        targets = [self.template.target(output) for output in outputs]
        ids: list[list[int]] = self.tokenizer(targets, add_special_tokens=False)["input_ids"]
        rows = (row[1:] if len(row) > 1 and row[0] == self.lone_blank else row for row in ids)
        return [[*row, self.eos_id] for row in rows]

    def pad(self, prompts: Sequence[list[int]], targets: Sequence[list[int]] | None = None) -> Tokens:
        """Left-padded tensors on the model's device of prompts and, if given, the answers behind them."""
        answers = targets if targets is not None else [[] for _ in prompts]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids, mask, labels = [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            gap = length - len(prompt) - len(answer)
            ids.append([self.eos_id] * gap + prompt + answer)
            mask.append([0] * gap + [1] * (length - gap))
            labels.append([IGNORED] * (length - len(answer)) + answer)
        mask_tensor = torch.tensor(mask, device=self.device)
        return Tokens(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=mask_tensor,
            position_ids=(mask_tensor.cumsum(-1) - 1).clamp(min=0),
            labels=torch.tensor(labels, device=self.device),
        )

    def encode(self, inputs: Sequence[str], outputs: Sequence[str] | None = None) -> Tokens:
        """Tokens of raw inputs (the template is applied here) and, if given, their answers."""
        return self.pad(self.prompt_ids(inputs), None if outputs is None else self.target_ids(outputs))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, up to the end token, without blanks at its ends."""
        kept = list(ids)
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def answer_logits(self, tokens: Tokens) -> Tensor:
        """(answer tokens, V) logits at the answers' positions only; the head costs 40 % of a body pass over all."""
        if self.has_plain_head:
            states = self.body(**tokens.inputs(), use_cache=False)[0]
            logits: Tensor = self.head(states[tokens.answer_positions()])
            return logits
        longest = int((tokens.labels != IGNORED).sum(1).max())
        logits = self.model(**tokens.inputs(), use_cache=False, logits_to_keep=longest + 1).logits
        return logits[tokens.answer_positions()[:, -(longest + 1) :]]

    def next_logits(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """((B, V) logits behind the last position, the cache) of one pass; inputs as the model takes them.

        The last states are cut out before the head: over a slice of (B, T, d) torch copies the head's weights for each
        row, which took a quarter of a batch's time writing 64 tokens, and half of it ranking choices (32 rows).
        """
        if self.has_plain_head:
            output = self.body(**inputs, use_cache=True)
            return self.head(output[0][:, -1].contiguous()), output.past_key_values
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], output.past_key_values


def load_backbone(config: ModelConfig, folder: Path | None = None) -> Backbone:
    """Load the model in `folder` (else `config.folder`, else `config.name` as a folder), frozen and in evaluation mode.

    Never downloads: `fetch_backbone` does. Raises ModelError and SettingsError with what to do.
    """
    place = folder or config.folder or Path(config.name)
    if not is_model_folder(place):
        raise ModelNotFound(
            f"no model in {place}: it needs config.json and model.safetensors; "
            "run `dylora-stream model fetch`, or set model.folder to a folder that has them"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    prepare_process()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(config.dtype, device)
    transformers_logging.disable_progress_bar()
    model, tokenizer = _read(place, dtype, trust=config.trust_remote_code)
    model.to(device).eval().requires_grad_(False)
    if config.attention == "auto":
        attend_plainly(model)
    stem_layers = config.stem_of(len(_decoder_layers(model.base_model)))
    _check(model, tokenizer, stem_layers, config.name)
    backbone = Backbone(
        model=model,
        tokenizer=tokenizer,
        stem_layers=stem_layers,
        read_layers=config.read_layers,
        digest=folder_digest(place),
        name=config.name,
        dtype=dtype,
        attention=config.attention,
        lone_blank=_lone_blank(tokenizer),
    )
    _rehearse(backbone)
    return replace(backbone, has_plain_head=_has_plain_head(model))


def _read(place: Path, dtype: torch.dtype, *, trust: bool) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that holds all of both."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise explain_load_error(place, error) from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{place} lacks {len(missing)} of the weights that {type(model).__name__} has, {missing[0]} among them; "
            "they would be random, and others in every process: set model.name to a causal language model with all "
            "of its weights"
        )
    return model, tokenizer


def _lone_blank(tokenizer: Any) -> int | None:
    """What a tokenizer that begins every text with a blank (Llama 2's, Mistral's) makes of it before a blank of the
    text's own: behind a prompt it would not be there, and the model would never write it.
    """
    alone, before, whole = tokenizer([" a", "a:", "a: a"], add_special_tokens=False)["input_ids"]
    return int(alone[0]) if len(alone) > 1 and whole == [*before, *alone[1:]] else None


def held_bytes(device: torch.device) -> int:
    """GPU memory that torch holds for this process; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` → bfloat16 where the device multiplies it natively, else float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer; Conv1D keeps its weight transposed."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))


@contextmanager
def capture_input(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states ((B, T, d), one a call) that reach a decoder layer."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _decoder_layers(body: nn.Module) -> nn.ModuleList:
    """The longest ModuleList of the body."""
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(
            f"{type(body).__name__} has no list of decoder layers: it cannot be split into stem and pool"
        )
    return max(lists, key=len)


def _check(model: Any, tokenizer: Any, stem_layers: int, name: str) -> None:
    layers = len(_decoder_layers(model.base_model))
    if stem_layers >= layers:
        raise SettingsError(
            f"model.stem_layers is {stem_layers}, but {name} has {layers} layers: "
            f"set it between 1 and {layers - 1} (half of them is a good place to start)"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no end token: an answer could not end")


@torch.no_grad()
def _rehearse(backbone: Backbone) -> None:
    """A pass as records take it: ModelError where states or cache are not what reading and decoding need."""
    tokens = backbone.pad([[backbone.eos_id], [backbone.eos_id] * 2])
    with capture_input(backbone.layers[backbone.read_layers]) as seen:
        output = backbone.body(**tokens.inputs(), use_cache=True)
    wanted = (*tokens.input_ids.shape, backbone.width)
    shapes = [tuple(states.shape) for states in (*seen[:1], output[0])]
    reason = ""
    if shapes != [wanted, wanted]:
        reason = f"its layers do not hand on one state of {backbone.width} numbers a token"
    elif not hasattr(getattr(output, "past_key_values", None), "reorder_cache"):
        reason = "its passes leave no cache of keys and values to decode with"
    if reason:
        raise ModelError(
            f"{backbone.name} ({type(backbone.model).__name__}) cannot be served: {reason}; "
            "set model.name to another model"
        )


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether the model's logits are head(body states) and nothing else.

    Told by several tokens: one of them may be for padding, whose embedding and logits are zeros.
    """
    ids = torch.arange(PROBED_TOKENS, device=next(model.parameters()).device)[None]
    states = model.base_model(input_ids=ids, use_cache=False)[0]
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.equal(model.get_output_embeddings()(states), logits)
