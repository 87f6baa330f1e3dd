"""An expert's weights, and their PEFT folder on disk.

In memory the update of a linear layer is `B A x`: the scale lies in B already. On disk the same matrices are written
with `lora_alpha = r`, so that plain `peft.PeftModel.from_pretrained` applies them unchanged. Safetensors only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dylora_stream.core.errors import ExpertCorrupt
from dylora_stream.model.backbone import Backbone

__all__ = ["Adapter", "load_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's name of the wrapped model


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """LoRA weights: layer name → (A (r, d_in), B (d_out, r)), float32 on the CPU, the scale within B."""

    rank: int
    tensors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return sum(a.numel() + b.numel() for a, b in self.tensors.values())


def save_adapter(folder: Path, adapter: Adapter, backbone: Backbone, manifest: Mapping[str, Any]) -> None:
    """Write adapter_config.json, adapter_model.safetensors, manifest.json and a model card into `folder`.

    `manifest` is free JSON about the expert; the backbone's name and digest and the prompt template are added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = backbone.upper_linears()
    weights: dict[str, Tensor] = {}
    for name, (a, b) in adapter.tensors.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        weights[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone.name,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
        "fan_in_fan_out": any(isinstance(modules[name], Conv1D) for name in adapter.tensors),
        "target_modules": list(adapter.tensors),
    }
    _write_json(folder / CONFIG, config)
    whole = {
        **manifest,
        "backbone": {"name": backbone.name, "digest": backbone.digest},
        "prompt_template": backbone.template.text,
        "parameters": adapter.parameters,
    }
    _write_json(folder / "manifest.json", whole)
    (folder / "README.md").write_text(_card(whole), encoding="utf-8")


def load_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder, its scale baked into B. Raises ExpertCorrupt with the file at fault."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        rank = int(config["r"])
        scale = float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ExpertCorrupt(
            f"the adapter in {folder} cannot be read ({type(error).__name__}: {error})"
        ) from error
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        name, _, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        halves.setdefault(name, {})[half] = tensor.to(torch.float32)
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in halves.items():
        if (
            set(pair) != {"lora_A", "lora_B"}
            or pair["lora_A"].shape[0] != rank
            or pair["lora_B"].shape[1] != rank
        ):
            raise ExpertCorrupt(f"the adapter in {folder} has no pair of rank {rank} for {name}")
        tensors[name] = (pair["lora_A"], pair["lora_B"] if scale == 1.0 else pair["lora_B"] * scale)
    return Adapter(rank=rank, tensors=tensors)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(manifest: Mapping[str, Any]) -> str:
    """The model card: what it is, what it was trained for, how to load it elsewhere."""
    backbone = manifest["backbone"]
    lines = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {manifest.get('expert_id', 'expert')}, version {manifest.get('version', 1)}",
        "",
        f"A LoRA expert of DyLoRA Stream, {manifest['parameters']:,} parameters, for this backbone:",
        f"`{backbone['name']}`, digest `{backbone['digest'][:12]}`.",
        "",
        "The prompt is this template; the answer follows and ends with the tokenizer's end token:",
        "",
        "```",
        manifest["prompt_template"],
        "```",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(backbone, "this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
