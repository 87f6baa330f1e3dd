"""A dataset folder: tasks as `NAME.train.jsonl` and `NAME.test.jsonl`, and outliers.

`outliers.jsonl` holds records of no task, `input` only. Where there is none, outliers are made out of the folder's own
words, scattered over all tasks, and of tokens drawn evenly from the vocabulary.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.bench.novelty.config import NoveltyBenchConfig
from dylora_stream.bench.tasks import Task, load_tasks
from dylora_stream.core.errors import SettingsError
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.features import LabelledText

__all__ = ["Chosen", "choose_in_order", "load_folder", "load_outliers", "made_outliers", "strip_markers"]

TRAIN, OUTLIERS = ".train.jsonl", "outliers.jsonl"
# A short name and a colon in front of a line's text.
MARKER = re.compile(r"(?m)^[^\S\n]*[A-Za-z][A-Za-z ]{0,20}[0-9]?[^\S\n]*:[^\S\n]*")
SHORTEST, LONGEST = 4, 40  # words or tokens of a made outlier


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What is used of a file, in the file's order. `passed_over` rows were too long."""

    rows: tuple[LabelledText, ...]
    passed_over: int


def load_folder(config: NoveltyBenchConfig) -> dict[str, Task]:
    """All tasks of the folder by name, markers stripped where asked for. Raises SettingsError."""
    names = sorted(path.name.removesuffix(TRAIN) for path in config.data.glob(f"*{TRAIN}"))
    tasks = load_tasks(config.data, names)
    for name in (name for skill in config.skills for name in skill):
        if name not in tasks:
            raise SettingsError(f"{name!r} is no task of {config.data}: {', '.join(names)}")
    if not config.is_stripped:
        return tasks
    return {
        name: Task(name=name, train=_stripped(task.train), test=_stripped(task.test))
        for name, task in tasks.items()
    }


def load_outliers(config: NoveltyBenchConfig) -> tuple[str, ...]:
    """Inputs of the folder's outliers, none where it has no such file. Raises SettingsError."""
    path = config.data / OUTLIERS
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            texts.append(_input(line, f"{path}, line {number}"))
    return tuple(strip_markers(text) for text in texts) if config.is_stripped else tuple(texts)


def strip_markers(text: str) -> str:
    """The text without the names in front of its lines; one that is nothing else stays as it is."""
    stripped = MARKER.sub("", text)
    return stripped if stripped.strip() else text


def choose_in_order(
    rows: Sequence[LabelledText], count: int, longest: int, backbone: Backbone, rng: np.random.Generator
) -> Chosen:
    """At most `count` rows within `longest` tokens, answer included: drawn at random, given in the file's order."""
    prompts = backbone.prompt_ids([row.input for row in rows])
    targets = backbone.target_ids([row.output for row in rows])
    fits = [len(prompt) + len(target) <= longest for prompt, target in zip(prompts, targets, strict=True)]
    usable = np.flatnonzero(fits)
    if not len(usable):
        raise SettingsError(f"none of {len(rows)} rows is within {longest} tokens: raise --max-tokens")
    kept = np.sort(rng.permutation(usable)[:count])
    return Chosen(rows=tuple(rows[row] for row in kept.tolist()), passed_over=len(rows) - len(usable))


def made_outliers(
    tasks: Mapping[str, Sequence[LabelledText]], count: int, backbone: Backbone, rng: np.random.Generator
) -> list[LabelledText]:
    """Records of no task: words from all over the folder, every second one tokens from all over the vocabulary.

    Each has the answer of a row drawn from the folder: a label does not make a skill of it.
    """
    rows = [row for task in tasks.values() for row in task]
    special = set(backbone.tokenizer.all_special_ids)
    tokens = np.array([token for token in range(len(backbone.tokenizer)) if token not in special])
    made = []
    for number in range(count):
        length = int(rng.integers(SHORTEST, LONGEST + 1))
        if number % 2:
            text = str(backbone.tokenizer.decode(rng.choice(tokens, length).tolist()))
        else:
            sources = [rows[row].input.split() for row in rng.integers(len(rows), size=length).tolist()]
            text = " ".join(words[int(rng.integers(len(words)))] for words in sources if words)
        answer = rows[int(rng.integers(len(rows)))].output
        made.append(LabelledText(input=text.strip() or "?", output=answer))
    return made


def _stripped(rows: Sequence[LabelledText]) -> tuple[LabelledText, ...]:
    return tuple(LabelledText(input=strip_markers(row.input), output=row.output) for row in rows)


def _input(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("input"), str):
        raise SettingsError(f'{place} is not {{"input": text}}')
    return str(row["input"])
