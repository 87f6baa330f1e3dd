"""Expert folders are counted and handed out without a model."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dylora_stream.core.errors import DyloraError, ExpertCorrupt
from dylora_stream.ops.artefacts import ADAPTER, count_parameters, export_expert


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    """A folder as training writes it."""
    folder = tmp_path / "expert"
    folder.mkdir()
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros((4,), np.float16)}, folder / ADAPTER)
    save_file({"features": np.zeros((5, 5), np.float32)}, folder / "statistics.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "exemplars.jsonl").write_text('{"input": "private"}\n')
    return folder


def test_parameters_are_counted_from_the_header(expert: Path) -> None:
    """Only the adapter counts as the expert; a pattern chooses the files."""
    assert count_parameters(expert, ADAPTER) == 10
    assert count_parameters(expert) == 35


def test_an_export_leaves_the_streams_rows_behind(expert: Path, tmp_path: Path) -> None:
    """Sharing an adapter must not share what it was trained on, unless asked for."""
    assert export_expert(expert, tmp_path / "out") == ["adapter_config.json", ADAPTER]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", ADAPTER]
    assert "exemplars.jsonl" in export_expert(expert, tmp_path / "all", with_rows=True)


def test_an_export_overwrites_nothing(expert: Path, tmp_path: Path) -> None:
    """A folder in use is refused."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(DyloraError, match="not empty"):
        export_expert(expert, tmp_path / "out")
    with pytest.raises(DyloraError, match="cannot be written"):
        export_expert(expert, tmp_path / "out" / "mine")


def test_a_file_that_is_no_safetensors_is_named(expert: Path) -> None:
    """Half a file is a corrupt expert."""
    (expert / ADAPTER).write_bytes(b"\xff" * 20)
    with pytest.raises(ExpertCorrupt, match=ADAPTER):
        count_parameters(expert)
