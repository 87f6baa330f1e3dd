"""One contract for every backbone: a tiny Llama, and a tiny GPT-2 with fused projections and Conv1D layers."""

import copy
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import END, blank_first, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_mamba, tiny_opt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from dylora_stream.core.errors import ExpertCorrupt, ModelError, ModelNotFound, SettingsError, TrainingFailed
from dylora_stream.core.recipes import Recipe
from dylora_stream.model import attention as attending
from dylora_stream.model import training
from dylora_stream.model.adapters import load_adapter, save_adapter
from dylora_stream.model.backbone import (
    IGNORED,
    Backbone,
    PromptTemplate,
    fetch_backbone,
    linear_shape,
    load_backbone,
)
from dylora_stream.model.config import Attention, Dtype, ModelConfig
from dylora_stream.model.features import (
    ANSWER_READ,
    PASS_ANSWER_TOKENS,
    SKETCH_SIZE,
    LabelledText,
    answer_rows,
    answer_size,
    feature_space,
    read_rows,
    read_states,
    read_stem,
    row_size,
    stem_features,
)
from dylora_stream.model.identity import folder_digest
from dylora_stream.model.process import keep_freed_memory
from dylora_stream.model.training import (
    Trained,
    TrainingOptions,
    fitting,
    score_rows,
    train_expert,
)

ROWS = [
    LabelledText(input=text, output=text.split()[0].upper())
    for text in (
        "one two",
        "red green blue",
        "a b c d",
        "up down",
        "left or right",
        "tea",
        "east west",
        "x y z",
    )
]
RECIPE = Recipe(rate=1e-2, epochs=4, batch_size=3, rank=4, alpha=8.0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    make = tiny_llama if request.param == "llama" else tiny_gpt2
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    """A tiny model, loaded in float32, its stem two layers."""
    return load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=2, threads=1), folder)


@pytest.fixture(scope="module")
def trained(backbone: Backbone) -> Trained:
    """An expert trained on ROWS with seed 1."""
    return train_expert(backbone, ROWS, RECIPE, TrainingOptions(seed=1))


def weights_of(backbone: Backbone) -> list[torch.Tensor]:
    """Copies of all weights."""
    return [parameter.detach().clone() for parameter in backbone.model.parameters()]


def same_adapters(first: Trained, second: Trained) -> bool:
    """Whether two trainings gave the same bits."""
    pairs = zip(first.adapter.tensors.values(), second.adapter.tensors.values(), strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def numbered(rows: Sequence[LabelledText], order: Sequence[int]) -> list[LabelledText]:
    """Rows in another order."""
    return [rows[index] for index in order]


def test_only_linear_layers_above_the_stem_are_adapted(backbone: Backbone) -> None:
    """Every linear layer of the upper two layers is named, none of the stem's, and shapes are (in, out)."""
    names = backbone.upper_linears()
    assert {name.split(".")[2] for name in names} == {"2", "3"}
    assert len(names) == 2 * (4 if "transformer" in next(iter(names)) else 7)
    assert all(linear_shape(module)[0] in {32, 48, 128} for module in names.values())


def test_rows_are_padded_on_the_left_and_labels_cover_the_answer_and_its_end(backbone: Backbone) -> None:
    """The end token is appended to the answer; positions count from the first real token."""
    tokens = backbone.encode(["a", "a longer one"], ["b", "c"])
    assert tokens.attention_mask[0, 0] == 0
    assert tokens.input_ids[:, -1].tolist() == [backbone.eos_id, backbone.eos_id]
    assert (tokens.labels != IGNORED).sum(1).tolist() == [3, 3]  # blank, letter, end
    assert tokens.position_ids[0, tokens.attention_mask[0] == 1][0] == 0
    assert backbone.decode(tokens.answer_ids()[:3].tolist()) == "b"


def test_an_end_token_that_the_tokenizer_adds_does_not_stand_before_the_answer(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    """Tokenizers that were saved for training end every text; what would be written behind is another text."""
    ending = shutil.copytree(folder, tmp_path / "ending")
    tokenizer = Tokenizer.from_file(str(ending / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, backbone.eos_id)]
    )
    tokenizer.save(str(ending / "tokenizer.json"))
    other = load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=2, threads=1), ending)
    assert other.tokenizer("a")["input_ids"][-1] == other.eos_id
    texts = ["a text", "", "x"]
    assert other.prompt_ids(texts) == backbone.prompt_ids(texts)
    assert other.target_ids(texts) == backbone.target_ids(texts)


