"""The demo's own arithmetic and its player: what the table says must be what was sent and what came back."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dylora_stream.core.errors import SettingsError
from dylora_stream.demo.journal import Journal, Reply, Sent, Task
from dylora_stream.demo.player import Pace, Player
from dylora_stream.demo.report import experts_of, judged, skill_reports
from dylora_stream.demo.run import emptied, read_tasks
from dylora_stream.demo.skills import Skill, is_usable, load_skills
from dylora_stream.store.identity import claim_identity
from dylora_stream.testing import ManualClock


def sent(journal: Journal, task: str, *inputs: str) -> list[str]:
    """Records of a task, sent in this order; their positions."""
    positions = []
    for text in inputs:
        order = len(journal.sent)
        position = f"requests:0:{order}"
        journal.sent[position] = Sent(
            task=task, input=text, output=text.upper(), position=position, order=order
        )
        positions.append(position)
    return positions


def answered(journal: Journal, position: str, output: str, expert: str | None = None) -> None:
    """The first result of a record, or one more."""
    journal.counts[position] += 1
    reply = Reply(output=output, expert=expert, policy="dense", is_novel=expert is None)
    journal.replies.setdefault(position, reply)


# ---- journal ----


def test_totals_are_counted_by_position() -> None:
    """A second result, and a dead letter beside a result, are repeats; what has neither is lost."""
    journal = Journal()
    once, twice, both, dead, lost = sent(journal, "a", "1", "2", "3", "4", "5")
    for position in (once, twice, twice, both):
        answered(journal, position, "x")
    journal.dead.update([both, dead])
    assert journal.totals() == {"sent": 5, "answered": 3, "lost": 1, "repeated": 2, "dead_lettered": 2}
    assert lost not in journal.counts


def test_a_quiet_run_loses_and_repeats_nothing() -> None:
    """Sent equals answered; results of records that are not this run's do not count as answers."""
    journal = Journal()
    for position in sent(journal, "a", "1", "2"):
        answered(journal, position, "x")
    journal.counts["requests:0:99"] += 1
    assert journal.totals() == {"sent": 2, "answered": 2, "lost": 0, "repeated": 0, "dead_lettered": 0}


def test_an_answer_is_right_whatever_blanks_surround_it() -> None:
    """Exact match otherwise; without a reply it is wrong."""
    journal = Journal()
    right, wrong, silent = sent(journal, "a", "x", "y", "z")
    answered(journal, right, " X\n")
    answered(journal, wrong, "Yes")
    assert [journal.is_right(journal.sent[each]) for each in (right, wrong, silent)] == [True, False, False]


def test_training_is_heard_from_its_events() -> None:
    """It begins with `training.started` and ends with either end."""
    journal = Journal()
    heard = []
    for kind in ("training.started", "training.completed", "training.started", "training.failed"):
        journal.heard_event(kind)
        heard.append(journal.is_training)
    assert heard == [True, False, True, False]
    assert journal.events["training.started"] == 2


# ---- report ----


def test_purity_is_the_share_of_training_rows_of_the_experts_task() -> None:
    """The task with most rows owns the expert; rows of elsewhere are left out."""
    journal = Journal()
    first, second = sent(journal, "a", "1", "2", "3"), sent(journal, "b", "4")
    trained = {"e-1": [*first, *second, "requests:0:77"], "e-2": ["requests:0:78"]}
    assert experts_of(trained, journal) == {"e-1": ("a", 0.75)}


def test_no_input_is_judged_twice_and_none_that_was_trained_on() -> None:
    """Nor one sent before the expert was live, nor another task's; later training rows are out as well."""
    journal = Journal()
    early = sent(journal, "a", "1", "2", "3")
    sent(journal, "a", "early")
    journal.heard_registry(["e-1"])
    sent(journal, "a", "1", "4", "4", "early")
    sent(journal, "b", "5")
    later = sent(journal, "a", "6")
    trained = {"e-1": early, "e-2": later}
    after = judged(Task(name="a", rows=()), journal, trained)
    assert [record.input for record in after] == ["4", "early"]
    assert judged(Task(name="b", rows=()), journal, trained) == []


