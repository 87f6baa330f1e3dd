"""`bench continual` on a tiny Llama and three tiny tasks: what is shared, what is kept, and what the numbers mean."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_llama
from rich.console import Console

from dylora_stream.bench.continual import ContinualConfig, continual, workbench
from dylora_stream.bench.continual.chain import GateCourse
from dylora_stream.bench.continual.config import DEFAULT_METHODS
from dylora_stream.bench.continual.evaluate import SHARED, TIED, Cell, Examiner, leaders, scene_of, sole
from dylora_stream.bench.continual.parts import methods_named
from dylora_stream.bench.continual.parts import workbench as made
from dylora_stream.bench.continual.statistics import Passage, bootstrap
from dylora_stream.bench.continual.watch import Silence
from dylora_stream.bench.continual.workbench import Workbench
from dylora_stream.bench.store import Store
from dylora_stream.bench.tasks import choose, load_task, load_tasks
from dylora_stream.core.errors import SettingsError, StoreError
from dylora_stream.core.messages import Policy
from dylora_stream.core.recipes import Recipe
from dylora_stream.core.routing import NULL_EXPERT, Routing
from dylora_stream.model.backbone import IGNORED, Backbone, Tokens, load_backbone
from dylora_stream.model.config import ModelConfig
from dylora_stream.model.gates import GATES, ClosedFormGate
from dylora_stream.model.gates.base import Lesson, Stage
from dylora_stream.model.gates.uniform import Among, SumGate
from dylora_stream.model.training import Trained, score_rows, train_expert
from dylora_stream.settings import Settings

TASKS = {"letters": ("abcdefgh", "y"), "digits": ("0123456789", "n"), "signs": ("!?.,;:", "s")}
ORDERS = (("letters", "digits", "signs"), ("signs", "letters", "digits"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, told apart by their alphabets, each with one answer."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for name, (alphabet, output) in TASKS.items():
        for part, count in (("train", 24), ("test", 10)):
            texts = ["".join(rng.choice(list(alphabet), size=8)) for _ in range(count)]
            lines = [json.dumps({"input": text, "output": output}) for text in texts]
            (folder / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> Settings:
    """Of a tiny float32 model, experts small and quickly trained."""
    base = Settings()
    return base.model_copy(
        update={
            "model": ModelConfig(name="tiny", folder=model, dtype="float32", stem_layers=1, threads=1),
            "store": replace(base.store, folder=tmp_path / "home"),
            "seeding": Recipe(rate=2e-2, epochs=6, batch_size=8, rank=4, alpha=8.0),
        }
    )


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a training of an expert: its rows."""
    seen: list[int] = []

    def counted(backbone: Backbone, rows: Any, *rest: Any) -> Trained:
        seen.append(len(rows))
        return train_expert(backbone, rows, *rest)

    monkeypatch.setattr(workbench, "train_expert", counted)
    return seen


@pytest.fixture
def bench(settings: Settings, data: Path, tmp_path: Path) -> Iterator[Workbench]:
    """The parts of a run over all tasks."""
    backbone = load_backbone(settings.model, settings.model.folder)
    with made(asked(data), settings, backbone, tmp_path / "work", Silence().tell) as parts:
        yield parts


def asked(data: Path, **changes: Any) -> ContinualConfig:
    """A run's configuration."""
    values: dict[str, Any] = {"orders": ORDERS[:1], "train_rows": 16, "memory": 8} | changes
    return ContinualConfig(data=data, **values)


def run(config: ContinualConfig, settings: Settings) -> dict[str, Any]:
    """The document of a quiet run."""
    return continual(config, settings, Console(file=io.StringIO()))


def passage(table: list[list[float | None]], leading: list[list[int]] | None = None) -> Passage:
    """A course with these accuracies in percent, of ten rows a task."""
    cells = {
        (t, j): Cell(
            is_exact=np.arange(10) < round(value / 10),
            leaders=None if leading is None else np.array(leading[j]),
        )
        for t, row in enumerate(table)
        for j, value in enumerate(row)
        if value is not None
    }
    order = ("a", "b", "c")[: len(table)]
    return Passage(method="m", order=order, seed=0, cells=cells, parameters=1, train_s=1.0)


def test_experts_that_train_alone_are_trained_once_for_gates_orders_and_the_oracle(
    settings: Settings, data: Path, trainings: list[int]
) -> None:
    """Three tasks, two gates, two orders and the oracle: three trainings."""
    methods = ("closed_form", "retriever", "oracle")
    document = run(asked(data, methods=methods, orders=ORDERS), settings)
    assert trainings == [16] * 3
    assert set(document["methods"]) == set(methods)
    assert document["methods"]["oracle"]["bwt"] == 0.0
    assert document["methods"]["closed_form"]["oracle_route"] == document["methods"]["oracle"]["average"]


