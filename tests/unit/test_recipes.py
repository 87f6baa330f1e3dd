"""Schedules against their formulas, and the checks of a recipe."""

import math

import pytest

from dylora_stream.core.recipes import CONSOLIDATION, SEEDING, Recipe, rate_at, steps_of


def rates(recipe: Recipe, steps: int) -> list[float]:
    """The rate of each step, as a share of the highest."""
    return [rate_at(step, steps, recipe) / recipe.rate for step in range(steps)]


def test_wsd_rises_stays_and_falls() -> None:
    """Ten per cent up in a line, a plateau at the full rate, twenty per cent down in a line that ends above zero."""
    shares = rates(Recipe(warmup_share=0.1, decay_share=0.2), 100)
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10:80] == pytest.approx([1.0] * 70)
    assert shares[80:] == pytest.approx([(100 - step) / 21 for step in range(80, 100)])


def test_cyclical_restarts_in_equal_cycles() -> None:
    """Each cycle is half a cosine from the rate to the floor."""
    recipe = Recipe(schedule="cyclical", warmup_share=0.0, cycles=3, floor_share=0.1)
    shares = rates(recipe, 30)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * (step % 10) / 10)) / 2 for step in range(30)]
    assert shares == pytest.approx(expected)


def test_cyclical_warms_up_once() -> None:
    """The rise comes before the first cycle and not before later ones."""
    shares = rates(Recipe(schedule="cyclical", warmup_share=0.1, cycles=2), 20)
    assert shares[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert shares[11] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["wsd", "cyclical"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_trainings_have_a_rate_at_every_step(schedule: str, steps: int) -> None:
    """With few steps shares round to nothing; no step stands still or exceeds the rate."""
    assert all(0 < share <= 1 for share in rates(Recipe(schedule=schedule), steps))  # type: ignore[arg-type]


def test_steps_count_the_last_partial_batch() -> None:
    """65 rows in eights are nine steps an epoch."""
    assert steps_of(65, Recipe(epochs=2, batch_size=8)) == 18


def test_consolidation_is_slower_than_seeding() -> None:
    """The design's high rate for seeding, low and stable one for consolidation."""
    assert CONSOLIDATION.rate <= SEEDING.rate / 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "linear"},
        {"rate": 0.0},
        {"epochs": 0},
        {"warmup_share": 0.6, "decay_share": 0.6},
        {"weight_decay": -1.0},
        {"floor_share": 2.0},
    ],
)
def test_a_wrong_recipe_is_refused(wrong: dict[str, float]) -> None:
    """The message names the knob."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)  # type: ignore[arg-type]
