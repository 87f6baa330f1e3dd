"""The figures of `bench novelty` against values worked out by hand, and the stream that it plays."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dylora_stream.bench.novelty.alarms import in_turn
from dylora_stream.bench.novelty.child import Finished
from dylora_stream.bench.novelty.config import NoveltyBenchConfig
from dylora_stream.bench.novelty.folder import load_outliers, strip_markers
from dylora_stream.bench.novelty.learner import Played
from dylora_stream.bench.novelty.metrics import agreement, area, curve, false_positives, interval, on_grid
from dylora_stream.bench.novelty.reading import ReadRows
from dylora_stream.bench.novelty.script import (
    FLOOD,
    OUTLIER,
    REPEAT,
    STRAYS,
    Script,
    outliers_wanted,
    script_of,
)
from dylora_stream.bench.novelty.tally import tally
from dylora_stream.bench.novelty.trained import Trained, families, likelihood_ratings
from dylora_stream.core.errors import SettingsError
from dylora_stream.model.features import LabelledText
from dylora_stream.model.training import RowScores


def rows(name: str, count: int) -> ReadRows:
    """Distinct rows of one task."""
    texts = tuple(LabelledText(input=f"{name} {number}", output=name) for number in range(count))
    return ReadRows(texts=texts, features=np.zeros((count, 2), np.float32))


def a_script(seed: int = 0) -> Script:
    """Three tasks of 40 rows, with strays."""
    tasks = {name: rows(name, 40) for name in "abc"}
    strays = {OUTLIER: rows("o", outliers_wanted(120)), FLOOD: rows("f", 50)}
    strays[REPEAT] = rows("r", 1).take(np.zeros(30, dtype=np.int64))
    return script_of(tasks, strays, np.random.default_rng(seed))


def test_area_counts_pairs_and_halves_ties() -> None:
    """Known 1, 2, 3 and novel 2, 4: of six pairs four are right and one is tied."""
    assert area(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])) == pytest.approx(4.5 / 6)
    assert area(np.array([1.0, 2.0]), np.array([np.inf, np.inf])) == 1.0


def test_false_positives_stand_at_the_threshold_that_nearly_all_novel_rows_reach() -> None:
    """Of 20 novel rows 0 … 19 one may be missed: the threshold is 1."""
    novel = np.arange(20.0)
    assert false_positives(np.array([0.0, 0.5, 1.0, 7.0]), novel) == 0.5
    assert false_positives(np.array([-1.0, -2.0]), novel) == 0.0


def test_a_curve_of_perfect_scores_is_one_everywhere() -> None:
    """And a curve of equal scores is the diagonal."""
    assert curve(np.array([1.0, 2.0]), np.array([3.0, 4.0]))[1:].min() == 1.0
    np.testing.assert_allclose(curve(np.ones(5), np.ones(5)), np.linspace(0, 1, 101))


def test_p_values_on_a_grid() -> None:
    """Those at the rate are novel at it, and so is what nothing calibrates."""
    np.testing.assert_allclose(
        on_grid(np.array([0.01, 0.05, 0.5, np.nan]), np.array([0.0, 0.05, 1.0])), [0.25, 0.75, 1.0]
    )


def test_the_binomial_interval_holds_its_share() -> None:
    """100 tries at 0.05: 0 to 11, as the cumulative sums say."""
    chances = [math.comb(100, k) * 0.05**k * 0.95 ** (100 - k) for k in range(101)]
    low = next(k for k in range(101) if sum(chances[: k + 1]) >= 0.005) / 100
    high = next(k for k in range(101) if sum(chances[: k + 1]) >= 0.995) / 100
    assert interval(0.05, 100) == (low, high)


def test_agreement_of_a_split_and_of_a_mixture() -> None:
    """Two tasks of two records: perfect under other names; one expert for both; by hand."""
    perfect = agreement(list("aabb"), list("xxyy"))
    assert (perfect.purity, perfect.homogeneity, perfect.nmi, perfect.ari) == pytest.approx((1, 1, 1, 1))
    mixed = agreement(list("aabb"), list("xxxx"))
    assert (mixed.purity, mixed.homogeneity, mixed.nmi, mixed.ari) == pytest.approx((0.5, 0, 0, 0))
    split = agreement(list("aabb"), list("xyzz"))
    # H(task) = ln 2, H(expert) = 1.5 ln 2, mutual information ln 2: NMI = 1 / 1.25
    # one pair of two together in both, of six: expected 2·1/6, ARI = (1 - 1/3) / (1.5 - 1/3)
    assert (split.purity, split.homogeneity, split.nmi, split.ari) == pytest.approx((1, 1, 0.8, 4 / 7))


def test_markers_are_taken_off_lines() -> None:
    """Names in front of a colon at a line's beginning; times and lone names stay."""
    assert strip_markers("Title: A day\nsentence 1: It rains: a lot\n12:30 now") == (
        "A day\nIt rains: a lot\n12:30 now"
    )
    assert strip_markers("Title:") == "Title:"
    assert strip_markers("no marker\n\nText :\nmore") == "no marker\n\n\nmore"


