"""What names a backbone and its feature space, computed from files alone: learn needs it and never loads torch."""

import hashlib
from pathlib import Path

__all__ = ["DEFAULT_TEMPLATE", "FEATURE_VERSION", "feature_space_name", "folder_digest"]

DEFAULT_TEMPLATE = "{input}\n\nAnswer: "
FEATURE_VERSION = 2  # changes whenever a number or the pooling in `features` changes
DIGESTED = (
    "config.json",
    "*.safetensors",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "*.py",
)


def folder_digest(folder: Path) -> str:
    """sha256 over names and contents of the files that determine what the model computes."""
    whole = hashlib.sha256()
    for path in sorted({path for pattern in DIGESTED for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def feature_space_name(read_layers: int, digest: str) -> str:
    """The name of the space that features live in; equal names mean comparable features."""
    return f"stem{read_layers}-v{FEATURE_VERSION}-{digest[:12]}"
