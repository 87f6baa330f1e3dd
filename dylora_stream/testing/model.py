"""A model that is none."""

from collections.abc import Sequence

import numpy as np

from dylora_stream.core.experts import Registry
from dylora_stream.core.messages import (
    Answer,
    Novelty,
    Policy,
    Request,
    RoutingWeight,
)
from dylora_stream.core.ports import Activation, LoadFailure

__all__ = ["UniformAnswerer"]


class UniformAnswerer:
    """`core.ports.Answerer` without a model: every text gets `reply` from the backbone and the same novelty."""

    def __init__(self, reply: str = "ok", *, is_novel: bool = False, features: int = 4) -> None:
        self._reply = reply
        self._novelty = Novelty(
            score=1.0, p_value=0.01 if is_novel else 0.9, entropy=0.0, nearest=None, is_novel=is_novel
        )
        self._features = np.zeros(features, dtype=np.float32)
        self.registry = Registry()

    def prepare(self, registry: Registry) -> Activation:
        """See the port."""

        def activate() -> tuple[LoadFailure, ...]:
            self.registry = registry
            return ()

        return activate

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See the port."""
        weights = (RoutingWeight(expert=None, version=0, weight=1.0),)
        return [
            Answer(
                output=self._reply,
                policy=Policy.BACKBONE,
                weights=weights,
                novelty=self._novelty,
                features=self._features,
            )
            for _ in requests
        ]

    def score(self, inputs: Sequence[str], tenant: str) -> list[Novelty]:
        """See the port."""
        del tenant
        return [self._novelty] * len(inputs)


class MemoryIndex:
    """`core.ports.VectorIndex` in numpy: a dictionary of vectors, searched by brute force."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._vectors: dict[int, np.ndarray] = {}

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Take ids (n,) int64 and vectors (n, d) float32 in; an id that is there already is replaced."""
        self._vectors.update(zip(ids.tolist(), vectors.astype(np.float32), strict=True))

    def remove(self, ids: np.ndarray) -> None:
        """Forget these ids; unknown ones are ignored."""
        for row_id in ids.tolist():
            self._vectors.pop(row_id, None)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(distances (n, k) float32 ascending, ids (n, k) int64); inf and -1 where there are fewer than k."""
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        found = min(k, len(self._vectors))
        if found:
            known = np.fromiter(self._vectors, dtype=np.int64)
            vectors = np.stack(list(self._vectors.values()))
            exact = np.linalg.norm(queries[:, None, :] - vectors[None], axis=2)
            order = np.argsort(exact, axis=1, kind="stable")[:, :found]
            distances[:, :found] = np.take_along_axis(exact, order, axis=1)
            ids[:, :found] = known[order]
        return distances, ids

    def __len__(self) -> int:
        return len(self._vectors)
