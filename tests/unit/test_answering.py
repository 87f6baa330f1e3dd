"""The answerer: registries activated whole, rows routed by maturity, choices ranked, with tiny models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_adapter, tiny_gpt2, tiny_llama
from safetensors.numpy import save_file

from dylora_stream.core.errors import BadRecord, ModelMismatch, SettingsError
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry, StoredFolder
from dylora_stream.core.messages import Answer, Policy, Position, Request
from dylora_stream.core.novelty import NoveltyConfig
from dylora_stream.core.routing import RoutingConfig, decide
from dylora_stream.model.adapters import Adapter, load_adapter, save_adapter
from dylora_stream.model.answering import MixtureAnswerer
from dylora_stream.model.backbone import Backbone, load_backbone
from dylora_stream.model.config import GenerationConfig, ModelConfig, PoolConfig
from dylora_stream.model.exemplars import read_exemplars
from dylora_stream.model.features import LabelledText, read_rows
from dylora_stream.model.gates import BackboneGate, ClosedFormGate, Gate, HybridGate
from dylora_stream.model.live import LiveExperts, read_expert
from dylora_stream.model.network import RouterNetwork
from dylora_stream.model.router import RouterParts
from dylora_stream.model.router_training import RouterLesson, RouterTraining, dense_shares, train_router
from dylora_stream.model.training import score_rows
from dylora_stream.store.experts import FolderStore
from dylora_stream.store.index import FaissIndex

ROWS = 32  # of each skill: enough for a say in novelty
ROUTING = RoutingConfig()
SKILLS: dict[str, Callable[[np.random.Generator], str]] = {
    "digits": lambda rng: " ".join(str(number) for number in rng.integers(10, 99, 5)),
    "letters": lambda rng: "".join(rng.choice(list("abcdefgh"), 14)),
    "marks": lambda rng: "".join(rng.choice(list("?!.,;:"), 14)),
}


@dataclass(frozen=True)
class World:
    """A backbone, a store, and a way to make answerers and experts."""

    backbone: Backbone
    store: FolderStore
    folder: Path

    def answerer(self, gate: Gate | None = None, slots: int = 4) -> MixtureAnswerer:
        """A new answerer without experts."""
        live = self.live(gate, slots)
        return MixtureAnswerer(live, self.store, GenerationConfig(max_new_tokens=6, micro_batch=4), 200)

    def live(self, gate: Gate | None = None, slots: int = 4) -> LiveExperts:
        """No experts yet."""
        parts = RouterParts(
            gate=gate or HybridGate(ROUTING), novelty=NoveltyConfig(), index_factory=FaissIndex
        )
        return LiveExperts(self.backbone, PoolConfig(slots=slots, rank=4), parts)

    def expert(self, skill: str, maturity: Maturity = Maturity.MATURE, version: int = 1) -> ExpertVersion:
        """A stored expert of a skill, its adapter random, its features those of the skill's texts."""
        folder = self.folder / f"{skill}-{version}"
        save_adapter(folder, random_adapter(self.backbone, hash_of(skill) + version), self.backbone, {})
        save_file(
            {"features": read_rows(self.backbone, texts(skill, ROWS))}, folder / "statistics.safetensors"
        )
        return ExpertVersion(
            expert_id=skill,
            skill_id=skill,
            version=version,
            parent=None,
            storage=self.store.put(folder),
            maturity=maturity,
        )

    def registry(self, *experts: ExpertVersion, router: StoredFolder | None = None) -> Registry:
        """A registry of these experts for this backbone."""
        return Registry(experts=experts, router=router, backbone=self.backbone.digest)


def hash_of(skill: str) -> int:
    """A small number of a skill, for seeds."""
    return list(SKILLS).index(skill) * 100


def texts(skill: str, count: int, seed: int = 0) -> list[str]:
    """Texts of a skill."""
    rng = np.random.default_rng([seed, hash_of(skill)])
    return [SKILLS[skill](rng) for _ in range(count)]


def ask(*inputs: str, tenant: str = "default", choices: tuple[str, ...] = ()) -> list[Request]:
    """Requests of these texts."""
    return [
        Request(position=Position("requests", 0, offset), input=text, tenant=tenant, choices=choices)
        for offset, text in enumerate(inputs)
    ]


def shares(answer: Answer) -> dict[str | None, float]:
    """Weight of each member of a row."""
    return {weight.expert: weight.weight for weight in answer.weights}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny model, its stem two layers."""
    make = tiny_llama if request.param == "llama" else tiny_gpt2
    folder = make(tmp_path_factory.mktemp(request.param))
    config = ModelConfig(name="tiny", dtype="float32", stem_layers=2, feature_layers=1, threads=1)
    return load_backbone(config, folder)


@pytest.fixture
def world(backbone: Backbone, tmp_path: Path) -> World:
    """An empty store beside a backbone."""
    return World(backbone, FolderStore(str(tmp_path / "store"), tmp_path / "cache"), tmp_path / "made")


@pytest.fixture
def answerer(world: World) -> Iterator[MixtureAnswerer]:
    """An answerer without experts."""
    answerer = world.answerer()
    yield answerer
    answerer.close()


def test_without_experts_the_backbone_answers_and_everything_is_novel(
    world: World, answerer: MixtureAnswerer
) -> None:
    """An empty pool gives the bare model's greedy answers, no p-value, and the feature rows of the stem alone."""
    inputs = ["what", "a longer question", "x"]
    answers = answerer.answer(ask(*inputs))
    tokens = world.backbone.encode(inputs)
    plain = world.backbone.model.generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=world.backbone.eos_id,
    )
    expected = [world.backbone.decode(row[tokens.input_ids.shape[1] :].tolist()) for row in plain]
    assert [answer.output for answer in answers] == expected
    for answer in answers:
        assert answer.policy is Policy.BACKBONE
        assert shares(answer) == {None: 1.0}
        assert answer.novelty.p_value is None
        assert answer.novelty.is_novel
    features = np.stack([answer.features for answer in answers])
    np.testing.assert_allclose(features, read_rows(world.backbone, inputs), atol=1e-4)


def test_a_nascent_experts_row_is_shared_and_a_mature_ones_is_taken_alone(
    world: World, answerer: MixtureAnswerer
) -> None:
    """Dense while young, with the leader well ahead; sparse from the registry record that calls it mature."""
    digits, letters = world.expert("digits"), world.expert("letters", Maturity.NASCENT)
    assert answerer.activate(world.registry(digits, letters)) == ()
    digit, letter = answerer.answer(ask(texts("digits", 1, 7)[0], texts("letters", 1, 7)[0]))
    assert digit.policy is Policy.SPARSE
    assert shares(digit) == {"digits": 1.0}
    assert letter.policy is Policy.DENSE
    assert len(letter.weights) >= 2
    assert letter.expert is not None
    assert letter.expert.expert == "letters"
    assert letter.expert.weight >= 0.8
    answerer.activate(world.registry(digits, replace(letters, maturity=Maturity.MATURE)))
    (letter,) = answerer.answer(ask(texts("letters", 1, 7)[0]))
    assert letter.policy is Policy.SPARSE
    assert shares(letter) == {"letters": 1.0}


def test_a_single_nascent_expert_shares_its_rows_with_the_backbone(
    world: World, answerer: MixtureAnswerer
) -> None:
    """The backbone is the permanent null expert: dense has a partner even when there is one expert."""
    answerer.activate(world.registry(world.expert("digits", Maturity.NASCENT)))
    (answer,) = answerer.answer(ask(texts("digits", 1, 7)[0]))
    assert answer.policy is Policy.DENSE
    assert set(shares(answer)) == {"digits", None}


def test_a_new_expert_leaves_the_answers_of_others_rows_unchanged(
    world: World, answerer: MixtureAnswerer
) -> None:
    """Rows that keep their gates keep their answers and features; the base weights stay bit-identical."""
    before_weights = {name: weight.clone() for name, weight in world.backbone.model.state_dict().items()}
    digits, letters = world.expert("digits"), world.expert("letters")
    rows = ask(*texts("digits", 5, 3))
    answerer.activate(world.registry(digits))
    before = answerer.answer(rows)
    answerer.activate(world.registry(digits, letters))
    after = answerer.answer(rows)
    assert [answer.output for answer in after] == [answer.output for answer in before]
    assert [shares(answer) for answer in after] == [shares(answer) for answer in before]
    for name, weight in world.backbone.model.state_dict().items():
        assert torch.equal(weight, before_weights[name])


