"""`bench novelty` on a tiny Llama and three tiny tasks: what is measured, what is kept, what a folder cannot give."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_llama
from rich.console import Console

from dylora_stream.bench.novelty import NoveltyBenchConfig, cost, novelty, reading, run, trained
from dylora_stream.bench.novelty.config import USUAL_PARTS
from dylora_stream.core.checks import CheckConfig
from dylora_stream.core.errors import SettingsError
from dylora_stream.core.novelty import SCORERS
from dylora_stream.core.recipes import Recipe
from dylora_stream.learn.lifecycle import LifecycleConfig
from dylora_stream.model.config import ModelConfig
from dylora_stream.settings import Settings

TASKS = {"letters": ("abcdefgh", "yes"), "digits": ("0123456789", "no 1"), "signs": ("!?.,;:", "so so")}
RATES = {"0.05", "0.01"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def write_tasks(folder: Path, names: Sequence[str]) -> Path:
    """Tasks that are told apart by their alphabets, each with one answer."""
    rng = np.random.default_rng(1)
    for name in names:
        alphabet, output = TASKS[name]
        for part, count in (("train", 40), ("test", 16)):
            texts = ["".join(rng.choice(list(alphabet), size=8)) for _ in range(count)]
            lines = [json.dumps({"input": text, "output": output}) for text in texts]
            (folder / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks."""
    return write_tasks(tmp_path_factory.mktemp("data"), list(TASKS))