def test_a_second_run_trains_and_teaches_nothing_and_says_the_same(
    settings: Settings, data: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything comes out of the store, the gates' decisions too."""
    config = asked(data, methods=("closed_form", "hybrid", "sum", "mora", "sequential", "joint", "base"))
    first = run(config, settings)
    count = len(trainings)
    assert count > 7

    def refuse(*_: object) -> None:
        raise AssertionError("a gate was loaded")

    monkeypatch.setattr(GateCourse, "_brought", refuse)
    assert run(config, settings) == first
    assert len(trainings) == count


def test_a_killed_run_goes_on_behind_the_last_finished_task(
    settings: Settings, data: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C in the third task's training costs that training alone, and the numbers are a whole run's."""
    config = asked(data, methods=("mora", "hybrid"))
    whole = run(asked(data, methods=("mora", "hybrid"), work=tmp_path / "apart"), settings)
    trainings.clear()

    def interrupted(_: Workbench, __: Any, ___: Any, what: str) -> Trained:
        raise KeyboardInterrupt(what)

    train = Workbench.train
    monkeypatch.setattr(Workbench, "train", lambda *a: interrupted(*a) if "signs" in a[3] else train(*a))
    with pytest.raises(KeyboardInterrupt):
        run(config, settings)
    assert len(trainings) == 2
    monkeypatch.setattr(Workbench, "train", train)
    resumed = run(config, settings)
    assert len(trainings) == 2 + 1 + 3  # the rest of mora's, and those of experts that train alone
    for method in ("mora", "hybrid"):
        assert resumed["methods"][method]["matrix"] == whole["methods"][method]["matrix"]
        assert resumed["methods"][method]["routing"] == whole["methods"][method]["routing"]


def test_experts_that_train_among_others_are_shared_by_orders_that_begin_alike(
    settings: Settings, data: Path, trainings: list[int]
) -> None:
    """Two orders with a common first task: five trainings in place of six."""
    orders = (("letters", "digits", "signs"), ("letters", "signs", "digits"))
    run(asked(data, methods=("sum",), orders=orders), settings)
    assert len(trainings) == 5


def test_rows_of_one_expert_score_as_in_a_real_gated_pass(bench: Workbench) -> None:
    """The shared exactness equals routing, pool and forward pass in one, in float32."""
    examiner, order = Examiner(bench), ORDERS[0]
    course = GateCourse(bench, examiner, "closed_form", (order, 0))
    for t in range(3):
        course.learn(t)
    scene = scene_of([(name, bench.features(name, 0)) for name in order])
    gate = ClosedFormGate()
    for name in order:
        cell = course.answer(2, name)
        course._brought(2)
        routing = examiner._decided(gate, scene, name)
        assert (sole(routing) != SHARED).all()
        real = examiner._preset(routing, np.arange(len(routing)), name)
        assert np.array_equal(cell.is_exact, real)
        exam = bench.exams[name].kept
        at_stem = score_rows(bench.backbone, exam, gate=_in_slot(bench, routing))
        bench.pool.no_gates()
        assert np.array_equal(real, at_stem.is_exact)
        assert cell.leaders is not None
        assert (cell.leaders == order.index(name)).mean() > 0.8
    assert course.answer(2, "letters").is_exact.mean() > 0.8


def _in_slot(bench: Workbench, routing: Routing) -> Callable[[list[int], Tokens], Any]:
    """Gates set at the stem of the very pass."""

    def enter(chosen: list[int], tokens: Tokens) -> Any:
        slots, weights = (
            torch.from_numpy(routing.experts[chosen] + 1),
            torch.from_numpy(routing.weights[chosen]),
        )
        mask = tokens.attention_mask * (tokens.labels == IGNORED)
        return bench.hook.routing(mask, lambda _: bench.pool.set_gates(slots, weights))

    return enter


def test_the_backbone_is_bit_identical_afterwards_and_has_no_hooks(
    settings: Settings, data: Path, tmp_path: Path
) -> None:
    """A run leaves nothing behind."""
    backbone = load_backbone(settings.model, settings.model.folder)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    config = asked(data, orders=(ORDERS[0][:2],))
    with made(config, settings, backbone, tmp_path / "work", Silence().tell) as bench:
        for method in ("hybrid", "mora"):
            course = GateCourse(bench, Examiner(bench), method, (ORDERS[0][:2], 0))
            course.learn(0)
            course.learn(1)
            course.answer(1, "letters")
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


def test_average_forgetting_and_routing_are_what_the_matrix_says() -> None:
    """The last row's mean; the mean of last minus diagonal but for the last task; the share of right leaders."""
    leading = [[0] * 10, [1] * 5 + [0] * 5, [TIED] * 10]
    table = [[80.0, None, None], [None, 60.0, None], [50.0, 70.0, 90.0]]
    course = passage(table, leading)
    assert course.average == pytest.approx(70.0)
    assert course.bwt == pytest.approx((50 - 80 + 70 - 60) / 2)
    assert course.routing == pytest.approx(50.0)
    assert course.matrix == table
    assert passage([[90.0]]).bwt is None
    assert passage(table).routing is None
    assert passage(table, [[TIED] * 10] * 3).routing is None


def test_the_bootstrap_is_paired_by_row_and_covers_the_mean() -> None:
    """Equal methods differ by exactly 0; a method that is better on every row it differs in is above 0."""
    rng = np.random.default_rng(0)
    rows = {name: (rng.random(100) < 0.6).astype(float) for name in ("a", "b")}
    better = {name: np.where(np.arange(100) < 20, 1.0, row) for name, row in rows.items()}
    found = bootstrap({"same": rows, "twin": dict(rows), "better": better}, "same", np.random.default_rng(1))
    mean = 50 * sum(row.mean() for row in rows.values())
    assert found["same"].low < mean < found["same"].high
    assert found["same"].high - found["same"].low == pytest.approx(
        2 * 1.96 * 100 * (0.24 / 200) ** 0.5, rel=0.1
    )
    assert (found["twin"].difference_low, found["twin"].difference_high) == (0.0, 0.0)
    assert 0 < found["better"].difference_low < found["better"].difference < found["better"].difference_high


def test_only_whole_weights_make_a_sole_expert() -> None:
    """One expert with weight 1 is; shares, ties, rank weights are not; no weight is the backbone."""
    experts = np.array([[2, NULL_EXPERT], [0, 1], [0, NULL_EXPERT], [NULL_EXPERT, NULL_EXPERT], [1, 0]])
    weights = np.array([[1, 0], [0.5, 0.5], [0.85, 0.15], [1, 0], [0, 0]], dtype=np.float32)
    routing = Routing(experts, weights, (Policy.DENSE,) * 5)
    assert sole(routing).tolist() == [2, SHARED, SHARED, NULL_EXPERT, NULL_EXPERT]
    assert leaders(routing).tolist() == [2, TIED, 0, NULL_EXPERT, NULL_EXPERT]
    by_rank = Routing(experts, weights, routing.policies, np.ones((5, 2, 4), dtype=np.float32))
    assert sole(by_rank)[0] == SHARED


def test_the_whole_matrix_and_the_report_are_written(settings: Settings, data: Path, tmp_path: Path) -> None:
    """Every cell is there on request; JSON and plots lie beside each other."""
    config = asked(
        data,
        orders=(ORDERS[0][:2],),
        methods=("closed_form", "joint"),
        is_whole_matrix=True,
        report=tmp_path / "r.json",
    )
    document = run(config, settings)
    assert json.loads((tmp_path / "r.json").read_text()) == document
    assert all(value is not None for row in document["methods"]["closed_form"]["matrix"] for value in row)
    assert document["methods"]["joint"]["bwt"] is None
    assert document["methods"]["joint"]["matrix"][0] == [None, None]
    assert (tmp_path / "r-average.png").stat().st_size > 1000
    assert (tmp_path / "r-forgetting.png").exists()


def test_targets_choose_the_layers_that_experts_adapt(settings: Settings, data: Path, tmp_path: Path) -> None:
    """Attention alone; chained methods too."""
    backbone = load_backbone(settings.model, settings.model.folder)
    config = asked(data, orders=(ORDERS[0][:2],), targets="attention")
    with made(config, settings, backbone, tmp_path / "work", Silence().tell) as bench:
        course = GateCourse(bench, Examiner(bench), "mora", (ORDERS[0][:2], 0))
        course.learn(0)
        course.learn(1)
        layers = bench.adapter(course._records[1]["expert"]).tensors
        assert layers
        assert all("attn" in name for name in layers)
    with (
        pytest.raises(SettingsError, match="no layer above the stem"),
        made(asked(data, targets="nothing"), settings, backbone, tmp_path / "work", Silence().tell),
    ):
        pass


def test_long_rows_are_passed_over_and_counted(settings: Settings, data: Path) -> None:
    """The next row that fits takes the place; none that fits is an error."""
    backbone = load_backbone(settings.model, settings.model.folder)
    rows = load_task(data, "letters").train
    long = [type(rows[0])(input="x" * 300, output="y"), *rows[:5]]
    chosen = choose(long, 6, 64, "letters", backbone)
    assert (len(chosen.kept), chosen.passed_over) == (5, 1)
    with pytest.raises(SettingsError, match="raise --max-tokens"):
        choose(long[:1], 1, 64, "letters", backbone)


def test_a_missing_task_an_empty_file_and_a_bad_line_are_named(data: Path, tmp_path: Path) -> None:
    """Errors say what is there, or which line it is."""
    with pytest.raises(SettingsError, match="it holds digits, letters, signs"):
        load_tasks(data, ["nouns"])
    with pytest.raises(SettingsError, match="no folder"):
        load_tasks(tmp_path / "nowhere", ["a"])
    (tmp_path / "a.train.jsonl").write_text("\n")
    with pytest.raises(SettingsError, match=r"a\.train\.jsonl is empty"):
        load_tasks(tmp_path, ["a"])
    (tmp_path / "a.train.jsonl").write_text('{"input": "x", "output": "y"}\n{"input": "x"}\n')
    with pytest.raises(SettingsError, match=r"a\.train\.jsonl, line 2"):
        load_tasks(tmp_path, ["a"])
    (tmp_path / "a.train.jsonl").write_text('{"input": "x", "output": "y"}\n')
    with pytest.raises(SettingsError, match=r"a\.test\.jsonl cannot be read"):
        load_tasks(tmp_path, ["a"])


def test_unknown_methods_and_uneven_orders_are_refused(data: Path) -> None:
    """With what there is."""
    with pytest.raises(SettingsError, match="closed_form.*sequential, oracle, joint"):
        methods_named(["clairvoyance"])
    assert set(DEFAULT_METHODS) <= set(methods_named(["all"]))
    assert methods_named(["hybrid_young"]) == ("hybrid_young",), "an ablation, not one of all"
    with pytest.raises(SettingsError, match="does not hold each task"):
        asked(data, orders=(("letters", "digits"), ("letters", "signs")))


def test_what_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    """Half a file is computed again."""
    store = Store(tmp_path)
    store.put_tensors("kind", "key", {"x": torch.arange(3), "y": torch.ones(2, 2).t()})
    kept = store.tensors("kind", "key")
    assert kept is not None
    assert torch.equal(kept["x"], torch.arange(3))
    (tmp_path / "kind" / "key.safetensors").write_bytes(b"half")
    (tmp_path / "kind" / "key.json").write_text('{"a"')
    assert store.tensors("kind", "key") is None
    assert store.value("kind", "key") is None


class OrderFreeGate(SumGate):
    """Its experts train in a company of nobody."""

    is_order_free = True

    def company(self, stage: Stage, lesson: Lesson) -> Among:
        """The new expert and no other."""
        del lesson
        return Among(replace(stage, slots={}))


def test_experts_of_an_order_free_gate_are_shared_by_all_orders(
    bench: Workbench, trainings: list[int]
) -> None:
    """Two orders, three trainings."""
    shared = replace(bench, student=lambda _: OrderFreeGate())
    for order in ORDERS:
        course = GateCourse(shared, Examiner(shared), "free", (order, 0))
        for t in range(3):
            course.learn(t)
    assert len(trainings) == 3


@pytest.mark.parametrize("method", [name for name in GATES if name != "base"])
def test_every_gate_decides_out_of_the_store_as_it_did(bench: Workbench, method: str) -> None:
    """Learned twice, scored; restored into a fresh gate, scored again: the same rows, the same leaders."""
    order = ORDERS[0][:2]
    first = GateCourse(bench, Examiner(bench), method, (order, 0))
    for t in range(2):
        first.learn(t)
    cells = [first.answer(1, name) for name in order]
    shutil.rmtree(bench.store.folder / "cells")
    again = GateCourse(bench, Examiner(bench), method, (order, 0))
    for t in range(2):
        again.learn(t)
    for name, cell in zip(order, cells, strict=True):
        restored = again.answer(1, name)
        assert np.array_equal(restored.is_exact, cell.is_exact)
        assert restored.leaders is not None
        assert np.array_equal(restored.leaders, cell.leaders)


def test_a_folder_that_cannot_be_written_ends_a_run_in_one_line(tmp_path: Path) -> None:
    """--work that names a file, or a full disk: what is wrong and what to do; nothing half-written stays."""
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert store.value("cells", "a") is None
    assert store.tensors("cells", "a") is None
    with pytest.raises(StoreError, match="name a folder that can .--work"):
        store.put_value("cells", "a", 1)
    with pytest.raises(StoreError, match="name a folder that can .--work"):
        store.put_tensors("cells", "a", {"x": torch.zeros(1)})