def test_a_skills_line_has_its_numbers() -> None:
    """Records until live count the task's own; before and after are over the judged ones."""
    journal = Journal()
    early = sent(journal, "a", "1", "2")
    sent(journal, "b", "9")
    journal.heard_registry(["e-1"])
    journal.heard_registry(["e-1"])
    third, fourth = sent(journal, "a", "3", "4")
    answered(journal, third, "3", "e-1")
    answered(journal, fourth, "wrong", "e-1")
    tasks = [Task(name=name, rows=()) for name in ("a", "b")]
    line, other = skill_reports(tasks, journal, {"e-1": early}, {third: False, fourth: False})
    assert (line.records, line.records_to_live, line.judged) == (4, 2, 2)
    assert (line.experts, line.purity) == (["e-1"], 1.0)
    assert (line.accuracy_before, line.accuracy_after, line.majority_baseline) == (0.0, 0.5, 0.25)
    assert (other.experts, other.records_to_live, other.accuracy_after) == ([], None, None)


# ---- skills ----


@pytest.fixture(scope="module")
def skills() -> tuple[Skill, ...]:
    """Read once: sources of many packages."""
    return load_skills()


def test_the_skills_are_distinct_and_the_same_every_time(skills: tuple[Skill, ...]) -> None:
    """Every input and output once within a skill, no input in two."""
    assert skills == load_skills()
    assert len(skills) >= 4
    inputs = [text for skill in skills for text, _ in skill.rows]
    assert len(set(inputs)) == len(inputs)
    for skill in skills:
        outputs = [output for _, output in skill.rows]
        assert len(skill.rows) >= 250
        assert len(set(outputs)) == len(outputs)
        assert all(map(is_usable, skill.rows))


def test_another_seed_sends_other_rows_first(skills: tuple[Skill, ...]) -> None:
    """The kinds stay."""
    others = load_skills(1)
    assert [skill.name for skill in others] == [skill.name for skill in skills]
    assert others[0].rows[:20] != skills[0].rows[:20]


# ---- player ----


class PromptTraffic:
    """Answers at once, and has an expert live after `learned_after` records of a task."""

    def __init__(self, journal: Journal, clock: ManualClock, learned_after: int = 20) -> None:
        self._journal, self._clock, self._learned_after = journal, clock, learned_after
        self._counts: dict[str, int] = {}
        self.is_answering = True
        self.bursts: list[int] = []
        self.killed: list[tuple[str, int]] = []

    def send(self, records: Sequence[tuple[str, str, str]]) -> None:
        """See Traffic."""
        self.bursts.append(len(records))
        for task, text, output in records:
            position = sent(self._journal, task, text)[0]
            self._counts[task] = self._counts.get(task, 0) + 1
            if self.is_answering:
                is_known = self._counts[task] > self._learned_after
                answered(self._journal, position, output, f"e-{task}" if is_known else None)

    def hear(self, timeout_s: float) -> None:
        """See Traffic; time passes, and what learn would have said by now is heard."""
        self._clock.advance(timeout_s)
        live = [f"e-{task}" for task, count in self._counts.items() if count > self._learned_after]
        self._journal.heard_registry(live)
        if live:
            self._journal.events.update({"expert.promoted": 1, "expert.matured": 1})

    def kill(self, role: str) -> None:
        """See Traffic."""
        self.killed.append((role, len(self._journal.sent)))


TASKS = tuple(
    Task(name=name, rows=tuple((f"{name} {n}", str(n)) for n in range(300))) for name in ("a", "b", "c")
)


def play(
    pace: Pace, *, is_answering: bool = True, learned_after: int = 20
) -> tuple[Journal, PromptTraffic, ManualClock]:
    """The whole stream, played to its end."""
    journal, clock = Journal(), ManualClock()
    traffic = PromptTraffic(journal, clock, learned_after)
    traffic.is_answering = is_answering
    Player(TASKS, journal, traffic, clock, pace).play(lambda _: None)
    return journal, traffic, clock


def test_tasks_arrive_one_after_another_and_come_back() -> None:
    """The first record of each task comes in the tasks' order; every earlier one returns in later phases."""
    pace = Pace(burst=12, window=32, return_share=0.25)
    journal, traffic, _ = play(pace, learned_after=60)
    records = list(journal.sent.values())
    first = {record.task: record.order for record in reversed(records)}
    assert sorted(first, key=first.__getitem__) == ["a", "b", "c"]
    assert any(record.task == "a" and first["b"] < record.order < first["c"] for record in records)
    assert {record.task for record in records if record.order > first["c"]} == {"a", "b", "c"}
    assert max(traffic.bursts) == pace.burst