@pytest.fixture
def settings(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a tiny float32 model, whose experts are small, quickly trained, and let through."""
    monkeypatch.setattr(run, "COPIES", 12)
    monkeypatch.setattr(cost, "MODES", 400)
    monkeypatch.setattr(cost, "ROUNDS", 3)
    base = Settings()
    return base.model_copy(
        update={
            "model": ModelConfig(name="tiny", folder=model, dtype="float32", stem_layers=1, threads=1),
            "store": replace(base.store, folder=tmp_path / "home"),
            "seeding": Recipe(rate=2e-2, epochs=6, batch_size=8, rank=4, alpha=8.0),
            "novelty": replace(base.novelty, folds=3),
            "check": CheckConfig(seed_gain=0.0, seed_t=0.5, routing=0.5),
            "lifecycle": LifecycleConfig(rows_to_seed=24, max_seed_rows=32, sketch_rows=8),
        }
    )


def asked(data: Path, tmp_path: Path, **changes: Any) -> NoveltyBenchConfig:
    """A quick run's configuration."""
    values: dict[str, Any] = {
        "draws": 1,
        "train_rows": 32,
        "test_rows": 12,
        "scale_rows": 2048,
        "work": tmp_path / "work",
    }
    return NoveltyBenchConfig(data=data, **values | changes)


def measured(config: NoveltyBenchConfig, settings: Settings) -> dict[str, Any]:
    """The document of a quiet run."""
    return novelty(config, settings, Console(file=io.StringIO()))


def refuse(*_: object, **__: object) -> None:
    """Stands for what must not be done again."""
    raise AssertionError("this was done already")


def test_a_run_gives_every_figure_and_its_pictures(settings: Settings, data: Path, tmp_path: Path) -> None:
    """The document has the agreed keys; the JSON file holds it; the plots lie beside it."""
    path = tmp_path / "out" / "report.json"
    document = measured(asked(data, tmp_path, report=path), settings)
    assert json.loads(path.read_text()) == json.loads(json.dumps(document))
    assert set(document["auroc"]) == set(SCORERS)
    for entry in document["auroc"].values():
        assert entry.keys() == {"mean", "worst", "fpr95", "by_task"}
        assert entry["worst"] <= entry["mean"] <= 1
        assert entry["by_task"].keys() == TASKS.keys()
    assert document["out_of_scope"] is None
    assert document["false_alarm"].keys() == RATES | {"rows"}
    assert document["false_alarm_in_time"].keys() == {"plain", "adaptive"}
    assert document["detection"].keys() == RATES
    wanted = {
        "tasks",
        "experts",
        "purity",
        "homogeneity",
        "nmi",
        "ari",
        "outlier_experts",
        "records_to_notice",
    }
    assert document["stream"].keys() == wanted
    assert document["stream"]["tasks"] == 3
    assert document["cost_share"] > 0
    assert document["ms_per_record"] > 0
    assert document["details"]["scale"]["rows"] == document["details"]["scale"]["held"] == 2048
    pictures = {"report-roc.png", "report-calibration.png", "report-clusters.png"}
    assert {file.name for file in path.parent.iterdir()} == pictures | {"report.json"}


def test_a_second_run_reads_nothing_and_says_the_same(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features come out of the store; the figures depend on the seed alone."""
    config = asked(data, tmp_path, only=("leave-one-out", "alarms", "stream"))
    first = measured(config, settings)
    monkeypatch.setattr(reading, "read_rows", refuse)
    monkeypatch.setattr(reading, "answer_rows", refuse)
    assert measured(config, settings) == first


def test_one_task_leaves_nothing_out(settings: Settings, tmp_path: Path) -> None:
    """AUROC and detection are null, false alarms and out of scope are there all the same."""
    folder = tmp_path / "one"
    folder.mkdir()
    write_tasks(folder, ["digits"])
    lines = [json.dumps({"input": text}) for text in ("abc def", "?!?!?!", "gh gh gh")]
    (folder / "outliers.jsonl").write_text("\n".join(lines))
    document = measured(asked(folder, tmp_path, only=("leave-one-out", "alarms")), settings)
    assert document["auroc"] is None
    assert document["detection"] is None
    assert document["stream"] is None
    assert document["cost_share"] is None
    assert set(document["out_of_scope"]) == set(SCORERS)
    assert document["out_of_scope"]["fused"].keys() == {"auroc", "fpr95"}
    assert document["false_alarm"]["0.05"] is not None


def test_twins_are_left_out_too_but_not_averaged(settings: Settings, data: Path, tmp_path: Path) -> None:
    """The mean is the other task's figure alone, and the stream has two skills."""
    config = asked(data, tmp_path, twins=("digits", "signs"), only=("leave-one-out", "stream"))
    document = measured(config, settings)
    entry = document["auroc"]["fused"]
    assert entry["mean"] == entry["worst"] == entry["by_task"]["letters"]
    assert document["twins"].keys() == {"digits", "signs"}
    assert document["twins"]["signs"]["auroc"] == entry["by_task"]["signs"]
    assert document["stream"]["tasks"] == 2


def test_without_labels_no_answer_is_read(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scorers and clusters go by inputs; experts are founded all the same."""
    monkeypatch.setattr(reading, "answer_rows", refuse)
    document = measured(asked(data, tmp_path, has_labels=False, only=("leave-one-out", "stream")), settings)
    assert document["auroc"]["fused"]["mean"] is not None


def test_trained_experts_are_trained_once(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream trains through the daemon's trial; a second run takes the finished jobs."""
    config = asked(data, tmp_path, is_training=True, only=("stream",))
    first = measured(config, settings)
    assert any(name.startswith("seed ") for name in first["details"]["stream"]["decisions"])
    monkeypatch.setattr("dylora_stream.model.jobs.Trial", refuse)
    assert measured(config, settings) == first


def test_an_expert_a_task_says_which_tasks_are_one(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families, exactness and the likelihood ratio come out of one training a task; a second run trains nothing."""
    config = asked(data, tmp_path, only=("experts",))
    first = measured(config, settings)
    placed = [
        *first["experts"]["unlearned"],
        *(task for group in first["experts"]["families"] for task in group),
    ]
    assert sorted(placed) == sorted(TASKS)
    assert set(first["auroc"]) == {"likelihood"}
    assert first["details"]["experts"]["digits"]["commonest answer"] == 1.0
    monkeypatch.setattr(trained, "train_expert", refuse)
    assert measured(config, settings) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"only": ("roc",)}, "roc.*leave-one-out"), ({"twins": ("digits", "nails")}, "nails.*digits"),
     ({"twins": ("digits",)}, "digits alone"), ({"families": (("digits",),)}, "digits is no family"),
     ({"twins": ("digits", "signs"), "families": (("signs", "words"),)}, "signs cannot be of two"),
     ({"max_tokens": 9}, "--max-tokens"),
     ({"only": ("experts",), "has_labels": False}, "--labels no")],
)  # fmt: skip
def test_a_wrong_question_is_refused(
    settings: Settings, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """With what would be right."""
    with pytest.raises(SettingsError, match=message):
        measured(asked(data, tmp_path, **changes), settings)


def test_a_folder_without_tasks_is_named(settings: Settings, tmp_path: Path) -> None:
    """An empty folder, and one that is not there."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SettingsError, match=str(folder)):
            measured(asked(folder, tmp_path), settings)


def test_the_parts_are_those_of_the_command() -> None:
    """All of them are asked for by default."""
    assert NoveltyBenchConfig(data=Path()).only == USUAL_PARTS
