"""Online clusters: joining, mending, readiness, and what must never become an expert."""

from typing import Any

import numpy as np
import pytest

from dylora_stream.core.arrivals import NEIGHBOURS, Timeline
from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.clustering import OnlineClusters, Reference
from dylora_stream.core.likeness import similarity
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


def test_a_first_skill_that_waits_long_does_not_fall_to_pieces() -> None:
    """Its training was rejected, say, or takes long: it must not become the middle that it is measured from."""
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    place(clusters, skill(np.random.default_rng(16), "a", 400, scatter=0.5))
    assert max(len(members) for members in clusters.clusters.values()) >= 280


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
    rows = skill(np.random.default_rng(5), "a", 40)
    for _, row_id, features, sketch in rows:
        clusters.place(row_id, features, sketch, 1_000)
    clusters.recluster()
    largest = max(clusters.clusters, key=lambda name: len(clusters.members(name)))
    assert clusters.readiness(largest, 16).reason == "flood"


def test_a_flood_amid_ordinary_traffic_is_never_ready() -> None:
    """Two hundred near-copies within a second, where records come one a second."""
    rng = np.random.default_rng(11)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    place(clusters, [skill(rng, f"o{number}", 1)[0] for number in range(200)])
    for number, (_, row_id, features, sketch) in enumerate(skill(rng, "flood", 200, scatter=0.2)):
        clusters.place(row_id, features, sketch, 100_000 + 5 * number)
        if number % 16 == 15:
            clusters.recluster()
            assert not any(clusters.readiness(name, 32).is_ready for name in clusters.clusters)


def test_a_cluster_that_is_mostly_a_flood_is_not_ready() -> None:
    """Also where rows enough came at their own pace."""
    rng = np.random.default_rng(15)
    rows = skill(rng, "a", 240, scatter=0.4)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    for number, (_, row_id, features, sketch) in enumerate(rows[:70]):
        clusters.place(row_id, features, sketch, 1000 * number)
    (name,) = clusters.clusters
    assert clusters.readiness(name, 64).is_ready
    for number, (_, row_id, features, sketch) in enumerate(rows[70:]):
        clusters.place(row_id, features, sketch, 35_000 + 2 * number)
    (name,) = clusters.clusters
    assert clusters.readiness(name, 64).reason == "flood"


