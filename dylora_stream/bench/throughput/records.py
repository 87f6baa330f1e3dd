"""The records that are answered: real inputs of the demo's skills."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from dylora_stream.demo.skills import load_skills

__all__ = ["CHOICES", "EXPERTS", "plain_records", "with_choices"]

CHOICES = 4  # a record
EXPERTS = 4  # that know the records


def plain_records(count: int) -> list[dict[str, Any]]:
    """Inputs of all skills in turn, without answers; a skill's begin anew when they are used up."""
    skills = load_skills()
    turns = (divmod(n, len(skills)) for n in range(count))
    return [{"input": skills[skill].rows[turn % len(skills[skill].rows)][0]} for turn, skill in turns]


def with_choices(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same inputs, each with the answers of four other rows to choose from."""
    outputs = cycle(output for skill in load_skills() for _, output in skill.rows[: len(records)])
    return [row | {"choices": list(dict.fromkeys(islice(outputs, CHOICES)))} for row in records]
