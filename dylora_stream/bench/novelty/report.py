"""What a run says, as one JSON document. Rates and areas are in 0..1; null where a folder cannot give a figure.

Means are over tasks that are nobody's twin; twins stand apart, under `twins`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dylora_stream.bench.novelty.alarms import NOMINAL, Alarms, InTime
from dylora_stream.bench.novelty.config import ALPHAS
from dylora_stream.bench.novelty.cost import Cost
from dylora_stream.bench.novelty.judging import FUSED, LeftOut, Rating
from dylora_stream.bench.novelty.metrics import interval
from dylora_stream.bench.novelty.scale import Scale
from dylora_stream.bench.novelty.tally import Tally
from dylora_stream.bench.novelty.trained import LIKELIHOOD, Trained, families, likelihood_ratings

__all__ = ["Document", "Findings", "document_of", "roc_of"]

Document = dict[str, Any]


@dataclass(kw_only=True)
class Findings:
    """What the parts of a run found; None where a part was left out or a folder cannot give it."""

    tasks: Sequence[str]
    twins: Sequence[str] = ()
    left_out: Mapping[str, LeftOut] | None = None
    out_of_scope: Mapping[str, Rating] | None = None
    alarms: Alarms | None = None
    in_time: InTime | None = None
    tally: Tally | None = None
    cost: Cost | None = None
    trained: Trained | None = None
    scale: Scale | None = None
    facts: Document = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def judged(self) -> list[str]:
        """Tasks whose figures are averaged."""
        return [name for name in self.tasks if name not in self.twins]


def document_of(found: Findings) -> Document:
    """The report."""
    cost, alarms, in_time = found.cost, found.alarms, found.in_time
    document = {
        "auroc": _areas(found),
        "out_of_scope": None
        if found.out_of_scope is None
        else {name: {"auroc": r.auroc, "fpr95": r.fpr95} for name, r in found.out_of_scope.items()},
        "false_alarm": None
        if alarms is None
        else _by_rate(alarms.rates) | {"rows": alarms.rows[max(ALPHAS)]},
        "false_alarm_in_time": None
        if in_time is None
        else {"plain": _by_rate(in_time.plain), "adaptive": _by_rate(in_time.adaptive)},
        "detection": _detection(found),
        "stream": None if found.tally is None else _stream(found.tally),
        "experts": None if found.trained is None else _families(found.trained),
        "cost_share": None if cost is None else cost.share,
        "ms_per_record": None if cost is None else cost.ms,
        "twins": _twins(found),
        "details": _details(found),
        **found.facts,
        "notes": [*found.notes, *_alarm_notes(alarms)],
    }
    return dict(_rounded(document))


def _areas(found: Findings) -> Document | None:
    by_scorer: dict[str, dict[str, Rating]] = {}
    for task, left in (found.left_out or {}).items():
        for scorer, rating in left.ratings.items():
            by_scorer.setdefault(scorer, {})[task] = rating
    if found.trained is not None and len(found.tasks) > 1:
        by_scorer[LIKELIHOOD] = likelihood_ratings(found.trained)
    return {scorer: _area(ratings, found.judged) for scorer, ratings in by_scorer.items()} or None


def _area(ratings: Mapping[str, Rating], tasks: Sequence[str]) -> Document:
    judged = [ratings[task] for task in tasks]
    return {
        "mean": _mean([rating.auroc for rating in judged]),
        "worst": min((rating.auroc for rating in judged), default=math.nan),
        "fpr95": _mean([rating.fpr95 for rating in judged]),
        "by_task": {task: rating.auroc for task, rating in ratings.items()},
    }


def _families(trained: Trained) -> Document:
    together, unlearned = families(trained)
    return {"families": together, "unlearned": unlearned}


def _exactness(trained: Trained) -> Document:
    """Shares of each task's rows that who scored them has exactly right."""
    return {
        task: {
            "backbone": float(trained.exact(None, task).mean()),
            "commonest answer": float(trained.common[task].mean()),
            **{expert: float(trained.exact(expert, task).mean()) for expert in trained.common},
        }
        for task in trained.common
    }


