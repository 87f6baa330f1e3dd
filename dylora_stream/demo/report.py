"""From the journal and the ledger's training rows to the table and the JSON report. Pure.

*After* is prequential: records sent after their task's expert was live, whose input no expert was trained on
before. *Before* is the backbone alone on those same records, the better of the raw and the chat prompt.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dylora_stream.demo.journal import Journal, Sent, Task

__all__ = [
    "SkillReport",
    "TrainedRows",
    "experts_of",
    "judged",
    "skill_reports",
    "skills_table",
    "totals_table",
]

TrainedRows = Mapping[str, Sequence[str]]  # expert id → positions of its first version's training rows


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillReport:
    """One line of the table. Accuracies are exact match; None where there was nothing to judge."""

    name: str
    records: int
    experts: list[str]
    purity: float | None
    records_to_live: int | None
    judged: int
    accuracy_before: float | None
    accuracy_after: float | None
    majority_baseline: float


def experts_of(trained: TrainedRows, journal: Journal) -> dict[str, tuple[str, float]]:
    """expert id → (the task most of its training rows belong to, the share of them)."""
    owners = {}
    for expert, positions in trained.items():
        counts = Counter(journal.sent[position].task for position in positions if position in journal.sent)
        if counts:
            task, most = counts.most_common(1)[0]
            owners[expert] = (task, most / sum(counts.values()))
    return owners


def judged(task: Task, journal: Journal, trained: TrainedRows) -> list[Sent]:
    """The task's records that count as *after*: sent once its expert was live, input new and not trained on."""
    owners = experts_of(trained, journal)
    starts = [
        journal.live_at[expert]
        for expert, (name, _) in owners.items()
        if name == task.name and expert in journal.live_at
    ]
    if not starts:
        return []
    seen = {
        journal.sent[position].input
        for positions in trained.values()
        for position in positions
        if position in journal.sent
    }
    found = []
    for record in journal.of(task.name):
        if record.order >= min(starts) and record.input not in seen:
            found.append(record)
            seen.add(record.input)
    return found


def skill_reports(
    tasks: Sequence[Task], journal: Journal, trained: TrainedRows, before: Mapping[str, bool]
) -> list[SkillReport]:
    """One a task; `before`: position → whether the backbone alone was right."""
    owners = experts_of(trained, journal)
    reports = []
    for task in tasks:
        records = journal.of(task.name)
        experts = [expert for expert, (name, _) in owners.items() if name == task.name]
        live = [journal.live_at[expert] for expert in experts if expert in journal.live_at]
        after = judged(task, journal, trained)
        outputs = Counter(record.output for record in records)
        reports.append(
            SkillReport(
                name=task.name,
                records=len(records),
                experts=experts,
                purity=min((owners[expert][1] for expert in experts), default=None),
                records_to_live=sum(record.order < min(live) for record in records) if live else None,
                judged=len(after),
                accuracy_before=_mean(
                    [before[record.position] for record in after if record.position in before]
                ),
                accuracy_after=_mean([journal.is_right(record) for record in after]),
                majority_baseline=max(outputs.values(), default=0) / max(len(records), 1),
            )
        )
    return reports


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def skills_table(reports: Sequence[SkillReport]) -> Table:
    """For people, within 80 columns."""
    table = Table(
        title="Exact match: before = the backbone alone, after = once the expert was live",
        caption="live: records sent until its expert was; judged: records behind before and after",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("kind", no_wrap=True)
    table.add_column("sent", justify="right", no_wrap=True)
    table.add_column("expert", no_wrap=True)
    for name in ("purity", "live", "judged", "before", "after", "majority"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        numbers = (
            report.purity,
            report.records_to_live,
            report.judged,
            report.accuracy_before,
            report.accuracy_after,
            report.majority_baseline,
        )
        experts = "\n".join(report.experts) or "-"
        table.add_row(report.name, str(report.records), experts, *(_shown(number) for number in numbers))
    return table


def totals_table(title: str, totals: Mapping[str, int]) -> Table:
    """One row of counts."""
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True)
    for name in totals:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    table.add_row(*(str(count) for count in totals.values()))
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
