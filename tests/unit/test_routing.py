"""The hybrid rule: dense, sparse, backbone."""

from dataclasses import replace

import numpy as np
import pytest

from dylora_stream.core.messages import Policy
from dylora_stream.core.routing import NULL_EXPERT, Routing, RoutingConfig, decide

CONFIG = RoutingConfig()
SURE = 1000.0


def route(logits: list[list[float]], mature: list[bool], *, beyond: bool = False) -> Routing:
    """Route with every expert allowed."""
    table = np.array(logits)
    return decide(
        table, np.array(mature), np.full(len(table), beyond), np.ones(table.shape, dtype=bool), CONFIG
    )


def test_a_mature_winner_takes_its_row_alone() -> None:
    """One member with all the weight."""
    routing = route([[SURE, 0.0]], [True, False])
    assert routing.policies == (Policy.SPARSE,)
    assert routing.members(0) == [(0, 1.0)]


def test_a_nascent_winner_shares_its_row_with_the_backbone_and_leads_when_sure() -> None:
    """At least two members; the leader has at least 0.8; weights sum to 1."""
    routing = route([[0.0, SURE]], [True, False])
    assert routing.policies == (Policy.DENSE,)
    members = routing.members(0)
    assert len(members) >= 2
    assert members[0][0] == 1
    assert members[0][1] >= 0.8
    assert NULL_EXPERT in [expert for expert, _ in members]
    assert routing.weights.sum() == pytest.approx(1.0)


def test_an_unsure_nascent_winner_shares_its_row_with_an_established_expert() -> None:
    """Two experts and the backbone, in descending order."""
    routing = route([[9.0, 10.0]], [True, False])
    assert [expert for expert, _ in routing.members(0)] == [1, 0, NULL_EXPERT]


def test_a_mature_winner_shares_with_a_nascent_expert_close_behind() -> None:
    """Dense where the nascent one is near, sparse where it is far."""
    assert route([[10.0, 9.0], [SURE, 0.0]], [True, False]).policies == (Policy.DENSE, Policy.SPARSE)


def test_a_nascent_expert_without_a_seat_costs_a_mature_winner_nothing() -> None:
    """With one seat beside the backbone there is nobody to share with: the row stays sparse."""
    narrow = replace(CONFIG, top_k=2)
    logits, is_mature = np.array([[10.0, 9.0], [9.0, 10.0]]), np.array([True, False])
    routing = decide(logits, is_mature, np.zeros(2, bool), np.ones((2, 2), bool), narrow)
    assert routing.policies == (Policy.SPARSE, Policy.DENSE)
    assert routing.members(0) == [(0, 1.0)]
    assert [expert for expert, _ in routing.members(1)] == [1, NULL_EXPERT]


def test_a_row_outside_of_every_expert_goes_to_the_backbone() -> None:
    """As does a row whose tenant has no expert, and every row while there are none."""
    assert route([[SURE, 0.0]], [True, True], beyond=True).members(0) == [(NULL_EXPERT, 1.0)]
    nobody = decide(
        np.zeros((2, 1)), np.array([True]), np.zeros(2, bool), np.array([[False], [True]]), CONFIG
    )
    assert nobody.policies == (Policy.BACKBONE, Policy.SPARSE)
    empty = decide(np.zeros((3, 0)), np.zeros(0, bool), np.zeros(3, bool), np.zeros((3, 0), bool), CONFIG)
    assert empty.policies == (Policy.BACKBONE,) * 3


def test_an_expert_of_another_tenant_never_answers() -> None:
    """However well it fits."""
    allowed = np.array([[False, True]])
    routing = decide(np.array([[SURE, 0.0]]), np.array([True, False]), np.zeros(1, bool), allowed, CONFIG)
    assert 0 not in [expert for expert, _ in routing.members(0)]


def test_wrong_routing_settings_are_refused() -> None:
    """With a message that names the field."""
    for wrong in (
        {"method": "best"},
        {"top_k": 1},
        {"null_share": 0.6},
        {"temperature_dense": 0.0},
        {"close_share": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RoutingConfig(**wrong)  # type: ignore[arg-type]
