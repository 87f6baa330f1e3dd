"""Sufficient statistics, the discriminant that follows from them, and leave-one-out routing."""

import numpy as np
import pytest

from dylora_stream.core.statistics import (
    ExpertStatistics,
    LinearDiscriminant,
    Moments,
    Whitening,
    entropy,
    pooled_covariance,
    separation,
)

DIMENSIONS = 24


def blobs(rng: np.random.Generator, experts: int, rows: int, gap: float) -> list[ExpertStatistics]:
    """Gaussian experts whose means lie `gap` standard deviations apart in every dimension, at random."""
    return [
        ExpertStatistics(
            expert_id=f"e{number}",
            rows=(rng.normal(size=(rows, DIMENSIONS)) + gap * rng.normal(size=DIMENSIONS)).astype(np.float32),
        )
        for number in range(experts)
    ]


def test_updating_row_by_row_equals_one_batch_fit() -> None:
    """Online equals batch, and so does merging two halves in the other order."""
    rows = np.random.default_rng(1).normal(3.0, 2.0, size=(40, DIMENSIONS)).astype(np.float32)
    batch, online = Moments.of(rows), Moments.empty(DIMENSIONS)
    for row in rows:
        online = online.updated(row)
    halves = Moments.of(rows[25:]).merged(Moments.of(rows[:25]))
    for other in (online, halves):
        assert other.count == batch.count
        np.testing.assert_allclose(other.mean, batch.mean, rtol=1e-10)
        np.testing.assert_allclose(other.scatter, batch.scatter, rtol=1e-8, atol=1e-8)


def test_the_covariance_of_few_rows_in_many_dimensions_can_be_inverted() -> None:
    """With 32 rows in 576 dimensions, one of them constant, shrinkage keeps the condition number sane."""
    rows = np.random.default_rng(2).normal(size=(32, 576)).astype(np.float32)
    rows[:, 0] = 5.0
    covariance = pooled_covariance([Moments.of(rows)])
    assert covariance.shrinkage > 0.5
    assert np.linalg.eigvalsh(covariance.matrix).min() > 0
    assert np.isfinite(Whitening.fit([Moments.of(rows)])(rows)).all()


def test_whitening_turns_mahalanobis_distances_into_euclidean_ones() -> None:
    """Distances after whitening equal those under the shrunk covariance."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    moments = [Moments.of(rows)]
    inverse = np.linalg.inv(pooled_covariance(moments).matrix)
    whitened = Whitening.fit(moments)(rows)
    deviation = rows[0] - rows[1]
    assert np.linalg.norm(whitened[0] - whitened[1]) == pytest.approx(
        np.sqrt(deviation @ inverse @ deviation)
    )


def test_the_discriminant_routes_separated_experts_and_its_affine_form_agrees() -> None:
    """Fresh rows go to their own expert; weights and bias for a forward pass give the same logits."""
    rng = np.random.default_rng(4)
    experts = blobs(rng, 4, 60, gap=1.5)
    discriminant = LinearDiscriminant.fit(experts)
    for column, expert in enumerate(experts):
        fresh = (expert.mean + rng.normal(size=(50, DIMENSIONS))).astype(np.float32)
        assert (discriminant.logits(fresh).argmax(axis=1) == column).mean() > 0.95
        weight, bias = discriminant.affine
        np.testing.assert_allclose(fresh @ weight.T + bias, discriminant.logits(fresh), rtol=1e-6, atol=1e-6)


def test_entropy_is_zero_for_a_sure_row_and_the_logarithm_for_an_even_one() -> None:
    """In nats, with probabilities of zero allowed."""
    np.testing.assert_allclose(entropy(np.array([[1.0, 0.0], [0.5, 0.5]])), [0.0, np.log(2)])


@pytest.mark.parametrize("gap", [0.2, 0.5])
def test_closed_form_leave_one_out_equals_refitting_without_each_row(gap: float) -> None:
    """Within two rows of sixty: only shrinkage and scales, kept from the fit on all, differ."""
    rng = np.random.default_rng(5)
    experts = blobs(rng, 3, 60, gap)
    rows = blobs(rng, 1, 60, gap)[0].rows
    refitted = [
        LinearDiscriminant.fit(
            [*experts, ExpertStatistics(expert_id="new", rows=np.delete(rows, line, axis=0))]
        )
        .logits(rows[line : line + 1])
        .argmax()
        == len(experts)
        for line in range(len(rows))
    ]
    assert separation(experts, rows).accuracy == pytest.approx(np.mean(refitted), abs=2.5 / 60)


def test_rows_of_a_known_expert_are_not_separable_and_name_their_rival() -> None:
    """A second half of an expert's own rows is confused with it; with no experts everything is separable."""
    rng = np.random.default_rng(6)
    experts = blobs(rng, 3, 80, gap=1.5)
    twin = (experts[1].mean + rng.normal(size=(40, DIMENSIONS))).astype(np.float32)
    result = separation(experts, twin)
    assert result.accuracy < 0.9
    assert result.rival == "e1"
    assert separation([], twin).accuracy == 1.0
