"""The learn loop's child in this process: features out of what was read, experts from statistics or by training.

Without training, an expert is founded from its rows' features once they can be told apart from the other experts'
(the second of the daemon's three checks); the first and third need a model's answers. A later version takes its rows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dylora_stream.bench.novelty.reading import ReadRows
from dylora_stream.core.checks import CheckConfig, is_apart
from dylora_stream.core.errors import TrainingFailed
from dylora_stream.core.ports import JobUpdate
from dylora_stream.core.statistics import ExpertStatistics, separation

__all__ = ["Finished", "StreamChild", "by_heart"]

Train = Callable[[Path], Path]
"""Does the job in a folder as the daemon's child does; its result folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A job that founds or changes an expert, and its decision."""

    kind: str
    expert_id: str
    positions: tuple[str, ...]
    decision: str
    neighbour: str | None


class StreamChild:
    """`core.ports.Child` that does a job when it is submitted.

    `check` says how well rows must be told apart, by the first `routed` numbers of a feature row.
    """

    def __init__(self, rows: ReadRows, check: CheckConfig, routed: int, train: Train | None = None) -> None:
        self._rows = rows
        self._lines = {(text.input, text.output): line for line, text in enumerate(rows.texts)}
        self._check, self._routed = check, routed
        self._train = train
        self._updates: list[JobUpdate] = []
        self.submitted = 0
        self.taught: dict[str, ReadRows] = {}  # by expert, what its newest version was made of
        self.finished: list[Finished] = []

    def submit(self, folder: Path) -> None:
        """See the port; only a training may fail without ending the run."""
        self.submitted += 1
        try:
            self._updates.append(JobUpdate(job=folder.name, result=self._do(folder)))
        except TrainingFailed as error:
            self._updates.append(JobUpdate(job=folder.name, error=str(error)))

    def updates(self) -> list[JobUpdate]:
        """See the port."""
        said, self._updates = self._updates, []
        return said

    @property
    def is_idle(self) -> bool:
        """See the port."""
        return not self._updates

    def close(self) -> None:
        """See the port."""

    def _do(self, folder: Path) -> Path:
        spec = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        lines = (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        own = self._rows.take(np.array([self._lines[row["input"], row["output"]] for row in rows]))
        if spec["kind"] == "sketch":
            return _written(folder / "result", "sketches.safetensors", own, {"rows": len(rows)})
        result = self._train(folder) if self._train is not None else self._found(folder, spec, own, rows)
        report = json.loads((result / "report.json").read_text(encoding="utf-8"))
        if report["decision"] == "promoted":
            self.taught[spec["expert_id"]] = own
        self.finished.append(
            Finished(
                kind=spec["kind"],
                expert_id=spec["expert_id"],
                positions=tuple(row["position"] for row in rows),
                decision=report["decision"],
                neighbour=report.get("with"),
            )
        )
        return result

    def _found(
        self, folder: Path, spec: Mapping[str, Any], own: ReadRows, rows: Sequence[Mapping[str, Any]]
    ) -> Path:
        """An expert of its rows' statistics, or the neighbour that they are confused with."""
        apart = separation(self._statistics(spec["registry"]["experts"]), own.features[:, : self._routed])
        may_live = spec["kind"] != "seed" or is_apart(apart.accuracy, len(own), self._check)
        report: dict[str, Any] = {
            "decision": "promoted" if may_live else "confused",
            "with": None if may_live else apart.rival,
            "reason": f"routed apart: {apart}",
            "heldout": {},
        }
        counts = np.array([row["count"] for row in rows], dtype=np.int64)
        _written(folder / "result" / "expert", "statistics.safetensors", own, {}, counts)
        return _report(folder / "result", report)

    def _statistics(self, experts: Sequence[Mapping[str, Any]]) -> list[ExpertStatistics]:
        """Of the registry's experts, out of their folders: the part that rows are routed by."""
        tables = [load_file(Path(expert["folder"]) / "statistics.safetensors") for expert in experts]
        return [
            ExpertStatistics(expert_id=expert["expert_id"], rows=table["features"][:, : self._routed])
            for expert, table in zip(experts, tables, strict=True)
        ]


def by_heart(taught: ReadRows, features: np.ndarray, routed: int) -> str:
    """The answer of the row most alike in the first `routed` numbers of features (D,)."""
    gaps = np.linalg.norm((taught.features - features)[:, :routed], axis=1)
    return taught.texts[int(gaps.argmin())].output


def _written(
    folder: Path, name: str, rows: ReadRows, report: Mapping[str, Any], counts: np.ndarray | None = None
) -> Path:
    """Features and answers' features, zeros where there are none, with their counts, and the report beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = rows.answers if rows.answers is not None else np.zeros((len(rows), 1), dtype=np.float32)
    counted = {} if counts is None else {"counts": counts}
    save_file({"features": rows.features, "sketches": answers, **counted}, folder / name)
    return _report(folder, report)


def _report(folder: Path, report: Mapping[str, Any]) -> Path:
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder
