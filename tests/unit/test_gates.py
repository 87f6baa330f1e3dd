"""Gates that weigh experts by row: their formulas, what a new expert may change in them, and how they are served."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_adapter, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dylora_stream.core.errors import SettingsError
from dylora_stream.core.messages import Policy
from dylora_stream.core.novelty import NoveltyConfig
from dylora_stream.core.recipes import Recipe
from dylora_stream.core.routing import METHODS, Routing, RoutingConfig
from dylora_stream.core.statistics import ExpertStatistics, LinearDiscriminant, Moments, Whitening
from dylora_stream.model.backbone import Backbone, Tokens, load_backbone
from dylora_stream.model.config import ModelConfig, PoolConfig
from dylora_stream.model.features import LabelledText, read_rows, read_states, read_stem
from dylora_stream.model.gates import GATES, SERVED_GATES, gate_named
from dylora_stream.model.gates.base import BackboneGate, Lesson, Memory, Scene, Stage, Student
from dylora_stream.model.gates.gain import GainGate
from dylora_stream.model.gates.learning import Learning
from dylora_stream.model.gates.retriever import RetrieverConfig, RetrieverGate
from dylora_stream.model.gates.ridge import PROJECTION_SEED, RidgeConfig, RidgeGate
from dylora_stream.model.gates.rows import Scaling
from dylora_stream.model.gates.sapt import SAPTConfig, SAPTGate
from dylora_stream.model.live import LiveExperts, LoadedExpert
from dylora_stream.model.mixture import Pool
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.router import RouterParts
from dylora_stream.model.stem import StemHook, StemOutput
from dylora_stream.model.training import TrainingOptions, train_expert
from dylora_stream.store.index import FaissIndex

RANK = 4
ROWS = 32  # of each skill
RECIPE = Recipe(rank=RANK, alpha=float(RANK), epochs=2, batch_size=8, rate=1e-2)
SKILLS: dict[str, Callable[[np.random.Generator], str]] = {
    "digits": lambda rng: " ".join(str(number) for number in rng.integers(10, 99, 5)),
    "letters": lambda rng: "".join(rng.choice(list("abcdefgh"), 14)),
    "marks": lambda rng: "".join(rng.choice(list("?!.,;:"), 14)),
}
NAMES = tuple(SKILLS)

BY_ROW: dict[str, Callable[[], Student]] = {
    "closed_form": lambda: gate_named("closed_form", RoutingConfig()),
    "hybrid": lambda: gate_named("hybrid", RoutingConfig()),
    "ridge": lambda: RidgeGate(RidgeConfig(units=128)),
    "router": lambda: gate_named("router", RoutingConfig()),
    "retriever": RetrieverGate,
    "moa": lambda: gate_named("moa", RoutingConfig()),
    "sapt": lambda: SAPTGate(SAPTConfig(steps=100, learning=Learning(steps=2, rows=4))),
    "gainlora": GainGate,
}
SHARING = [name for name in BY_ROW if name != "gainlora"]  # there, old experts stay open to new rows
TOP_ONE = ("closed_form", "ridge", "router", "retriever", "moa")


def texts(skill: str, count: int, seed: int = 0) -> list[str]:
    """Texts of a skill."""
    rng = np.random.default_rng([seed, NAMES.index(skill)])
    return [SKILLS[skill](rng) for _ in range(count)]


@dataclass(frozen=True)
class School:
    """A pool, and the skills' stored rows."""

    stage: Stage
    memory: Mapping[str, Memory]

    def teach(self, gate: Student, begin: int, end: int) -> None:
        """The experts of these skills, one after another, trained in the gate's company where it wants that."""
        for place in range(begin, end):
            name, old = NAMES[place], {NAMES[other]: other + 1 for other in range(place)}
            lesson = Lesson(
                expert_id=name, memory={met: self.memory[met] for met in NAMES[: place + 1]}, seed=place
            )
            company = gate.company(replace(self.stage, slots=old), lesson)
            adapter = random_adapter(self.stage.backbone, place)
            if company is not None:
                options = TrainingOptions(seed=place, company=company)
                adapter = train_expert(self.stage.backbone, lesson.own.rows, RECIPE, options).adapter
            self.stage.pool.write(place + 1, adapter)
            gate.learn(replace(self.stage, slots={**old, name: place + 1}), lesson)

    def stem(self, inputs: list[str]) -> StemOutput:
        """What the gate sees of these."""
        tokens = self.stage.backbone.encode(inputs)
        return StemOutput.of(read_states(self.stage.backbone, tokens), tokens.attention_mask)

    def scene(self, rows: int, experts: int, beyond: tuple[int, ...] = ()) -> Scene:
        """So many mature experts, all allowed."""
        statistics = [
            ExpertStatistics(expert_id=name, rows=self.memory[name].features) for name in NAMES[:experts]
        ]
        return Scene(
            allowed=np.ones((rows, experts), dtype=bool),
            is_beyond=np.isin(np.arange(rows), beyond),
            is_mature=np.ones(experts, dtype=bool),
            discriminant=LinearDiscriminant.fit(statistics),
            network=None,
            expert_ids=NAMES[:experts],
        )

    def decide(self, gate: Student, inputs: list[str], experts: int) -> Routing:
        """The gate's routing of these."""
        return gate.decide(self.stem(inputs), self.scene(len(inputs), experts))

    @torch.no_grad()
    def logits(self, inputs: list[str], routing: Routing) -> Tensor:
        """(n, V) behind the prompts, as routed."""
        slots, backbone = torch.from_numpy(routing.experts + 1), self.stage.backbone
        with self.stage.pool.gated(slots, torch.from_numpy(routing.weights)):
            return backbone.model(**backbone.encode(inputs).inputs()).logits[:, -1]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny Llama, its stem two layers."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    return load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=2, threads=1), folder)


