"""What a run has computed so far, in files named by a digest of all that determines them.

A killed run goes on where it stopped, and runs that share experts share them over time as well. A file is written
beside its place and renamed, so that it is whole or not there; one that cannot be read counts as missing. To measure a
routing method afresh, delete `chains/METHOD`, `cells/METHOD` and `experts/METHOD`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylora_stream.core.errors import StoreError
from dylora_stream.model.backbone import Backbone

__all__ = ["Store", "digest", "ground_of"]

VERSION = 1  # changes whenever the same question would get another answer


def digest(**parts: Any) -> str:
    """A name for these parts; JSON values only."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def ground_of(backbone: Backbone) -> dict[str, Any]:
    """Parts of a `digest`: what everything that this backbone computes depends on."""
    return {
        "backbone": backbone.digest,
        "dtype": str(backbone.dtype),
        "attention": backbone.attention,
        "stem": backbone.stem_layers,
        "read": backbone.read_layers,
        "targets": list(backbone.targets),
        "template": backbone.template.text,
    }


class Store:
    """Values by kind (a folder, may be nested) and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def value(self, kind: str, key: str) -> Any:
        """A JSON value, None where there is none."""
        try:
            return json.loads((self.folder / kind / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put_value(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON value."""
        with self._written(kind, f"{key}.json") as beside:
            beside.write_text(json.dumps(value), encoding="utf-8")

    def tensors(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """Tensors by name, None where there are none."""
        try:
            return load_file(self.folder / kind / f"{key}.safetensors")
        except (OSError, SafetensorError):
            return None

    def put_tensors(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, bit for bit."""
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        with self._written(kind, f"{key}.safetensors") as beside:
            save_file(own, beside)

    @contextmanager
    def _written(self, kind: str, name: str) -> Iterator[Path]:
        """The file to write, which has its name afterwards. Raises StoreError."""
        folder = self.folder / kind
        beside = (folder / name).with_suffix(f".{os.getpid()}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield beside
            beside.replace(folder / name)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                beside.unlink()
            raise StoreError(
                f"{folder} cannot be written ({error}): free some space, or name a folder that can (--work, or "
                "--set store.folder=…); what is finished is kept"
            ) from error
