"""Tasks of a dataset folder, for the accuracies of two ways of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dylora_stream.bench.tasks import load_task
from dylora_stream.bench.throughput.config import Sizes
from dylora_stream.core.errors import SettingsError
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText

__all__ = ["TaskRows", "read_tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRows:
    """One task's rows, none longer than the bench's bound."""

    name: str
    train: Sequence[LabelledText]
    test: Sequence[LabelledText]


def read_tasks(folder: Path, backbone: Backbone, sizes: Sizes, names: Sequence[str] = ()) -> list[TaskRows]:
    """The tasks, in name order, that have both files and enough rows which are short enough; of `names` if given.

    Of each file the first such rows are taken. Raises SettingsError with the file, and the line, at fault.
    """
    tasks: list[TaskRows] = []
    for file in sorted(folder.glob("*.train.jsonl")):
        name = file.name.removesuffix(".train.jsonl")
        if (names and name not in names) or not (folder / f"{name}.test.jsonl").is_file():
            continue
        task = load_task(folder, name)
        train = _short(task.train, backbone, sizes.data_tokens, sizes.data_rows)
        test = _short(task.test, backbone, sizes.data_tokens, 2 * sizes.data_rows)
        if len(train) == sizes.data_rows and len(test) >= sizes.data_rows // 2:
            tasks.append(TaskRows(name=name, train=train, test=test))
    missing = set(names) - {task.name for task in tasks}
    if len(tasks) >= sizes.data_tasks and not missing:
        return tasks
    raise SettingsError(
        f"{folder} has {len(tasks)} tasks with {sizes.data_rows} training rows of at most {sizes.data_tokens} tokens "
        f"(NAME.train.jsonl and NAME.test.jsonl, rows of input and output); {sizes.data_tasks} are needed"
        + (f"; of those named, it lacks {', '.join(sorted(missing))}" if missing else "")
    )


def _short(
    rows: Sequence[LabelledText], backbone: Backbone, most_tokens: int, count: int
) -> list[LabelledText]:
    kept: list[LabelledText] = []
    for row in rows:
        prompt, target = backbone.prompt_ids([row.input])[0], backbone.target_ids([row.output])[0]
        if row.input.strip() and len(prompt) + len(target) <= most_tokens:
            kept.append(row)
        if len(kept) == count:
            break
    return kept