@pytest.fixture(scope="module")
def memory(backbone: Backbone) -> Mapping[str, Memory]:
    """Stored rows of all skills."""
    return {
        name: Memory(
            rows=[LabelledText(input=text, output=name) for text in texts(name, ROWS)],
            features=read_stem(backbone, texts(name, ROWS)),
        )
        for name in NAMES
    }


@pytest.fixture
def school(backbone: Backbone, memory: Mapping[str, Memory]) -> Iterator[School]:
    """An empty pool of four slots."""
    pool, hook = Pool(backbone, PoolConfig(slots=4, rank=RANK)), StemHook(backbone)
    yield School(Stage(backbone=backbone, pool=pool, hook=hook, slots={}), memory)
    pool.close()
    hook.close()


def weights_of(routing: Routing, experts: int) -> np.ndarray:
    """(n, E) weight of each expert, in the experts' order."""
    table = np.zeros((len(routing), experts))
    for row in range(len(routing)):
        for expert, weight in routing.members(row):
            if expert >= 0:
                table[row, expert] = weight
    return table


def test_each_method_has_a_name_a_gate_and_a_place_in_the_setting() -> None:
    """`core` cannot import the gates, so the setting's names are written there again, in any order."""
    assert sorted(GATES) == sorted(METHODS)
    assert set(SERVED_GATES) <= set(GATES)
    for name in GATES:
        assert gate_named(name, RoutingConfig()).name == name


def test_an_unknown_gate_is_refused_with_the_names_there_are() -> None:
    """As a wrong setting."""
    with pytest.raises(SettingsError, match="closed_form.*mora"):
        gate_named("closed-form", RoutingConfig())


@pytest.mark.parametrize("name", SHARING)
def test_each_gate_gives_rows_to_the_expert_they_belong_to(school: School, name: str) -> None:
    """On rows it has not seen, of skills that lie apart; each row's leader leads clearly."""
    gate = BY_ROW[name]()
    school.teach(gate, 0, 3)
    held_out = [text for skill in NAMES for text in texts(skill, 10, seed=1)]
    weights = weights_of(school.decide(gate, held_out, 3), 3)
    assert (weights.argmax(axis=1) == np.repeat(np.arange(3), 10)).mean() >= 0.9
    assert np.median(weights.max(axis=1)) > 0.5
    assert (gate.parameters > 0) == (name in ("ridge", "router", "moa", "sapt"))


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return rows / rows.norm(dim=-1, keepdim=True)


