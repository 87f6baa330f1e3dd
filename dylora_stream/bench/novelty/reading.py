"""Features of rows, read once: a run that was stopped goes on where it was, and later runs share what was read.

Equal texts are read once and have equal features: in bfloat16, the same text in two batches has not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dylora_stream.bench.continual.workbench import Tell
from dylora_stream.bench.store import Store, digest
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText, answer_rows, feature_space, read_rows

__all__ = ["FeatureReader", "ReadRows", "concatenated"]

Item = TypeVar("Item")

CHUNK = 64  # rows of a file in the store, and of a step of the progress bar


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """Rows with their features (n, D) float32 and their answers' (n, A) float32, or None."""

    texts: tuple[LabelledText, ...]
    features: np.ndarray
    answers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> "ReadRows":
        """These rows: (m,) int64."""
        return ReadRows(
            texts=tuple(self.texts[row] for row in rows.tolist()),
            features=self.features[rows],
            answers=None if self.answers is None else self.answers[rows],
        )

    def distinct(self) -> "ReadRows":
        """The first row of each input, in order."""
        first: dict[str, int] = {}
        for row, text in enumerate(self.texts):
            first.setdefault(text.input, row)
        return self.take(np.array(list(first.values()), dtype=np.int64))

    def unanswered(self) -> "ReadRows":
        """The same without answers' features."""
        return ReadRows(texts=self.texts, features=self.features)


def concatenated(parts: Sequence[ReadRows]) -> ReadRows:
    """All rows, in order; with answers where all parts have them."""
    answers = [part.answers for part in parts if part.answers is not None]
    return ReadRows(
        texts=tuple(text for part in parts for text in part.texts),
        features=np.concatenate([part.features for part in parts]),
        answers=np.concatenate(answers) if len(answers) == len(parts) else None,
    )


class FeatureReader:
    """Reads features with a backbone, out of the store where they are there."""

    def __init__(self, backbone: Backbone, store: Store, tell: Tell) -> None:
        self._backbone, self._store, self._tell = backbone, store, tell
        self._ground = {
            "space": feature_space(backbone),
            "dtype": str(backbone.dtype),
            "template": backbone.template.text,
        }

    def read(self, rows: Sequence[LabelledText], what: str, *, has_answers: bool) -> ReadRows:
        """Features of the rows, in their order. `what` is shown."""
        texts = list(dict.fromkeys(row.input for row in rows))
        table = self._chunks("inputs", texts, what, lambda part: read_rows(self._backbone, part))
        place = {text: number for number, text in enumerate(texts)}
        features = table[[place[row.input] for row in rows]]
        answers = self._answers(rows, what) if has_answers else None
        return ReadRows(texts=tuple(rows), features=features, answers=answers)

    def _answers(self, rows: Sequence[LabelledText], what: str) -> np.ndarray:
        """(n, A) float32."""
        pairs = list(dict.fromkeys((row.input, row.output) for row in rows))

        def answered(part: Sequence[tuple[str, str]]) -> np.ndarray:
            texts = [LabelledText(input=text, output=output) for text, output in part]
            return answer_rows(self._backbone, texts)

        table = self._chunks("answers", pairs, f"{what}, answers", answered)
        place = {pair: number for number, pair in enumerate(pairs)}
        return table[[place[row.input, row.output] for row in rows]]

    def _chunks(
        self, kind: str, items: Sequence[Item], what: str, read: Callable[[Sequence[Item]], np.ndarray]
    ) -> np.ndarray:
        """(n, d) float32 of the items, a chunk at a time out of the store or read."""
        tables = []
        for start in range(0, len(items), CHUNK):
            part = items[start : start + CHUNK]
            key = digest(**self._ground, items=part)
            found = self._store.tensors(f"features/{kind}", key)
            if found is None:
                self._tell(f"reading {what}", start, len(items))
                found = {"features": torch.from_numpy(read(part))}
                self._store.put_tensors(f"features/{kind}", key, found)
            tables.append(found["features"].numpy())
        return np.concatenate(tables)
