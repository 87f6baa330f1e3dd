"""Held-out rows and paired comparisons."""

import numpy as np
import pytest

from dylora_stream.core.checks import CheckConfig, compare, held_out, is_apart, is_drift, serves_as_well

TEXTS = [f"row {number}" for number in range(200)]


def test_about_the_share_is_held_out_and_stays_so_when_rows_come() -> None:
    """A row's side depends on its input alone: more rows or another order move none of them."""
    config = CheckConfig(heldout_share=0.2)
    few, many = held_out(TEXTS[:120], config), held_out(TEXTS[::-1], config)[::-1]
    assert 0.1 < many.mean() < 0.3
    assert np.array_equal(few, many[:120])


def test_small_buffers_hold_out_the_least_number_and_keep_as_many() -> None:
    """Ten rows: five and five; two: one and one; equal inputs never stand on both sides."""
    config = CheckConfig(heldout_share=0.05, heldout_min=8)
    assert held_out(TEXTS[:10], config).sum() == 5
    assert held_out(TEXTS[:2], config).sum() == 1
    sides = held_out(["a", "a", "b", "b"], config)
    assert (sides[0], sides[2]) == (sides[1], sides[3])
    assert 0 < sides.sum() < 4


def test_a_comparison_needs_both_the_gain_and_its_certainty() -> None:
    """Against the textbook paired t; equal losses are no gain, a constant gain is certain."""
    before, after = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 1.7, 2.2, 3.8])
    gains = before - after
    verdict = compare(before, after, min_t=2.0)
    assert verdict.t == pytest.approx(gains.mean() / (gains.std(ddof=1) / 2))
    assert verdict.is_better
    assert not compare(before, after, min_t=2.0, min_gain=1.0).is_better
    assert not compare(before, before, min_t=0.0).is_better
    assert compare(before, before - 0.25, min_t=2.0).is_better
    assert not compare(before[:1], after[:1], min_t=2.0).is_better


def test_drift_needs_loss_and_exactness_near_the_expert_s_own() -> None:
    """An expert that is half right on its own rows does not swallow a skill that it answers badly."""
    config = CheckConfig()
    assert is_drift((0.5, 0.85), (0.2, 0.9), 4.0, config)
    assert not is_drift((0.9, 0.85), (0.2, 0.9), 4.0, config)
    assert not is_drift((0.25, 0.85), (0.2, 0.9), 0.3, config)
    assert not is_drift((0.25, 0.3), (0.2, 0.4), 4.0, config)


def test_an_expert_serves_as_well_unless_one_of_the_rows_own_is_better_or_far_ahead() -> None:
    """One very bad row among ten proves nothing by its t, and is a long way behind all the same."""
    own, backbone, config = np.linspace(0.2, 0.6, 10), np.full(10, 8.0), CheckConfig()
    noise = np.array([0.2, -0.2] * 5)
    assert serves_as_well((own + noise, 0.7), (own, 0.7), backbone, config)
    assert serves_as_well((own - 0.1, 0.5), (own, 0.7), backbone, config)
    assert not serves_as_well((own + 0.3, 0.7), (own, 0.7), backbone, config)
    assert not serves_as_well((own + noise, 0.25), (own, 0.75), backbone, config)
    one_bad = own + np.array([0.0] * 9 + [12.0])
    assert not compare(one_bad, own, min_t=2.0).is_better
    assert not serves_as_well((one_bad, 0.7), (own, 0.7), backbone, config)


def test_a_wrong_check_is_refused() -> None:
    """Holding out more than half would train on less than is checked."""
    with pytest.raises(ValueError, match="heldout_share"):
        CheckConfig(heldout_share=0.6)


@pytest.mark.parametrize(
    ("share", "rows", "expected"),
    [
        (0.9, 48, True),
        (0.8, 48, True),
        (0.7, 48, False),
        (0.8, 400, False),
        (0.89, 400, True),
        (0.0, 4, False),
    ],
)
def test_a_skill_is_refused_where_its_rows_surely_show_too_little(
    share: float, rows: int, expected: bool
) -> None:
    """Nine of ten are wanted; few rows may fall short of that by chance, many may not."""
    assert is_apart(share, rows, CheckConfig(routing=0.9)) is expected