def skill_of_templates(rng: np.random.Generator, name: str, rows: int, templates: int = 3) -> list[Row]:
    """Rows of kinds that look nothing alike, in random order."""
    parts = [skill(rng, f"{name}{number}", rows // templates, scatter=0.3) for number in range(templates)]
    mixed = [row for part in parts for row in part]
    return [mixed[line] for line in rng.permutation(len(mixed))]


def test_templates_that_come_together_are_one_cluster() -> None:
    """After another skill's phase: what one source sends is one skill, however unlike its rows are."""
    rng = np.random.default_rng(12)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    first, second = skill(rng, "a", 120, scatter=0.4), skill_of_templates(rng, "b", 90)
    for number, (_, row_id, features, sketch) in enumerate(first):
        clusters.witness(row_id, features, sketch, 1000 * number, "e-a")
    for number, (_, row_id, features, sketch) in enumerate(second, start=len(first)):
        clusters.place(row_id, features, sketch, 1000 * number)
    clusters.recluster()
    assert [len(members) for members in clusters.clusters.values()] == [len(second)]


def test_a_source_of_many_templates_is_ready_however_unlike_they_are() -> None:
    """A cluster that time has made one is not scattered: each of its rows has its like."""
    rng = np.random.default_rng(13)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    known = [row for name in "xyz" for row in skill(rng, f"e-{name}", 120, scatter=0.4)]
    for number, (owner, row_id, features, sketch) in enumerate(known):
        clusters.witness(row_id, features, sketch, 1000 * number, owner)
    for number, (_, row_id, features, sketch) in enumerate(skill_of_templates(rng, "b", 120, 12)):
        clusters.place(row_id, features, sketch, 1000 * (len(known) + number))
    clusters.recluster()
    (name,) = clusters.clusters
    assert clusters.readiness(name, 64).cohesion < ClusteringConfig().min_cohesion
    assert clusters.readiness(name, 64).reason == "ready"


def test_a_full_cluster_that_is_asked_about_again_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until it has another row: learn asks at every step, and the pool's processor is not its to waste."""
    rng = np.random.default_rng(14)
    clusters, measured = OnlineClusters(ClusteringConfig(), PRIOR), []
    rows = skill(rng, "a", 40)
    for number, (_, row_id, features, sketch) in enumerate(rows[:-1]):
        clusters.place(row_id, features, sketch, 1000 * number)
    clusters.recluster()
    (name,) = clusters.clusters

    def counting(*arguments: Any) -> np.ndarray:
        measured.append(len(arguments[0]))
        return similarity(*arguments)

    monkeypatch.setattr("dylora_stream.core.clustering.similarity", counting)
    before = clusters.readiness(name, 64)
    assert clusters.readiness(name, 64) == before
    assert measured == [39]
    (_, row_id, features, sketch) = rows[-1]
    clusters.place(row_id, features, sketch, 40_000)
    assert clusters.readiness(name, 64).distinct_rows == before.distinct_rows + 1
    assert measured == [39, 40]


def test_templates_that_come_all_the_time_stay_apart() -> None:
    """The same rows as the only traffic there is: time says nothing, looks decide."""
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    place(clusters, skill_of_templates(np.random.default_rng(12), "b", 90))
    assert sorted(len(members) for members in clusters.clusters.values()) == [30, 30, 30]


def test_rows_that_came_with_an_expert_join_it() -> None:
    """A template that shows up among an expert's own rows, after another expert's phase."""
    rng = np.random.default_rng(13)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    other, own, late = skill(rng, "a", 120), skill(rng, "b", 60), skill(rng, "c", 30, scatter=0.3)
    for number, (_, row_id, features, sketch) in enumerate(other):
        clusters.witness(row_id, features, sketch, 1000 * number, "e-a")
    for number, (_, row_id, features, sketch) in enumerate(own):
        clusters.witness(row_id, features, sketch, 120_000 + 1000 * number, "e-b")
    for number, (_, row_id, features, sketch) in enumerate(late):
        clusters.place(row_id, features, sketch, 120_500 + 2000 * number)
    assert set(clusters.recluster().joined.values()) == {"e-b"}
    assert not len(clusters)


@pytest.mark.parametrize(("beside", "joined"), [(("e-b",), {"e-b"}), (("e-a", "e-b", "e-c"), set())])
def test_a_text_that_comes_again_and_again_joins_the_expert_that_it_comes_with(
    beside: tuple[str, ...], joined: set[str]
) -> None:
    """A source's commonest line may be a single text, which founds nothing; one that comes all the time is nobody's."""
    rng = np.random.default_rng(18)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    phases = [(owner, row) for owner in ("e-a", "e-b", "e-c") for row in skill(rng, owner, 100)]
    ((_, text, features, sketch),) = skill(rng, "line", 1)
    for number, (owner, (_, row_id, look, rule)) in enumerate(phases):
        clusters.witness(row_id, look, rule, 1000 * number, owner)
        if owner in beside and number % 2:
            clusters.place(f"{text}-{number}", features, sketch, 1000 * number + 500)
    assert set(clusters.recluster().joined.values()) == joined


@pytest.mark.parametrize("rows_a_pass", [3, 4, 8])
def test_a_skill_that_begins_right_after_another_does_not_join_it(rows_a_pass: int) -> None:
    """Its first few rows are all near the expert's last ones; joining is for good, and would go on row by row."""
    rng = np.random.default_rng(16)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    phases = [
        row for name, rows in (("y", 200), ("z", 200), ("a", 64)) for row in skill(rng, f"e-{name}", rows)
    ]
    for number, (owner, row_id, features, sketch) in enumerate(phases):
        clusters.witness(row_id, features, sketch, 1000 * number, owner)
    for number, (_, row_id, features, sketch) in enumerate(skill(rng, "b", 40)):
        clusters.place(row_id, features, sketch, 1000 * (len(phases) + number))
        if number % rows_a_pass == rows_a_pass - 1:
            assert not clusters.recluster().joined


def test_first_rows_beside_an_expert_need_no_answer() -> None:
    """An expert's rows are there before any waiting row is."""
    rng = np.random.default_rng(17)
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    for number, (_, row_id, features, sketch) in enumerate(skill(rng, "a", 5)):
        clusters.witness(row_id, features, sketch, number, "e-a")
    for number, (_, row_id, features, _) in enumerate(skill(rng, "b", 5)):
        clusters.place(row_id, features, None, 10 + number)
    assert len(clusters) == 5


def test_a_skill_without_new_texts_is_ready_with_fewer() -> None:
    """Thirty texts that come again and again; one of them repeated a thousand times would not do."""
    rows = skill(np.random.default_rng(14), "a", 30, scatter=0.4)
    clusters, repeated = OnlineClusters(ClusteringConfig(), PRIOR), OnlineClusters(ClusteringConfig(), PRIOR)
    for number in range(90):
        _, row_id, features, sketch = rows[number % 30]
        clusters.place(f"{row_id}-{number}", features, sketch, 1000 * number)
        _, row_id, features, sketch = rows[min(number, 29)]
        repeated.place(f"{row_id}-{number}", features, sketch, 1000 * number)
    (name,), (other,) = clusters.clusters, repeated.clusters
    assert clusters.readiness(name, 64).reason == "ready"
    assert repeated.readiness(other, 64).reason == "repeats"


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


def test_a_repeat_takes_the_place_of_a_first_row_that_is_gone() -> None:
    """And later repeats stand behind it."""
    (_, _, features, sketch) = skill(np.random.default_rng(18), "a", 1)[0]
    clusters = OnlineClusters(ClusteringConfig(), PRIOR)
    for number in range(4):
        clusters.place(f"a-{number}", features, sketch, number)
    clusters.forget(["a-0", "a-2"])
    clusters.place("a-4", features, sketch, 4)
    clusters.recluster()
    (name,) = clusters.clusters
    assert clusters.members(name) == ("a-1", "a-3", "a-4")
    assert clusters.readiness(name, 1).distinct_rows == 1


def test_neighbours_on_the_timeline_are_counted_in_their_order() -> None:
    """Against a loop over all pairs; rows that were left out or that nobody has are no neighbours."""
    rng = np.random.default_rng(19)
    timeline, groups = Timeline(), {f"r{number}": int(rng.integers(3)) for number in range(0, 120, 2)}
    for number in rng.permutation(120).tolist():
        timeline.note(f"r{number}", 1000 * number, "e" if number % 5 == 1 else None)
    found = timeline.together(groups, {"e": 3}, 4, {"r4"})
    sent = [f"r{number}" for number in range(120) if number != 4]
    labels = [groups.get(row, 3 if int(row[1:]) % 5 == 1 else -1) for row in sent]
    before = np.zeros((4, 4))
    for later, label in enumerate(labels):
        for other in labels[max(0, later - NEIGHBOURS) : later]:
            if min(label, other) >= 0:
                before[other, label] += 1
    assert np.array_equal(found.before, before)


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


def test_wrong_clustering_settings_are_refused() -> None:
    """With a message that names the field."""
    for wrong in (
        {"join_similarity": 1.0},
        {"kinship": 0.0},
        {"together": -1.0},
        {"answer_weight": 2.0},
        {"min_cohesion": -0.1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClusteringConfig(**wrong)  # type: ignore[arg-type]
