"""The pool, the stem's hook and the answerer, on a tiny Llama and a tiny GPT-2."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import random_adapter, tiny_gpt2, tiny_llama
from peft import PeftModel

from dylora_stream.core.errors import ModelMismatch
from dylora_stream.model.adapters import save_adapter
from dylora_stream.model.backbone import Backbone, load_backbone
from dylora_stream.model.config import ModelConfig, PoolConfig
from dylora_stream.model.decoding import generate
from dylora_stream.model.mixture import Pool
from dylora_stream.model.stem import StemHook, StemOutput

TEXTS = ["one two three", "a", "a longer text than the others are", "??", "x y"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    make = tiny_llama if request.param == "llama" else tiny_gpt2
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    """A tiny model, loaded, its stem one layer."""
    return load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=1, threads=1), folder)


@pytest.fixture
def pool(backbone: Backbone) -> Iterator[Pool]:
    """A pool of eight slots with seven adapters in it, in slots 1 to 7."""
    pool = Pool(backbone, PoolConfig(slots=8, rank=4))
    for slot in range(1, 8):
        pool.write(slot, random_adapter(backbone, slot))
    yield pool
    pool.close()


def logits_of(backbone: Backbone, texts: list[str]) -> torch.Tensor:
    """(n, V) logits behind the prompts."""
    with torch.no_grad():
        return backbone.model(**backbone.encode(texts).inputs()).logits[:, -1]


def one_hot(slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates that give each row to one slot."""
    return torch.tensor(slots)[:, None], torch.ones((len(slots), 1))


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's, of transformers
def test_a_one_hot_gate_equals_that_adapter_alone_under_plain_peft(
    backbone: Backbone, pool: Pool, folder: Path, tmp_path: Path
) -> None:
    """The pool's update is PEFT's, fused and Conv1D layers included."""
    save_adapter(tmp_path, random_adapter(backbone, 3), backbone, {"expert_id": "three"})
    plain = load_backbone(ModelConfig(name="tiny", dtype="float32", stem_layers=1, threads=1), folder)
    peft = PeftModel.from_pretrained(plain.model, tmp_path).eval()
    with torch.no_grad():
        expected = peft(**plain.encode(TEXTS).inputs()).logits[:, -1]
    with pool.gated(*one_hot([3] * len(TEXTS))):
        found = logits_of(backbone, TEXTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, logits_of(backbone, TEXTS), atol=1e-2)


@pytest.mark.parametrize("others", [[1, 2, 1, 2], [1, 2, 3, 4], [1, 1, 1, 1]])
def test_a_row_of_the_backbone_is_bit_identical_whatever_the_other_rows_do(
    backbone: Backbone, pool: Pool, others: list[int]
) -> None:
    """Gate 0 equals the base model, alone and in mixed company."""
    base = logits_of(backbone, TEXTS)
    with pool.gated(*one_hot([0, *others])):
        assert torch.equal(logits_of(backbone, TEXTS)[0], base[0])
    with pool.gated(*one_hot([0] * len(TEXTS))):
        assert torch.equal(logits_of(backbone, TEXTS), base)
    assert torch.equal(logits_of(backbone, TEXTS), base)


@pytest.mark.parametrize("slots", [[[1, 2], [3, 0], [2, 0], [0, 0], [1, 3]], [[1], [2], [3], [4], [5]]])
def test_a_mixed_batch_equals_its_rows_one_by_one(
    backbone: Backbone, pool: Pool, slots: list[list[int]]
) -> None:
    """Rows do not see one another, whichever way the sum is computed."""
    table = torch.tensor(slots)
    weights = torch.rand(table.shape, generator=torch.Generator().manual_seed(1))
    with pool.gated(table, weights):
        together = logits_of(backbone, TEXTS)
    for row, text in enumerate(TEXTS):
        with pool.gated(table[row : row + 1], weights[row : row + 1]):
            torch.testing.assert_close(
                together[row : row + 1], logits_of(backbone, [text]), atol=1e-4, rtol=1e-4
            )


