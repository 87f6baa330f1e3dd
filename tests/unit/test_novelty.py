"""Novelty: the promise on known traffic, detection, who has a veto, and what is outside."""

from dataclasses import fields, replace

import numpy as np
import pytest

from dylora_stream.core.novelty import NoveltyConfig, NoveltyScorer, NoveltyScores, distinct
from dylora_stream.core.novelty.spaces import RelativeSpace
from dylora_stream.core.statistics import (
    ExpertStatistics,
    LinearDiscriminant,
    Moments,
    pooled_covariance,
)
from dylora_stream.testing import MemoryIndex

DIMENSIONS = 32
CONFIG = NoveltyConfig()


def draw(rng: np.random.Generator, centre: np.ndarray, rows: int) -> np.ndarray:
    """Rows about a centre; two of three dimensions vary ten times less than the rest, as skills' features do."""
    spread = np.where(np.arange(DIMENSIONS) % 3 == 0, 1.0, 0.1)
    return (centre + spread * rng.normal(size=(rows, DIMENSIONS))).astype(np.float32)


def world(
    seed: int, experts: int, rows: int = 64
) -> tuple[np.random.Generator, np.ndarray, list[ExpertStatistics]]:
    """A generator, the centres of `experts` known skills and one new one, and the known ones' statistics."""
    rng = np.random.default_rng(seed)
    centres = 1.5 * rng.normal(size=(experts + 1, DIMENSIONS))
    known = [
        ExpertStatistics(expert_id=f"e{number}", rows=draw(rng, centre, rows))
        for number, centre in enumerate(centres[:experts])
    ]
    return rng, centres, known


def fit(experts: list[ExpertStatistics], config: NoveltyConfig = CONFIG, seed: int = 0) -> NoveltyScorer:
    """A scorer over these experts."""
    discriminant = LinearDiscriminant.fit(experts) if experts else None
    return NoveltyScorer.fit(experts, discriminant, MemoryIndex, config, np.random.default_rng(seed))


@pytest.mark.parametrize("experts", [1, 3, 15])
@pytest.mark.parametrize("repeats", [1, 5])
def test_known_rows_are_called_novel_at_most_alpha_of_the_time(experts: int, repeats: int) -> None:
    """Mean over twelve draws of calibration and test, within the binomial 99 % bound above alpha. Where every text came
    five times and all that follows is new, twice alpha: that is not what was seen."""
    flagged = []
    for seed in range(12):
        rng, centres, known = world(seed, experts, rows=48)
        repeated = [replace(expert, rows=np.repeat(expert.rows, repeats, axis=0)) for expert in known]
        scorer = fit(repeated, replace(CONFIG, folds=5), seed=seed)
        fresh = np.concatenate([draw(rng, centre, 40) for centre in centres[:experts]])
        flagged.append(scorer.score(fresh).is_novel)
    together = np.concatenate(flagged)
    # One calibration of 48 rows has its own spread; 48 rows an expert and 12 draws leave this much of it.
    spread = np.sqrt(CONFIG.alpha * (1 - CONFIG.alpha) * (1 / len(together) + 1 / (48 * 12 * experts)))
    assert together.mean() <= (1 if repeats == 1 else 2) * CONFIG.alpha + 2.6 * spread


def test_traffic_that_repeats_itself_keeps_the_promise_and_uses_it() -> None:
    """Texts that come again are known anyway: alpha of the records as they come are called novel, not of new texts."""
    rates, of_texts = [], []
    for seed in range(12):
        rng, centres, _ = world(seed, 1)
        texts = draw(rng, centres[0], 400)
        known, fresh = texts[rng.integers(400, size=300)], texts[rng.integers(400, size=600)]
        experts = [ExpertStatistics(expert_id="e0", rows=rows) for rows in (known, distinct(known))]
        as_they_came, once = (fit([expert], seed=seed).score(fresh).is_novel.mean() for expert in experts)
        rates.append(as_they_came)
        of_texts.append(once)
    assert 1.2 * np.mean(of_texts) <= np.mean(rates) <= CONFIG.alpha


@pytest.mark.parametrize("experts", [1, 3])
def test_rows_of_a_new_skill_are_noticed(experts: int) -> None:
    """Nearly all of them, with one expert (no entropy) and with several; scores rise with novelty."""
    rng, centres, known = world(20, experts)
    scorer = fit(known)
    new, old = scorer.score(draw(rng, centres[-1], 60)), scorer.score(draw(rng, centres[0], 60))
    assert new.is_novel.mean() >= 0.95
    assert np.median(new.score) > 1.5 * np.median(old.score)
    assert (old.nearest == 0).mean() > 0.95
    if experts == 1:
        assert not new.entropy.any()


