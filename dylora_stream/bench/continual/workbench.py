"""What all methods of a run share: backbone, pool, rows, recipe, store; and experts, each trained once."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dylora_stream.bench.store import Store, digest, ground_of
from dylora_stream.bench.tasks import Rows
from dylora_stream.core.recipes import Recipe
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText, read_stem
from dylora_stream.model.gates.base import Student
from dylora_stream.model.mixture import Pool
from dylora_stream.model.stem import StemHook
from dylora_stream.model.training import Trained, TrainingOptions, train_expert

__all__ = ["Expert", "Tell", "Workbench", "seed_of"]

Tell = Callable[[str, int, int], None]
"""Takes what is being done, the step, and how many there are (0: unknown)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A trained expert: its place in the store, the parameters, and the seconds that its training took."""

    key: str
    parameters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """Shared by the courses of a run, one course at a time: there is one pool."""

    backbone: Backbone
    pool: Pool
    hook: StemHook
    store: Store
    recipe: Recipe
    student: Callable[[str], Student]
    """A gate by its name, untaught."""
    lessons: Mapping[tuple[str, int], Rows]
    """Training rows by task and seed."""
    exams: Mapping[str, Rows]
    """Test rows by task."""
    memory: int = 32
    """Stored rows of an expert."""
    gating: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the gates, for the digests."""
    tell: Tell = lambda _what, _step, _steps: None

    @property
    def ground(self) -> dict[str, Any]:
        """What every result depends on, but for rows and seeds."""
        return {**ground_of(self.backbone), "recipe": asdict(self.recipe)}

    def alone(self, name: str, seed: int) -> Expert:
        """The expert of a task that trained alone: all methods, orders and runs with such experts share it."""
        rows = self.lessons[name, seed]
        key = digest(**self.ground, rows=rows.digest, seed=seed_of(seed, name))
        return self.expert(
            "alone", key, rows.kept, TrainingOptions(seed=seed_of(seed, name)), f"{name}, alone"
        )

    def expert(
        self, kind: str, key: str, rows: Sequence[LabelledText], options: TrainingOptions, what: str
    ) -> Expert:
        """An expert out of the store, else trained. Raises TrainingFailed."""
        known = self.known(kind, key)
        if known is not None:
            return known
        return self.keep(kind, key, self.train(rows, options, what))

    def known(self, kind: str, key: str) -> Expert | None:
        """An expert that is in the store already."""
        found = self.store.value(f"experts/{kind}", key)
        if found is None:
            return None
        return Expert(key=f"{kind}/{key}", parameters=found["parameters"], seconds=found["seconds"])

    def train(self, rows: Sequence[LabelledText], options: TrainingOptions, what: str) -> Trained:
        """A training, told about."""

        def progress(step: int, steps: int, loss: float) -> None:
            self.tell(f"training {what}: loss {loss:.3f}", step, steps)

        self.tell(f"training {what}", 0, 0)
        return train_expert(self.backbone, rows, self.recipe, replace(options, progress=progress))

    def keep(self, kind: str, key: str, trained: Trained) -> Expert:
        """Store an expert; the numbers come last, so that they say that it is whole."""
        flat = {
            f"{half}|{layer}": tensor
            for layer, pair in trained.adapter.tensors.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
        count = trained.adapter.parameters
        numbers = {"parameters": count, "seconds": trained.seconds, "losses": trained.losses}
        self.store.put_tensors(f"experts/{kind}", key, flat)
        self.store.put_value(f"experts/{kind}", key, numbers)
        return Expert(key=f"{kind}/{key}", parameters=count, seconds=trained.seconds)

    def adapter(self, key: str) -> Adapter:
        """An expert's weights, by `Expert.key`."""
        kind, _, name = key.rpartition("/")
        flat = self.store.tensors(f"experts/{kind}", name)
        if flat is None:
            raise FileNotFoundError(f"the expert {key} is gone from {self.store.folder}: start the run again")
        layers = [half.removeprefix("A|") for half in flat if half.startswith("A|")]
        tensors = {layer: (flat[f"A|{layer}"], flat[f"B|{layer}"]) for layer in layers}
        return Adapter(rank=next(iter(tensors.values()))[0].shape[0], tensors=tensors)

    def features(self, name: str, seed: int) -> np.ndarray:
        """(n, d) float32 stem features of a task's training rows, read once."""
        backbone, rows = self.backbone, self.lessons[name, seed]
        where = {"backbone": backbone.digest, "dtype": str(backbone.dtype), "stem": backbone.read_layers}
        key = digest(**where, template=backbone.template.text, rows=rows.digest)
        found = self.store.tensors("features", key)
        if found is None:
            self.tell(f"reading {name}", 0, 0)
            features = read_stem(backbone, [row.input for row in rows.kept])
            found = {"features": torch.from_numpy(features)}
            self.store.put_tensors("features", key, found)
        return found["features"].numpy()


def seed_of(seed: int, name: str) -> int:
    """A seed for one task of a run."""
    return int(hashlib.sha256(json.dumps([seed, name]).encode()).hexdigest()[:7], 16)