def test_the_shared_and_the_gathered_way_agree(
    backbone: Backbone, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of summing blocks give the same logits and the same gradients of the weights."""
    slots = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 0], [1, 1]])
    results = []
    for shared in (0, 100):
        monkeypatch.setattr("dylora_stream.model.mixture.SHARED_EXPERTS", shared)
        weights = torch.full(slots.shape, 0.5, requires_grad=True)
        with pool.gated(slots, weights):
            logits = backbone.model(**backbone.encode(TEXTS).inputs()).logits[:, -1]
        (logits**2).sum().backward()
        results.append((logits.detach(), weights.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)


def test_decoding_keeps_each_rows_gates_while_rows_leave(backbone: Backbone, pool: Pool) -> None:
    """Many rows decoded together, ended ones cut out, write what each writes alone without a cache."""
    slots = [1, 2, 0, 3, 4]
    with pool.gated(*one_hot(slots)):
        written = generate(backbone, pool, backbone.encode(TEXTS), 12)
    for text, slot, ids in zip(TEXTS, slots, written, strict=True):
        prompt = backbone.prompt_ids([text])[0]
        alone: list[int] = []
        for _ in range(12):
            with pool.gated(*one_hot([slot])), torch.no_grad():
                token = int(backbone.model(**backbone.pad([prompt + alone]).inputs()).logits[0, -1].argmax())
            if token == backbone.eos_id:
                break
            alone.append(token)
        assert ids == alone


def test_routing_inside_the_pass_equals_gates_set_before_it(backbone: Backbone, pool: Pool) -> None:
    """The hook at the stem's end sets the gates of the layers behind it, once, in `generate` too."""
    hook = StemHook(backbone)
    tokens, gates, seen = backbone.encode(TEXTS), one_hot([1, 2, 3, 0, 4]), []

    def decide(stem: StemOutput) -> None:
        seen.append(stem.features)
        pool.set_gates(*gates)

    with torch.no_grad():
        pool.set_gates(*gates)
        preset = backbone.model.generate(
            **_plain(tokens), max_new_tokens=6, do_sample=False, pad_token_id=backbone.eos_id
        )
        pool.no_gates()
        with hook.routing(tokens.attention_mask, decide):
            routed = backbone.model.generate(
                **_plain(tokens), max_new_tokens=6, do_sample=False, pad_token_id=backbone.eos_id
            )
    hook.close()
    pool.no_gates()
    assert torch.equal(routed, preset)
    assert len(seen) == 1
    assert seen[0].shape == (len(TEXTS), backbone.width)


def _plain(tokens: object) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def test_left_padding_changes_nothing(backbone: Backbone, pool: Pool) -> None:
    """A short text among long ones gets the logits and features it gets alone."""
    with pool.gated(*one_hot([2, 2])):
        padded = logits_of(backbone, ["short", "a text that is a good deal longer than the other one"])
    with pool.gated(*one_hot([2])):
        torch.testing.assert_close(padded[:1], logits_of(backbone, ["short"]), atol=1e-4, rtol=1e-4)


def test_a_lower_rank_is_padded_and_a_higher_one_refused(backbone: Backbone, pool: Pool) -> None:
    """Rank 2 in a pool of rank 4 gives what rank 2 gives; rank 5 raises and leaves the slot as it was."""
    small, wide = random_adapter(backbone, 9, rank=2), Pool(backbone, PoolConfig(slots=1, rank=2))
    wide.write(1, small)
    with wide.gated(*one_hot([1])):
        expected = logits_of(backbone, TEXTS[:1])
    wide.close()
    pool.write(8, small)
    with pytest.raises(ModelMismatch, match=r"pool\.rank"):
        pool.write(8, random_adapter(backbone, 9, rank=5))
    with pool.gated(*one_hot([8])):
        torch.testing.assert_close(logits_of(backbone, TEXTS[:1]), expected, atol=1e-5, rtol=1e-5)