def test_the_relative_distance_is_the_experts_less_that_of_all_rows() -> None:
    """Squared Mahalanobis distances, by the inverse covariances: within experts, and with the means' scatter added."""
    rng, _, known = world(24, 3)
    parts, rows = [expert.rows for expert in known], rng.normal(size=(5, DIMENSIONS)).astype(np.float32)
    within = pooled_covariance([Moments.of(part) for part in parts]).matrix
    means = np.stack([part.mean(axis=0) for part in parts]).astype(np.float64)
    everyone = within + np.cov(means.T, bias=True)

    def squared(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        gaps = rows - mean
        return np.einsum("nd,nd->n", gaps @ np.linalg.inv(covariance), gaps)

    wanted = [squared(mean, within) - squared(means.mean(axis=0), everyone) for mean in means]
    assert np.allclose(RelativeSpace(parts).distances(rows), np.stack(wanted, axis=1), rtol=1e-3)


def test_with_an_answer_it_counts_how_far_a_row_is() -> None:
    """A row five times as far out in the same direction is more novel, by the relative distance above all."""
    rng, centres, known = world(25, 3)
    experts = [replace(expert, answers=expert.rows) for expert in known]
    near = draw(rng, centres[-1], 20)
    middle = centres[:3].mean(axis=0)
    far = (middle + 5.0 * (near - middle)).astype(np.float32)

    def gain(weight: float) -> float:
        scorer = fit(experts, replace(CONFIG, relative_weight=weight))
        return float(
            np.median(np.log(scorer.score(far, answers=far).score / scorer.score(near, answers=near).score))
        )

    assert gain(0.2) > gain(0.0) + 1.0


def test_without_an_expert_everything_may_found_a_cluster() -> None:
    """No p-value, novel and outside, nearest to nobody; the same for a tenant without experts."""
    rng, centres, known = world(21, 2)
    rows = draw(rng, centres[0], 3)
    for scores in (fit([]).score(rows), fit(known).score(rows, np.zeros((3, 2), dtype=bool))):
        assert np.isnan(scores.p_value).all()
        assert scores.is_novel.all()
        assert scores.is_beyond.all()
        assert (scores.nearest == -1).all()


def test_an_expert_under_its_floor_has_no_veto() -> None:
    """Thirteen rows cannot give p <= 0.05: alone they give no p-value, beside others they silence nothing."""
    rng, centres, known = world(22, 2)
    young = ExpertStatistics(expert_id="young", rows=draw(rng, centres[-1], 13))
    assert np.isnan(fit([young]).score(draw(rng, centres[0], 5)).p_value).all()
    elsewhere = draw(rng, centres[-1] + 5.0, 30)
    assert fit([*known, young]).score(elsewhere).is_novel.mean() > 0.9


def test_a_young_expert_changes_nothing_of_what_the_others_say() -> None:
    """One young expert has no veto: rows of its own skill are novel while it is young, and other experts' rows keep
    their rate."""
    rng, centres, known = world(27, 2)
    young = ExpertStatistics(expert_id="young", rows=draw(rng, centres[-1], 10))
    scorer = fit([*known, young])
    assert scorer.score(draw(rng, centres[-1], 40)).is_novel.mean() > 0.9
    assert scorer.score(draw(rng, centres[0], 200)).is_novel.mean() <= 0.1
    assert (scorer.score(draw(rng, centres[-1], 40)).nearest == 2).mean() > 0.9


def test_rows_of_a_new_kind_of_answer_are_noticed_by_the_answer_alone() -> None:
    """Known inputs with answers that no expert gives; the promise holds for rows with answers, and a row without one
    (none given, nan, or all zero) is scored by its input."""
    flagged, found = [], []
    for seed in range(6):
        rng, centres, known = world(30 + seed, 3, rows=48)
        kinds = 3.0 * rng.normal(size=(4, 12))
        said = [
            (kind + rng.normal(size=(48, 12))).astype(np.float32) if column < 2 else None
            for column, kind in enumerate(kinds[:3])
        ]
        experts = [replace(expert, answers=part) for expert, part in zip(known, said, strict=True)]
        scorer = fit(experts, seed=seed)
        rows = np.concatenate([draw(rng, centre, 30) for centre in centres[:2]])
        right = (np.repeat(kinds[:2], 30, axis=0) + rng.normal(size=(60, 12))).astype(np.float32)
        wrong = (kinds[3] + rng.normal(size=(60, 12))).astype(np.float32)
        flagged.append(scorer.score(rows, None, right).is_novel)
        found.append(scorer.score(rows, None, wrong).is_novel)
        plain = scorer.score(rows).p_value
        for nothing in (np.full_like(wrong, np.nan), np.zeros_like(wrong)):
            np.testing.assert_array_equal(scorer.score(rows, None, nothing).p_value, plain)
    together = np.concatenate(flagged)
    assert together.mean() <= CONFIG.alpha + 2.6 * np.sqrt(
        CONFIG.alpha * (1 / len(together) + 1 / (48 * 6 * 3))
    )
    assert np.mean(found) >= 0.9


def test_another_tenants_experts_neither_calibrate_nor_answer() -> None:
    """A tenant's rows meet its own experts' calibration: the same p-values as without the others, up to whitening."""
    rng, centres, known = world(28, 3)
    experts = [replace(expert, tenant="b" if column == 2 else "a") for column, expert in enumerate(known)]
    scorer = fit(experts)
    theirs = np.tile([True, True, False], (40, 1))
    assert scorer.score(draw(rng, centres[2], 40), theirs).is_novel.mean() > 0.9
    assert scorer.score(draw(rng, centres[2], 40), ~theirs).is_novel.mean() <= 0.2


def test_scoring_novel_rows_moves_nothing() -> None:
    """A known row's numbers are the same before and after a thousand novel ones were scored, and whatever stood beside
    it; the experts' rows are as they were."""
    rng, centres, known = world(29, 2)
    kept = [expert.rows.copy() for expert in known]
    scorer = fit(known)
    rows = draw(rng, centres[0], 5)
    before = scorer.score(rows)
    scorer.score(draw(rng, centres[-1], 1000))
    after = scorer.score(rows)
    for field in fields(NoveltyScores):
        np.testing.assert_array_equal(getattr(before, field.name), getattr(after, field.name))
    for expert, rows_before in zip(known, kept, strict=True):
        np.testing.assert_array_equal(expert.rows, rows_before)


def test_repeated_rows_are_scored_as_one_and_counted_as_they_came() -> None:
    """The same whether they stand there ten times or carry their number; p-values at most halve."""
    rng, centres, known = world(23, 1)
    size = len(known[0].rows)
    repeated = ExpertStatistics(expert_id="e0", rows=np.repeat(known[0].rows, 10, axis=0))
    counted = replace(known[0], counts=np.full(size, 10))
    assert len(distinct(repeated.rows)) == size
    rows = draw(rng, centres[0], 20)
    once, many, told = (
        NoveltyScorer.fit([e], None, MemoryIndex, CONFIG, np.random.default_rng(0)).score(rows)
        for e in (known[0], repeated, counted)
    )
    np.testing.assert_array_equal(once.score, many.score)
    np.testing.assert_array_equal(many.p_value, told.p_value)
    np.testing.assert_allclose(many.p_value, once.p_value * (size + 1) / (2 * size + 1))


def test_many_rows_are_summarised_by_modes_and_the_promise_holds() -> None:
    """Above the cap: k-means modes with local spreads."""
    rng, centres, known = world(24, 2, rows=300)
    scorer = fit(known, NoveltyConfig(max_modes=20))
    assert scorer.score(draw(rng, centres[0], 200)).is_novel.mean() <= 0.1
    assert scorer.score(draw(rng, centres[-1], 50)).is_novel.mean() >= 0.95


def test_only_rows_clearly_outside_are_beyond() -> None:
    """A known row and its novel neighbour are answered by an expert; one far from all is not."""
    rng, centres, known = world(25, 2)
    scorer = fit(known)
    assert scorer.score(draw(rng, centres[0], 100)).is_beyond.mean() <= 0.01
    assert scorer.score(draw(rng, centres[-1] + 30.0, 20)).is_beyond.all()


def test_scoring_changes_nothing_and_does_not_depend_on_the_batch() -> None:
    """The same row gets the same numbers alone, in a batch, and again."""
    rng, centres, known = world(26, 3)
    scorer = fit(known)
    rows = draw(rng, centres[-1], 8)
    whole = scorer.score(rows)
    parts = [scorer.score(rows[line : line + 1]) for line in range(8)]
    for field in fields(NoveltyScores):
        joined = np.concatenate([getattr(part, field.name) for part in parts])
        np.testing.assert_allclose(joined.astype(float), getattr(whole, field.name).astype(float), rtol=1e-5)


def test_wrong_novelty_settings_are_refused() -> None:
    """With a message that names the field."""
    for wrong in (
        {"alpha": 0.5},
        {"folds": 1},
        {"neighbours": 0},
        {"beyond_margin": 0.5},
        {"length_weight": -1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NoveltyConfig(**wrong)
