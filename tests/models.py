"""Tiny causal language models with random weights, as folders: a Llama, a GPT-2 (fused projections, Conv1D), and
others for what only they have.

And random adapters for them.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone, linear_shape

END = "<|end|>"
VOCABULARY = 257  # bytes and the end token
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip


def tiny_llama(folder: Path) -> Path:
    """A Llama of four layers."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    return _saved(LlamaForCausalLM, config, folder)


def tiny_gpt2(folder: Path) -> Path:
    """A GPT-2 of four layers."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _saved(GPT2LMHeadModel, config, folder)


def tiny_hybrid(folder: Path) -> Path:
    """A Qwen3.5 of four layers: its cache holds convolutions' and recurrent states beside keys and values."""
    config = Qwen3_5TextConfig(
        **SIZES,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    return _saved(Qwen3_5ForCausalLM, config, folder)


def tiny_gemma2(folder: Path) -> Path:
    """A Gemma 2 of four layers: its logits are capped, and token 0 is for padding."""
    config = Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=8,
        pad_token_id=0,
    )
    return _saved(Gemma2ForCausalLM, config, folder)


def tiny_mamba(folder: Path) -> Path:
    """A Mamba of four layers: it has no attention, and no cache of keys and values."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, state_size=8, eos_token_id=256
    )
    return _saved(MambaForCausalLM, config, folder)


def tiny_opt(folder: Path) -> Path:
    """An OPT as its model of 350M is: embeddings half as wide as its layers' states."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=256,
    )
    return _saved(OPTForCausalLM, config, folder)


def blank_first(folder: Path) -> Path:
    """The model in `folder` with a tokenizer as Llama 2's: words carry their blank, and every text begins with one."""
    letters = ["<unk>", END, "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:\n", "▁a", "▁y"]
    vocabulary = {token: index for index, token in enumerate(letters)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "y")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.save_pretrained(folder)
    return folder


def _saved(architecture: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    architecture(config).eval().save_pretrained(folder)
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(byte_tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.save_pretrained(folder)
    return folder


def random_adapter(backbone: Backbone, seed: int, rank: int = 4) -> Adapter:
    """An adapter of every layer above the stem, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in backbone.upper_linears().items():
        d_in, d_out = linear_shape(module)
        a = torch.randn((rank, d_in), generator=generator) * d_in**-0.5
        tensors[name] = (a, torch.randn((d_out, rank), generator=generator) * 0.5)
    return Adapter(rank=rank, tensors=tensors)
