"""Looking into and handing out expert folders, without loading a model."""

import json
import math
import shutil
from pathlib import Path

from dylora_stream.core.errors import DyloraError, ExpertCorrupt

__all__ = ["ADAPTER", "PRIVATE_FILES", "count_parameters", "export_expert"]

ADAPTER = "adapter_model.safetensors"
PRIVATE_FILES = (
    "exemplars.jsonl",
    "statistics.safetensors",
)  # rows of the stream and their features: not to be given away


def count_parameters(folder: Path, pattern: str = "*.safetensors") -> int:
    """Numbers in the safetensors files of a folder that match, read from their headers alone."""
    return sum(_numbers_in(file) for file in sorted(folder.glob(pattern)))


def export_expert(folder: Path, target: Path, *, with_rows: bool = False) -> list[str]:
    """Copy an expert's folder to a new one that plain PEFT loads; the names of the files.

    Rows of the stream stay behind unless asked for. Raises DyloraError when the target is in use, or
    cannot be written.
    """
    if not (folder / ADAPTER).is_file():
        raise ExpertCorrupt(f"{folder} holds no {ADAPTER}: the expert's files are incomplete")
    try:
        if target.exists() and any(target.iterdir()):
            raise DyloraError(f"{target} is not empty: name a new folder")
        target.mkdir(parents=True, exist_ok=True)
        files = [
            file
            for file in sorted(folder.iterdir())
            if file.is_file() and (with_rows or file.name not in PRIVATE_FILES)
        ]
        for file in files:
            shutil.copyfile(file, target / file.name)
    except OSError as error:
        raise DyloraError(f"{target} cannot be written ({error.strerror}): name a new folder") from error
    return [file.name for file in files]


def _numbers_in(file: Path) -> int:
    """A safetensors file opens with the length of its JSON header (8 bytes, little endian), then the header."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise ExpertCorrupt(f"{file} is not a safetensors file: {error}") from error
