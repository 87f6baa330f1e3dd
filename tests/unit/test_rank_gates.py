"""Gates that weigh ranks: their formulas against plain references, their learning, and what they promise about rows."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from models import random_adapter, tiny_llama
from torch import Tensor

from dylora_stream.core.recipes import Recipe
from dylora_stream.core.routing import Routing
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone, Tokens, load_backbone
from dylora_stream.model.config import ModelConfig, PoolConfig
from dylora_stream.model.decoding import generate
from dylora_stream.model.features import LabelledText, read_stem
from dylora_stream.model.gates.arrow import ArrowConfig, ArrowGate, prototype
from dylora_stream.model.gates.attention import AttentionGate
from dylora_stream.model.gates.base import Lesson, Memory, Scene, Stage, Student
from dylora_stream.model.gates.compose import ComposeConfig, ComposeGate
from dylora_stream.model.gates.flylora import FlyLoRAConfig, FlyLoRAGate, initial_adapter
from dylora_stream.model.gates.hierarchical import HierarchicalGate
from dylora_stream.model.gates.learning import Learning, by_ranks, learn_by_answers
from dylora_stream.model.gates.members import member_softmax, spread, top_members, top_softmax
from dylora_stream.model.gates.mixlora import MixLoRAGate
from dylora_stream.model.gates.mora import MoRAConfig, MoRAGate, MoRARanks
from dylora_stream.model.gates.row_ranks import as_routing
from dylora_stream.model.gates.smora import SMoRAConfig, SMoRAGate
from dylora_stream.model.gates.xlora import XLoRAGate
from dylora_stream.model.mixture import YOUNG_SLOT, LayerView, Pool
from dylora_stream.model.stem import StemHook, StemOutput
from dylora_stream.model.training import TrainingOptions, train_expert

RANK = 4
TEXTS = ["one two three", "a", "a longer text than the others are", "??", "x y"]
QUICK = Learning(steps=2, rows=4)
RECIPE = Recipe(
    rank=RANK, alpha=float(RANK), epochs=1, batch_size=4, warmup_share=0.0, decay_share=0.0, rate=1e-2
)

GATES = {
    "smora": lambda: SMoRAGate(SMoRAConfig(budget=4)),
    "flylora": lambda: FlyLoRAGate(FlyLoRAConfig(budget=4)),
    "arrow": ArrowGate,
    "xlora": lambda: XLoRAGate(QUICK),
    "amlora": lambda: AttentionGate(QUICK),
    "mixlora": MixLoRAGate,
    "compose": lambda: ComposeGate(ComposeConfig(budget=4)),
    "hierarchical": HierarchicalGate,
    "mora": lambda: MoRAGate(MoRAConfig(budget=4)),
}
IN_COMPANY = ("smora", "flylora", "mixlora", "compose", "hierarchical", "mora")
BY_TOKEN = ("smora", "flylora", "arrow", "xlora", "amlora", "mora")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny Llama, its stem two layers, read behind the first."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    config = ModelConfig(name="tiny", dtype="float32", stem_layers=2, feature_layers=1, threads=1)
    return load_backbone(config, folder)


@pytest.fixture
def stage(backbone: Backbone) -> Iterator[Stage]:
    """An empty pool of six slots."""
    pool, hook = Pool(backbone, PoolConfig(slots=6, rank=RANK)), StemHook(backbone)
    yield Stage(backbone=backbone, pool=pool, hook=hook, slots={})
    pool.close()
    hook.close()


def memory_of(backbone: Backbone, expert_id: str) -> Memory:
    """Eight rows of a kind, told apart by their words."""
    rows = [
        LabelledText(input=f"{expert_id * (3 + row)} {row}", output=f"{expert_id}{row % 2}")
        for row in range(8)
    ]
    return Memory(rows=rows, features=read_stem(backbone, [row.input for row in rows]))


def with_slots(stage: Stage, slots: Mapping[str, int]) -> Stage:
    """The same stage with these experts."""
    return Stage(backbone=stage.backbone, pool=stage.pool, hook=stage.hook, slots=dict(slots))


def taught(stage: Stage, gate: Student, expert_ids: str = "abc", *, trained: bool = False) -> Stage:
    """The stage after lessons on experts; with `trained` they train in the gate's company, else they are random."""
    memory: dict[str, Memory] = {}
    for number, expert_id in enumerate(expert_ids):
        memory[expert_id] = memory_of(stage.backbone, expert_id)
        lesson = Lesson(expert_id=expert_id, memory=dict(memory), seed=number)
        company = gate.company(stage, lesson)
        adapter = random_adapter(stage.backbone, number + 1)
        if trained:
            start = gate.start(stage, lesson) if isinstance(gate, FlyLoRAGate) else None
            options = TrainingOptions(seed=number, company=company, start=start)
            adapter = train_expert(stage.backbone, lesson.own.rows, RECIPE, options).adapter
        stage.pool.write(number + 1, adapter)
        stage = with_slots(stage, {**stage.slots, expert_id: number + 1})
        gate.learn(stage, lesson)
    return stage