def test_outliers_are_inputs_alone(tmp_path: Path) -> None:
    """A line without one is named; a folder may have none."""
    config = NoveltyBenchConfig(data=tmp_path)
    assert load_outliers(config) == ()
    (tmp_path / "outliers.jsonl").write_text('{"input": "a"}\n\n{"input": "b", "output": "x"}\n')
    assert load_outliers(config) == ("a", "b")
    (tmp_path / "outliers.jsonl").write_text('{"input": "a"}\n{"text": "b"}\n')
    with pytest.raises(SettingsError, match="line 2"):
        load_outliers(config)


def test_outliers_that_are_no_text_are_named(tmp_path: Path) -> None:
    """The file, before anything is read by the model."""
    (tmp_path / "outliers.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(SettingsError, match="outliers.jsonl cannot be read"):
        load_outliers(NoveltyBenchConfig(data=tmp_path))


def test_parts_in_turn_are_spread_evenly_in_their_order() -> None:
    """A part of four and one of two: neither runs out before the end."""
    assert in_turn([4, 2]).tolist() == [0, 4, 1, 2, 5, 3]


def test_a_stream_brings_tasks_one_after_another_and_old_ones_back() -> None:
    """All rows come once, three quarters in the file's order before the next task begins, the others later, mixed."""
    script = a_script()
    assert Counter(script.labels) == {"a": 40, "b": 40, "c": 40, OUTLIER: 6, REPEAT: 30, FLOOD: 50}
    places = {name: [number for number, label in enumerate(script.labels) if label == name] for name in "abc"}
    first, second, third = sorted(places, key=lambda name: places[name][0])
    assert places[first][29] < places[second][0]
    assert places[second][29] < places[third][0]
    assert any(place < places[third][0] for place in places[first][30:])
    for name, own in places.items():
        texts = [script.rows.texts[line].input for line in script.lines[own].tolist()]
        assert texts == [f"{name} {number}" for number in range(40)]


def test_a_flood_is_over_in_a_second_and_a_repeat_runs_all_along() -> None:
    """By record time, which never goes back."""
    script = a_script()
    labels = np.array(script.labels)
    flood, repeat = script.times_ms[labels == FLOOD], script.times_ms[labels == REPEAT]
    assert np.ptp(flood) <= 1000
    assert np.ptp(repeat) > 0.9 * script.times_ms[-1]
    assert (np.diff(script.times_ms) >= 0).all()
    assert len({script.rows.texts[line].input for line in script.lines[labels == REPEAT].tolist()}) == 1


def test_a_stream_depends_on_its_seed_alone() -> None:
    """The same seed, the same stream."""
    assert a_script(1).labels == a_script(1).labels
    assert a_script(1).labels != a_script(2).labels


def a_founding(expert: str, own: list[int]) -> Finished:
    """An expert founded of these records."""
    positions = tuple(map(str, own))
    return Finished(kind="seed", expert_id=expert, positions=positions, decision="promoted", neighbour=None)


def played(script: Script, owners: dict[str, str], jobs: list[tuple[int, str, list[int]]]) -> Played:
    """Every record goes to its label's owner; jobs (records taken, expert, its records) all found one."""
    numbers = {str(number): number for number in range(len(script))}
    return Played(
        owners=tuple(owners.get(label) for label in script.labels),
        was_known=tuple(number >= jobs[0][0] for number in range(len(script))),
        finished=tuple(
            (at, a_founding(expert, own)) for at, expert, own in jobs
        ),
        experts=tuple(expert for _, expert, _ in jobs),
        numbers=numbers,
        snapshots=(),
    )  # fmt: skip


def test_skills_are_counted_from_their_founding() -> None:
    """Experts for two of three tasks, and one from the flood; a family is one skill; nobody's records share a label."""
    script = a_script()
    where = {
        label: [n for n, own in enumerate(script.labels) if own == label]
        for label in ("a", "b", "c", *STRAYS)
    }
    jobs = [
        (where["a"][20], "e-a", where["a"][:20]),
        (where["b"][25], "e-b", [*where["b"][:24], where[OUTLIER][0]]),
        (len(script), "e-f", where[FLOOD]),
    ]
    found = tally(script, played(script, {"a": "e-a", "b": "e-b"}, jobs), ())
    assert found.experts == 3
    assert found.outlier_experts == (FLOOD,)
    assert found.skills["a"].cluster == found.skills["a"].distinct == 20
    assert found.skills["b"].cluster == 25
    assert found.skills["c"].cluster is None
    assert found.skills["a"].novel_first == 1
    assert found.skills["a"].called_novel == 0.0
    assert found.records_to_notice == 25
    assert found.decisions == {"seed promoted": 3}
    assert found.agreement is not None
    assert (found.agreement.purity, found.agreement.ari) == (1.0, 1.0)
    family = tally(script, played(script, {"a": "e-a", "b": "e-b", "c": "e-b"}, jobs), [("b", "c")])
    assert set(family.skills) == {"a", "b+c"}
    assert family.agreement is not None
    assert family.agreement.ari == 1.0


def test_tasks_that_one_expert_serves_as_well_as_two_are_one_family() -> None:
    """One way suffices, few rows more are chance, and a task that is not learned is nobody's kin."""
    right = {
        ("a", "a"): 30, ("a", "b"): 29, ("a", "c"): 0, ("a", "d"): 20,
        ("b", "a"): 5, ("b", "b"): 30, ("b", "c"): 0, ("b", "d"): 20,
        ("c", "a"): 0, ("c", "b"): 0, ("c", "c"): 30, ("c", "d"): 20,
        ("d", "a"): 0, ("d", "b"): 0, ("d", "c"): 0, ("d", "d"): 20,
    }  # fmt: skip
    trained = trained_of(right, {"a": 4, "b": 4, "c": 4, "d": 19})
    assert families(trained) == ([["a", "b"], ["c"]], ["d"])


def test_a_rows_likelihood_is_novel_where_no_kept_expert_gains() -> None:
    """Two tasks whose own experts alone lower the loss: perfect for the one left out, whichever it is."""
    ratings = likelihood_ratings(trained_of({("a", "a"): 30, ("b", "b"): 30}, {"a": 0, "b": 0}))
    assert {task: rating.auroc for task, rating in ratings.items()} == {"a": 1.0, "b": 1.0}
    assert ratings["a"].fpr95 == 0.0


def trained_of(right: Mapping[tuple[str, str], int], common: Mapping[str, int]) -> Trained:
    """Of 40 rows a task the first so many are right under (expert, task), all with a lower loss than the backbone's."""

    def first(count: int) -> np.ndarray:
        return np.arange(40) < count

    def scored(expert: str | None, task: str) -> RowScores:
        count = 0 if expert is None else right.get((expert, task), 0)
        return RowScores(losses=np.full(40, 2.0 - (count > 0), dtype=np.float32), is_exact=first(count))

    return Trained(
        scores={expert: {task: scored(expert, task) for task in common} for expert in (None, *common)},
        common={task: first(count) for task, count in common.items()},
    )
