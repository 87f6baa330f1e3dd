"""Online clusters: joining, mending, readiness, and what must never become an expert."""

import numpy as np
import pytest

from dylora_stream.core.clustering import ClusteringConfig, OnlineClusters, Reference
from dylora_stream.core.linkage import average_linkage

DIMENSIONS, SKETCH = 48, 24
PRIOR = Reference(
    input_mean=np.zeros(DIMENSIONS), input_std=np.ones(DIMENSIONS), sketch_mean=np.zeros(SKETCH)
)
Row = tuple[str, str, np.ndarray, np.ndarray]  # skill, row id, features, sketch


def skill(rng: np.random.Generator, name: str, rows: int, scatter: float = 0.8) -> list[Row]:
    """Rows about a random direction, in the input and in the answer."""
    look, rule = rng.normal(size=DIMENSIONS), rng.normal(size=SKETCH)
    return [
        (
            name,
            f"{name}-{number}",
            (look + scatter * rng.normal(size=DIMENSIONS)).astype(np.float32),
            (rule + scatter * rng.normal(size=SKETCH)).astype(np.float32),
        )
        for number in range(rows)
    ]


def place(clusters: OnlineClusters, rows: list[Row]) -> None:
    """Take rows in, one a second, mending after each sixteenth."""
    for number, (_, row_id, features, sketch) in enumerate(rows):
        clusters.place(row_id, features, sketch, 1000 * number)
        if number % 16 == 15:
            clusters.recluster()
    clusters.recluster()


def purities(clusters: OnlineClusters, at_least: int) -> list[tuple[str, float]]:
    """Leading skill and its share, for each cluster of that many rows."""
    result = []
    for members in clusters.clusters.values():
        if len(members) >= at_least:
            names = [row_id.rpartition("-")[0] for row_id in members]
            leader = max(set(names), key=names.count)
            result.append((leader, names.count(leader) / len(names)))
    return sorted(result)


def test_a_first_skill_with_nothing_to_compare_it_with_is_one_cluster() -> None:
    """The prior reference sets it apart from text in general; it is ready at the rows asked for."""
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    place(clusters, skill(np.random.default_rng(1), "a", 64, scatter=0.5))
    assert purities(clusters, 1) == [("a", 1.0)]
    (name,) = clusters.clusters
    assert clusters.readiness(name, 64).reason == "ready"
    assert clusters.readiness(name, 65).reason == "too_few_rows"


def test_two_skills_at_a_time_are_two_pure_clusters() -> None:
    """Whatever their order of arrival."""
    rng = np.random.default_rng(2)
    rows = skill(rng, "a", 48) + skill(rng, "b", 48)
    for _ in range(3):
        clusters = OnlineClusters(ClusteringConfig(), PRIOR)
        place(clusters, [rows[line] for line in rng.permutation(len(rows))])
        assert purities(clusters, 8) == [("a", 1.0), ("b", 1.0)]


def test_scattered_outliers_never_make_a_ready_cluster() -> None:
    """A hundred texts of a hundred kinds."""
    rng = np.random.default_rng(3)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    place(clusters, [skill(rng, f"o{number}", 1)[0] for number in range(100)])
    assert not any(clusters.readiness(name, 16).is_ready for name in clusters.clusters)


def test_one_text_repeated_is_never_ready() -> None:
    """Repeats count once, also with the small differences of another batch's rounding."""
    rng = np.random.default_rng(4)
    (_, _, features, sketch) = skill(rng, "a", 1)[0]
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    for number in range(50):
        noise = 1e-4 * rng.normal(size=DIMENSIONS).astype(np.float32)
        clusters.place(f"a-{number}", features + noise, sketch, number)
    (name,) = clusters.clusters
    assert clusters.readiness(name, 32).reason == "repeats"
    assert clusters.readiness(name, 32).distinct_rows == 1


def test_a_flood_is_not_ready_where_a_span_is_asked_for() -> None:
    """All rows within a moment of record time."""
    clusters = OnlineClusters(ClusteringConfig(min_span_ms=60_000), PRIOR)
    for _, row_id, features, sketch in skill(np.random.default_rng(5), "a", 40):
        clusters.place(row_id, features, sketch, 1_000)
    (name,) = clusters.clusters
    assert clusters.readiness(name, 32).reason == "flood"


