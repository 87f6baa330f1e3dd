"""What a stream's records came to: experts against skills, how soon, how clean.

Tasks of one family are one skill. A skill's records count from the moment when its first expert lives (all of them
where it never had one), each with the expert that has it at the end; records that nobody has share one label. An expert
is of the skill that most of its founding records are of.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dylora_stream.bench.novelty.learner import Played
from dylora_stream.bench.novelty.metrics import Agreement, agreement
from dylora_stream.bench.novelty.script import STRAYS, Script

__all__ = ["Skill", "Tally", "tally"]

NOBODY = "(nobody)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """How one skill was noticed; None where it never had an expert. `experts`: founded of mostly its records."""

    experts: int
    cluster: int | None
    """Distinct records that the first expert was founded of."""
    distinct: int | None
    """Distinct records of the skill until that expert lived."""
    novel_first: int | None
    """Distinct records of it that came until one was called novel."""
    called_novel: float | None
    """Share of its later records called novel when they came."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The stream's figures."""

    skills: Mapping[str, Skill]
    experts: int
    outlier_experts: tuple[str, ...]
    """The labels of experts founded of mostly outliers, a repeated text, or a flood."""
    agreement: Agreement | None
    """None where no record counts."""
    decisions: Mapping[str, int]
    """Jobs by kind and decision."""

    @property
    def records_to_notice(self) -> int | None:
        """The most distinct records of its cluster that any noticed skill needed; None where none was noticed."""
        return max(
            (skill.cluster for skill in self.skills.values() if skill.cluster is not None), default=None
        )


@dataclass(frozen=True, kw_only=True)
class _Founding:
    """An expert's beginning."""

    label: str
    at: int  # records taken until it lived
    distinct: int  # inputs that it was founded of


def tally(script: Script, played: Played, families: Sequence[Sequence[str]]) -> Tally:
    """From what was played."""
    family = {task: "+".join(tasks) for tasks in families for task in tasks}
    labels = [family.get(label, label) for label in script.labels]
    foundings = _foundings(script, played, labels)
    skills = {name: _skill(name, script, played, labels, foundings) for name in _names(labels)}
    since = {name: min((f.at for f in foundings if f.label == name), default=0) for name in skills}
    counted = [n for n, label in enumerate(labels) if label in since and n >= since[label]]
    return Tally(
        skills=skills,
        experts=len(played.experts),
        outlier_experts=tuple(f.label for f in foundings if f.label in STRAYS),
        agreement=agreement([labels[n] for n in counted], [played.owners[n] or NOBODY for n in counted])
        if counted
        else None,
        decisions=Counter(f"{job.kind} {job.decision}" for _, job in played.finished),
    )


def _foundings(script: Script, played: Played, labels: Sequence[str]) -> list[_Founding]:
    found = []
    for at, job in played.finished:
        if job.kind != "seed" or job.decision != "promoted":
            continue
        records = [played.numbers[position] for position in job.positions]
        found.append(
            _Founding(
                label=Counter(labels[record] for record in records).most_common(1)[0][0],
                at=at,
                distinct=_distinct(script, records),
            )
        )
    return found


def _skill(
    name: str, script: Script, played: Played, labels: Sequence[str], foundings: Sequence[_Founding]
) -> Skill:
    own = [number for number, label in enumerate(labels) if label == name]
    mine = [founding for founding in foundings if founding.label == name]
    first = next((place for place, number in enumerate(own) if not played.was_known[number]), None)
    novel_first = None if first is None else _distinct(script, own[: first + 1])
    if not mine:
        return Skill(experts=0, cluster=None, distinct=None, novel_first=novel_first, called_novel=None)
    at = mine[0].at
    later = [not played.was_known[number] for number in own if number >= at]
    return Skill(
        experts=len(mine),
        cluster=mine[0].distinct,
        distinct=_distinct(script, [number for number in own if number < at]),
        novel_first=novel_first,
        called_novel=sum(later) / len(later) if later else None,
    )


def _distinct(script: Script, records: Sequence[int]) -> int:
    return len({script.rows.texts[int(script.lines[record])].input for record in records})


def _names(labels: Sequence[str]) -> list[str]:
    """Skills in the order they came."""
    return [name for name in dict.fromkeys(labels) if name not in STRAYS]