def _detection(found: Findings) -> Document | None:
    if found.left_out is None:
        return None
    left_out = found.left_out
    return _by_rate({a: _mean([left_out[task].detected[a] for task in found.judged]) for a in ALPHAS})


def _twins(found: Findings) -> Document:
    if found.left_out is None:
        return {}
    return {
        task: {
            "auroc": found.left_out[task].ratings[FUSED].auroc,
            "fpr95": found.left_out[task].ratings[FUSED].fpr95,
            "detection": _by_rate(found.left_out[task].detected),
        }
        for task in found.twins
    }


def _stream(tally: Tally) -> Document:
    figures: Document = {"purity": None, "homogeneity": None, "nmi": None, "ari": None}
    figures |= asdict(tally.agreement) if tally.agreement is not None else {}
    return {
        "tasks": len(tally.skills),
        "experts": tally.experts,
        **figures,
        "outlier_experts": len(tally.outlier_experts),
        "records_to_notice": tally.records_to_notice,
    }


def _details(found: Findings) -> Document:
    details: Document = {}
    if found.left_out is not None:
        details["by_task"] = {
            task: {
                "auroc": {scorer: rating.auroc for scorer, rating in left.ratings.items()},
                "fpr95": {scorer: rating.fpr95 for scorer, rating in left.ratings.items()},
                "detection": _by_rate(left.detected),
            }
            for task, left in found.left_out.items()
        }
        details["roc"] = roc_of(found)
    if found.alarms is not None:
        details["false_alarm"] = _alarm_details(found.alarms)
    if found.in_time is not None:
        details["false_alarm_in_time"] = {"rows": _by_rate(found.in_time.rows)}
    if found.tally is not None:
        details["stream"] = {
            "skills": {name: asdict(skill) for name, skill in found.tally.skills.items()},
            "outlier_experts": list(found.tally.outlier_experts),
            "decisions": dict(found.tally.decisions),
        }
    if found.trained is not None:
        details["experts"] = _exactness(found.trained)
    if found.cost is not None:
        details["cost"] = asdict(found.cost)
    if found.scale is not None:
        details["scale"] = asdict(found.scale)
    return details


def roc_of(found: Findings) -> dict[str, list[float]]:
    """Mean true-positive rates over judged tasks at false-positive rates 0, 0.01 … 1, by scorer."""
    tasks = [left for task, left in (found.left_out or {}).items() if task in found.judged]
    if not tasks:
        return {}
    return {
        scorer: np.mean([left.ratings[scorer].curve for left in tasks], axis=0).tolist()
        for scorer in tasks[0].ratings
    }


def _alarm_details(alarms: Alarms) -> Document:
    return {
        str(alpha): {
            "rows": alarms.rows[alpha],
            "rate": alarms.rates[alpha],
            "spread": alarms.spread[alpha],
            "binomial_99": interval(alpha, alarms.rows[alpha]) if alarms.rows[alpha] else None,
            "rows_without_say": alarms.unsaid[alpha][0],
            "rate_without_say": alarms.unsaid[alpha][1],
            "by_task": {task: rates[alpha] for task, rates in alarms.by_task.items()},
        }
        for alpha in ALPHAS
    } | {"nominal": NOMINAL.tolist(), "actual": alarms.actual.tolist()}


def _alarm_notes(alarms: Alarms | None) -> list[str]:
    if alarms is None:
        return []
    return [
        f"At {alpha:.0%}, {rows} rows a draw are of experts with too few rows to say anything; they are not counted "
        f"(called novel: {rate:.0%})."
        for alpha, (rows, rate) in alarms.unsaid.items()
        if rows
    ]


def _by_rate(rates: Mapping[float, Any]) -> Document:
    return {str(alpha): rates[alpha] for alpha in ALPHAS}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _rounded(value: Any) -> Any:
    """Four digits; nan becomes null."""
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(inner) for inner in value]
    return value
