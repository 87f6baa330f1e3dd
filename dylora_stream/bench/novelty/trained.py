"""What experts that were trained say of the tasks: which are one skill, and how new a row is by its likelihood.

An expert a task, trained alone with the seeding recipe; the backbone and every expert score every task's test rows.

- A task is learned where its expert is exactly right on more rows than its commonest training answer is.
- Learned tasks are one family where one expert serves them as well as two do: the expert of one of them is not behind
  the other's own expert on the other's rows. Families are what hangs together by such pairs.
- Likelihood ratio: s(x, y) = -max_e [log p_e(y|x) - log p_0(y|x)], means over the answer's tokens; e are the experts
  of the tasks that are not left out, 0 is the backbone. It needs the right answer and a pass an expert, so it is
  measured here and serves nowhere.

More, and behind, are sign tests over the rows that one of the two has right and the other has not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.stats import binomtest

from dylora_stream.bench.novelty.judging import Ground, Rating, ReadTask
from dylora_stream.bench.store import Store, digest, ground_of
from dylora_stream.core.recipes import Recipe
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText
from dylora_stream.model.training import RowScores, TrainingOptions, score_rows, train_expert

__all__ = ["LIKELIHOOD", "Trained", "families", "likelihood_ratings", "score_all"]

LIKELIHOOD = "likelihood"  # its name among the scorers
CHANCE = 0.025  # of a sign test, one side: the end of a two-sided interval of 95 %


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Every task's test rows by who scored them: the expert of a task, or None for the backbone."""

    scores: Mapping[str | None, Mapping[str, RowScores]]
    common: Mapping[str, np.ndarray]
    """(n,) bool by task: whether a row's answer is the commonest one of the task's training rows."""

    def exact(self, expert: str | None, task: str) -> np.ndarray:
        """(n,) bool."""
        return self.scores[expert][task].is_exact


def score_all(ground: Ground, backbone: Backbone, recipe: Recipe, store: Store) -> Trained:
    """Train what is not in the store yet, and score. Raises TrainingFailed."""
    scores: dict[str | None, dict[str, RowScores]] = {}
    for number, expert in enumerate((None, *ground.tasks)):
        ground.tell(f"training and scoring: {expert or 'the backbone'}", number, 1 + len(ground.tasks))
        rows = () if expert is None else ground.tasks[expert].train.texts
        key = digest(
            **ground_of(backbone),
            recipe=asdict(recipe),
            seed=ground.seed,
            train=[[row.input, row.output] for row in rows],
            test=[[row.input, row.output] for task in ground.tasks.values() for row in task.test.texts],
        )
        found = store.tensors("trained", key)
        if found is None:
            scored = _scored(ground, backbone, recipe, rows)
            found = {"losses": torch.from_numpy(scored.losses), "is_exact": torch.from_numpy(scored.is_exact)}
            store.put_tensors("trained", key, found)
        scores[expert] = _by_task(ground.tasks, found["losses"].numpy(), found["is_exact"].numpy())
    return Trained(scores=scores, common={name: _common(task) for name, task in ground.tasks.items()})


def families(trained: Trained) -> tuple[list[list[str]], list[str]]:
    """(families of learned tasks in the tasks' order, tasks that were not learned)."""
    learned = [task for task, common in trained.common.items() if _is_more(trained.exact(task, task), common)]
    groups: list[list[str]] = []
    for task in learned:
        kin = [group for group in groups if any(_is_one(trained, task, other) for other in group)]
        groups = [group for group in groups if group not in kin]
        groups.append([*(member for group in kin for member in group), task])
    return groups, [task for task in trained.common if task not in learned]


def likelihood_ratings(trained: Trained) -> dict[str, Rating]:
    """By left-out task: its rows against those of the others, scored by the others' experts."""
    tasks = list(trained.common)
    result = {}
    for left_out in tasks:
        kept = [task for task in tasks if task != left_out]
        known = np.concatenate([_novelty(trained, kept, task) for task in kept])
        result[left_out] = Rating.of(known, _novelty(trained, kept, left_out))
    return result


def _scored(ground: Ground, backbone: Backbone, recipe: Recipe, rows: Sequence[LabelledText]) -> RowScores:
    """All test rows under an expert trained on `rows`, or under the backbone where there are none."""
    options = TrainingOptions(seed=ground.seed)
    adapter = train_expert(backbone, rows, recipe, options).adapter if rows else None
    texts = [row for task in ground.tasks.values() for row in task.test.texts]
    return score_rows(backbone, texts, adapter)


def _by_task(tasks: Mapping[str, ReadTask], losses: np.ndarray, is_exact: np.ndarray) -> dict[str, RowScores]:
    ends = np.cumsum([len(task.test) for task in tasks.values()])[:-1]
    parts = zip(tasks, np.split(losses, ends), np.split(is_exact, ends), strict=True)
    return {name: RowScores(losses=own, is_exact=exact) for name, own, exact in parts}


def _common(task: ReadTask) -> np.ndarray:
    answer = Counter(row.output for row in task.train.texts).most_common(1)[0][0]
    return np.array([row.output == answer for row in task.test.texts])


def _is_one(trained: Trained, first: str, second: str) -> bool:
    """Whether the expert of one of the two serves both as well as their own two do."""
    return any(
        not _is_more(trained.exact(other, other), trained.exact(expert, other))
        for expert, other in ((first, second), (second, first))
    )


def _is_more(some: np.ndarray, others: np.ndarray) -> bool:
    """Whether `some` (n,) bool are true on more rows than `others`, beyond chance."""
    only, against = int((some & ~others).sum()), int((others & ~some).sum())
    return only > against and binomtest(only, only + against, alternative="greater").pvalue <= CHANCE


def _novelty(trained: Trained, experts: Sequence[str], task: str) -> np.ndarray:
    """(n,): higher is more novel."""
    base = trained.scores[None][task].losses
    gains = [base - trained.scores[expert][task].losses for expert in experts]
    return -np.max(gains, axis=0)