def formula(name: str, state: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """(n, E) scores or weights from a gate's state alone, as its paper writes them."""
    if name == "retriever":
        means = torch.stack([state[f"mean:{expert}"] for expert in NAMES])
        return unit(unit(features) - means.mean(0)) @ unit(means - means.mean(0)).t()
    u = (features - state["mean"]) / state["deviation"]
    z = unit(u) * u.shape[1] ** 0.5
    if name == "ridge":
        generator = torch.Generator().manual_seed(PROJECTION_SEED)
        projection = (
            torch.randn((z.shape[1], 128), generator=generator, dtype=torch.float64) / z.shape[1] ** 0.5
        )
        gram, sums = state["gram"], torch.stack([state[f"sum:{expert}"] for expert in NAMES], dim=1)
        return (z @ projection).relu() @ torch.linalg.solve(gram + gram.trace() / 128 * torch.eye(128), sums)
    if name == "moa":
        return torch.stack(
            [z @ state[f"weight:{expert}"][:-1] + state[f"weight:{expert}"][-1] for expert in NAMES], dim=1
        )
    if name == "sapt":
        hidden = torch.nn.functional.silu(z.float() @ state["down"].t()) @ state["up"].t()
        centred = hidden - hidden.mean(1, keepdim=True)
        query = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        keys = torch.stack([state[f"key:{expert}"] for expert in NAMES])
        return torch.softmax(query @ keys.t() / keys.shape[1] ** 0.5, dim=1)
    gates = []
    for expert in NAMES:
        f = torch.nn.functional.silu(z.float() @ state[f"first:{expert}"].t()) @ state[f"second:{expert}"].t()
        cosine = unit(f) @ unit(state[f"key:{expert}"][None])[0]
        gates.append((2 * torch.sigmoid(4 * cosine) - 1).abs())
    return torch.stack(gates, dim=1)


@pytest.mark.parametrize("name", ["ridge", "retriever", "moa", "sapt", "gainlora"])
def test_a_gate_decides_as_its_formula(school: School, name: str) -> None:
    """Computed anew from the state; ridge, retrieval and the classifier take the best, the others weigh all."""
    gate = BY_ROW[name]()
    school.teach(gate, 0, 3)
    inputs = [text for skill in NAMES for text in texts(skill, 5, seed=2)]
    expected = formula(name, gate.state(), school.stem(inputs).features.double()).numpy()
    routing = school.decide(gate, inputs, 3)
    if name in TOP_ONE:
        assert routing.experts[:, 0].tolist() == expected.argmax(axis=1).tolist()
        assert routing.policies == (Policy.SPARSE,) * len(inputs)
    else:
        np.testing.assert_allclose(weights_of(routing, 3), expected, atol=1e-5)
        assert (np.diff(routing.weights, axis=1) <= 0).all()


def test_retrieval_may_average_the_nearest_few(school: School) -> None:
    """`mixture`: so many experts, the same weight each, the selection's among them."""
    alone, few = RetrieverGate(), RetrieverGate(RetrieverConfig(mode="mixture", experts=2))
    school.teach(alone, 0, 3)
    school.teach(few, 0, 3)
    inputs = texts("letters", 4, seed=2)
    routing = school.decide(few, inputs, 3)
    assert (routing.weights == 0.5).all()
    assert (routing.experts == school.decide(alone, inputs, 3).experts).any(axis=1).all()


def test_ridge_after_n_lessons_is_the_batch_fit(school: School) -> None:
    """Sums over rows are exact, whatever the order behind the first expert; W is solved from them."""
    gate, other = RidgeGate(RidgeConfig(units=96)), RidgeGate(RidgeConfig(units=96))
    school.teach(gate, 0, 3)
    for name in ("digits", "marks", "letters"):
        other.learn(school.stage, Lesson(expert_id=name, memory={name: school.memory[name]}, seed=0))
    scaling = Scaling.of(school.memory["digits"].features)
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    wide = len(scaling.mean)
    projection = torch.randn((wide, 96), generator=generator, dtype=torch.float64) * wide**-0.5
    rows = torch.cat([scaling(torch.from_numpy(school.memory[name].features)) for name in NAMES])
    lifted = (rows @ projection).relu()
    gram, sums = (
        lifted.t() @ lifted / ROWS,
        lifted.t() @ torch.eye(3).double().repeat_interleave(ROWS, 0) / ROWS,
    )
    for taught in (gate, other):
        state = taught.state()
        torch.testing.assert_close(state["gram"], gram, rtol=1e-12, atol=1e-12)
        for column, name in enumerate(NAMES):
            torch.testing.assert_close(state[f"sum:{name}"], sums[:, column], rtol=1e-12, atol=1e-12)
    inputs = [text for skill in NAMES for text in texts(skill, 5, seed=3)]
    weights = torch.linalg.solve(gram + gram.trace() / 96 * torch.eye(96), sums)
    features = school.stem(inputs).features
    batch = ((scaling(features) @ projection).relu() @ weights).argmax(dim=1)
    assert school.decide(gate, inputs, 3).experts[:, 0].tolist() == batch.tolist()


def test_the_discriminant_of_rows_that_came_one_by_one_is_the_batch_fit(school: School) -> None:
    """The closed form needs count, mean and scatter alone."""
    statistics = [ExpertStatistics(expert_id=name, rows=school.memory[name].features) for name in NAMES]
    batch = LinearDiscriminant.fit(statistics)
    moments = []
    for expert in statistics:
        seen = Moments.empty(expert.rows.shape[1])
        for row in expert.rows:
            seen = seen.updated(row)
        moments.append(seen)
    whitening = Whitening.fit(moments)
    online = LinearDiscriminant(whitening, whitening(np.stack([part.mean for part in moments])), NAMES)
    features = read_stem(school.stage.backbone, texts("marks", 5, seed=4))
    np.testing.assert_allclose(online.logits(features), batch.logits(features), rtol=1e-6)


@pytest.mark.parametrize("name", SHARING)
def test_a_new_expert_far_away_leaves_old_rows_where_they_were(school: School, name: str) -> None:
    """The leader of each old row stays; a top-1 gate's output for it is the same bit for bit."""
    gate = BY_ROW[name]()
    school.teach(gate, 0, 2)
    old = [text for skill in NAMES[:2] for text in texts(skill, 8, seed=5)]
    before = school.decide(gate, old, 2)
    said = school.logits(old, before)
    school.teach(gate, 2, 3)
    after = school.decide(gate, old, 3)
    assert after.experts[:, 0].tolist() == before.experts[:, 0].tolist()
    if name in TOP_ONE:
        assert torch.equal(school.logits(old, after), said)
    else:
        assert np.abs(weights_of(after, 3)[:, :2] - weights_of(before, 2)).max() < 0.15


def test_a_new_gainlora_gate_is_shut_on_old_rows_and_old_gates_do_not_move(school: School) -> None:
    """What f gives on the span of old rows is orthogonal to its key after training too; older numbers are frozen."""
    gate = GainGate()
    school.teach(gate, 0, 2)
    kept = gate.state()
    school.teach(gate, 2, 3)
    for key, tensor in kept.items():
        assert torch.equal(gate.state()[key], tensor)
    stored = [row.input for skill in NAMES[:2] for row in school.memory[skill].rows]
    opened = weights_of(school.decide(gate, stored, 3), 3)[:, 2]
    assert np.mean(opened) < 0.2
    assert np.mean(weights_of(school.decide(gate, texts("marks", 8, seed=6), 3), 3)[:, 2]) > 0.5


@pytest.mark.parametrize("name", BY_ROW)
def test_a_restored_gate_decides_bit_for_bit_and_goes_on_learning(
    school: School, tmp_path: Path, name: str
) -> None:
    """State through a file, which does not keep the order of its names, into a fresh gate; then one more lesson."""
    gate, again = BY_ROW[name](), BY_ROW[name]()
    school.teach(gate, 0, 2)
    save_file({key: value.contiguous() for key, value in gate.state().items()}, tmp_path / "gate.safetensors")
    again.restore(load_file(tmp_path / "gate.safetensors"))
    inputs = [text for skill in NAMES for text in texts(skill, 5, seed=7)]
    for experts in (2, 3):
        if experts == 3:
            school.teach(gate, 2, 3)
            school.teach(again, 2, 3)
        first, second = school.decide(gate, inputs, experts), school.decide(again, inputs, experts)
        assert np.array_equal(first.experts, second.experts)
        assert np.array_equal(first.weights, second.weights)
        assert gate.parameters == again.parameters


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_beyond_every_expert_and_untaught_gates_leave_the_backbone_alone(
    school: School, name: str
) -> None:
    """As with the closed form; a fresh gate has nobody to choose."""
    gate = BY_ROW[name]()
    inputs = texts("digits", 3, seed=8)
    if name not in ("closed_form", "hybrid"):
        assert school.decide(gate, inputs, 2).policies == (Policy.BACKBONE,) * 3
    school.teach(gate, 0, 2)
    routing = gate.decide(school.stem(inputs), school.scene(3, 2, beyond=(1,)))
    assert routing.policies[1] is Policy.BACKBONE
    assert routing.members(1) == [(-1, 1.0)]
    assert routing.policies[0] is not Policy.BACKBONE


@pytest.fixture
def experts(backbone: Backbone, memory: Mapping[str, Memory]) -> list[LoadedExpert]:
    """A loaded expert of each skill."""
    return [
        LoadedExpert(
            expert_id=name,
            version=1,
            adapter=random_adapter(backbone, place),
            features=read_rows(backbone, texts(name, ROWS)),
            is_mature=True,
        )
        for place, name in enumerate(NAMES)
    ]


def live_with(backbone: Backbone, gate: Student) -> LiveExperts:
    """No experts yet."""
    parts = RouterParts(gate=gate, novelty=NoveltyConfig(), index_factory=FaissIndex)
    return LiveExperts(backbone, PoolConfig(slots=3, rank=RANK), parts)


@torch.no_grad()
def served(live: LiveExperts, inputs: list[str], tenant: str = "default") -> tuple[Routing, Tensor]:
    """Routing and logits of a batch."""
    tokens = live.backbone.encode(inputs)
    with live.serving(tokens, inputs, [tenant] * len(inputs)) as current:
        logits = live.backbone.model(**tokens.inputs()).logits[:, -1]
    assert current.routed is not None
    return current.routed.routing, logits


def next_inputs(tokens: Tokens) -> dict[str, Tensor]:
    """A first new token behind each row."""
    return {
        "input_ids": torch.full_like(tokens.input_ids[:, :1], 65),
        "attention_mask": nn.functional.pad(tokens.attention_mask, (0, 1), value=1),
        "position_ids": tokens.position_ids[:, -1:] + 1,
    }


@pytest.mark.parametrize("name", SERVED_GATES)
def test_a_served_method_learns_from_installed_experts(
    backbone: Backbone, experts: list[LoadedExpert], name: str
) -> None:
    """Where a third expert leaves an old row's route, its logits are the same; all at once gives the same gate."""
    live, at_once = (live_with(backbone, gate_named(name, RoutingConfig())) for _ in range(2))
    inputs = [text for skill in NAMES[:2] for text in texts(skill, 4, seed=9)]
    live.install(experts[:2], RouterNetwork(backbone.width))
    before = [served(live, [text]) for text in inputs]
    live.install(experts, RouterNetwork(backbone.width))
    after = [served(live, [text]) for text in inputs]
    at_once.install(experts, RouterNetwork(backbone.width))
    anew = [served(at_once, [text]) for text in inputs]
    live.close()
    at_once.close()
    stayed = [row for row in range(len(inputs)) if before[row][0].members(0) == after[row][0].members(0)]
    # Where everyone takes part, a new expert is a member of every row; retrieval's centre moves a little.
    assert len(stayed) >= (0 if name == "arrow" else len(inputs) - 1)
    for row in stayed:
        assert torch.equal(before[row][1], after[row][1])
    for (routing, logits), (again, logits_again) in zip(after, anew, strict=True):
        assert routing.members(0) == again.members(0)
        assert torch.equal(logits, logits_again)


@pytest.mark.parametrize("name", SERVED_GATES)
def test_a_served_method_learns_beside_the_batch_and_is_swapped_in_without_a_lesson(
    backbone: Backbone, experts: list[LoadedExpert], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lessons take seconds: a pass under way is answered by the old experts, and none is left for the swap."""
    live, at_once = (live_with(backbone, gate_named(name, RoutingConfig())) for _ in range(2))
    inputs = [text for skill in NAMES for text in texts(skill, 2, seed=9)]
    live.install(experts[:2], RouterNetwork(backbone.width))
    before, tokens = served(live, inputs), backbone.encode(inputs)
    with torch.no_grad(), live.serving(tokens, inputs, ["default"] * len(inputs)):
        _, cache = backbone.next_logits(tokens.inputs())
        activate = live.prepared(experts, RouterNetwork(backbone.width))
        following, _ = backbone.next_logits(next_inputs(tokens) | {"past_key_values": cache})
    with torch.no_grad(), live.serving(tokens, inputs, ["default"] * len(inputs)):
        _, cache = backbone.next_logits(tokens.inputs())
        undisturbed, _ = backbone.next_logits(next_inputs(tokens) | {"past_key_values": cache})
    assert torch.equal(following, undisturbed)
    assert torch.equal(served(live, inputs)[1], before[1])
    with monkeypatch.context() as patched:
        patched.delattr(LiveExperts, "_taught")
        activate()
    at_once.install(experts, RouterNetwork(backbone.width))
    assert torch.equal(served(live, inputs)[1], served(at_once, inputs)[1])
    live.close()
    at_once.close()


@pytest.mark.parametrize("name", SERVED_GATES)
def test_experts_of_a_served_method_train_alone(school: School, name: str) -> None:
    """As the daemon trains them, whoever stands already: a method that wants company is not served without it."""
    gate = gate_named(name, RoutingConfig())
    lesson = Lesson(expert_id="letters", memory={met: school.memory[met] for met in NAMES[:2]}, seed=0)
    assert gate.company(replace(school.stage, slots={"digits": 1}), lesson) is None


@pytest.mark.parametrize("name", SERVED_GATES)
def test_no_served_method_gives_a_row_to_another_tenants_expert(
    backbone: Backbone, experts: list[LoadedExpert], name: str
) -> None:
    """Nor does the other tenant's expert change what is said."""
    live, alone = (live_with(backbone, gate_named(name, RoutingConfig())) for _ in range(2))
    live.install([experts[0], replace(experts[1], tenant="other")])
    inputs = texts("letters", 4, seed=10)
    routing, _ = served(live, inputs)
    assert {expert for row in range(4) for expert, _ in routing.members(row)} <= {0, -1}
    alone.install([])
    stranger, said = served(live, inputs, tenant="nobody")
    assert stranger.policies == (Policy.BACKBONE,) * 4
    assert torch.equal(said, served(alone, inputs)[1])
    live.close()
    alone.close()


class Unteachable(BackboneGate):
    """Fails at one expert; else everything goes to the first."""

    def __init__(self, stumbling: str) -> None:
        self._stumbling = stumbling

    def learn(self, stage: Stage, lesson: Lesson) -> None:
        """Or not."""
        if lesson.expert_id == self._stumbling:
            raise RuntimeError("nothing to learn here")

    def decide(self, stem: StemOutput, scene: Scene) -> Routing:
        """The first expert."""
        rows = len(stem.mask)
        return Routing(
            np.zeros((rows, 1), dtype=np.int64), np.ones((rows, 1), np.float32), (Policy.SPARSE,) * rows
        )


def test_a_gate_that_cannot_learn_an_expert_leaves_the_old_ones_serving(
    backbone: Backbone, experts: list[LoadedExpert]
) -> None:
    """Slots in use that were written for its lessons get their old blocks back."""
    live = live_with(backbone, Unteachable("marks"))
    inputs = texts("digits", 3, seed=11)
    live.install(experts[:2])
    _, said = served(live, inputs)
    for wrong in (
        experts,
        [experts[2]],
        [replace(experts[1], adapter=random_adapter(backbone, 9)), experts[2]],
    ):
        with pytest.raises(RuntimeError, match="nothing to learn"):
            live.install(wrong)
        assert [expert.expert_id for expert in live.experts] == ["digits", "letters"]
        assert torch.equal(served(live, inputs)[1], said)
    live.close()