def test_reclustering_reports_every_move_and_keeps_ids_by_overlap() -> None:
    """Moves lead from the old assignment to the new one; a second pass over the same rows changes nothing."""
    rng = np.random.default_rng(6)
    rows = skill(rng, "a", 30, scatter=1.5) + skill(rng, "b", 30, scatter=1.5)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    at = {row_id: clusters.place(row_id, f, s, 0).cluster_id for _, row_id, f, s in rows}
    largest = max(set(at.values()), key=list(at.values()).count)
    result = clusters.recluster()
    at.update(result.moves)
    assert at == {row_id: name for name, members in clusters.clusters.items() for row_id in members}
    assert largest in clusters.clusters
    assert all(
        source not in clusters.clusters and target in clusters.clusters for source, target in result.merged
    )
    assert not clusters.recluster().moves


def test_the_same_rows_give_the_same_clusters_and_ids() -> None:
    """A replay, and a restart that restores stored rows, agree with the first run."""
    rows = skill(np.random.default_rng(7), "a", 40)
    first, second, restored = (OnlineClusters(ClusteringConfig(), PRIOR) for _ in range(3))
    place(first, rows)
    place(second, rows)
    homes = {row_id: name for name, members in first.clusters.items() for row_id in members}
    for number, (_, row_id, features, sketch) in enumerate(rows):
        restored.restore(row_id, features, sketch, 1000 * number, homes[row_id])
    assert first.clusters == second.clusters == restored.clusters
    assert not restored.recluster().moves


def test_rows_that_were_taken_or_expired_are_gone() -> None:
    """Forgetting shrinks the cluster; expiry goes by the cluster's latest record."""
    rng = np.random.default_rng(8)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    place(clusters, skill(rng, "a", 20) + skill(rng, "b", 20))
    clusters.forget(["a-0", "unknown"])
    assert len(clusters) == 39
    assert {row_id.partition("-")[0] for row_id in clusters.expired(before_ms=20_000)} == {"a"}
    clusters.forget(clusters.expired(before_ms=20_000))
    assert purities(clusters, 1) == [("b", 1.0)]


def test_rows_without_an_answer_are_compared_by_input_alone() -> None:
    """Labelled and unlabelled rows of one skill share a cluster."""
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    for number, (_, row_id, features, sketch) in enumerate(skill(np.random.default_rng(9), "a", 30)):
        clusters.place(row_id, features, sketch if number % 2 else None, number)
    clusters.recluster()
    assert len(clusters.clusters) == 1


def test_average_linkage_equals_merging_by_brute_force() -> None:
    """Against a loop that recomputes every average at every step."""
    rng = np.random.default_rng(10)
    vectors = rng.normal(size=(30, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    groups = [[line] for line in range(30)]
    while len(groups) > 1:
        pairs = [(a, b) for b in range(len(groups)) for a in range(b)]
        a, b = max(pairs, key=lambda pair: similarity[np.ix_(groups[pair[0]], groups[pair[1]])].mean())
        if similarity[np.ix_(groups[a], groups[b])].mean() < 0.3:
            break
        groups[a] += groups.pop(b)
    labels = average_linkage(similarity, 0.3)
    assert sorted(
        sorted(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())
    ) == sorted(sorted(group) for group in groups)


def test_two_tight_groups_that_share_a_look_stay_apart() -> None:
    """Similarity 0.4 between, 0.9 within: above the threshold, and yet not one loose skill."""
    groups = np.repeat([0, 1], 10)
    similarity = np.where(groups[:, None] == groups[None], 0.9, 0.4)
    assert len(set(average_linkage(similarity, 0.2).tolist())) == 1
    assert len(set(average_linkage(similarity, 0.2, max_gap=0.3).tolist())) == 2


def test_wrong_clustering_settings_are_refused() -> None:
    """With a message that names the field."""
    for wrong in ({"join_similarity": 1.0}, {"max_gap": 0.0}, {"answer_weight": 2.0}, {"min_cohesion": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClusteringConfig(**wrong)  # type: ignore[arg-type]