def scene_of(stage: Stage, rows: int, allowed: np.ndarray | None = None) -> Scene:
    """Rows that every expert may answer."""
    ids = tuple(stage.slots)
    everyone = np.ones((rows, len(ids)), dtype=bool)
    return Scene(
        allowed=everyone if allowed is None else allowed,
        is_beyond=np.zeros(rows, dtype=bool),
        is_mature=np.ones(len(ids), dtype=bool),
        discriminant=None,
        network=None,
        expert_ids=ids,
    )


def gates_of(stage: Stage, routing: Routing) -> tuple[Tensor, Tensor]:
    """Slots and weights as serving computes them."""
    slots = np.array([*stage.slots.values(), 0])
    weights = routing.weights if routing.rank_weights is None else routing.rank_weights
    return torch.from_numpy(slots[routing.experts]), torch.from_numpy(weights)


def served(stage: Stage, gate: Student, texts: list[str]) -> Tensor:
    """(n, V) logits behind the prompts, routed at the stem."""
    tokens = stage.backbone.encode(texts)
    with torch.no_grad(), stage.hook.routing(tokens.attention_mask, decider(stage, gate)):
        logits = stage.backbone.model(**tokens.inputs()).logits[:, -1]
    stage.pool.no_gates()
    return logits


def decider(stage: Stage, gate: Student) -> Any:
    """What a stem hook calls."""

    def decide(stem: StemOutput) -> None:
        routing = gate.decide(stem, scene_of(stage, len(stem.mask)))
        stage.pool.set_gates(*gates_of(stage, routing), gate.ranks)

    return decide


def view_of(stage: Stage, *, shares: Tensor | None = None, rows: int = 2, seed: int = 0) -> LayerView:
    """Random inputs at the first adapted layer, with A x of the experts that stand."""
    layer, (d_in, _) = next(iter(stage.pool.shapes.items()))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((rows, 3, d_in), generator=generator)
    slots = torch.tensor(list(stage.slots.values()))
    low = torch.stack([inputs @ stage.pool.blocks(int(slot), layer)[0].t() for slot in slots], dim=2)
    shares = torch.ones((rows, len(slots))) if shares is None else shares
    states = torch.randn((rows, 3, stage.backbone.width), generator=generator)
    return LayerView(layer, inputs, low, slots, shares, states)


def softmax(values: np.ndarray) -> np.ndarray:
    """Of a vector."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def each_token(view: LayerView) -> list[tuple[int, int]]:
    """(row, position) pairs."""
    return [(row, place) for row in range(view.inputs.shape[0]) for place in range(view.inputs.shape[1])]


def test_mora_weighs_the_signed_largest_and_cuts_only_while_serving(stage: Stage) -> None:
    """Softmax over the largest signed scores of members; under the cut 0, not renormalised; in training no cut."""
    gate = MoRAGate(MoRAConfig(budget=3, temperature=0.2, cut=0.4))
    stage = taught(stage, gate)
    view = view_of(stage, shares=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.5]]))
    serving, training = (
        gate.ranks.weigh(view),
        MoRARanks(MoRAConfig(budget=3, temperature=0.2), 0.0).weigh(view),
    )
    for row, place in each_token(view):
        member = np.repeat(view.shares[row].numpy() != 0, RANK)
        low = view.low[row, place].flatten().double().numpy()
        scores = np.where(member, low / np.linalg.norm(low[member]), -np.inf)
        top = np.argsort(-scores)[:3]
        expected = np.zeros_like(scores)
        expected[top] = 3 * softmax(scores[top] / 0.2)
        np.testing.assert_allclose(training[row, place].flatten(), expected, atol=1e-5)
        np.testing.assert_allclose(
            serving[row, place].flatten(), np.where(scores >= 0.4, expected, 0), atol=1e-5
        )
    assert (serving == 0).sum() > (training == 0).sum()


def test_mora_divides_by_no_zero(stage: Stage) -> None:
    """Where A x is 0 weights are finite while training and 0 while serving."""
    gate = MoRAGate()
    view = view_of(taught(stage, gate))
    silent = LayerView(view.layer, view.inputs, view.low * 0, view.slots, view.shares, view.states)
    assert torch.isfinite(MoRARanks(MoRAConfig(), 0.0).weigh(silent)).all()
    assert not gate.ranks.weigh(silent).any()


def test_smora_shares_the_budget_by_sigmoid_and_selects_by_bias(stage: Stage) -> None:
    """k s / Σ s over the k largest s + bias; the bias moves the choice and not the weight."""
    gate = SMoRAGate(SMoRAConfig(budget=5))
    stage = taught(stage, gate)
    view = view_of(stage, shares=torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    state = gate.state()
    state[f"bias:{view.layer}:b"] = torch.tensor([9.0, 0.0, 0.0, 0.0])
    gate.restore(state)
    weights = gate.ranks.weigh(view)
    rows = torch.cat([state[f"rows:{view.layer}:{name}"] for name in "abc"]).double().numpy()
    bias = torch.cat([state[f"bias:{view.layer}:{name}"] for name in "abc"]).numpy()
    for row, place in each_token(view):
        member = np.repeat(view.shares[row].numpy() != 0, RANK)
        scores = 1 / (1 + np.exp(-rows @ view.inputs[row, place].double().numpy()))
        top = np.argsort(-np.where(member, scores + bias, -np.inf))[: min(5, member.sum())]
        expected = np.zeros_like(scores)
        expected[top] = len(top) * scores[top] / scores[top].sum()
        np.testing.assert_allclose(weights[row, place].flatten(), expected, atol=1e-5)
        assert weights[row, place, 1, 0] > 0


def test_flylora_opens_the_ranks_with_the_largest_moved_output(stage: Stage) -> None:
    """1 for the k largest |A x + d|, among members alone."""
    gate = FlyLoRAGate(FlyLoRAConfig(budget=5))
    stage = taught(stage, gate)
    view = view_of(stage, shares=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    state = gate.state()
    state[f"bias:{view.layer}:c"] = torch.tensor([0.5, -0.5, 0.0, 0.0])
    gate.restore(state)
    weights = gate.ranks.weigh(view)
    bias = torch.stack([state[f"bias:{view.layer}:{name}"] for name in "abc"])
    for row, place in each_token(view):
        member = np.repeat(view.shares[row].numpy() != 0, RANK)
        moved = np.where(member, (view.low[row, place] + bias).abs().flatten().numpy(), -np.inf)
        expected = np.zeros(3 * RANK)
        expected[np.argsort(-moved)[: min(5, member.sum())]] = 1
        np.testing.assert_array_equal(weights[row, place].flatten(), expected)


def test_flylora_starts_sparse_random_and_silent(stage: Stage) -> None:
    """A quarter of A's entries in each row, another A for each expert, the same for the same seed; B zero."""
    gate, memory = FlyLoRAGate(), {"a": memory_of(stage.backbone, "a"), "b": memory_of(stage.backbone, "b")}
    first, second, again = (
        gate.start(stage, Lesson(expert_id=name, memory=memory, seed=3)) for name in ("a", "b", "a")
    )
    for layer, (d_in, _) in stage.pool.shapes.items():
        a, b = first.tensors[layer]
        assert ((a != 0).sum(1) == round(d_in / 4)).all()
        assert not b.any()
        assert torch.equal(a, again.tensors[layer][0])
        assert not torch.equal(a, second.tensors[layer][0])
    assert initial_adapter({"x": (1, 1)}, 2, 0).tensors["x"][0].all()


