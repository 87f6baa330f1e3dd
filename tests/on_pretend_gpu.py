"""The model room on the pretend GPU: reading, training, serving with every method, the router's lesson, a whole job.

Run as a program; it ends with 0 where nothing mixed devices.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from models import random_adapter, tiny_llama
from pretend_gpu import GPU, Watching, to_gpu
from safetensors.numpy import save_file

from dylora_stream.core.novelty import NoveltyConfig
from dylora_stream.core.recipes import Recipe
from dylora_stream.core.routing import SERVED_METHODS, RoutingConfig
from dylora_stream.model.adapters import save_adapter
from dylora_stream.model.backbone import Backbone, load_backbone
from dylora_stream.model.config import ModelConfig, PoolConfig
from dylora_stream.model.decoding import generate, rank_choices
from dylora_stream.model.features import LabelledText, answer_rows, read_rows
from dylora_stream.model.gates import gate_named
from dylora_stream.model.jobs import run_job
from dylora_stream.model.live import LiveExperts, LoadedExpert
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.router import RouterParts
from dylora_stream.model.router_training import RouterLesson, RouterTraining, train_router
from dylora_stream.model.training import TrainingOptions, score_rows, train_expert
from dylora_stream.model.trial import Workshop
from dylora_stream.store.index import FaissIndex

KINDS = ("apple", "bolt", "cloud")
RECIPE = Recipe(rank=4, alpha=4.0, epochs=1, batch_size=4)


def texts(kind: str, count: int = 16) -> list[str]:
    """Inputs of one kind."""
    return [f"{kind} {number} {kind[::-1] * (number % 3)}" for number in range(count)]


def parts(method: str) -> RouterParts:
    """A router's, for one method."""
    gate = gate_named(method, RoutingConfig())
    return RouterParts(gate=gate, novelty=NoveltyConfig(), index_factory=FaissIndex)


def serve(backbone: Backbone, method: str) -> None:
    """Experts come one after another; a batch is written, one is ranked, one is scored."""
    experts = [
        LoadedExpert(
            expert_id=kind,
            version=1,
            adapter=random_adapter(backbone, seed),
            features=read_rows(backbone, texts(kind)),
            is_mature=seed > 0,
        )
        for seed, kind in enumerate(KINDS)
    ]
    live = LiveExperts(backbone, PoolConfig(slots=4, rank=4), parts(method))
    network = RouterNetwork(backbone.width).to(backbone.device)
    live.install(experts[:2], network)
    live.install(experts, network)
    inputs = [text for kind in KINDS for text in texts(kind, 3)]
    tokens, tenants = backbone.encode(inputs), ["default"] * len(inputs)
    with live.serving(tokens, inputs, tenants):
        generate(backbone, live.pool, tokens, 4)
    with live.serving(tokens, inputs, tenants):
        rank_choices(backbone, live.pool, tokens, [backbone.target_ids(["a", "no way", ""]) for _ in inputs])
    live.router.score(read_rows(backbone, inputs), live.router.allowed(tenants))
    if method == "hybrid":
        rows = {kind: [LabelledText(input=text, output=kind) for text in texts(kind)] for kind in KINDS}
        lesson = RouterLesson(expert_id=KINDS[-1], exemplars=rows, seed=0)
        train_router(live, network, lesson, RoutingConfig(), RouterTraining(steps=4, task_batches=2))
    live.close()


def train(backbone: Backbone) -> None:
    """A new expert, a later version of it, and their scores."""
    rows = [LabelledText(input=text, output="yes") for text in texts("apple")]
    answer_rows(backbone, rows)
    first = train_expert(backbone, rows, RECIPE, TrainingOptions(seed=0))
    second = train_expert(backbone, rows, RECIPE, TrainingOptions(seed=0, start=first.adapter))
    score_rows(backbone, rows, second.adapter)


def do_a_job(backbone: Backbone, folder: Path) -> None:
    """Consolidation beside another expert, under a stored router."""
    experts = []
    for seed, kind in enumerate(KINDS[:2]):
        place = folder / kind
        save_adapter(place, random_adapter(backbone, seed), backbone, {"expert_id": kind})
        save_file({"features": read_rows(backbone, texts(kind))}, place / "statistics.safetensors")
        lines = (json.dumps({"input": text, "output": kind}) for text in texts(kind))
        (place / "exemplars.jsonl").write_text("\n".join(lines) + "\n")
        entry = {"folder": str(place), "expert_id": kind, "version": 1, "maturity": "nascent"}
        experts.append({**entry, "tenant": "default"})
    network = RouterNetwork(backbone.width)
    for kind in KINDS[:2]:
        network.add_column(kind)
    network.is_fitted = True
    network.save(folder / "router")
    job = folder / "job"
    job.mkdir()
    document = {
        "id": "j", "kind": "consolidate", "expert_id": KINDS[0], "skill_id": "s", "version": 2, "parent": None,
        "tenant": "default", "seed": 0, "recipe": {"rank": 4, "epochs": 1, "batch_size": 8},
        "check": {"known_loss": 0.0, "routing": 0.0},
        "registry": {"router": str(folder / "router"), "experts": experts},
    }  # fmt: skip
    (job / "job.json").write_text(json.dumps(document))
    rows = (json.dumps({"input": text, "output": KINDS[0]}) for text in texts(KINDS[0], 24))
    (job / "rows.jsonl").write_text("\n".join(rows) + "\n")
    workshop = Workshop(
        backbone=backbone, parts=parts("hybrid"), routing=RoutingConfig(), say=lambda _said: None
    )
    run_job(job, workshop)


def main() -> int:
    """All of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig(name="tiny", dtype="float32", stem_layers=2, feature_layers=2, threads=1)
        backbone = load_backbone(config, tiny_llama(Path(folder) / "model"))
        with Watching():
            to_gpu(backbone.model)
            assert backbone.device == GPU
            train(backbone)
            for method in SERVED_METHODS:
                serve(backbone, method)
            do_a_job(backbone, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
