"""Decoding with each kind of cache: of keys and values, and of linear attention's states beside them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import random_adapter, tiny_gpt2, tiny_hybrid, tiny_llama

from dylora_stream.model import decoding
from dylora_stream.model.backbone import Backbone, load_backbone
from dylora_stream.model.config import ModelConfig, PoolConfig
from dylora_stream.model.decoding import generate, rank_choices
from dylora_stream.model.features import LabelledText
from dylora_stream.model.mixture import Pool
from dylora_stream.model.training import score_rows

TEXTS = ["one two three", "a", "a longer text than the others are", "??", "x y"]
CHOICES = ["yes", "no way", "perhaps, or so", "a", ""]


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny model, its stem two layers."""
    make = tiny_llama if request.param == "llama" else tiny_hybrid
    config = ModelConfig(name="tiny", dtype="float32", stem_layers=2, feature_layers=2, threads=1)
    return load_backbone(config, make(tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def pool(backbone: Backbone) -> Iterator[Pool]:
    """An expert in slot 1."""
    pool = Pool(backbone, PoolConfig(slots=1, rank=4))
    pool.write(1, random_adapter(backbone, 1))
    yield pool
    pool.close()


def test_rows_that_end_leave_the_others_as_they_write_alone(backbone: Backbone, pool: Pool) -> None:
    """A token that one row writes early ends it: what is left in the cache belongs to the rows that stay."""
    gates, tokens = (torch.tensor([[1], [0], [1], [0]]), torch.ones((4, 1))), backbone.encode(TEXTS[:4])
    with pool.gated(*gates):
        whole = generate(backbone, pool, tokens, 12)
    end = whole[1][2]
    ending = replace(backbone, tokenizer=SimpleNamespace(eos_token_id=end))
    with pool.gated(*gates):
        written = generate(ending, pool, tokens, 12)
    assert len(set(map(len, written))) > 1
    assert written == [ids[: ids.index(end)] if end in ids else ids for ids in whole]


@pytest.mark.parametrize("rows", [5, 30])
def test_choices_are_ranked_as_in_whole_passes(backbone: Backbone, pool: Pool, rows: int) -> None:
    """A prompt's cache serves all of its choices and stays as it was for those of the next pass."""
    texts = [TEXTS[row % len(TEXTS)] for row in range(rows)]
    best = rank_choices(backbone, pool, backbone.encode(texts), [backbone.target_ids(CHOICES) for _ in texts])
    for text, index in zip(TEXTS, best, strict=False):
        choices = [LabelledText(input=text, output=choice) for choice in CHOICES]
        assert index == int(score_rows(backbone, choices).losses.argmin())
    assert best == [best[row % len(TEXTS)] for row in range(rows)]


def test_choices_behind_a_long_prompt_hold_few_copies_of_it(
    backbone: Backbone, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each choice of a pass has a copy of the prompt's cache: positions are bounded, not rows alone."""
    tokens, targets = backbone.encode(TEXTS[:2]), [backbone.target_ids(CHOICES) for _ in range(2)]
    best = rank_choices(backbone, pool, tokens, targets)
    copies: list[int] = []
    expanded = decoding._expanded

    def counted(cache: Any, index: torch.Tensor) -> Any:
        copies.append(len(index))
        return expanded(cache, index)

    monkeypatch.setattr(decoding, "_expanded", counted)
    most = 2 * (tokens.input_ids.shape[1] + max(map(len, targets[0])))
    monkeypatch.setattr(decoding, "CHOICE_POSITIONS", most)
    assert rank_choices(backbone, pool, tokens, targets) == best
    assert sum(copies) == sum(map(len, targets))
    assert max(copies) <= most // tokens.input_ids.shape[1]


def test_choices_of_a_short_prompt_fit_beside_a_long_prompt(tmp_path: Path) -> None:
    """Where positions are learned there are only so many, and padding behind a long prompt takes none of them."""
    config = ModelConfig(name="tiny", dtype="float32", stem_layers=2, feature_layers=2, threads=1)
    backbone = load_backbone(config, tiny_gpt2(tmp_path))
    pool = Pool(backbone, PoolConfig(slots=1, rank=4))
    texts, choices = ["x" * 450, "x"], [["a", "b"], ["a" * 90, "b" * 90]]
    targets = [backbone.target_ids(each) for each in choices]
    together = rank_choices(backbone, pool, backbone.encode(texts), targets)
    alone = [
        rank_choices(backbone, pool, backbone.encode([text]), [own])[0]
        for text, own in zip(texts, targets, strict=True)
    ]
    pool.close()
    assert together == alone