def test_arrow_points_along_the_product_and_mixes_the_top(stage: Stage) -> None:
    """Directions are the product's first right-singular vectors; weights the softmax over the largest |x·v| / T."""
    gate = ArrowGate(ArrowConfig(top_k=2, temperature=0.5))
    stage = taught(stage, gate)
    view = view_of(stage, shares=torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    weights = gate.ranks.weigh(view)[..., 0]
    directions = []
    for slot in stage.slots.values():
        a, b = stage.pool.blocks(slot, view.layer)
        directions.append(torch.linalg.svd(b.double() @ a.double()).Vh[0].numpy())
    for row, place in each_token(view):
        scores = np.abs(np.stack(directions) @ view.inputs[row, place].double().numpy())
        scores = np.where(view.shares[row].numpy() != 0, scores, -np.inf)
        top = [index for index in np.argsort(-scores)[:2] if np.isfinite(scores[index])]
        expected = np.zeros(3)
        expected[top] = softmax(scores[top] / 0.5)
        np.testing.assert_allclose(weights[row, place], expected, atol=1e-5)
    assert not prototype(torch.ones((2, 5)), torch.zeros((3, 2))).any()


def test_xlora_is_a_softmax_of_a_small_network_on_stem_states(stage: Stage) -> None:
    """The same softmax as by hand, over members; and learning has moved it away from the mean."""
    gate = XLoRAGate(QUICK)
    stage = taught(stage, gate)
    view, state = view_of(stage, shares=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])), gate.state()
    columns = np.stack([state[f"column:{view.layer}:{name}"].double().numpy() for name in "abc"])
    weights = gate.ranks.weigh(view)[..., 0]
    for row, place in each_token(view):
        h = view.states[row, place].double().numpy()
        h = (h - h.mean()) / np.sqrt(h.var() + 1e-5)
        units = np.tanh(state["hidden::"].double().numpy() @ h / np.sqrt(len(h)))
        logits = np.where(view.shares[row].numpy() != 0, columns @ units, -np.inf)
        np.testing.assert_allclose(weights[row, place], softmax(logits), atol=1e-5)
    assert columns.any()


