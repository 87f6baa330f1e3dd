"""One training job, from rows to a verdict.

1 split off held-out rows · 2 are they known to the backbone, or served by an expert (drift)? · 3 can inputs alone tell
them apart from other experts' rows? · 4 train the adapter · 5 does it serve them better than the experts asked in 2? ·
6 train the router with it · 7 check it on the held-out rows, routed as it will be served. A later version of an expert
skips 2, 3 and 5 and starts from the served one.

There is one training a job: held-out rows stay out of later versions' training too (`core.checks`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dylora_stream.core.checks import CheckConfig, compare, held_out, is_apart, is_drift, serves_as_well
from dylora_stream.core.errors import RowsUnlearnable, TrainingFailed
from dylora_stream.core.recipes import Recipe
from dylora_stream.core.routing import RoutingConfig
from dylora_stream.core.statistics import ExpertStatistics, LinearDiscriminant, separation
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone
from dylora_stream.model.config import PoolConfig
from dylora_stream.model.features import LabelledText, read_rows
from dylora_stream.model.live import LiveExperts, LoadedExpert
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.router import RouterParts
from dylora_stream.model.router_training import RouterLesson, RouterTrained, RouterTraining, train_router
from dylora_stream.model.training import RowScores, Trained, TrainingOptions, score_rows, train_expert

__all__ = ["Outcome", "Rival", "Trial", "TrialPlan", "Workshop", "heldout_scores"]

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What every job of a child shares. `say` takes progress."""

    backbone: Backbone
    parts: RouterParts
    routing: RoutingConfig
    say: Say


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A live expert as a job meets it: its stored rows, and (loss, exact share) of its own held-out check."""

    expert: LoadedExpert
    exemplars: Sequence[LabelledText]
    own_check: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What is to be trained, on what, beside whom. `is_seed`: a new expert, not a later version of one."""

    expert_id: str
    version: int
    tenant: str
    is_seed: bool
    seed: int
    recipe: Recipe
    check: CheckConfig
    rows: Sequence[LabelledText]
    rivals: Sequence[Rival]
    network: RouterNetwork | None

    @cached_property
    def is_held_out(self) -> np.ndarray:
        """(n,) bool."""
        return held_out([row.input for row in self.rows], self.check)

    @cached_property
    def training(self) -> list[LabelledText]:
        """Rows to train on."""
        return [row for row, out in zip(self.rows, self.is_held_out, strict=True) if not out]

    @cached_property
    def checking(self) -> list[LabelledText]:
        """Rows to check on."""
        return [row for row, out in zip(self.rows, self.is_held_out, strict=True) if out]

    @property
    def served(self) -> LoadedExpert | None:
        """The served version of the plan's expert."""
        found = (rival.expert for rival in self.rivals if rival.expert.expert_id == self.expert_id)
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A decision with its numbers; adapter and network where something was trained. features: (n, d) of all rows."""

    report: dict[str, Any]
    features: np.ndarray
    adapter: Adapter | None = None
    network: RouterNetwork | None = None

    @property
    def is_promoted(self) -> bool:
        """Whether there is a version to serve."""
        return self.report["decision"] == "promoted"


def heldout_scores(backbone: Backbone, live: LiveExperts, plan: TrialPlan) -> RowScores:
    """The held-out rows as serve would answer them with what is live."""
    return score_rows(
        backbone, plan.checking, gate=live.gate([row.input for row in plan.checking], plan.tenant)
    )


class Trial:
    """Runs a plan; `run` once."""

    def __init__(self, workshop: Workshop, plan: TrialPlan) -> None:
        self._workshop, self._plan = workshop, plan
        self._backbone = workshop.backbone

    def run(self) -> Outcome:
        """The steps of the module's docstring. Raises TrainingFailed; RowsUnlearnable where the rows are the reason."""
        plan = self._plan
        if len(plan.rows) < 2:
            raise RowsUnlearnable(
                f"{len(plan.rows)} labelled rows within {plan.recipe.max_row_tokens} tokens cannot be split into "
                "training and check"
            )
        if not plan.is_seed and plan.served is None:
            raise TrainingFailed(
                f"no version of {plan.expert_id} that fits this model is in the registry: there is none to start from"
            )
        features = read_rows(self._backbone, [row.input for row in plan.rows])
        base = score_rows(self._backbone, plan.checking)  # 1
        report: dict[str, Any] = {
            "with": None,
            "heldout": {"rows": len(plan.checking)} | _numbers("backbone", base),
        }
        near = self._nearest(features) if plan.is_seed else []
        if plan.is_seed:
            report |= self._known(base) or self._drift(near, base) or self._apart(features)  # 2, 3
        if "decision" in report:
            return Outcome(report=report, features=features)
        trained = self._train()  # 4
        report |= self._served_as_well(near, trained.adapter, base)  # 5
        if "decision" in report:
            return Outcome(report=report, features=features)
        lesson, now, new = self._checked(trained.adapter, features, base)  # 6, 7
        report |= _verdict(plan, base, now, new) | _account(plan, trained, lesson)
        return Outcome(report=report, features=features, adapter=trained.adapter, network=lesson.network)

    def _known(self, base: RowScores) -> dict[str, Any]:
        """A decision, when the backbone alone is good enough."""
        loss, exact, check = float(base.losses.mean()), float(base.is_exact.mean()), self._plan.check
        if exact < check.known_exact and loss > check.known_loss:
            return {}
        return {
            "decision": "known_to_backbone",
            "reason": f"the backbone alone answers {exact:.0%} of held-out rows exactly, loss {loss:.3f}",
        }

    def _nearest(self, features: np.ndarray) -> list[tuple[Rival, RowScores]]:
        """The experts that inputs alone put nearest, each with the held-out rows as it answers them."""
        plan, own = self._plan, self._own()
        if not own:
            return []
        discriminant = LinearDiscriminant.fit(self._statistics(own))
        held_out = features[plan.is_held_out, : self._backbone.width]
        tempered = discriminant.posterior(held_out, self._workshop.routing.temperature_dense)
        nearest = [own[index] for index in np.argsort(-tempered.mean(axis=0))[: plan.check.drift_experts]]
        return [(rival, score_rows(self._backbone, plan.checking, rival.expert.adapter)) for rival in nearest]

    def _drift(self, near: Sequence[tuple[Rival, RowScores]], base: RowScores) -> dict[str, Any]:
        """A decision, when one of the nearest experts serves the rows about as well as its own."""
        for rival, scores in near:
            found, own_check = (float(scores.losses.mean()), float(scores.is_exact.mean())), rival.own_check
            if own_check and is_drift(found, own_check, float(base.losses.mean()), self._plan.check):
                return _is_served(rival, scores)
        return {}

    def _served_as_well(
        self, near: Sequence[tuple[Rival, RowScores]], adapter: Adapter, base: RowScores
    ) -> dict[str, Any]:
        """A decision, when one of the nearest experts serves the rows as well as the one that was trained on them."""
        if not near:
            return {}
        own = score_rows(self._backbone, self._plan.checking, adapter)
        rival, scores = min(near, key=lambda pair: float(pair[1].losses.mean()))
        two = [(each.losses, float(each.is_exact.mean())) for each in (scores, own)]
        if not serves_as_well(two[0], two[1], base.losses, self._plan.check):
            return {}
        served = _is_served(rival, scores)
        own_numbers = f"{own.is_exact.mean():.0%}, loss {own.losses.mean():.3f}"
        return served | {"reason": f"{served['reason']}; an expert of their own {own_numbers}"}

    def _apart(self, features: np.ndarray) -> dict[str, Any]:
        """How well the rows are routed apart, leave-one-out; a decision, when that is not enough."""
        apart = separation(self._statistics(self._own()), features[:, : self._backbone.width])
        if is_apart(apart.accuracy, len(features), self._plan.check):
            return {"routing_loo": apart.accuracy}
        return {
            "decision": "confused",
            "with": apart.rival,
            "reason": f"routed apart: {apart}; wanted {self._plan.check.routing}",
            "routing_loo": apart.accuracy,
        }

    def _train(self) -> Trained:
        plan = self._plan

        def tell(step: int, steps: int, loss: float) -> None:
            self._workshop.say({"stage": "training", "step": step, "steps": steps, "loss": round(loss, 4)})

        start = plan.served.adapter if plan.served else None
        options = TrainingOptions(seed=plan.seed, start=start, progress=tell)
        return train_expert(self._backbone, plan.training, plan.recipe, options)

    def _checked(
        self, adapter: Adapter, features: np.ndarray, base: RowScores
    ) -> tuple[RouterTrained, RowScores, RowScores]:
        """The router's lesson, and held-out scores as served now and with the new version."""
        plan = self._plan
        experts = [rival.expert for rival in plan.rivals]
        version = LoadedExpert(
            expert_id=plan.expert_id,
            version=plan.version,
            adapter=adapter,
            features=features[~plan.is_held_out],  # the router must not have seen what it is checked on
            is_mature=plan.served.is_mature if plan.served else False,
            tenant=plan.tenant,
        )
        everyone = [version if expert is plan.served else expert for expert in experts]
        everyone += [] if plan.served else [version]
        exemplars = {rival.expert.expert_id: rival.exemplars for rival in plan.rivals}
        lesson = RouterLesson(
            expert_id=plan.expert_id, exemplars=exemplars | {plan.expert_id: plan.training}, seed=plan.seed
        )
        rank = max(expert.adapter.rank for expert in everyone)
        live = LiveExperts(
            self._backbone, PoolConfig(slots=len(everyone) + 1, rank=rank), self._workshop.parts
        )
        try:
            live.install(experts, plan.network)
            now = heldout_scores(self._backbone, live, plan) if experts else base
            live.install(everyone, plan.network)
            taught = train_router(live, plan.network, lesson, self._workshop.routing, RouterTraining())
            live.install(everyone, taught.network)
            return taught, now, heldout_scores(self._backbone, live, plan)
        finally:
            live.close()

    def _own(self) -> list[Rival]:
        """The experts of the plan's tenant."""
        return [rival for rival in self._plan.rivals if rival.expert.tenant == self._plan.tenant]

    def _statistics(self, rivals: Sequence[Rival]) -> list[ExpertStatistics]:
        """Of the part of the features that rows are routed by."""
        return [
            ExpertStatistics(
                expert_id=rival.expert.expert_id, rows=rival.expert.features[:, : self._backbone.width]
            )
            for rival in rivals
        ]


