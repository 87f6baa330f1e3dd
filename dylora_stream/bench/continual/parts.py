"""The parts of a run, made from settings: gates by name, and the workbench."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from dylora_stream.bench.continual.config import ContinualConfig
from dylora_stream.bench.continual.courses import FENCE_POSTS
from dylora_stream.bench.continual.networked import YOUNG, NetworkedGate
from dylora_stream.bench.continual.workbench import Tell, Workbench
from dylora_stream.bench.store import Store
from dylora_stream.bench.tasks import Rows, choose, load_tasks
from dylora_stream.bootstrap.parts import faiss_index
from dylora_stream.core.errors import SettingsError
from dylora_stream.model import gates
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.config import PoolConfig
from dylora_stream.model.gates.base import Student
from dylora_stream.model.mixture import Pool
from dylora_stream.model.router import RouterParts
from dylora_stream.model.stem import StemHook
from dylora_stream.settings import Settings

__all__ = ["methods_named", "student_named", "workbench"]

TARGETS = {"all": (), "attention": ("attn",), "mlp": ("mlp",)}  # parts of layers' names


def methods_named(names: Sequence[str]) -> tuple[str, ...]:
    """The methods, `all` spelt out. Raises SettingsError with those there are."""
    known = (*gates.GATES, *FENCE_POSTS)
    for name in names:
        if name not in (*known, YOUNG, "all"):
            raise SettingsError(
                f"there is no method {name!r}: use all, or some of {', '.join((*known, YOUNG))}"
            )
    return known if "all" in names else tuple(dict.fromkeys(names))


def student_named(name: str, settings: Settings) -> Student:
    """A gate, untaught; the hybrid one with the network that the daemon would train for it."""
    if name not in ("hybrid", YOUNG):
        return gates.gate_named(name, settings.router)
    gate = gates.gate_named("hybrid", settings.router)
    parts = RouterParts(gate=gate, novelty=settings.novelty, index_factory=faiss_index())
    return NetworkedGate(settings.router, parts, is_young=name == YOUNG)


@contextmanager
def workbench(
    config: ContinualConfig, settings: Settings, backbone: Backbone, work: Path, tell: Tell
) -> Iterator[Workbench]:
    """The shared parts; its hooks are off the backbone afterwards."""
    tasks = load_tasks(config.data, config.orders[0])
    recipe = config.recipe(settings.seeding)

    def chosen(name: str, part: str, seed: str) -> Rows:
        rows, count = (
            (tasks[name].train, config.train_rows)
            if part == "train"
            else (tasks[name].test, config.test_rows)
        )
        return choose(rows, count, config.max_tokens, f"{name}.{part}{seed}", backbone)

    backbone = _aimed(backbone, config.targets)
    pool = Pool(backbone, PoolConfig(slots=len(tasks), rank=recipe.rank))
    hook = StemHook(backbone)
    gating = {key: value for key, value in asdict(settings.router).items() if key != "method"}
    try:
        yield Workbench(
            backbone=backbone,
            pool=pool,
            hook=hook,
            store=Store(work),
            recipe=recipe,
            student=lambda name: student_named(name, settings),
            lessons={
                (name, seed): chosen(name, "train", f".{seed}") for name in tasks for seed in config.seeds
            },
            exams={name: chosen(name, "test", "") for name in tasks},
            memory=config.memory,
            gating=gating,
            tell=tell,
        )
    finally:
        pool.close()
        hook.close()


def _aimed(backbone: Backbone, text: str) -> Backbone:
    """With the layers that experts adapt. Raises SettingsError where there is no such layer."""
    parts = TARGETS[text] if text in TARGETS else tuple(text.split(","))
    aimed = replace(backbone, targets=parts)
    if not aimed.upper_linears():
        names = sorted({name.rpartition(".")[2] for name in backbone.upper_linears()})
        raise SettingsError(
            f"no layer above the stem is named like {text!r}: use all, attention, mlp, or some of {', '.join(names)}"
        )
    return aimed