def test_amlora_attends_to_what_experts_would_say(stage: Stage) -> None:
    """The same attention as by hand, over members; and learning has moved it away from the mean."""
    gate = AttentionGate(QUICK)
    stage = taught(stage, gate)
    view, state = view_of(stage, shares=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])), gate.state()
    query = state[f"query:{view.layer}:"].double().numpy()
    keys = [state[f"key:{view.layer}:{name}"].double().numpy() for name in "abc"]
    weights = gate.ranks.weigh(view)[..., 0]
    for row, place in each_token(view):
        x, low = view.inputs[row, place].double().numpy(), view.low[row, place].double().numpy()
        size = np.sqrt((x**2).mean())
        q = query @ x / size / np.sqrt(len(x))
        logits = np.array([q @ key @ low[expert] / size / 4 for expert, key in enumerate(keys)])
        logits = np.where(view.shares[row].numpy() != 0, logits, -np.inf)
        np.testing.assert_allclose(weights[row, place], softmax(logits), atol=1e-5)
    assert any(key.any() for key in keys)


def test_amlora_asks_for_little_attention_beside_the_largest(stage: Stage) -> None:
    """The penalty of one expert alone is 0, of equal ones it is 1 - 1/E."""
    gate = AttentionGate(Learning(steps=1, rows=4, rate=1e-9))
    stage = taught(stage, gate)
    for shares, expected in (([[0.0, 1.0, 0.0]], 0.0), ([[1.0, 1.0, 1.0]], 2 / 3)):
        view = view_of(stage, shares=torch.tensor(shares), rows=1)
        with gate.ranks.watched(torch.ones((1, 3), dtype=torch.bool)):
            gate.ranks.weigh(view)
        assert float(gate.ranks.off()) == pytest.approx(expected, abs=1e-4)


def test_mixlora_multiplies_two_choices_of_factors(stage: Stage) -> None:
    """r times each softmax over r of the E·r factors, the second conditioned on the first; allowed experts alone."""
    gate = MixLoRAGate()
    stage = taught(stage, gate)
    state = gate.state()
    generator = torch.Generator().manual_seed(0)
    for key in state:
        if key.startswith(("choose", "condition")):
            state[key] = torch.randn(state[key].shape, generator=generator)
    gate.restore(state)
    stem, allowed = stem_of(stage), np.ones((len(TEXTS), 3), dtype=bool)
    allowed[1] = [False, True, False]
    found = dense(gate.decide(stem, scene_of(stage, len(TEXTS), allowed)), 3)
    parts = {
        part: np.concatenate([state[f"{part}::{name}"].double().numpy() for name in "abc"])
        for part in ("choose_a", "choose_b", "condition")
    }
    for row, z in enumerate(by_hand(stem, state)):
        member = np.repeat(allowed[row], RANK)
        first = top_by_hand(parts["choose_a"] @ z, member, RANK)
        condition = parts["condition"] @ (first @ parts["choose_a"] / RANK)
        expected = first * top_by_hand(parts["choose_b"] @ z + condition, member, RANK)
        np.testing.assert_allclose(found[row].flatten(), expected, atol=1e-3)


def test_compose_serves_each_row_its_own_ranks_and_votes_in_training(stage: Stage) -> None:
    """R times the softmax over the R largest; in training all rows get the R ranks that the batch voted for."""
    gate = ComposeGate(ComposeConfig(budget=3))
    stage = taught(stage, gate)
    state, stem = gate.state(), stem_of(stage)
    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        state[f"rows::{name}"] = torch.randn(state[f"rows::{name}"].shape, generator=generator)
    gate.restore(state)
    rows = np.concatenate([state[f"rows::{name}"].double().numpy() for name in "abc"])
    z = by_hand(stem, state)
    served_ranks = np.stack([top_by_hand(rows @ row, np.ones(3 * RANK, dtype=bool), 3) for row in z])
    found = dense(gate.decide(stem, scene_of(stage, len(TEXTS))), 3)
    np.testing.assert_allclose(found.reshape(len(TEXTS), -1), served_ranks, atol=1e-4)
    elected = np.argsort(-served_ranks.sum(0))[:3]
    everyone = torch.ones((len(TEXTS), 3), dtype=torch.bool)
    voted = gate.weigh(gate.prepared(stem.features), ["a", "b", "c"], everyone, is_training=True).flatten(1)
    assert all(set(np.flatnonzero(row)) == set(elected) for row in voted.numpy())
    np.testing.assert_allclose(voted.sum(1), 3.0, atol=1e-4)


def test_compose_keeps_new_ranks_away_from_often_used_ones(stage: Stage) -> None:
    """The penalty is the mean over layers of Σ |A_new aᵀ| over the old ranks used at least as much as the mean."""
    gate = ComposeGate(ComposeConfig(budget=4, orthogonality=2.0))
    stage = taught(stage, gate, "ab")
    lesson = Lesson(expert_id="c", memory={"c": memory_of(stage.backbone, "c")}, seed=0)
    company = gate.company(stage, lesson)
    pairs = random_adapter(stage.backbone, 9).tensors
    state = gate.state()
    mean = float(torch.cat([state["use::a"], state["use::b"]]).mean())
    total = 0.0
    for layer, (a, _) in pairs.items():
        for name, slot in stage.slots.items():
            old = stage.pool.blocks(slot, layer)[0][state[f"use::{name}"] >= mean]
            total += float((a @ old.t()).abs().sum())
    assert total > 0
    assert float(company.penalty(pairs)) == pytest.approx(2 * total / len(pairs), rel=1e-4)