def _is_served(rival: Rival, scores: RowScores) -> dict[str, Any]:
    """The decision that rows are an expert's already."""
    numbers = f"{scores.is_exact.mean():.0%} of held-out rows exactly, loss {scores.losses.mean():.3f}"
    return {
        "decision": "drift",
        "with": rival.expert.expert_id,
        "reason": f"{rival.expert.name} answers {numbers}",
    }


def _verdict(plan: TrialPlan, base: RowScores, now: RowScores, new: RowScores) -> dict[str, Any]:
    """Promoted when the new version beats the backbone and what is served on the held-out rows."""
    check = plan.check
    over_base = compare(base.losses, new.losses, min_t=check.seed_t, min_gain=check.seed_gain)
    over_now = (
        compare(now.losses, new.losses, min_t=check.seed_t, min_gain=check.seed_gain)
        if plan.is_seed
        else compare(now.losses, new.losses, min_t=check.consolidate_t)
    )
    keeps_exact = float(new.is_exact.mean()) >= float(now.is_exact.mean()) - check.exact_slack
    is_promoted = over_base.is_better and over_now.is_better and keeps_exact
    reason = (
        f"held-out loss: backbone {base.losses.mean():.3f}, served {now.losses.mean():.3f}, new "
        f"{new.losses.mean():.3f} (paired t {over_base.t:.1f}, {over_now.t:.1f}); exact: "
        f"{base.is_exact.mean():.0%}, {now.is_exact.mean():.0%}, {new.is_exact.mean():.0%}"
    )
    numbers = {"rows": len(plan.checking)} | _numbers("backbone", base) | _numbers("served", now)
    numbers |= _numbers("new", new) | {"t_backbone": over_base.t, "t_served": over_now.t}
    return {"decision": "promoted" if is_promoted else "rejected", "reason": reason, "heldout": numbers}


def _numbers(name: str, scores: RowScores) -> dict[str, Any]:
    return {f"loss_{name}": float(scores.losses.mean()), f"exact_match_{name}": float(scores.is_exact.mean())}


def _account(plan: TrialPlan, trained: Trained, lesson: RouterTrained) -> dict[str, Any]:
    """What a report says of the training itself."""
    rows = hashlib.sha256()
    for row in plan.training:
        rows.update(json.dumps([row.input, row.output]).encode())
    return {
        "expert_id": plan.expert_id,
        "version": plan.version,
        "trained_rows": trained.rows,
        "rows_sha256": rows.hexdigest(),
        "train_s": round(trained.seconds, 3),
        "steps": len(trained.losses),
        "loss_first": trained.losses[0],
        "loss_last": trained.losses[-1],
        "is_stem_cached": trained.is_stem_cached,
        "parameters": trained.adapter.parameters,
        "lora_config": {"r": trained.adapter.rank, "lora_alpha": trained.adapter.rank},
        "router": {
            "accuracy": lesson.accuracy,
            "accuracy_closed_form": lesson.accuracy_closed_form,
            "train_s": round(lesson.seconds, 3),
        },
    }
