"""Fence posts: what no gate is needed for, and what no gate can beat."""

from collections.abc import Sequence

from dylora_stream.bench.continual.evaluate import Cell, Examiner
from dylora_stream.bench.continual.workbench import Expert, Workbench, seed_of
from dylora_stream.bench.store import digest
from dylora_stream.model.training import TrainingOptions

__all__ = ["BaseCourse", "JointCourse", "OracleCourse", "SequentialCourse"]


class _AdapterCourse:
    """A fence post whose rows are answered by one adapter."""

    has_diagonal = True
    is_alone = False

    def __init__(self, bench: Workbench, examiner: Examiner, order: Sequence[str], seed: int) -> None:
        self._bench, self._examiner, self._order, self._seed = bench, examiner, order, seed
        self._experts: list[Expert] = []

    def cost(self) -> tuple[int, float]:
        """See `Course`."""
        return self._experts[-1].parameters, sum(expert.seconds for expert in self._experts)

    def answer(self, t: int, name: str) -> Cell:
        """See `Course`."""
        del t
        return Cell(is_exact=self._examiner.alone(self._experts[-1].key, name))

    def _digests(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [(name, self._bench.lessons[name, self._seed].digest) for name in names]


class BaseCourse(_AdapterCourse):
    """The backbone alone."""

    def learn(self, t: int) -> None:
        """Nothing."""

    def answer(self, t: int, name: str) -> Cell:
        """See `Course`."""
        del t
        return Cell(is_exact=self._examiner.alone(None, name))

    def cost(self) -> tuple[int, float]:
        """See `Course`."""
        return 0, 0.0


class SequentialCourse(_AdapterCourse):
    """One adapter, trained on, task after task: what forgetting is when nothing is done about it."""

    def learn(self, t: int) -> None:
        """See `Course`."""
        bench, name = self._bench, self._order[t]
        key = digest(**bench.ground, rows=self._digests(self._order[: t + 1]), seed=self._seed)
        expert = bench.known("sequential", key)
        if expert is None:
            start = bench.adapter(self._experts[-1].key) if self._experts else None
            options = TrainingOptions(seed=seed_of(self._seed, name), start=start)
            expert = bench.expert(
                "sequential", key, bench.lessons[name, self._seed].kept, options, f"{name}, sequential"
            )
        self._experts.append(expert)


class OracleCourse(_AdapterCourse):
    """Each row by its own task's expert, which trained alone: what perfect routing would give."""

    is_alone = True

    def learn(self, t: int) -> None:
        """See `Course`."""
        self._experts.append(self._bench.alone(self._order[t], self._seed))

    def answer(self, t: int, name: str) -> Cell:
        """See `Course`."""
        del t
        return Cell(is_exact=self._examiner.alone(self._bench.alone(name, self._seed).key, name))

    def cost(self) -> tuple[int, float]:
        """See `Course`."""
        return sum(e.parameters for e in self._experts), sum(e.seconds for e in self._experts)


class JointCourse(_AdapterCourse):
    """One adapter on all tasks' rows at once, as many epochs: nothing arrives one after another."""

    has_diagonal = False

    def learn(self, t: int) -> None:
        """All tasks, when the last one is there."""
        if t < len(self._order) - 1:
            return
        bench, names = self._bench, sorted(self._order)
        key = digest(**bench.ground, rows=self._digests(names), seed=self._seed)
        rows = [row for name in names for row in bench.lessons[name, self._seed].kept]
        options = TrainingOptions(seed=seed_of(self._seed, "joint"))
        self._experts.append(bench.expert("joint", key, rows, options, "all tasks, joint"))
