"""The child's work: job folders in, result folders out.

    job.json, rows.jsonl  ─►  result/report.json
                              result/sketches.safetensors          kind sketch: for clustering
                              result/expert/, result/router/       kinds seed and consolidate, when promoted

A result is written aside and renamed once the disk has it: a folder with `result/report.json` is a finished job, and
is returned as it is when asked for again.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors.numpy import save_file

from dylora_stream.core.checks import CheckConfig
from dylora_stream.core.durable import put_in_place
from dylora_stream.core.errors import ModelMismatch, RowsUnlearnable, TrainingFailed
from dylora_stream.core.recipes import Recipe
from dylora_stream.core.routing import RoutingConfig
from dylora_stream.model.adapters import save_adapter
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.blocks import check_layers, shapes_of
from dylora_stream.model.features import LabelledText, answer_rows, answer_size, read_rows
from dylora_stream.model.live import read_expert
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.reference import write_reference
from dylora_stream.model.router import RouterParts
from dylora_stream.model.training import fitting
from dylora_stream.model.trial import Outcome, Rival, Trial, TrialPlan, Workshop

__all__ = ["run_job", "serve_jobs"]

MAX_EXEMPLARS = 256  # stored training rows of an expert, for the routers of later ones


def serve_jobs(
    load: Callable[[], Backbone],
    parts: RouterParts,
    folders: Iterable[str],
    stdout: TextIO,
    routing: RoutingConfig | None = None,
) -> None:
    """Work through job folders, one a line, until there are no more; JSON lines on `stdout`.

    The backbone is loaded at the first job. A job that fails ends with an `error` line, and the next one is taken.
    """
    backbone: Backbone | None = None
    for line in filter(None, map(str.strip, folders)):
        say = _speaker(stdout, Path(line).name)
        try:
            backbone = backbone or load()
            workshop = Workshop(
                backbone=backbone,
                parts=parts,
                routing=routing or RoutingConfig(),
                say=lambda progress, say=say: say({"progress": progress}),  # type: ignore[misc]
            )
            result = run_job(Path(line), workshop)
        except Exception as error:  # noqa: BLE001 - whatever a job runs into ends the job, not the child
            say({"error": f"{type(error).__name__}: {error}"})
        else:
            say({"result": str(result)})


def run_job(folder: Path, workshop: Workshop) -> Path:
    """Do the job in `folder` and return its result folder. Raises TrainingFailed, ExpertCorrupt, ModelMismatch."""
    result = folder / "result"
    if (result / "report.json").is_file():
        return result
    try:
        spec = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        rows = _json_lines(folder / "rows.jsonl")
    except (OSError, ValueError) as error:
        raise TrainingFailed(f"{folder} is not a job folder: {error}") from error
    digest = spec.get("backbone") or workshop.backbone.digest
    if digest != workshop.backbone.digest:
        raise ModelMismatch(
            f"the job is for backbone {digest[:12]}, this child has {workshop.backbone.digest[:12]}"
        )
    if spec.get("threads"):
        torch.set_num_threads(int(spec["threads"]))
    aside = folder / "result.tmp"
    for left in (aside, result):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    if spec.get("reference"):
        write_reference(workshop.backbone, Path(spec["reference"]))
    report = (
        _sketch(workshop, rows, aside) if spec["kind"] == "sketch" else _train(workshop, spec, rows, aside)
    )
    _write_json(aside / "report.json", report)
    put_in_place(aside, result)
    return result


def _sketch(workshop: Workshop, rows: Sequence[Mapping[str, Any]], result: Path) -> dict[str, Any]:
    """features (n, D) and sketches (n, A), answer rows, zeros for rows without an answer."""
    features = read_rows(workshop.backbone, [row["input"] for row in rows])
    labelled = [index for index, row in enumerate(rows) if row["output"] is not None]
    sketches = np.zeros((len(rows), answer_size(workshop.backbone)), dtype=np.float32)
    texts = _labelled([rows[index] for index in labelled])

    def tell(step: int, steps: int) -> None:
        workshop.say({"stage": "sketch", "step": step, "steps": steps})

    if texts:
        sketches[labelled] = answer_rows(workshop.backbone, texts, tell)
    save_file({"features": features, "sketches": sketches}, result / "sketches.safetensors")
    return {"rows": len(rows), "labelled": len(labelled)}


def _train(
    workshop: Workshop, spec: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], result: Path
) -> dict[str, Any]:
    """A seed or consolidate job, and the files of a promoted version. Rows too long to train on are not checked on
    either."""
    router = spec["registry"].get("router")
    recipe = Recipe(**spec["recipe"])
    labelled = _labelled([row for row in rows if row["output"] is not None])
    plan = TrialPlan(
        expert_id=spec["expert_id"],
        version=int(spec["version"]),
        tenant=spec["tenant"],
        is_seed=spec["kind"] == "seed",
        seed=int(spec["seed"]),
        recipe=recipe,
        check=CheckConfig(**spec.get("check", {})),
        rows=fitting(workshop.backbone, labelled, recipe),
        rivals=_served(workshop.backbone, [_rival(entry) for entry in spec["registry"]["experts"]]),
        network=_router(Path(router), workshop.backbone) if router else None,
    )
    try:
        outcome = Trial(workshop, plan).run()
    except RowsUnlearnable as error:
        return {"decision": "rejected", "with": None, "reason": str(error)}
    if outcome.is_promoted:
        named = {key: spec.get(key) for key in ("expert_id", "skill_id", "version", "parent", "tenant")}
        _write_expert(workshop.backbone, plan, outcome, {**named, "job": spec["id"]}, result / "expert")
        _write_statistics(workshop.backbone, plan, outcome, rows, result / "expert")
        if outcome.network is not None:
            outcome.network.save(result / "router")
    return outcome.report


def _router(folder: Path, backbone: Backbone) -> RouterNetwork:
    """Where the backbone computes. Raises ExpertCorrupt, ModelMismatch."""
    return RouterNetwork.load(folder, backbone.width).to(backbone.device)


def _served(backbone: Backbone, rivals: Sequence[Rival]) -> list[Rival]:
    """Without experts of another `model.stem_layers`, which no worker serves either."""
    shapes, served = shapes_of(backbone.upper_linears()), []
    for rival in rivals:
        with suppress(ModelMismatch):
            check_layers(rival.expert.adapter, shapes)
            served.append(rival)
    return served


def _rival(entry: Mapping[str, Any]) -> Rival:
    """A live expert from its folder. Raises ExpertCorrupt."""
    folder = Path(entry["folder"])
    expert = read_expert(folder, entry["expert_id"], int(entry["version"]))
    expert = replace(expert, is_mature=entry["maturity"] == "mature", tenant=entry["tenant"])
    exemplars = folder / "exemplars.jsonl"
    rows = _labelled(_json_lines(exemplars)) if exemplars.is_file() else []
    try:
        numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"))["heldout"]
        own_check = (float(numbers["loss_new"]), float(numbers["exact_match_new"]))
    except (OSError, ValueError, KeyError):
        own_check = None  # an expert from elsewhere: it is never called drift
    return Rival(expert=expert, exemplars=rows, own_check=own_check)


def _write_expert(
    backbone: Backbone, plan: TrialPlan, outcome: Outcome, manifest: Mapping[str, Any], folder: Path
) -> None:
    """The PEFT adapter, exemplars for later routers, and the report."""
    if outcome.adapter is None:
        raise TrainingFailed("a promoted version has no adapter")
    save_adapter(folder, outcome.adapter, backbone, {**manifest, "heldout": outcome.report["heldout"]})
    kept = [{"input": row.input, "output": row.output} for row in plan.training[-MAX_EXEMPLARS:]]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    (folder / "exemplars.jsonl").write_text(lines, encoding="utf-8")
    _write_json(folder / "report.json", outcome.report)


def _write_statistics(
    backbone: Backbone, plan: TrialPlan, outcome: Outcome, rows: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Features of all rows that are trained or checked on, and how many records came with the text of each."""
    counts = {row["input"]: int(row.get("count", 1)) for row in rows}
    tensors = {
        "features": outcome.features,
        "sketches": answer_rows(backbone, plan.rows),
        "counts": np.array([counts[row.input] for row in plan.rows], dtype=np.int64),
    }
    save_file(tensors, folder / "statistics.safetensors")


def _labelled(rows: Sequence[Mapping[str, Any]]) -> list[LabelledText]:
    return [LabelledText(input=row["input"], output=row["output"]) for row in rows]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Split at newlines alone: JSON text may hold other line separators."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _speaker(stdout: TextIO, job: str) -> Callable[[dict[str, Any]], None]:
    """Writes one JSON line about a job."""

    def say(message: dict[str, Any]) -> None:
        stdout.write(json.dumps({"job": job, **message}) + "\n")
        stdout.flush()

    return say
