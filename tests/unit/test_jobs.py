"""The child's jobs, from folder to folder, on a tiny Llama: two skills that inputs tell apart."""

import io
import json
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_llama
from safetensors.numpy import load_file

from dylora_stream.core.checks import CheckConfig
from dylora_stream.core.novelty import NoveltyConfig
from dylora_stream.core.recipes import Recipe
from dylora_stream.core.routing import RoutingConfig
from dylora_stream.model.adapters import load_adapter
from dylora_stream.model.backbone import Backbone, load_backbone
from dylora_stream.model.config import ModelConfig
from dylora_stream.model.features import SKETCH_SIZE, answer_size, row_size
from dylora_stream.model.gates import gate_named
from dylora_stream.model.jobs import serve_jobs
from dylora_stream.model.router import RouterParts
from dylora_stream.store.index import FaissIndex

RECIPE = Recipe(rate=1e-2, epochs=6, batch_size=8, rank=4, alpha=8.0)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny Llama in float32."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    return load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=2, threads=1), folder)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Path:
    """The result folder of the first expert."""
    said, folder = play(backbone, tmp_path_factory.mktemp("jobs"), job("letters"), letter_rows(0, 60))
    assert "result" in said[-1], said
    return folder / "result"


def letter_rows(begin: int, end: int) -> Rows:
    """Words of letters, all answered `yes`."""
    rng = np.random.default_rng(7)
    words = ["".join(rng.choice(list("abcdefgh"), size=9)) for _ in range(end)]
    return [
        {"position": f"t:0:{n}", "input": words[n], "output": "yes", "choices": [], "count": 1 + n % 3}
        for n in range(begin, end)
    ]


def digit_rows(begin: int, end: int) -> Rows:
    """Numbers, all answered `none`."""
    rng = np.random.default_rng(8)
    words = ["".join(rng.choice(list("0123456789"), size=12)) for _ in range(end)]
    return [
        {"position": f"t:1:{n}", "input": words[n], "output": "none", "choices": []}
        for n in range(begin, end)
    ]


def job(expert_id: str, **changes: Any) -> dict[str, Any]:
    """A seeding job's description."""
    spec = {
        "kind": "seed",
        "expert_id": expert_id,
        "skill_id": f"s-{expert_id}",
        "version": 1,
        "parent": None,
    }
    spec |= {"tenant": "default", "seed": 1, "threads": 1, "recipe": asdict(RECIPE), "rank": 4}
    spec |= {"check": asdict(CheckConfig()), "registry": {"experts": [], "router": None}}
    return spec | changes


def registry(*results: Path) -> dict[str, Any]:
    """A registry of promoted experts' result folders, the last one's router."""
    experts = [
        {
            "expert_id": json.loads((result / "expert" / "manifest.json").read_text())["expert_id"],
            "version": 1,
            "folder": str(result / "expert"),
            "maturity": "nascent",
            "tenant": "default",
        }
        for result in results
    ]
    return {"experts": experts, "router": str(results[-1] / "router")}


def play(
    backbone: Backbone, root: Path, spec: dict[str, Any], rows: Rows
) -> tuple[list[dict[str, Any]], Path]:
    """What the child says about one job, and the job's folder."""
    folder = root / f"job-{spec['kind']}-{spec.get('expert_id')}"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"id": folder.name} | spec))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ask(backbone, folder), folder


def ask(backbone: Backbone, *folders: Path) -> list[dict[str, Any]]:
    """The child's lines about these folders."""
    parts = RouterParts(
        gate=gate_named("hybrid", RoutingConfig()), novelty=NoveltyConfig(), index_factory=FaissIndex
    )
    out = io.StringIO()
    serve_jobs(lambda: backbone, parts, io.StringIO("".join(f"{folder}\n" for folder in folders)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def report_of(said: list[dict[str, Any]]) -> dict[str, Any]:
    """The report behind the last line."""
    report: dict[str, Any] = json.loads((Path(said[-1]["result"]) / "report.json").read_text())
    return report


def test_a_sketch_job_gives_features_and_sketches_in_the_rows_order(
    backbone: Backbone, tmp_path: Path
) -> None:
    """A row without an answer has a sketch of zeros; progress is told."""
    rows = [*letter_rows(0, 3), {**digit_rows(0, 1)[0], "output": None}]
    said, folder = play(backbone, tmp_path, {"kind": "sketch"}, rows)
    arrays = load_file(folder / "result" / "sketches.safetensors")
    assert arrays["features"].shape == (4, row_size(backbone))
    assert arrays["sketches"].shape == (4, answer_size(backbone))
    sketches = arrays["sketches"][:, :SKETCH_SIZE]
    np.testing.assert_allclose(np.linalg.norm(sketches, axis=1), [1, 1, 1, 0], atol=1e-5)
    assert said[0] == {"job": folder.name, "progress": {"stage": "sketch", "step": 3, "steps": 3}}


def test_a_learnable_skill_is_promoted_with_all_its_files(letters: Path) -> None:
    """The report has the numbers; held-out rows are among neither the exemplars nor the trained rows."""
    report = json.loads((letters / "report.json").read_text())
    heldout = report["heldout"]
    assert report["decision"] == "promoted", report["reason"]
    assert heldout["loss_new"] < heldout["loss_backbone"]
    assert report["trained_rows"] + heldout["rows"] == 60
    exemplars = (letters / "expert" / "exemplars.jsonl").read_text().splitlines()
    assert len(exemplars) == report["trained_rows"]
    statistics = load_file(letters / "expert" / "statistics.safetensors")
    assert statistics["features"].shape[0] == 60
    assert statistics["counts"].tolist() == [1 + n % 3 for n in range(60)]
    assert load_adapter(letters / "expert").rank == 4
    assert (letters / "router" / "router.safetensors").is_file()


def test_a_second_skill_gets_its_own_expert_and_a_router_for_both(
    backbone: Backbone, letters: Path, tmp_path: Path
) -> None:
    """Inputs tell the two apart, and the router's network learns from both experts' exemplars."""
    said, folder = play(backbone, tmp_path, job("digits", registry=registry(letters)), digit_rows(0, 60))
    report = report_of(said)
    assert report["decision"] == "promoted", report["reason"]
    assert report["routing_loo"] >= 0.9
    assert report["router"]["accuracy"] >= 0.9
    assert (folder / "result" / "router" / "router.safetensors").is_file()


def test_experts_of_a_shallower_stem_do_not_stop_the_training_of_others(
    backbone: Backbone, tmp_path: Path
) -> None:
    """No worker serves them any more: a new one is trained as if they were not there, and none of them trains on."""
    shallower = replace(backbone, stem_layers=1, read_layers=1)
    _, old = play(shallower, tmp_path, job("letters"), letter_rows(0, 60))
    lower = registry(old / "result")
    said, _ = play(backbone, tmp_path, job("digits", registry=lower), digit_rows(0, 60))
    assert report_of(said)["decision"] == "promoted"
    said, _ = play(backbone, tmp_path, job("letters", kind="consolidate", registry=lower), letter_rows(0, 60))
    assert "that fits this model" in said[-1]["error"]


def test_rows_that_an_expert_serves_well_are_called_drift(
    backbone: Backbone, letters: Path, tmp_path: Path
) -> None:
    """New rows of a known skill: no training, the expert is named."""
    said, folder = play(backbone, tmp_path, job("again", registry=registry(letters)), letter_rows(60, 120))
    report = report_of(said)
    assert (report["decision"], report["with"]) == ("drift", "letters")
    assert not (folder / "result" / "expert").exists()


def test_rows_that_another_expert_serves_as_well_as_their_own_are_drift(
    backbone: Backbone, letters: Path, tmp_path: Path
) -> None:
    """Longer words are told apart from short ones; a second expert that answers them `yes` would add nothing."""
    elsewhere = tmp_path / "letters"
    shutil.copytree(letters, elsewhere)
    (
        elsewhere / "expert" / "report.json"
    ).unlink()  # it has no check of its own to be asked by before training
    words = [first["input"] + then["input"] for first, then in pairwise(letter_rows(60, 121))]
    rows = [{**row, "input": word} for row, word in zip(letter_rows(60, 120), words, strict=True)]
    said, folder = play(backbone, tmp_path, job("long", registry=registry(elsewhere)), rows)
    report = report_of(said)
    assert (report["decision"], report["with"]) == ("drift", "letters"), report["reason"]
    assert "an expert of their own" in report["reason"]
    assert report["routing_loo"] >= 0.9
    assert not (folder / "result" / "expert").exists()


def test_rows_that_inputs_do_not_tell_apart_are_called_confused(
    backbone: Backbone, letters: Path, tmp_path: Path
) -> None:
    """The same inputs with another answer could never be routed to an expert of their own."""
    rows = [{**row, "output": "no"} for row in letter_rows(60, 120)]
    report = report_of(play(backbone, tmp_path, job("twin", registry=registry(letters)), rows)[0])
    assert (report["decision"], report["with"]) == ("confused", "letters")


def test_what_the_backbone_can_do_alone_needs_no_expert(backbone: Backbone, tmp_path: Path) -> None:
    """With the bar of known skills above the backbone's loss."""
    spec = job("known", check=asdict(CheckConfig(known_loss=1000.0)))
    assert report_of(play(backbone, tmp_path, spec, letter_rows(0, 20))[0])["decision"] == "known_to_backbone"


def test_a_training_that_teaches_nothing_is_rejected_with_its_numbers(
    backbone: Backbone, tmp_path: Path
) -> None:
    """At a rate near zero the new expert is the backbone again."""
    spec = job("idle", recipe=asdict(RECIPE) | {"rate": 1e-9})
    said, folder = play(backbone, tmp_path, spec, letter_rows(0, 40))
    report = report_of(said)
    assert report["decision"] == "rejected"
    assert report["heldout"]["loss_new"] == pytest.approx(report["heldout"]["loss_backbone"], abs=1e-3)
    assert not (folder / "result" / "expert").exists()


@pytest.mark.parametrize(
    ("change", "said"), [({"rate": 1e30}, "the loss was lost"), ({"max_row_tokens": 1}, "cannot be split")]
)
def test_rows_that_teach_nothing_are_a_rejection_and_no_failure(
    backbone: Backbone, tmp_path: Path, change: dict[str, float], said: str
) -> None:
    """Another attempt on the same rows would end the same way: the report says so, and the cluster counts it."""
    spec = job("hopeless", recipe=asdict(RECIPE) | change)
    report = report_of(play(backbone, tmp_path, spec, letter_rows(0, 40))[0])
    assert report["decision"] == "rejected"
    assert said in report["reason"]


def test_a_consolidation_gives_a_second_version_that_its_held_out_rows_prefer(
    backbone: Backbone, letters: Path, tmp_path: Path
) -> None:
    """It starts from the served adapter; rows held out of version 1 stay out of version 2."""
    changes = {"kind": "consolidate", "version": 2, "parent": 1, "registry": registry(letters)}
    spec = job("letters", **changes, recipe=asdict(RECIPE) | {"rate": 2.5e-3})
    said, folder = play(backbone, tmp_path, spec, letter_rows(0, 120))
    report = report_of(said)
    assert report["decision"] == "promoted", report["reason"]
    assert report["heldout"]["loss_new"] < report["heldout"]["loss_served"]
    first = {
        json.loads(line)["input"]
        for line in (letters / "expert" / "exemplars.jsonl").read_text().splitlines()
    }
    kept = (folder / "result" / "expert" / "exemplars.jsonl").read_text().splitlines()
    second = {json.loads(line)["input"] for line in kept}
    held_out = {row["input"] for row in letter_rows(0, 60)} - first
    assert not held_out & second


def test_rows_too_long_to_train_on_are_not_checked_on_either(backbone: Backbone, tmp_path: Path) -> None:
    """They count neither among trained nor among held-out rows, wherever they fall."""
    long = [{**row, "output": "yes" * 5000} for row in letter_rows(60, 80)]
    recipe = asdict(RECIPE) | {"epochs": 1}
    report = report_of(play(backbone, tmp_path, job("long", recipe=recipe), [*letter_rows(0, 40), *long])[0])
    assert report["trained_rows"] + report["heldout"]["rows"] == 40


def test_a_job_that_fails_is_told_and_the_next_one_is_done(backbone: Backbone, tmp_path: Path) -> None:
    """A folder that is none, a job for another backbone, then a good one, and that one again without work."""
    other, _ = play(backbone, tmp_path, {"kind": "sketch", "backbone": "f" * 64, "expert_id": "x"}, [])
    assert "ModelMismatch" in other[-1]["error"]
    _, good = play(backbone, tmp_path, {"kind": "sketch"}, letter_rows(0, 2))
    said = ask(backbone, tmp_path / "nothing", good)
    assert "is not a job folder" in said[0]["error"]
    assert said[1] == {"job": good.name, "result": str(good / "result")}
