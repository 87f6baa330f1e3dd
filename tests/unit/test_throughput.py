"""The bench of throughput, on a tiny model: that it measures what it says, not how fast it is."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_llama
from rich.console import Console

from dylora_stream.bench.throughput import Sizes, ThroughputConfig, throughput
from dylora_stream.bench.throughput.accuracy import mean_over_tasks
from dylora_stream.bench.throughput.bare import random_tokens, twin
from dylora_stream.bench.throughput.config import AIMS
from dylora_stream.bench.throughput.contenders import Draws, filled_pool
from dylora_stream.bench.throughput.data import read_tasks
from dylora_stream.bench.throughput.mixed import bare_pass, gated_pass, mixed_peft, peft_pass
from dylora_stream.bench.throughput.training import Contest, training_rows
from dylora_stream.core.errors import SettingsError
from dylora_stream.core.recipes import Recipe
from dylora_stream.model.backbone import Backbone, load_backbone
from dylora_stream.model.config import ModelConfig
from dylora_stream.settings import load_settings

SMALL = Sizes(
    rows=4,
    tokens=6,
    rank=2,
    pools=(1, 4, 32),
    prompt_tokens=5,
    new_tokens=3,
    requests=4,
    distinct=40,
    train_rows=4,
    train_epochs=1,
    short=(20, 4),
    long=(12, 6),
    data_tasks=1,
    data_rows=4,
)
MODEL_PARTS = ("mixed", "decode", "answer", "train", "accuracy")
BESIDE = {
    "peft_mixed_32_float32",
    "peft_mixed_32_bfloat16",
    "peft_one_float32",
    "peft_one_bfloat16",
    "mixed_1_float32",
    "transformers_generate",
    "answer_choices_plain",
    "answer_generate_plain",
    "train_short_over_answers_only",
    "train_long_over_answers_only",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    """A tiny model in float32, its stem one layer."""
    return load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=1, threads=1), folder)


@pytest.mark.slow
def test_the_report_has_every_number_of_the_parts_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    """Ratios above zero from five pairs or more, the file as returned, and a plot beside it."""
    flags = [
        f"model.folder={folder}",
        "model.stem_layers=1",
        "model.dtype=float32",
        "model.threads=1",
        f"store.folder={tmp_path}",
        "generation.max_new_tokens=3",
    ]
    report = tmp_path / "report.json"
    for part in ("train", "test"):
        row = json.dumps({"input": "one", "output": "two"}) + "\n"
        (tmp_path / f"counting.{part}.jsonl").write_text(row * 4)
    config = ThroughputConfig(
        only=MODEL_PARTS, pairs=5, report=report, train_data=tmp_path, train_seeds=(0, 1), sizes=SMALL
    )
    found = throughput(config, load_settings(flags=flags), Console(quiet=True))
    wanted = {name for name in AIMS if not name.startswith("kafka")} | BESIDE
    assert wanted <= found["ratios"].keys()
    assert found["ratios"].keys() == found["pairs"].keys()
    assert all(ratio > 0 and math.isfinite(ratio) for ratio in found["ratios"].values())
    assert all(len(pairs) >= 5 for pairs in found["pairs"].values())
    assert found["answer_choices_same_texts"] == found["answer_generate_same_texts"] == 1.0
    assert found["train_accuracy"]["tasks"]["counting"].keys() == {"base", "ours", "peft"}
    assert found["train_accuracy"]["ours_over_peft"].keys() == {"mean", "margin_95"}
    assert len(found["train_accuracy"]["trainings"]["counting"]) == 2
    assert json.loads(report.read_text()) == found
    assert report.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
def test_trainings_whose_accuracy_was_measured_are_not_trained_again(folder: Path, tmp_path: Path) -> None:
    """A second run that asks for one more seed keeps the files of the first and gives its figures."""
    flags = [
        f"model.folder={folder}",
        "model.stem_layers=1",
        "model.dtype=float32",
        f"store.folder={tmp_path}",
    ]
    for part in ("train", "test"):
        (tmp_path / f"counting.{part}.jsonl").write_text(json.dumps({"input": "one", "output": "two"}) + "\n")
    sizes = replace(SMALL, data_rows=1)

    def run(seeds: tuple[int, ...]) -> dict[str, object]:
        config = ThroughputConfig(only=("accuracy",), train_data=tmp_path, train_seeds=seeds, sizes=sizes)
        found = throughput(config, load_settings(flags=flags), Console(quiet=True))
        return found["train_accuracy"]["trainings"]["counting"]

    first = run((0,))
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("bench/**/*.safetensors")}
    both = run((0, 1))
    assert len(kept) == 1
    assert (
        kept.items()
        <= {file: file.stat().st_mtime_ns for file in tmp_path.glob("bench/**/*.safetensors")}.items()
    )
    assert both[:1] == first
    assert len(both) == 2


def test_our_mixed_batch_and_pefts_are_the_same_computation(backbone: Backbone) -> None:
    """The same draws give the same states, which are not the bare model's."""
    tokens = random_tokens(backbone, 4, 6)
    with torch.no_grad(), filled_pool(backbone, 8, 2) as (gated, pool):
        ours = gated_pass(gated, pool, tokens, Draws(4, 8))()
        theirs = peft_pass(mixed_peft(backbone, 8, 2), tokens, Draws(4, 8))()
        bare = bare_pass(backbone, tokens)()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, bare, atol=1e-3)


def test_a_twin_shares_the_weights_and_none_of_the_hooks(backbone: Backbone) -> None:
    """What is measured as bare is bare, and lies in the same memory."""
    other = twin(backbone)
    tokens = random_tokens(backbone, 2, 5)
    pairs = zip(backbone.model.parameters(), other.model.parameters(), strict=True)
    assert all(one is two for one, two in pairs)
    with torch.no_grad(), filled_pool(backbone, 2, 2) as (gated, pool):
        pool.set_gates(*Draws(2, 2).next())
        torch.testing.assert_close(bare_pass(backbone, tokens)(), bare_pass(other, tokens)(), atol=0, rtol=0)
        assert not torch.equal(bare_pass(gated, tokens)(), bare_pass(other, tokens)())


def test_a_row_of_a_draw_has_members_of_its_own() -> None:
    """One member: another expert a row while there are as many; several: distinct ones within a row."""
    slots, weights = Draws(16, 32).next()
    assert sorted(slots.flatten().tolist()) == sorted(set(slots.flatten().tolist()))
    assert weights.unique().tolist() == [1.0]
    slots, weights = Draws(16, 32, 4).next()
    assert all(len(set(row)) == 4 for row in slots.tolist())
    assert weights.unique().tolist() == [0.25]


def test_all_three_trainings_of_a_contest_learn_the_same(backbone: Backbone) -> None:
    """In float32 the losses of ours and of both PEFT loops agree step by step."""
    rows = training_rows(backbone, 12, (20, 4))
    contest = Contest((backbone, backbone), rows, Recipe(rank=2, epochs=2, batch_size=4))
    ours = contest.ours()
    assert len(ours) == 6
    assert contest.plain() == pytest.approx(ours, rel=1e-3)
    assert contest.answers_only() == pytest.approx(ours, rel=1e-3)
    trained, theirs = contest.train().adapter, contest.theirs()
    assert ours[-1] != pytest.approx(ours[0], rel=1e-3)
    for name, (_, b) in trained.tensors.items():
        torch.testing.assert_close(theirs.tensors[name][1], b, atol=1e-3, rtol=1e-2)


def test_the_gain_of_training_is_a_mean_over_tasks_whatever_their_sizes() -> None:
    """Rows of a large task count no more than a small task's; the margin is of rows, and of trainings if several."""
    gain, margin = mean_over_tasks([np.ones((1, 2)), np.zeros((1, 100))])
    assert (gain, margin) == (0.5, 0.0)
    assert mean_over_tasks([np.array([[1.0, -1.0] * 50])])[1] == pytest.approx(0.196)
    assert mean_over_tasks([np.array([[1.0] * 9, [0.0] * 9])]) == (0.5, pytest.approx(1.96 / 2))


def test_tasks_without_enough_short_rows_are_passed_over(backbone: Backbone, tmp_path: Path) -> None:
    """And a folder with too few of the others is refused with what is needed."""
    row = json.dumps({"input": "one", "output": "two"}) + "\n"
    for name, rows in (("few", 2), ("many", 9)):
        for part in ("train", "test"):
            (tmp_path / f"{name}.{part}.jsonl").write_text(row * rows)
    tasks = read_tasks(tmp_path, backbone, SMALL)
    assert [(task.name, len(task.train), len(task.test)) for task in tasks] == [("many", 4, 8)]
    assert [task.name for task in read_tasks(tmp_path, backbone, SMALL, ["many"])] == ["many"]
    with pytest.raises(SettingsError, match="it lacks few"):
        read_tasks(tmp_path, backbone, SMALL, ["few", "many"])
    with pytest.raises(SettingsError, match="has 1 tasks"):
        read_tasks(tmp_path, backbone, Sizes(data_tasks=2, data_rows=4))


@pytest.mark.parametrize(
    "wrong",
    [{"only": ("speed",)}, {"only": ()}, {"pairs": 3}, {"only": ("accuracy",)}, {"train_data": Path()}],
)
def test_a_wrong_config_is_refused(wrong: dict[str, object]) -> None:
    """A part that there is not, no part, too few pairs; a folder of tasks and the part that takes it, one without the
    other."""
    with pytest.raises(ValueError, match="at least|there is no part|go together"):
        ThroughputConfig(**wrong)