def test_new_ranks_win_on_their_own_rows_from_the_start(stage: Stage) -> None:
    """A rank that is never chosen never learns: a young expert's ranks are chosen where it will learn."""
    for gate in (MixLoRAGate(), ComposeGate(ComposeConfig(budget=RANK))):
        here = taught(with_slots(stage, {}), gate, "ab")
        memory = {name: memory_of(stage.backbone, name) for name in "abz"}
        gate.company(here, Lesson(expert_id="z", memory=memory, seed=0))
        z = gate.prepared(torch.from_numpy(memory["z"].features))
        weights = gate.weigh(z, ["a", "b", "z"], torch.ones((len(z), 3), dtype=torch.bool), is_training=False)
        assert (weights[:, 2].sum(-1) > weights[:, :2].sum((1, 2))).all()


def test_hierarchical_is_the_expert_gate_times_mora_inside(stage: Stage) -> None:
    """A row with one member gets the same weights whoever else is in the batch, or stands in the pool."""
    gate = HierarchicalGate()
    stage = taught(stage, gate)
    alone = view_of(with_slots(stage, {"b": 2}))
    together = view_of(stage, shares=torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.5, 1.0]]))
    torch.testing.assert_close(gate.ranks.weigh(together)[0, :, 1], gate.ranks.weigh(alone)[0, :, 0])
    assert gate.parameters == 0


@pytest.mark.parametrize("method", ["hierarchical", "mora", "smora", "flylora", "arrow", "xlora", "amlora"])
def test_a_row_of_one_expert_does_not_see_the_others(stage: Stage, method: str) -> None:
    """Gates set to one expert give a row the same logits alone and beside rows of other experts."""
    gate = GATES[method]()
    stage = taught(stage, gate)
    tokens = stage.backbone.encode(TEXTS)
    members = torch.tensor([[2, 0], [1, 3], [3, 1], [0, 0], [1, 2]])
    with torch.no_grad():
        base = stage.backbone.model(**tokens.inputs()).logits[:, -1]
        stage.pool.set_gates(members, torch.ones(members.shape), gate.ranks)
        together = stage.backbone.model(**tokens.inputs()).logits[:, -1]
        stage.pool.set_gates(torch.tensor([[2]]), torch.ones((1, 1)), gate.ranks)
        alone = stage.backbone.model(**stage.backbone.encode(TEXTS[:1]).inputs()).logits[:, -1]
    stage.pool.no_gates()
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(together[3], base[3])
    assert not torch.allclose(together[0], base[0], atol=1e-2)


