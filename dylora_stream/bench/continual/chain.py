"""A gate's course: experts one after another, and what the gate learns of each."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dylora_stream.bench.continual.evaluate import Cell, Examiner, scene_of
from dylora_stream.bench.continual.workbench import Expert, Workbench, seed_of
from dylora_stream.bench.store import digest
from dylora_stream.model.gates.base import Lesson, Memory, Stage, Student
from dylora_stream.model.training import Company, TrainingOptions

__all__ = ["GateCourse"]


class GateCourse:
    """Experts one after another, behind a gate. Expert t stands in slot t + 1, its id is its task's name.

    Experts are shared as widely as their training allows: trained alone → by every method and order; in a company that
    neither has other experts in it nor learns itself (the gate's `is_order_free`) → by every order; else → by orders
    that begin alike.
    """

    has_diagonal = True

    def __init__(
        self, bench: Workbench, examiner: Examiner, name: str, way: tuple[Sequence[str], int]
    ) -> None:
        self._bench, self._examiner, self._name = bench, examiner, name
        self._order, self._seed = way
        self._records: list[dict[str, Any]] = []
        self._gate: Student | None = None
        self._at = -1  # the task that the gate at hand learned last

    @property
    def is_alone(self) -> bool:
        """See `Course`."""
        return all(record["is_alone"] for record in self._records)

    def learn(self, t: int) -> None:
        """See `Course`."""
        record = self._bench.store.value(f"chains/{self._name}", self._key(t))
        self._records.append(record or self._learned(t))

    def answer(self, t: int, name: str) -> Cell:
        """See `Course`."""
        bench, kind = self._bench, f"cells/{self._name}"
        key = digest(chain=self._key(t), exam=bench.exams[name].digest)
        found = bench.store.value(kind, key)
        if found is None:
            gate = self._brought(t)
            scene = scene_of([(met, bench.features(met, self._seed)) for met in self._order[: t + 1]])
            experts = [record["expert"] for record in self._records]
            cell = self._examiner.gated(gate, scene, experts, name)
            assert cell.leaders is not None
            found = {"is_exact": cell.is_exact.astype(int).tolist(), "leaders": cell.leaders.tolist()}
            bench.store.put_value(kind, key, found)
        return Cell(is_exact=np.array(found["is_exact"], dtype=bool), leaders=np.array(found["leaders"]))

    def cost(self) -> tuple[int, float]:
        """See `Course`."""
        experts = sum(record["expert_parameters"] for record in self._records)
        return experts + self._records[-1]["gate_parameters"], sum(r["train_s"] for r in self._records)

    def _key(self, t: int) -> str:
        """Of the gate and the experts behind t."""
        bench = self._bench
        rows = [(name, bench.lessons[name, self._seed].digest) for name in self._order[: t + 1]]
        parts = {"gate": self._name, "gating": dict(bench.gating), "memory": bench.memory}
        return digest(**bench.ground, **parts, rows=rows, seed=self._seed)

    def _brought(self, t: int) -> Student:
        """The gate behind t, experts in their slots."""
        if self._gate is not None and self._at == t:
            return self._gate
        bench = self._bench
        gate = bench.student(self._name)
        if t >= 0:
            gate.restore(bench.store.tensors(f"chains/{self._name}", self._key(t)) or {})
        for slot in range(1, bench.pool.slots + 1):
            if slot <= t + 1:
                bench.pool.write(slot, bench.adapter(self._records[slot - 1]["expert"]))
            else:
                bench.pool.clear(slot)
        self._gate, self._at = gate, t
        return gate

    def _learned(self, t: int) -> dict[str, Any]:
        """1 company · 2 training · 3 the slot · 4 the gate's lesson · 5 state, then record."""
        bench, gate = self._bench, self._brought(t - 1)
        lesson = self._lesson(t)
        bench.tell(f"learning {lesson.expert_id}", 0, 0)
        company = gate.company(self._stage(t), lesson)  # 1
        expert = self._expert(t, gate, company)  # 2
        bench.pool.write(t + 1, bench.adapter(expert.key))  # 3
        bench.tell(f"teaching the gate {lesson.expert_id}", 0, 0)
        began = time.perf_counter()
        gate.learn(self._stage(t + 1), lesson)  # 4
        bench.pool.no_gates()
        self._at = t
        record = {
            "expert": expert.key,
            "expert_parameters": expert.parameters,
            "gate_parameters": gate.parameters,
            "train_s": expert.seconds + time.perf_counter() - began,
            "is_alone": company is None,
        }
        bench.store.put_tensors(f"chains/{self._name}", self._key(t), gate.state())  # 5
        bench.store.put_value(f"chains/{self._name}", self._key(t), record)
        return record

    def _expert(self, t: int, gate: Student, company: Company | None) -> Expert:
        bench, name = self._bench, self._order[t]
        if company is None:
            return bench.alone(name, self._seed)
        rows = bench.lessons[name, self._seed]
        begin = getattr(gate, "start", None)  # of gates that draw A themselves
        start = begin(self._stage(t), self._lesson(t)) if begin else None
        options = TrainingOptions(seed=seed_of(self._seed, name), company=company, start=start)
        what = f"{name}, {self._name}"
        if getattr(gate, "is_order_free", False) and not company.parameters():
            parts = {
                "gating": dict(bench.gating),
                "memory": bench.memory,
                "rows": rows.digest,
                "seed": options.seed,
            }
            key = digest(**bench.ground, **parts)
            return bench.expert(self._name, key, rows.kept, options, what)
        # Its company may learn while it trains, so that an expert without the record behind it is of no use.
        return bench.keep(self._name, self._key(t), bench.train(rows.kept, options, what))

    def _stage(self, count: int) -> Stage:
        """With the first experts of the order."""
        slots = {name: slot for slot, name in enumerate(self._order[:count], start=1)}
        return Stage(backbone=self._bench.backbone, pool=self._bench.pool, hook=self._bench.hook, slots=slots)

    def _lesson(self, t: int) -> Lesson:
        """Stored rows are the first ones; features are of all rows, the stored ones' first."""
        bench = self._bench
        memory = {
            name: Memory(
                rows=bench.lessons[name, self._seed].kept[: bench.memory],
                features=bench.features(name, self._seed),
            )
            for name in self._order[: t + 1]
        }
        return Lesson(expert_id=self._order[t], memory=memory, seed=seed_of(self._seed, self._order[t]))
