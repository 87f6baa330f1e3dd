"""A method's way through the tasks of one order with one seed: a gate's, or a fence post's.

A course is gone through in order, `learn(0)`, `learn(1)`, …; after `learn(t)`, and before the next, `answer(t, name)`
scores any task. What is in the store is neither trained nor loaded.
"""

from collections.abc import Sequence
from typing import Protocol

from dylora_stream.bench.continual.chain import GateCourse
from dylora_stream.bench.continual.evaluate import Cell, Examiner
from dylora_stream.bench.continual.fences import BaseCourse, JointCourse, OracleCourse, SequentialCourse
from dylora_stream.bench.continual.workbench import Workbench

__all__ = ["FENCE_POSTS", "Course", "course_of"]

FENCE_POSTS = ("sequential", "oracle", "joint")


class Course(Protocol):
    """See the module."""

    has_diagonal: bool
    """Whether it can be asked before the last task."""

    def learn(self, t: int) -> None:
        """Learn the t-th task of the order."""

    def answer(self, t: int, name: str) -> Cell:
        """A task's test rows, t being the task learned last."""

    def cost(self) -> tuple[int, float]:
        """(trained parameters, seconds of training) so far, shared experts counted in full."""

    @property
    def is_alone(self) -> bool:
        """Whether its experts trained alone, each on its task."""


def course_of(bench: Workbench, examiner: Examiner, name: str, order: Sequence[str], seed: int) -> Course:
    """The course of a method."""
    if name == "base":
        return BaseCourse(bench, examiner, order, seed)
    if name == "sequential":
        return SequentialCourse(bench, examiner, order, seed)
    if name == "oracle":
        return OracleCourse(bench, examiner, order, seed)
    if name == "joint":
        return JointCourse(bench, examiner, order, seed)
    return GateCourse(bench, examiner, name, (order, seed))
