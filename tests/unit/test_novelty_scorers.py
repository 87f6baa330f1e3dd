"""The scorers from the literature: one interface, higher = more novel, and what each of them sees."""

import numpy as np
import pytest

from dylora_stream.core.novelty import SCORERS, FeatureLayout, NoveltyConfig
from dylora_stream.core.statistics import ExpertStatistics
from dylora_stream.testing import MemoryIndex

DIMENSIONS = 12
SKILLS = 3


def world(*, has_answers: bool) -> tuple[list[ExpertStatistics], np.ndarray, np.ndarray]:
    """Three experts, then 30 known rows and 30 rows of a fourth skill."""
    rng = np.random.default_rng(5)
    centres = 4.0 * rng.normal(size=(SKILLS + 1, DIMENSIONS))
    draw = [(centre + rng.normal(size=(60, DIMENSIONS))).astype(np.float32) for centre in centres]
    said = [(centre + rng.normal(size=(60, DIMENSIONS))).astype(np.float32) for centre in centres[::-1]]
    experts = [
        ExpertStatistics(
            expert_id=f"e{column}", rows=draw[column][:50], answers=said[column][:50] if has_answers else None
        )
        for column in range(SKILLS)
    ]
    rows = np.concatenate([*(part[50:] for part in draw[:SKILLS]), draw[SKILLS][:30]])
    answers = np.concatenate([*(part[50:] for part in said[:SKILLS]), said[SKILLS][:30]])
    return experts, rows, answers


def auroc(novelty: np.ndarray) -> float:
    """The share of pairs of one known and one new row in which the new one scores higher; ties count half."""
    known, new = novelty[:30], novelty[30:]
    return float(((new[:, None] > known).mean() + (new[:, None] >= known).mean()) / 2)


@pytest.mark.parametrize("name", sorted(SCORERS))
@pytest.mark.parametrize("has_answers", [False, True])
def test_every_scorer_gives_one_number_a_row_that_scoring_does_not_change(
    name: str, has_answers: bool
) -> None:
    """The same row gets the same number alone, in a batch, and again; with answers and without."""
    experts, rows, answers = world(has_answers=has_answers)
    scorer = SCORERS[name].fit(experts, MemoryIndex, NoveltyConfig(folds=2), np.random.default_rng(0))
    given = answers if has_answers else None
    whole = scorer.novelty(rows, given)
    assert whole.shape == (len(rows),)
    assert whole.dtype == np.float64
    assert np.isfinite(whole).all()
    alone = [
        scorer.novelty(rows[line : line + 1], None if given is None else given[line : line + 1])
        for line in range(0, 60, 7)
    ]
    np.testing.assert_allclose(np.concatenate(alone), whole[::7], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(scorer.novelty(rows, given), whole)


@pytest.mark.parametrize("name", sorted(set(SCORERS) - {"entropy"}))
def test_a_new_skill_scores_higher_than_known_ones(name: str) -> None:
    """Far away from three experts, every distance says so."""
    experts, rows, _ = world(has_answers=False)
    scorer = SCORERS[name].fit(experts, MemoryIndex, NoveltyConfig(folds=2), np.random.default_rng(0))
    assert auroc(scorer.novelty(rows)) > 0.95


def test_answers_tell_what_inputs_do_not() -> None:
    """Rows whose inputs are known but whose answers are of another kind score higher once the answer is given."""
    experts, rows, answers = world(has_answers=True)
    scorer = SCORERS["fused"].fit(experts, MemoryIndex, NoveltyConfig(folds=2), np.random.default_rng(0))
    disguised = np.concatenate([rows[:30], rows[:30]])
    assert auroc(scorer.novelty(disguised)) == pytest.approx(0.5)
    assert auroc(scorer.novelty(disguised, answers)) > 0.95


def test_a_layout_is_recognised_by_its_width() -> None:
    """Input and answer rows of a backbone of width 576 fall into their blocks; a bare vector is one block."""
    inputs, answers = FeatureLayout.of_inputs(576), FeatureLayout.of_answers(576)
    assert FeatureLayout.recognised(inputs.dimensions) == inputs
    assert FeatureLayout.recognised(answers.dimensions, is_answer=True) == answers
    assert [block.name for block in FeatureLayout.recognised(576).blocks] == ["row"]
    assert inputs.blocks[0].stop == 576
    parts = inputs.parts(np.zeros((2, inputs.dimensions)))
    assert sum(part.shape[1] for part in parts) == inputs.dimensions