def test_blanks_at_the_end_of_a_template_belong_to_the_answer() -> None:
    """Tokenizers join a blank with the word behind it, so the prompt must not end with it."""
    template = PromptTemplate("{input} => ")
    assert (template.render("a {b}"), template.target(" c ")) == ("a {b} =>", " c")


def test_the_first_token_is_left_out_of_the_features_unless_it_is_the_only_one() -> None:
    """Padding does not count, and a text of one token keeps it."""
    states = torch.tensor([[[9.0], [100.0], [2.0], [4.0]], [[9.0], [9.0], [9.0], [5.0]]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    assert stem_features(states, mask).tolist() == [[3.0], [5.0]]


def test_features_do_not_depend_on_the_batch(backbone: Backbone) -> None:
    """Alone or beside longer texts, in any order: the same features, from the stem alone or from a whole pass."""
    texts = [row.input for row in ROWS]
    together = read_stem(backbone, texts)
    alone = np.concatenate([read_stem(backbone, [text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    tokens = backbone.encode(texts[:3])
    with torch.no_grad():
        whole = backbone.model(**tokens.inputs(), output_hidden_states=True).hidden_states[2]
    assert torch.equal(whole, read_states(backbone, tokens))
    rows = read_rows(backbone, texts)
    assert rows.shape == (len(texts), row_size(backbone))
    np.testing.assert_allclose(rows[:, : backbone.width], together, atol=1e-6)
    np.testing.assert_allclose(
        rows, np.concatenate([read_rows(backbone, [text]) for text in texts]), atol=1e-4
    )
    assert answer_rows(backbone, ROWS[:2]).shape == (2, answer_size(backbone))
    assert feature_space(backbone).startswith("stem2-v2-")


def test_a_sketch_is_the_projected_gradient_of_the_answer_s_loss(backbone: Backbone) -> None:
    """Against autograd: the head's gradient, projected by the same two matrices, summed over both of its sides."""
    from dylora_stream.model import features

    row = ROWS[1]
    tokens = backbone.encode([row.input], [row.output])
    states = backbone.body(**tokens.inputs(), use_cache=False)[0][tokens.answer_positions()].detach()
    states.requires_grad_()
    loss = torch.nn.functional.cross_entropy(backbone.head(states), tokens.answer_ids(), reduction="sum")
    (gradients,) = torch.autograd.grad(loss, states)
    first, second = features._projections(backbone.width, backbone.device)
    expected = torch.nn.functional.normalize(((gradients @ first) * (states @ second)).mean(0), dim=0)
    np.testing.assert_allclose(
        answer_rows(backbone, [row])[0, :SKETCH_SIZE], expected.detach().numpy(), atol=1e-5
    )


@contextmanager
def answer_tokens_a_pass(backbone: Backbone) -> Iterator[list[int]]:
    """How many answer tokens' logits each pass computes."""
    seen: list[int] = []
    handle = backbone.head.register_forward_hook(lambda _head, _args, logits: seen.append(logits.shape[0]))
    try:
        yield seen
    finally:
        handle.remove()


def test_an_answer_is_cut_as_it_stands_behind_its_prompt(tmp_path: Path) -> None:
    """Some tokenizers put a blank of their own before a text: an answer's would be one that no model writes."""
    config = ModelConfig(name="tiny", dtype="float32", stem_layers=2, feature_layers=2, threads=1)
    backbone = load_backbone(config, blank_first(tiny_llama(tmp_path)))
    (prompt,), (target,) = backbone.prompt_ids(["a b"]), backbone.target_ids(["yes"])
    whole = backbone.tokenizer(backbone.template.render("a b") + " yes")["input_ids"]
    assert [*prompt, *target] == [*whole, backbone.eos_id]
    assert backbone.decode(target) == "yes"


def test_a_long_answer_is_read_by_its_beginning(backbone: Backbone) -> None:
    """A megabyte costs what a page does, has a place behind its prompt, and says how such a row is answered."""
    begin = " ".join(["ONE"] * ANSWER_READ)
    endless = [
        LabelledText(input=text, output=begin + 250_000 * end)
        for text, end in (("one two", " TWO"), ("one two", " SIX"), ("one " * 100, " TWO"))
    ]
    with answer_tokens_a_pass(backbone) as passes:
        first, second, squeezed = answer_rows(backbone, endless)
    hashed = slice(-129, -1)  # the whole answer's own 128 numbers, which differ
    np.testing.assert_allclose(np.delete(first, hashed), np.delete(second, hashed), atol=1e-5)
    assert np.isfinite(squeezed).all()
    assert sum(passes) <= len(endless) * ANSWER_READ


def test_a_pass_over_long_answers_holds_fewer_rows(backbone: Backbone) -> None:
    """Scoring and reading compute logits of so many answer tokens at once, whatever the rows; scores stay the same."""
    rows = [LabelledText(input=row.input, output=row.output + " Z" * 190) for row in ROWS * 2]
    with answer_tokens_a_pass(backbone) as passes:
        scored, read = score_rows(backbone, rows), answer_rows(backbone, rows)
    assert len(passes) > 2
    assert max(passes) <= PASS_ANSWER_TOKENS
    alone = np.concatenate([score_rows(backbone, [row]).losses for row in rows])
    np.testing.assert_allclose(scored.losses, alone, rtol=1e-4)
    assert np.isfinite(read).all()


def test_rows_that_are_too_long_are_left_out_of_training(backbone: Backbone) -> None:
    """Longer than the recipe allows, or than the model has positions for: the others alone give the same expert."""
    recipe = replace(RECIPE, max_row_tokens=10_000)
    long = [LabelledText(input="long", output="x" * 600), LabelledText(input="endless", output="x" * 300_000)]
    assert fitting(backbone, [*long, *ROWS], recipe) == ROWS
    with_long = train_expert(backbone, [*ROWS, *long], recipe, TrainingOptions(seed=1))
    assert with_long.rows == len(ROWS)
    assert same_adapters(with_long, train_expert(backbone, ROWS, recipe, TrainingOptions(seed=1)))


def test_training_lowers_the_loss_and_leaves_the_backbone_bit_identical(backbone: Backbone) -> None:
    """The expert predicts its rows better, and no weight, hook or gradient stays behind."""
    before, losses = weights_of(backbone), score_rows(backbone, ROWS).losses
    trained = train_expert(backbone, ROWS, RECIPE, TrainingOptions(seed=2))
    assert score_rows(backbone, ROWS, trained.adapter).losses.mean() < losses.mean() - 0.5
    assert all(torch.equal(old, new) for old, new in zip(before, weights_of(backbone), strict=True))
    assert np.array_equal(score_rows(backbone, ROWS).losses, losses)
    assert all(not module._forward_hooks for module in backbone.upper_linears().values())


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(
    backbone: Backbone, trained: Trained
) -> None:
    """Training is repeatable for the same rows, recipe, seed and threads."""
    again = train_expert(backbone, ROWS, RECIPE, TrainingOptions(seed=1))
    assert again.losses == trained.losses
    assert same_adapters(again, trained)
    assert not same_adapters(train_expert(backbone, ROWS, RECIPE, TrainingOptions(seed=3)), trained)


def test_the_stem_is_cached_and_gives_what_whole_passes_give(backbone: Backbone, trained: Trained) -> None:
    """Both architectures allow it; the adapters agree to rounding."""
    whole = train_expert(backbone, ROWS, RECIPE, TrainingOptions(seed=1, may_cache_stem=False))
    assert trained.is_stem_cached
    assert not whole.is_stem_cached
    np.testing.assert_allclose(trained.losses, whole.losses, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "attention", "expected"),
    [
        ("bfloat16", "auto", ["eager", "sdpa", "eager"]),
        ("bfloat16", "fused", ["sdpa"] * 3),
        ("float32", "auto", ["sdpa"] * 3),
    ],
)
def test_short_passes_in_bfloat16_attend_plainly(
    folder: Path, dtype: Dtype, attention: Attention, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass chooses, and states agree to rounding; a copy of the model chooses for itself."""
    monkeypatch.setattr(attending, "MOST_TOKENS", 16)
    config = ModelConfig(
        name="tiny", dtype=dtype, attention=attention, stem_layers=2, feature_layers=2, threads=1
    )
    backbone = load_backbone(config, folder)
    copied = copy.deepcopy(backbone.model)
    short, long = (backbone.pad([[5, 6, 7] * times]) for times in (4, 40))
    taken = []
    for tokens in (short, long, short):
        backbone.body(**tokens.inputs(), use_cache=False)
        taken.append(backbone.model.config._attn_implementation)
    assert taken == expected
    assert attending.attends_plainly(backbone.model) == (expected[0] == "eager")
    copied.base_model(**long.inputs())
    assert backbone.model.config._attn_implementation == expected[2]
    backbone.model.set_attn_implementation("sdpa")
    attended = [model.base_model(**short.inputs())[0].float() for model in (backbone.model, copied)]
    torch.testing.assert_close(*attended, rtol=0.05, atol=0.05)


def test_a_token_behind_padded_rows_takes_the_fused_kernel(folder: Path) -> None:
    """Behind rows of one length plain products are faster."""
    config = ModelConfig(name="tiny", dtype="bfloat16", stem_layers=2, feature_layers=2, threads=1)
    backbone = load_backbone(config, folder)
    for prompts, expected in (([[5, 6, 7], [5]], "sdpa"), ([[5, 6], [7, 5]], "eager")):
        tokens = backbone.pad(prompts)
        following, cache = backbone.next_logits(tokens.inputs())
        assert backbone.model.config._attn_implementation == "eager"
        inputs = {
            "input_ids": following.argmax(-1)[:, None],
            "attention_mask": torch.nn.functional.pad(tokens.attention_mask, (0, 1), value=1),
            "position_ids": tokens.position_ids[:, -1:] + 1,
        }
        backbone.next_logits(inputs | {"past_key_values": cache})
        assert backbone.model.config._attn_implementation == expected


def test_passes_that_keep_every_score_are_plain_for_fewer_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gradients are wanted every layer's scores stay: they must fit together."""
    config = ModelConfig(name="tiny", dtype="bfloat16", stem_layers=2, feature_layers=2, threads=1)
    backbone = load_backbone(config, folder)
    tokens = backbone.pad([[5] * 10] * 2)
    one_layer = attending.SCORE_BYTES * 2 * backbone.model.config.num_attention_heads * 10 * 10
    monkeypatch.setattr(attending, "MOST_BYTES", one_layer)
    with torch.no_grad():
        backbone.body(**tokens.inputs(), use_cache=False)
        assert backbone.model.config._attn_implementation == "eager"
    with torch.enable_grad():
        backbone.body(**tokens.inputs(), use_cache=False)
        assert backbone.model.config._attn_implementation == "sdpa"


def test_progress_is_told_at_every_step(backbone: Backbone) -> None:
    """Steps count from 1 to the number that the schedule was laid out for."""
    seen: list[tuple[int, int]] = []
    options = TrainingOptions(seed=1, progress=lambda step, steps, _loss: seen.append((step, steps)))
    train_expert(backbone, ROWS, Recipe(epochs=2, batch_size=3), options)
    assert seen == [(step, 6) for step in range(1, 7)]


def test_a_step_over_long_answers_takes_several_passes(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and their gradients are held of so many answer tokens at once; steps are those of all their rows."""
    recipe = Recipe(epochs=3, batch_size=len(ROWS))
    whole = train_expert(backbone, ROWS, recipe, TrainingOptions(seed=1))
    monkeypatch.setattr(training, "STEP_ANSWER_TOKENS", 16)
    with answer_tokens_a_pass(backbone) as passes:
        parted = train_expert(backbone, ROWS, recipe, TrainingOptions(seed=1))
    assert len(passes) > recipe.epochs
    assert max(passes) <= 16
    assert parted.losses == pytest.approx(whole.losses, rel=1e-3)
    assert whole.losses[-1] < whole.losses[0]


def test_a_later_version_starts_where_the_earlier_one_stands(backbone: Backbone, trained: Trained) -> None:
    """The first step's loss is the earlier version's, and the rank is kept."""
    recipe = Recipe(rate=1e-5, epochs=1, batch_size=len(ROWS), rank=4, alpha=8.0)
    later = train_expert(backbone, ROWS, recipe, TrainingOptions(seed=5, start=trained.adapter))
    tokens = backbone.encode([row.input for row in ROWS], [row.output for row in ROWS])
    counts = (tokens.labels != IGNORED).sum(1).numpy()
    expected = np.average(score_rows(backbone, ROWS, trained.adapter).losses, weights=counts)
    assert later.adapter.rank == 4
    assert later.losses[0] == pytest.approx(expected, abs=1e-4)


def test_rows_that_are_too_long_are_left_out_and_none_left_is_a_failure(backbone: Backbone) -> None:
    """A row over the limit does not train; a job without usable rows fails."""
    long = LabelledText(input="x" * 300, output="y")
    recipe = Recipe(epochs=1, max_row_tokens=64)
    assert train_expert(backbone, [*ROWS, long], recipe, TrainingOptions(seed=1)).rows == len(ROWS)
    with pytest.raises(TrainingFailed, match="none of 1 rows"):
        train_expert(backbone, [long], recipe, TrainingOptions(seed=1))


def test_exact_means_that_greedy_decoding_would_write_the_answer(backbone: Backbone) -> None:
    """Rows that were learned by heart are exact; generation agrees with the score."""
    recipe = Recipe(rate=2e-2, epochs=40, batch_size=4, rank=8)
    learned = train_expert(backbone, ROWS[:4], recipe, TrainingOptions(seed=1))
    scores = score_rows(backbone, ROWS, learned.adapter)
    assert scores.is_exact[:4].all()
    assert not score_rows(backbone, ROWS).is_exact.any()
    shuffled = score_rows(backbone, numbered(ROWS, range(7, -1, -1)), learned.adapter)
    np.testing.assert_allclose(shuffled.losses[::-1], scores.losses, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks for it
def test_plain_peft_loads_an_expert_and_gives_the_same_logits(
    backbone: Backbone, folder: Path, trained: Trained, tmp_path: Path
) -> None:
    """PeftModel.from_pretrained on the exported folder agrees with our hooks within 1e-4."""
    from dylora_stream.model.training import attached

    save_adapter(tmp_path / "expert", trained.adapter, backbone, {"expert_id": "upper", "version": 1})
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    other = PeftModel.from_pretrained(plain, tmp_path / "expert").eval()
    tokens = backbone.encode([row.input for row in ROWS])
    with torch.no_grad():
        base = backbone.model(**tokens.inputs()).logits
        with attached(backbone, trained.adapter.tensors, 1.0):
            ours = backbone.model(**tokens.inputs()).logits
        theirs = other(**tokens.inputs()).logits
    real = tokens.attention_mask.bool()
    assert (ours - theirs)[real].abs().max() < 1e-4
    assert (ours - base)[real].abs().max() > 1e-2


def test_an_adapter_comes_back_from_disk_as_it_was(
    backbone: Backbone, trained: Trained, tmp_path: Path
) -> None:
    """Bit for bit, and a folder that lost a byte is called corrupt."""
    save_adapter(tmp_path, trained.adapter, backbone, {})
    back = load_adapter(tmp_path)
    assert back.rank == trained.adapter.rank
    for name, (a, b) in trained.adapter.tensors.items():
        assert torch.equal(back.tensors[name][0], a)
        assert torch.equal(back.tensors[name][1], b)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ExpertCorrupt, match="cannot be read"):
        load_adapter(tmp_path)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    """An empty folder, and one whose configuration is not JSON."""
    with pytest.raises(ModelNotFound, match="model fetch"):
        load_backbone(ModelConfig(), tmp_path)
    (tmp_path / "config.json").write_text("no")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFound, match="does not load"):
        load_backbone(ModelConfig(), tmp_path)


def test_weights_that_are_cut_off_are_a_folder_that_does_not_load(folder: Path, tmp_path: Path) -> None:
    """As an interrupted copy leaves them."""
    cut = shutil.copytree(folder, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelNotFound, match="does not load"):
        load_backbone(ModelConfig(), cut)


def test_a_model_without_all_of_its_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """They would be drawn at random, by serve and by the child that trains, and bear the same digest."""
    part = shutil.copytree(folder, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    lost = min(name for name in weights if ".0." in name)
    save_file(
        {name: weights[name] for name in weights if name != lost},
        part / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=f"lacks 1 of the weights .* {lost} among them"):
        load_backbone(ModelConfig(stem_layers=2), part)


def test_capped_logits_are_the_models_own(tmp_path: Path) -> None:
    """Gemma 2 caps what its head gives; that is found out though its token 0 has an embedding of zeros."""
    backbone = load_backbone(ModelConfig(dtype="float32", stem_layers=2), tiny_gemma2(tmp_path))
    tokens = backbone.encode(["a text"], ["its answer"])
    with torch.no_grad():
        whole = backbone.model(**tokens.inputs()).logits[tokens.answer_positions()]
        assert torch.equal(backbone.answer_logits(tokens), whole)
        assert not torch.equal(backbone.head(backbone.body(**tokens.inputs())[0][:, -1]), whole[-1:])


@pytest.mark.parametrize(
    ("make", "reason"), [(tiny_mamba, "no cache of keys and values"), (tiny_opt, "one state of 16 numbers")]
)
def test_a_model_that_cannot_be_served_says_so_when_it_is_loaded(
    make: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    """Not at its first record."""
    with pytest.raises(ModelError, match=reason):
        load_backbone(ModelConfig(dtype="float32", stem_layers=2), make(tmp_path))


def test_a_stem_as_deep_as_the_model_is_refused_with_a_depth_that_fits(folder: Path) -> None:
    """There must be layers left for experts."""
    with pytest.raises(SettingsError, match="between 1 and 3"):
        load_backbone(ModelConfig(name="tiny", stem_layers=4), folder)


def test_the_stem_is_by_default_a_little_over_half_and_read_halfway(folder: Path) -> None:
    """No fewer layers than rows are read behind; a shallow stem is read at its end."""
    assert [ModelConfig().stem_of(layers) for layers in (30, 24, 12)] == [16, 12, 8]
    shallow = load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=2), folder)
    assert (shallow.stem_layers, shallow.read_layers) == (2, 2)
    deep = load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=3, feature_layers=1), folder)
    tokens = deep.encode(["a text", "another"])
    with torch.no_grad():
        states = deep.model(**tokens.inputs(), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], read_states(deep, tokens))
    assert {int(name.split(".")[2]) for name in deep.upper_linears()} == {3}


def test_a_folder_that_holds_something_else_is_not_fetched_into(tmp_path: Path) -> None:
    """Nothing is overwritten, and nothing is left beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ModelNotFound, match="holds no model"):
        fetch_backbone(tmp_path / "model", print)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_there_is_not_fetched_again(folder: Path) -> None:
    """The second call is instant and says nothing."""
    said: list[str] = []
    assert fetch_backbone(folder, said.append) == folder
    assert not said


@pytest.mark.parametrize("with_code", [False, True])
def test_code_is_fetched_with_a_model_where_it_is_trusted(
    with_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else; it is part of what the folder's digest names."""
    files = ("config.json", "model.safetensors", "modeling_own.py", "weights.bin")

    def download(_name: str, local_dir: Path, allow_patterns: list[str]) -> None:
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (local_dir / file).write_text(file)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_args, **_named: SimpleNamespace(siblings=())
    )
    target = fetch_backbone(tmp_path / "model", lambda _line: None, name="someone/model", with_code=with_code)
    fetched = {*files[:3]} if with_code else {*files[:2]}
    assert {path.name for path in target.iterdir()} == fetched
    digest = folder_digest(target)
    (target / "modeling_own.py").write_text("other code")
    assert folder_digest(target) != digest


def test_a_path_that_holds_no_model_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    """No network is asked for it."""
    with pytest.raises(ModelNotFound, match="not a model folder"):
        fetch_backbone(tmp_path / "target", print, name=str(tmp_path))
    assert not (tmp_path / "target").exists()


def test_a_second_pass_meets_the_memory_of_the_first(backbone: Backbone) -> None:
    """Where the C library can be told so, what a pass frees is not given back: hardly a page is new to the next."""
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    tokens = backbone.encode(["a b c " * 15] * 32)
    with torch.no_grad():
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            backbone.body(**tokens.inputs(), use_cache=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2000