def test_the_stream_ends_when_every_task_has_its_records_after_its_expert() -> None:
    """Long before its rows run out."""
    pace = Pace(after_records=30)
    journal, _, clock = play(pace)
    newest = max(journal.live_at.values())
    for task in TASKS:
        assert sum(record.order >= newest for record in journal.of(task.name)) >= pace.after_records
    assert len(journal.sent) < 600
    assert clock.monotonic_s() < pace.deadline_s
    assert journal.totals()["lost"] == 0


def test_a_phase_without_an_expert_ends_by_its_records() -> None:
    """Learn may never be ready; the next task comes all the same, and the stream ends when its rows do."""
    journal, _, _ = play(Pace(phase_records=50, burst=10), learned_after=10_000)
    order = [record.task for record in journal.sent.values()]
    assert order.index("b") >= 50
    assert all(order.count(task.name) >= len(task.rows) for task in TASKS)


def test_the_stream_ends_at_its_deadline_though_nobody_answers() -> None:
    """No more is sent than the window holds, and the last wait ends too."""
    pace = Pace(deadline_s=30.0, window=32)
    journal, _, clock = play(pace, is_answering=False)
    assert len(journal.sent) <= pace.window
    assert 30.0 < clock.monotonic_s() < 30.0 + 65.0
    assert journal.totals()["lost"] == len(journal.sent)


def test_training_slows_the_stream_to_a_trickle() -> None:
    """On two cores the child needs its turn."""

    class TrainingTraffic(PromptTraffic):
        """Always in training."""

        def hear(self, timeout_s: float) -> None:
            """See Traffic."""
            super().hear(timeout_s)
            self._journal.is_training = True

    journal, clock = Journal(), ManualClock()
    pace = Pace(burst=12, trickle_per_s=2.0, deadline_s=60.0)
    traffic = TrainingTraffic(journal, clock, learned_after=10_000)
    Player(TASKS[:1], journal, traffic, clock, pace).play(lambda _: None)
    assert len(journal.sent) == pytest.approx(2.0 * 60.0, abs=2 * pace.burst)


def test_roles_are_killed_once_when_due() -> None:
    """At the first burst that reaches the number."""
    _, traffic, _ = play(Pace(kill_serve_at=30, kill_learn_at=50, burst=12))
    assert traffic.killed == [("serve", 36), ("learn", 60)]


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path: Path) -> None:
    """--folder meant for --data, or the working directory, loses nothing; what a demo left is removed."""
    tasks, used = tmp_path / "tasks", tmp_path / "used"
    tasks.mkdir()
    (tasks / "a.train.jsonl").write_text("precious")
    with pytest.raises(SettingsError, match=r"holds a.train.jsonl.*--folder a new folder"):
        emptied(tasks)
    assert (tasks / "a.train.jsonl").read_text() == "precious"
    emptied(used)
    (used / "data").mkdir()
    (used / "data" / "old").write_text("x")
    emptied(used)
    assert [path.name for path in used.iterdir()] == ["daemon.log"]
    identity = claim_identity(used / "data", "serve", "x")
    with pytest.raises(SettingsError, match="another demo is running"):
        emptied(used)
    identity.lock.close()
    emptied(used)
    with pytest.raises(SettingsError, match="cannot be used"):
        emptied(tasks / "a.train.jsonl" / "below")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 is not"),
        ('{"input": "a"}', "line 1 is not"),
        ('{"input": "a", "output": 5}', "must be texts"),
        ("\n", "no row"),
    ],
)
def test_a_wrong_row_of_a_dataset_is_named(text: str, said: str, tmp_path: Path) -> None:
    """File and line, and no traceback, before anything is started."""
    (tmp_path / "a.train.jsonl").write_text(text)
    with pytest.raises(SettingsError, match=f"a.train.jsonl.*{said}"):
        read_tasks(tmp_path, None)


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """A line separator inside of a text is the text's."""
    row = {"input": "one\u2028two", "output": "x"}
    (tmp_path / "a.train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (task,) = read_tasks(tmp_path, 5)
    assert task.rows == (("one\u2028two", "x"),)