def test_an_expert_that_left_answers_no_more(world: World, answerer: MixtureAnswerer) -> None:
    """A registry without it serves as on a worker that never had it; its rows are nobody's."""
    first, second = world.expert("digits"), world.expert("marks")
    answerer.activate(world.registry(first, second))
    answerer.activate(world.registry(first))
    fresh = world.answerer()
    fresh.activate(world.registry(first))
    rows = ask(*texts("digits", 3, seed=1), *texts("marks", 3, seed=1))
    left, never = answerer.answer(rows), fresh.answer(rows)
    fresh.close()
    assert [(each.output, each.policy, each.weights) for each in left] == [
        (each.output, each.policy, each.weights) for each in never
    ]
    assert all(set(shares(answer)) <= {"digits", None} for answer in left)


def test_a_batch_answers_as_its_rows_do_one_by_one(world: World, answerer: MixtureAnswerer) -> None:
    """Batches, their order and their padding do not show in the answers."""
    answerer.activate(
        world.registry(
            world.expert("digits"), world.expert("letters", Maturity.NASCENT), world.expert("marks")
        )
    )
    requests = ask(*texts("digits", 3, 5), *texts("letters", 3, 5), *texts("marks", 3, 5))
    together = answerer.answer(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = answerer.answer([request])
        assert alone.output == answer.output
        assert alone.policy is answer.policy
        np.testing.assert_allclose(alone.features, answer.features, atol=1e-4)


def test_an_expert_serves_its_tenant_alone(world: World, answerer: MixtureAnswerer) -> None:
    """Another tenant's row goes to the backbone, and its novelty knows nothing of the expert."""
    answerer.activate(world.registry(replace(world.expert("digits"), tenant="acme")))
    text = texts("digits", 1, 7)[0]
    (ours,), (theirs,) = answerer.answer(ask(text, tenant="acme")), answerer.answer(ask(text))
    assert shares(ours) == {"digits": 1.0}
    assert shares(theirs) == {None: 1.0}
    assert theirs.novelty.p_value is None
    assert theirs.novelty.nearest is None


def test_scoring_equals_the_novelty_of_answering(world: World, answerer: MixtureAnswerer) -> None:
    """`score` runs the stem alone and gives the numbers that answers carry."""
    answerer.activate(world.registry(world.expert("digits"), world.expert("letters")))
    inputs = [*texts("digits", 2, 9), "Something else altogether, long and new."]
    scored = answerer.score(inputs, "default")
    answered = [answer.novelty for answer in answerer.answer(ask(*inputs))]
    for left, right in zip(scored, answered, strict=True):
        assert left.score == pytest.approx(right.score, rel=1e-3)
        assert left.nearest == right.nearest
    assert scored[2].score > max(scored[0].score, scored[1].score)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(
    world: World, answerer: MixtureAnswerer
) -> None:
    """A corrupt second version is named, and the first one goes on; a corrupt router is named too."""
    first, second = world.expert("digits"), world.expert("digits", version=2)
    letters = world.expert("letters")
    answerer.activate(world.registry(first, letters))
    (world.folder.parent / "store" / second.storage.path / "adapter_model.safetensors").write_bytes(b"broken")
    router = StoredFolder(path="00/" + "0" * 64, sha256="0" * 64)
    failed = answerer.activate(world.registry(second, letters, router=router))
    assert [(each.name, each.may_pass) for each in failed] == [("digits/2", True), ("router", True)]
    assert "is not what its digest says" in failed[0].reason
    (answer,) = answerer.answer(ask(texts("digits", 1, 7)[0]))
    assert answer.expert is not None
    assert (answer.expert.expert, answer.expert.version) == ("digits", 1)


def test_versions_that_are_live_are_not_read_again(
    world: World, answerer: MixtureAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new registry reads only what it adds, and a retired expert's slot is used again."""
    read: list[Path] = []

    def counting(folder: Path) -> Adapter:
        read.append(folder)
        return load_adapter(folder)

    monkeypatch.setattr("dylora_stream.model.live.load_adapter", counting)
    answerer = world.answerer(slots=2)
    digits, letters, marks = (world.expert(skill) for skill in SKILLS)
    for experts in ((digits,), (digits, letters), (digits, letters), (letters, marks)):
        assert answerer.activate(world.registry(*experts)) == ()
    assert len(read) == 3
    (failure,) = answerer.activate(world.registry(letters, marks, digits))
    assert (failure.name, failure.may_pass, "pool.slots" in failure.reason) == ("digits/1", False, True)
    (answer,) = answerer.answer(ask(texts("marks", 1, 7)[0]))
    assert shares(answer) == {"marks": 1.0}
    answerer.close()


def test_a_registry_of_another_backbone_is_refused(world: World, answerer: MixtureAnswerer) -> None:
    """Experts and features mean nothing on other weights."""
    with pytest.raises(ModelMismatch, match="backbone"):
        answerer.activate(replace(world.registry(), backbone="0" * 64))
    with pytest.raises(ModelMismatch, match="feature space"):
        answerer.activate(replace(world.registry(), feature_space="stem1-v0-000000000000"))


def test_choices_are_ranked_by_mean_likelihood_to_the_end_token(
    world: World, answerer: MixtureAnswerer
) -> None:
    """The answer is the choice whose tokens, end token included, are likeliest on average under the row's gates."""
    answerer.activate(world.registry(world.expert("digits"), world.expert("letters")))
    choices = ("entail", "entailment"[:5], "no", "n", "maybe", "")
    inputs = [*texts("digits", 2, 1), *texts("letters", 2, 1), "long and new, and from nobody's skill"]
    answers = answerer.answer(ask(*inputs, choices=choices))
    live = answerer._live
    for text, answer in zip(inputs, answers, strict=True):
        rows = [LabelledText(input=text, output=choice) for choice in choices]
        losses = score_rows(world.backbone, rows, gate=live.gate([text] * len(choices), "default")).losses
        assert answer.output == choices[int(losses.argmin())]


def test_many_choices_are_ranked_in_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the choices rows, each with the prompts' cache, rank as one pass does."""
    answerer = world.answerer()
    answerer.activate(world.registry(world.expert("digits"), world.expert("letters", Maturity.NASCENT)))
    requests = ask(*texts("digits", 2, 1), *texts("letters", 2, 1), choices=("a", "bc", "dd", "e!", "xyz"))
    whole = [answer.output for answer in answerer.answer(requests)]
    monkeypatch.setattr("dylora_stream.model.decoding.CHOICE_ROWS", 3)
    assert [answer.output for answer in answerer.answer(requests)] == whole
    answerer.close()


def test_a_pass_over_long_choices_holds_fewer_of_them(
    world: World, answerer: MixtureAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are computed of so many tokens at once, however many long choices a record has; the best stays."""
    answerer.activate(world.registry(world.expert("digits")))
    choices = tuple(f"{number} " * 40 for number in range(20))
    requests = ask(*texts("digits", 2, 1), choices=(*choices, "no"))
    whole = [answer.output for answer in answerer.answer(requests)]
    monkeypatch.setattr("dylora_stream.model.decoding.CHOICE_TOKENS", 300)
    seen: list[int] = []
    handle = world.backbone.head.register_forward_hook(lambda _head, _args, out: seen.append(out.shape[0]))
    assert [answer.output for answer in answerer.answer(requests)] == whole
    handle.remove()
    assert max(seen) <= 300


def test_what_cannot_be_answered_is_a_bad_record(world: World, answerer: MixtureAnswerer) -> None:
    """Too long an input, too many choices, too long a choice: each with its reason; an empty text is answered."""
    for request, reason in (
        (ask("x" * 300)[0], "input_too_long"),
        (ask("x", choices=tuple(str(number) for number in range(65)))[0], "too_many_choices"),
        (ask("x", choices=("a", "b" * 400))[0], "choice_too_long"),
    ):
        with pytest.raises(BadRecord) as caught:
            answerer.answer([request])
        assert caught.value.reason == reason
        assert caught.value.stage == "answer"
    assert len(answerer.answer(ask(""))) == 1


def test_a_megabyte_is_refused_before_it_is_cut_into_tokens(
    answerer: MixtureAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would take seconds and a hundred times its size, again for each half of the batch that it came with."""
    monkeypatch.delattr(Backbone, "prompt_ids")
    for request, reason in (
        (ask("x" * 1_000_000)[0], "input_too_long"),
        (ask("x", choices=("a", "b" * 1_000_000))[0], "choice_too_long"),
    ):
        with pytest.raises(BadRecord) as caught:
            answerer.answer([request])
        assert caught.value.reason == reason
    with pytest.raises(BadRecord, match="characters"):
        answerer.score(["x" * 1_000_000], "default")


def test_answers_that_leave_no_room_for_an_input_are_a_wrong_setting(world: World) -> None:
    """Every record would be a dead letter that says its input is too long; the tiny models have 512 positions."""
    live = world.live()
    for new_tokens in (505, 512, 4096):
        generation = GenerationConfig(max_new_tokens=new_tokens)
        with pytest.raises(SettingsError, match="at most 504"):
            MixtureAnswerer(live, world.store, generation, 1024)
    live.close()


def test_the_closed_form_gate_routes_alone_and_the_base_gate_never(world: World) -> None:
    """The other gates behind the same interface: argmax whatever the maturity, and no expert at all."""
    registry = world.registry(
        world.expert("digits", Maturity.NASCENT), world.expert("letters", Maturity.NASCENT)
    )
    for gate, expected in ((ClosedFormGate(), {"digits": 1.0}), (BackboneGate(), {None: 1.0})):
        answerer = world.answerer(gate)
        answerer.activate(registry)
        (answer,) = answerer.answer(ask(texts("digits", 1, 7)[0]))
        assert shares(answer) == expected
        answerer.close()


def test_a_router_is_trained_by_adding_a_column(world: World, tmp_path: Path) -> None:
    """The first lesson fits the shared layers, the next moves its own column alone; saved and loaded it is the same."""
    live = world.live()
    skills = list(SKILLS)
    for skill in skills:
        world.expert(skill)
    loaded = [read_expert(world.folder / f"{skill}-1", skill, 1) for skill in skills]
    exemplars = {
        skill: [LabelledText(input=text, output="yes") for text in texts(skill, 12, 2)] for skill in skills
    }
    config = RouterTraining(steps=10, exemplars=12, task_batches=2, task_rows=3)

    live.install(loaded[:1])
    one = train_router(
        live, None, RouterLesson(expert_id="digits", exemplars=exemplars, seed=1), ROUTING, config
    )
    assert not one.network.is_fitted
    live.install(loaded[:2], one.network)
    lesson = RouterLesson(
        expert_id="letters", exemplars={name: exemplars[name] for name in skills[:2]}, seed=1
    )
    two = train_router(live, one.network, lesson, ROUTING, config)
    assert two.network.is_fitted
    assert float(two.network.column("letters").abs().sum()) > 0
    live.install(loaded, two.network)
    three = train_router(
        live, two.network, RouterLesson(expert_id="marks", exemplars=exemplars, seed=1), ROUTING, config
    )
    again = train_router(
        live, two.network, RouterLesson(expert_id="marks", exemplars=exemplars, seed=1), ROUTING, config
    )
    live.close()
    assert three.accuracy >= three.accuracy_closed_form
    for name, tensor in two.network.state_dict().items():
        assert torch.equal(three.network.state_dict()[name], tensor)
    assert float(three.network.column("marks").abs().sum()) > 0
    three.network.save(tmp_path / "router")
    back = RouterNetwork.load(tmp_path / "router", world.backbone.width)
    for name, tensor in back.state_dict().items():
        assert torch.equal(three.network.state_dict()[name], tensor)
        assert torch.equal(again.network.state_dict()[name], tensor)
    with pytest.raises(ModelMismatch):
        RouterNetwork.load(tmp_path / "router", world.backbone.width + 1)


def test_the_networks_dense_shares_are_the_rules_shares() -> None:
    """What training differentiates through is what `core.routing` serves."""
    logits = np.random.default_rng(0).normal(size=(5, 4)) * 20
    experts, weights = dense_shares(torch.from_numpy(logits / ROUTING.temperature_dense), ROUTING)
    everyone = np.ones((5, 4), dtype=bool)
    routing = decide(logits, np.zeros(4, dtype=bool), np.zeros(5, dtype=bool), everyone, ROUTING)
    for row in range(5):
        served = {expert: weight for expert, weight in routing.members(row) if expert >= 0}
        trained = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert served == pytest.approx(trained, rel=1e-5)


def test_a_long_exemplar_takes_no_room_from_the_shorter_ones_behind_it(world: World) -> None:
    """Of an expert whose first row is long the others are read; of one whose rows all are, a beginning."""
    rows = [LabelledText(input=text, output="yes") for text in ("x" * 150, *texts("digits", 4))]
    read = read_exemplars(world.backbone, [rows, rows[:1]], 2 * 120)
    assert np.bincount(read.owners.numpy()).tolist() == [4, 1]
