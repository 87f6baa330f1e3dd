"""The records that are answered: real inputs of the demo's skills."""

from collections.abc import Sequence
from typing import Any

from dylora_stream.demo.skills import load_skills

__all__ = ["CHOICES", "EXPERTS", "plain_records", "with_choices"]

CHOICES = 4  # a record
EXPERTS = 4  # that know the records


def plain_records(count: int) -> list[dict[str, Any]]:
    """Inputs of all skills in turn, without answers."""
    skills = load_skills()
    return [{"input": skills[n % len(skills)].rows[n // len(skills)][0]} for n in range(count)]


def with_choices(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same inputs, each with the answers of four other rows to choose from."""
    outputs = [output for skill in load_skills() for _, output in skill.rows[: len(records)]]
    return [
        row | {"choices": list(dict.fromkeys(outputs[n * CHOICES : (n + 1) * CHOICES]))}
        for n, row in enumerate(records)
    ]
