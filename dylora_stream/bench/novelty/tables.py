"""A run's document as tables on the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from dylora_stream.bench.novelty.config import ALPHAS
from dylora_stream.bench.novelty.judging import FUSED
from dylora_stream.bench.novelty.report import Document

__all__ = ["show"]


def show(document: Document, console: Console) -> None:
    """The tables."""
    if document["auroc"] is not None:
        console.print(_scorer_table(document))
    if "by_task" in document["details"]:
        console.print(_task_table(document))
    if document["false_alarm"] is not None:
        console.print(_rate_table(document))
    if document["stream"] is not None:
        console.print(_stream_table(document["stream"]))
        console.print(_skill_table(document["details"]["stream"]["skills"]))
    if document["experts"] is not None:
        console.print(_expert_table(document["details"]["experts"]))
        console.print(_family_lines(document["experts"]))
    if document["cost_share"] is not None:
        cost = document["details"]["cost"]
        console.print(
            f"Scoring costs {document['ms_per_record']:.3f} ms a record, {document['cost_share']:.1%} of a pass; "
            f"with 10,000 modes {cost['ms_of_many']:.3f} ms, {cost['share_of_many']:.1%}."
        )
    if "scale" in document["details"]:
        console.print(_scale_lines(document["details"]["scale"]))
    for note in document["notes"]:
        console.print(note, style="dim", markup=False)


def _scale_lines(scale: Document) -> str:
    return (
        f"Of {scale['rows']:,} new rows learn holds {scale['held']:,}, {scale['held_mb']:,.0f} MB, and "
        f"{scale['disk_mb']:,.0f} MB on disk; a record takes it {scale['ms_first']:.2f} ms at first and "
        f"{scale['ms_last']:.2f} ms at last, making clusters anew {scale['recluster_s']:.1f} s, a start "
        f"{scale['load_s']:.1f} s."
    )


def _scorer_table(document: Document) -> Table:
    scope = document["out_of_scope"] or {}
    table = _table("One task left out", ("scorer", "AUROC", "worst", "FPR95", "out of scope: AUROC", "FPR95"))
    for name, entry in sorted(document["auroc"].items(), key=lambda item: -(item[1]["mean"] or 0.0)):
        outside = scope.get(name, {})
        cells = [entry[key] for key in ("mean", "worst", "fpr95")]
        table.add_row(name, *map(_cell, [*cells, outside.get("auroc"), outside.get("fpr95")]))
    return table


def _task_table(document: Document) -> Table:
    entries = document["details"]["by_task"]
    rates = [str(alpha) for alpha in ALPHAS]
    table = _table("By task", ("left out", "AUROC", "FPR95", *(f"found at {rate}" for rate in rates)))
    for task, entry in entries.items():
        name = f"{task} (twin)" if task in document["twins"] else task
        found = [entry["detection"][rate] for rate in rates]
        table.add_row(name, *map(_cell, [entry["auroc"].get(FUSED), entry["fpr95"].get(FUSED), *found]))
    return table


def _rate_table(document: Document) -> Table:
    columns = ("rate", "drawn", "± a draw", "99 %", "in time", "adaptive", "found")
    table = _table("Known rows called novel: splits drawn anew, in time; left-out rows found", columns)
    for rate in map(str, ALPHAS):
        drawn = document["details"]["false_alarm"][rate]
        bounds = drawn["binomial_99"]
        table.add_row(
            rate,
            _cell(drawn["rate"]),
            _cell(drawn["spread"]),
            f"{bounds[0]:.3f}…{bounds[1]:.3f}" if bounds else "",
            _cell(document["false_alarm_in_time"]["plain"][rate]),
            _cell(document["false_alarm_in_time"]["adaptive"][rate]),
            _cell((document["detection"] or {}).get(rate)),
        )
    return table


def _stream_table(stream: Document) -> Table:
    table = _table("The stream", ("", "value"))
    for name, value in stream.items():
        table.add_row(name.replace("_", " "), _cell(value))
    return table


def _skill_table(skills: Mapping[str, Document]) -> Table:
    columns = ("skill", "experts", "cluster", "own", "first novel", "later novel")
    table = _table(
        "Skills: distinct records of the first cluster, of its own until then, until one was novel", columns
    )
    for name, skill in skills.items():
        cells = [skill[key] for key in ("cluster", "distinct", "novel_first", "called_novel")]
        table.add_row(name, str(skill["experts"]), *map(_cell, cells))
    return table


def _expert_table(exactness: Mapping[str, Document]) -> Table:
    columns = ("task", "backbone", "commonest", "own expert", "best other", "")
    table = _table("Exact match by trained experts", columns)
    for task, shares in exactness.items():
        others = {other: shares[other] for other in exactness if other != task}
        best = max(others, key=lambda other: others[other], default="")
        cells = [shares["backbone"], shares["commonest answer"], shares[task], others.get(best)]
        table.add_row(task, *map(_cell, cells), best)
    return table


def _family_lines(experts: Document) -> str:
    several = [" + ".join(group) for group in experts["families"] if len(group) > 1]
    return (
        f"One expert serves as well as several: {', '.join(several) or 'nowhere'}. "
        f"Not learned beyond the commonest answer: {', '.join(experts['unlearned']) or 'none'}."
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    """The first column is a name, the others are numbers."""
    table = Table(title=title)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"
