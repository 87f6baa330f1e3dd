"""A dataset folder as tasks: `NAME.train.jsonl` and `NAME.test.jsonl`, a row a line: `{"input": …, "output": …}`.

What a run trains on and is tested on is chosen here, the same for every method. Rows that are too long are passed over
and counted, never cut: cutting would change the question.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dylora_stream.core.errors import SettingsError
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText

__all__ = ["Rows", "Task", "choose", "load_task", "load_tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task's files, whole."""

    name: str
    train: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What is used of a file. `passed_over` rows were too long; `digest` is of the texts and their order."""

    kept: tuple[LabelledText, ...]
    passed_over: int

    @property
    def digest(self) -> str:
        """Names these rows."""
        texts = json.dumps([(row.input, row.output) for row in self.kept])
        return hashlib.sha256(texts.encode()).hexdigest()[:20]


def load_tasks(folder: Path, names: Sequence[str]) -> dict[str, Task]:
    """The named tasks. Raises SettingsError with the file, and the line, at fault."""
    if not folder.is_dir():
        raise SettingsError(f"there is no folder {folder}: --data names a folder of NAME.train.jsonl files")
    there = sorted(path.name.removesuffix(".train.jsonl") for path in folder.glob("*.train.jsonl"))
    if not there:
        raise SettingsError(f"{folder} holds no NAME.train.jsonl: --data names a folder of such files")
    for name in names:
        if name not in there:
            raise SettingsError(f"there is no task {name!r} in {folder}: it holds {', '.join(there)}")
    return {name: load_task(folder, name) for name in names}


def load_task(folder: Path, name: str) -> Task:
    """One task. Raises SettingsError."""
    train, test = (_read(folder / f"{name}.{part}.jsonl") for part in ("train", "test"))
    return Task(name=name, train=train, test=test)


def choose(rows: Sequence[LabelledText], count: int, longest: int, name: str, backbone: Backbone) -> Rows:
    """The first `count` rows within `longest` tokens, answer included, in the random order that `name` seeds.

    Raises SettingsError where no row is.
    """
    order = list(range(len(rows)))
    Random(name).shuffle(order)
    prompts = backbone.prompt_ids([row.input for row in rows])
    targets = backbone.target_ids([row.output for row in rows])
    kept: list[LabelledText] = []
    passed_over = 0
    for row in order:
        if len(kept) == count:
            break
        if len(prompts[row]) + len(targets[row]) <= longest:
            kept.append(rows[row])
        else:
            passed_over += 1
    if not kept:
        raise SettingsError(
            f"none of the {len(rows)} rows for {name} is within {longest} tokens: raise --max-tokens"
        )
    return Rows(kept=tuple(kept), passed_over=passed_over)


def _read(path: Path) -> tuple[LabelledText, ...]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    rows = [
        _row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not rows:
        raise SettingsError(f"{path} is empty: a task needs at least one row in each of its files")
    return tuple(rows)


def _row(line: str, place: str) -> LabelledText:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "output")):
        raise SettingsError(f'{place} is not {{"input": text, "output": text}}')
    if not row["output"].strip():
        raise SettingsError(f"{place} has an empty output: there is nothing to learn")
    return LabelledText(input=row["input"], output=row["output"])
