"""What a run has computed so far, in files named by a digest of all that determines them.

A killed run goes on where it stopped, and runs that share experts share them over time as well. A file is written
beside its place and renamed, so that it is whole or not there; one that cannot be read counts as missing. To measure a
method afresh, delete `chains/METHOD`, `cells/METHOD` and `experts/METHOD`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Store", "digest"]

VERSION = 1  # changes whenever the same question would get another answer


def digest(**parts: Any) -> str:
    """A name for these parts; JSON values only."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Store:
    """Values by kind (a folder, may be nested) and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def value(self, kind: str, key: str) -> Any:
        """A JSON value, None where there is none."""
        try:
            return json.loads((self.folder / kind / f"{key}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def put_value(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON value."""
        path = self._place(kind, f"{key}.json")
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(value), encoding="utf-8")
        beside.replace(path)

    def tensors(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """Tensors by name, None where there are none."""
        try:
            return load_file(self.folder / kind / f"{key}.safetensors")
        except (FileNotFoundError, SafetensorError):
            return None

    def put_tensors(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, bit for bit."""
        path = self._place(kind, f"{key}.safetensors")
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(own, beside)
        beside.replace(path)

    def _place(self, kind: str, name: str) -> Path:
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name