@pytest.mark.parametrize("method", GATES)
def test_a_batch_equals_its_rows_one_by_one(stage: Stage, method: str) -> None:
    """No gate lets a row's answer depend on its neighbours."""
    gate = expert_free(GATES[method](), method)
    stage = taught(stage, gate)
    together = served(stage, gate, TEXTS)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(together[row], served(stage, gate, [text])[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", GATES)
def test_decoding_writes_what_each_row_writes_alone(stage: Stage, method: str) -> None:
    """Rows leave the batch, the gates of the others stay."""
    gate = expert_free(GATES[method](), method)
    stage = taught(stage, gate)
    tokens = stage.backbone.encode(TEXTS)
    written = []
    for part in (tokens, *(stage.backbone.encode([text]) for text in TEXTS)):
        with torch.no_grad(), stage.hook.routing(part.attention_mask, decider(stage, gate)):
            written += generate(stage.backbone, stage.pool, part, 6)
        stage.pool.no_gates()
    assert written[: len(TEXTS)] == written[len(TEXTS) :]


@pytest.mark.parametrize("method", GATES)
def test_kept_rows_go_on_with_their_gates(stage: Stage, method: str) -> None:
    """Rows in another order, one of them twice, get what they got."""
    gate = expert_free(GATES[method](), method)
    stage = taught(stage, gate)
    tokens, index = stage.backbone.encode(TEXTS), torch.tensor([3, 0, 0, 4])
    whole = served(stage, gate, TEXTS)
    with torch.no_grad():
        with stage.hook.routing(tokens.attention_mask, decider(stage, gate)):
            stage.backbone.model(**tokens.inputs())
        stage.pool.keep_rows(index)
        kept = stage.backbone.model(**{key: part[index] for key, part in tokens.inputs().items()}).logits[
            :, -1
        ]
    stage.pool.no_gates()
    torch.testing.assert_close(kept, whole[index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", GATES)
def test_a_restored_gate_weighs_bit_for_bit_the_same(stage: Stage, method: str) -> None:
    """A fresh gate with the state of a taught one gives the same logits, and goes on learning."""
    gate = expert_free(GATES[method](), method)
    stage = taught(stage, gate)
    fresh = expert_free(GATES[method](), method)
    state = {key: tensor.clone() for key, tensor in sorted(gate.state().items())}
    fresh.restore(state)
    assert torch.equal(served(stage, fresh, TEXTS), served(stage, gate, TEXTS))
    assert {key: tensor.tolist() for key, tensor in fresh.state().items()} == {
        key: tensor.tolist() for key, tensor in state.items()
    }
    assert fresh.parameters == gate.parameters
    memory = {name: memory_of(stage.backbone, name) for name in "abcd"}
    lesson = Lesson(expert_id="d", memory=memory, seed=1)
    for student in (gate, fresh):
        student.company(stage, lesson)
        student.learn(with_slots(stage, {**stage.slots, "d": 4}), lesson)
    for key, tensor in gate.state().items():
        assert torch.equal(fresh.state()[key], tensor)


@pytest.mark.parametrize("method", GATES)
def test_a_copy_of_a_gate_learns_apart_from_it(stage: Stage, method: str) -> None:
    """A deep copy goes on as the gate itself would, and leaves the gate as it was."""
    gate = expert_free(GATES[method](), method)
    stage = taught(stage, gate, "ab")
    logits, state = served(stage, gate, TEXTS), gate.state()
    fresh = copy.deepcopy(gate)
    assert torch.equal(served(stage, fresh, TEXTS), logits)
    memory = {name: memory_of(stage.backbone, name) for name in "abc"}
    lesson, larger = Lesson(expert_id="c", memory=memory, seed=1), with_slots(stage, {**stage.slots, "c": 3})
    stage.pool.write(3, random_adapter(stage.backbone, 3))
    fresh.company(stage, lesson)
    fresh.learn(larger, lesson)
    assert {key: value.tolist() for key, value in gate.state().items()} == {
        key: value.tolist() for key, value in state.items()
    }
    gate.company(stage, lesson)
    gate.learn(larger, lesson)
    assert {key: value.tolist() for key, value in gate.state().items()} == {
        key: value.tolist() for key, value in fresh.state().items()
    }


@pytest.mark.parametrize("method", IN_COMPANY)
def test_a_young_expert_learns_among_frozen_old_ones(stage: Stage, method: str) -> None:
    """Two steps change the young expert and what the gate holds of it; old blocks and parts keep their bits."""
    gate = expert_free(GATES[method](), method)
    stage = taught(stage, gate, "ab", trained=True)
    blocks = {
        (slot, layer): [part.clone() for part in stage.pool.blocks(slot, layer)]
        for slot in stage.slots.values()
        for layer in stage.pool.shapes
    }
    before = gate.state()
    memory = {name: memory_of(stage.backbone, name) for name in "abc"}
    lesson = Lesson(expert_id="c", memory=memory, seed=5)
    start = gate.start(stage, lesson) if isinstance(gate, FlyLoRAGate) else None
    company = gate.company(stage, lesson)
    drawn = gate.state()
    options = TrainingOptions(seed=5, company=company, start=start)
    trained = train_expert(stage.backbone, lesson.own.rows, RECIPE, options)
    assert len(trained.losses) == 2
    assert any(b.any() for _, b in trained.adapter.tensors.values())
    for (slot, layer), parts in blocks.items():
        for part, now in zip(parts, stage.pool.blocks(slot, layer), strict=True):
            assert torch.equal(part, now)
    after = gate.state()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if method in ("smora", "flylora", "mixlora", "compose"):
        assert any(not torch.equal(drawn[key], after[key]) for key in drawn)
    if start is not None:
        for layer, (a, _) in start.tensors.items():
            assert torch.equal(trained.adapter.tensors[layer][0], a)
    stage.pool.write(3, trained.adapter)
    gate.learn(with_slots(stage, {**stage.slots, "c": 3}), lesson)
    serving = gate.state()
    assert all(torch.equal(before[key], serving[key]) for key in before if not key.startswith("use"))


@pytest.mark.parametrize("method", IN_COMPANY)
def test_training_in_company_repeats_to_the_bit(stage: Stage, method: str) -> None:
    """The same lesson twice gives the same adapter."""
    adapters = []
    for _ in range(2):
        gate = expert_free(GATES[method](), method)
        here = taught(with_slots(stage, {}), gate, "ab", trained=True)
        adapters.append([here.pool.blocks(2, layer)[1].clone() for layer in here.pool.shapes])
    assert all(torch.equal(one, two) for one, two in zip(*adapters, strict=True))


@pytest.mark.parametrize("method", IN_COMPANY)
def test_a_company_reads_rows_where_they_are_served_from(stage: Stage, method: str) -> None:
    """States that are kept from step to step are not those of a deeper layer: whole passes give the same losses."""
    losses = []
    for may_cache in (True, False):
        gate = expert_free(GATES[method](), method)
        memory = {"a": memory_of(stage.backbone, "a")}
        lesson = Lesson(expert_id="a", memory=memory, seed=0)
        start = gate.start(stage, lesson) if isinstance(gate, FlyLoRAGate) else None
        company = gate.company(stage, lesson)
        options = TrainingOptions(seed=0, company=company, start=start, may_cache_stem=may_cache)
        losses.append(train_expert(stage.backbone, lesson.own.rows, RECIPE, options).losses)
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("method", IN_COMPANY)
def test_what_trained_in_company_is_served_the_same(stage: Stage, method: str) -> None:
    """In its slot the expert gets the logits it had while young: the scale lies within B. MoRA's cut is off."""
    gate = expert_free(GATES[method](), method)
    stage = taught(stage, gate, "ab")
    memory = {name: memory_of(stage.backbone, name) for name in "abc"}
    lesson = Lesson(expert_id="c", memory=memory, seed=5)
    company = gate.company(stage, lesson)
    young, scale = random_adapter(stage.backbone, 7), 0.5
    tokens = stage.backbone.encode(TEXTS[:1])
    with torch.no_grad():
        with company.joined(young.tensors, scale), company.batch(tokens):
            among = stage.backbone.model(**tokens.inputs()).logits[:, -1]
        baked = {layer: (a, b * scale) for layer, (a, b) in young.tensors.items()}
        stage.pool.write(3, Adapter(rank=RANK, tensors=baked))
        whole = with_slots(stage, {**stage.slots, "c": 3})
        gate.learn(whole, lesson)
        ranks = MoRARanks(MoRAConfig(budget=4), 0.0) if method in ("mora", "hierarchical") else gate.ranks
        if gate.ranks is None:
            standing = served(whole, gate, TEXTS[:1])
        else:
            members = torch.tensor([[3] if method == "hierarchical" else [1, 2, 3]])
            stage.pool.set_gates(members, torch.ones(members.shape), ranks)
            standing = stage.backbone.model(**tokens.inputs()).logits[:, -1]
    stage.pool.no_gates()
    torch.testing.assert_close(standing, among, atol=1e-3, rtol=1e-3)


def test_a_hierarchical_expert_trains_alone(stage: Stage) -> None:
    """With B = 0 it leaves the backbone as it is; its training does not depend on who came before."""
    gate = HierarchicalGate()
    memory = {"z": memory_of(stage.backbone, "z")}
    lesson, tokens = Lesson(expert_id="z", memory=memory, seed=0), stage.backbone.encode(TEXTS)
    adapters = []
    for before in ("", "ab"):
        here = taught(with_slots(stage, {}), gate, before)
        silent = {layer: (a, b * 0) for layer, (a, b) in random_adapter(stage.backbone, 1).tensors.items()}
        company = gate.company(here, lesson)
        with torch.no_grad():
            base = stage.backbone.model(**tokens.inputs()).logits
            with company.joined(silent, 1.0), company.batch(tokens):
                assert torch.equal(stage.backbone.model(**tokens.inputs()).logits, base)
        options = TrainingOptions(seed=0, company=company)
        adapters.append(train_expert(stage.backbone, lesson.own.rows, RECIPE, options).adapter)
    for layer, (a, b) in adapters[0].tensors.items():
        assert torch.equal(a, adapters[1].tensors[layer][0])
        assert torch.equal(b, adapters[1].tensors[layer][1])


@pytest.mark.parametrize("method", ["smora", "flylora"])
def test_biases_lift_ranks_that_are_used_too_little(stage: Stage, method: str) -> None:
    """After a step a young bias has moved by the rate: up where its rank was chosen less than the mean, else down."""
    make = {
        "smora": lambda: SMoRAGate(SMoRAConfig(budget=3, bias_rate=0.25)),
        "flylora": lambda: FlyLoRAGate(FlyLoRAConfig(budget=3, bias_rate=0.25)),
    }
    gate = make[method]()
    stage = taught(stage, gate, "a")
    lesson = Lesson(expert_id="b", memory={"b": memory_of(stage.backbone, "b")}, seed=1)
    company, young = gate.company(stage, lesson), random_adapter(stage.backbone, 5)
    tokens, seen = stage.backbone.encode(TEXTS), {}
    weigh = gate.ranks.weigh

    def watched(view: LayerView) -> Tensor:
        weights = weigh(view)
        is_real = tokens.attention_mask.bool()[:, :, None, None]
        seen[view.layer] = ((weights != 0) & is_real).sum((0, 1)).float(), view.slots
        return weights

    gate.ranks.weigh = watched
    with torch.no_grad(), company.joined(young.tensors, 1.0), company.batch(tokens):
        stage.backbone.model(**tokens.inputs())
    company.stepped()
    state = gate.state()
    for layer, (use, slots) in seen.items():
        mine = use[slots == YOUNG_SLOT][0]
        torch.testing.assert_close(state[f"bias:{layer}:b"], 0.25 * (use.mean() - mine).sign())
        assert not state[f"bias:{layer}:a"].any()
    assert any(state[f"bias:{layer}:b"].any() for layer in seen)


def test_learning_takes_rows_of_all_experts_in_turn(stage: Stage) -> None:
    """Every step sees as many rows of each expert, the parameters move, and nothing keeps a gradient."""
    gate = XLoRAGate(QUICK)
    stage = taught(stage, gate, "ab")
    memory = {name: memory_of(stage.backbone, name) for name in "ab"}
    lesson = Lesson(expert_id="b", memory=memory, seed=2)
    seen: list[str] = []
    gating = by_ranks(stage, gate.ranks)

    def watched(tokens: Tokens) -> Any:
        seen.extend(
            stage.backbone.decode(row[mask.bool()].tolist())
            for row, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)
        )
        return gating(tokens)

    gate.ranks.forget()
    moved = gate._table.tensors(gate.trained_parts)
    before = [tensor.clone() for tensor in moved]
    learn_by_answers(stage, lesson, watched, moved, Learning(steps=3, rows=4))
    assert len(seen) == 12
    assert sum("aaa" in text for text in seen) == sum("bbb" in text for text in seen) == 6
    assert any(not torch.equal(old, new) for old, new in zip(before, moved, strict=True))
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in moved)


def test_learning_minds_its_penalty(stage: Stage) -> None:
    """A heavy penalty on the columns keeps them smaller than none."""
    sizes = []
    for weight in (0.0, 1e4):
        gate = XLoRAGate(QUICK)
        here = taught(with_slots(stage, {}), gate, "ab")
        lesson = Lesson(
            expert_id="b", memory={name: memory_of(stage.backbone, name) for name in "ab"}, seed=2
        )
        moved = gate._table.tensors(["column"])
        config = Learning(
            steps=8, rows=2, penalty=lambda w=weight, parts=moved: w * sum((part**2).sum() for part in parts)
        )
        learn_by_answers(here, lesson, by_ranks(here, gate.ranks), moved, config)
        gate.ranks.forget()
        sizes.append(sum(float((part**2).sum()) for part in moved))
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("method", ["smora", "flylora", "arrow", "xlora", "amlora", "mixlora", "compose"])
def test_other_tenants_experts_take_no_part(stage: Stage, method: str) -> None:
    """A row is answered by the experts it is allowed; without one, by the backbone."""
    gate = GATES[method]()
    stage = taught(stage, gate)
    allowed = np.array([[True, True, True], [False, True, False], [False, False, False]] + [[True] * 3] * 2)
    routing = gate.decide(stem_of(stage), scene_of(stage, len(TEXTS), allowed))
    for row in range(len(TEXTS)):
        members = {expert for expert, _ in routing.members(row) if expert >= 0}
        assert members <= set(np.flatnonzero(allowed[row]))
        weights = [weight for _, weight in routing.members(row)]
        assert weights == sorted(weights, reverse=True)
    assert routing.members(2) == [(-1, 1.0)]


def test_weights_over_members_are_plain_arithmetic() -> None:
    """Sums, counts and zeros of the helpers; rows without a member get zeros and no NaN."""
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0], [1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    member = torch.tensor([[True, True, True, True], [True, False, False, True], [False] * 4])
    assert member_softmax(logits, member)[2].tolist() == [0.0] * 4
    torch.testing.assert_close(member_softmax(logits, member).sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert top_members(logits, member, 2).tolist() == [
        [False, True, True, False],
        [True, False, False, True],
        [False] * 4,
    ]
    torch.testing.assert_close(top_softmax(logits, member, 3).sum(1), torch.tensor([3.0, 2.0, 0.0]))
    torch.testing.assert_close(spread(logits.exp(), member).sum(1), torch.tensor([4.0, 2.0, 0.0]))
    routing = as_routing(np.array([[[0.0, 0.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=np.float32))
    assert routing.experts.tolist() == [[1], [-1]]
    assert routing.rank_weights.tolist() == [[[1.0, 2.0]], [[0.0, 0.0]]]


def expert_free(gate: Any, method: str) -> Any:
    """The gate; `hierarchical` over a fixed expert gate, because the closed form wants a fitted discriminant."""
    if method != "hierarchical":
        return gate
    return HierarchicalGate(MoRAGate(), MoRAConfig(budget=4))


def stem_of(stage: Stage) -> StemOutput:
    """The stem's output of the texts."""
    tokens, seen = stage.backbone.encode(TEXTS), []
    with torch.no_grad(), stage.hook.routing(tokens.attention_mask, seen.append):
        stage.backbone.model(**tokens.inputs())
    return seen[0]


def by_hand(stem: StemOutput, state: Mapping[str, Tensor]) -> np.ndarray:
    """(B, d) prepared features."""
    centre, scale = (state[key].double().numpy() for key in ("centre::", "spread::"))
    return (stem.features.double().numpy() - centre) / scale / np.sqrt(stem.features.shape[1])


def top_by_hand(logits: np.ndarray, member: np.ndarray, k: int) -> np.ndarray:
    """m times the softmax over the m largest members."""
    top = np.argsort(-np.where(member, logits, -np.inf))[: min(k, member.sum())]
    weights = np.zeros(len(logits))
    weights[top] = len(top) * softmax(logits[top])
    return weights


def dense(routing: Routing, experts: int) -> np.ndarray:
    """(n, E, r) rank weights in the order of the experts."""
    weights = np.zeros((len(routing), experts, routing.rank_weights.shape[2]))
    for row, members in enumerate(routing.experts):
        for place, expert in enumerate(members):
            if expert >= 0:
                weights[row, expert] = routing.rank_weights[row, place]
    return weights
