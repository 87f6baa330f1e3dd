"""Training an expert, over PEFT loops that learn the same: equal rows, first weights, batches, rates and clipping.

`train_X_answers` is the speed-up over the plain loop (`model(**inputs, labels=labels)`, logits everywhere), and
`train_X_over_answers_only` over one that computes logits at the answers only. Both get their batches padded and
tokenised, which ours does in its time. PEFT's adapters are cast to the backbone's dtype (see `contenders`), ours stay
in float32 and are cast where they are used; the losses of all three are reported.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dylora_stream.bench.throughput.bare import twin
from dylora_stream.bench.throughput.config import LEAST_PAIRS
from dylora_stream.bench.throughput.contenders import PeftModel, random_adapter
from dylora_stream.bench.throughput.measuring import Bench, in_turn
from dylora_stream.bench.throughput.records import plain_records
from dylora_stream.core.recipes import SEEDING, Recipe, rate_at
from dylora_stream.model.adapters import Adapter
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.features import LabelledText
from dylora_stream.model.training import Trained, TrainingOptions, train_expert

__all__ = ["Contest", "measure_training", "training_rows"]

SPREAD = 0.2  # of a prompt's length, both ways
TEXTS = 400  # of the demo's skills: the tokens that prompts are cut from


def measure_training(bench: Bench) -> None:
    """train_short_answers and train_long_answers."""
    sizes, backbone, bare = bench.config.sizes, bench.backbone(), bench.bare()
    recipe = replace(SEEDING, epochs=sizes.train_epochs, rank=sizes.rank, alpha=2.0 * sizes.rank)
    for name, shape in (("short", sizes.short), ("long", sizes.long)):
        contest = Contest((backbone, bare), training_rows(backbone, sizes.train_rows, shape), recipe)
        runs = (contest.plain, contest.answers_only, contest.ours)
        losses = [contest.plain(1), contest.answers_only(1)]  # warm
        times = in_turn([_keeping(losses, run) for run in runs], LEAST_PAIRS)
        bench.keep(f"train_{name}_answers", [(plain, ours) for plain, _, ours in times], is_speed=True)
        only = [(answers_only, ours) for _, answers_only, ours in times]
        bench.keep(f"train_{name}_over_answers_only", only, is_speed=True)
        last = dict(zip(("peft", "peft_answers_only", "ours"), losses[-len(runs) :], strict=True))
        bench.notes[f"train_{name}_losses"] = {who: _rounded(each) for who, each in last.items()}


def _keeping(results: list[list[float]], run: Callable[[], list[float]]) -> Callable[[], None]:
    return lambda: results.append(run())


def _rounded(losses: Sequence[float]) -> list[float]:
    return [round(loss, 4) for loss in losses]


class Contest:
    """One training, by us on the first backbone and by PEFT on the second. `seed`: of first weights and batches."""

    def __init__(
        self,
        backbones: tuple[Backbone, Backbone],
        rows: Sequence[LabelledText],
        recipe: Recipe,
        seed: int = 0,
    ) -> None:
        (self._backbone, bare), self._rows, self._recipe, self._seed = backbones, rows, recipe, seed
        self._start = random_adapter(bare, seed, recipe.rank, b_spread=0.0)
        own = self._backbone
        listening = _Listening(**{each.name: getattr(own, each.name) for each in fields(own)})
        self.trained = self.train(listening)
        self._batches = listening.heard[-len(self.trained.losses) :]
        self._wrapped = twin(bare)
        self._peft = PeftModel.around(self._wrapped, self._wrapped.model, recipe.rank, round(recipe.alpha))

    def train(self, backbone: Backbone | None = None) -> Trained:
        """Ours, whole."""
        options = TrainingOptions(seed=self._seed, start=self._start)
        return train_expert(backbone or self._backbone, self._rows, self._recipe, options)

    def ours(self) -> list[float]:
        """The losses of our training."""
        return list(self.train().losses)

    def plain(self, steps: int | None = None, dtype: torch.dtype | None = None) -> list[float]:
        """The losses of the plain loop; adapters in `dtype` or the backbone's."""
        model = self._peft.model
        return self._loop(
            lambda tokens: model(**tokens.inputs(), labels=tokens.labels, use_cache=False).loss, steps, dtype
        )

    def answers_only(self, steps: int | None = None) -> list[float]:
        """The losses of the loop that computes logits at the answers."""

        def loss(tokens: Tokens) -> Tensor:
            return nn.functional.cross_entropy(
                self._wrapped.answer_logits(tokens).float(), tokens.answer_ids()
            )

        return self._loop(loss, steps)

    def theirs(self) -> Adapter:
        """What PEFT's last loop made."""
        return self._peft.taken("default", self._recipe.alpha / self._recipe.rank)

    @torch.enable_grad()
    def _loop(
        self, loss_of: Callable[[Tokens], Any], steps: int | None, dtype: torch.dtype | None = None
    ) -> list[float]:
        self._peft.put("default", self._start, dtype)
        recipe, parameters = self._recipe, self._peft.parameters()
        optimizer = torch.optim.AdamW(
            parameters, lr=recipe.rate, weight_decay=recipe.weight_decay, foreach=True
        )
        losses = []
        for step, tokens in enumerate(self._batches[:steps]):
            optimizer.param_groups[0]["lr"] = rate_at(step, len(self._batches), recipe)
            loss = loss_of(tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses


@dataclass(frozen=True, kw_only=True)
class _Listening(Backbone):
    """Keeps every batch that it pads: the last ones are those that a training went through."""

    heard: list[Tokens] = field(default_factory=list)

    def pad(self, prompts: Sequence[list[int]], targets: Sequence[list[int]] | None = None) -> Tokens:
        tokens = super().pad(prompts, targets)
        self.heard.append(tokens)
        return tokens


def training_rows(backbone: Backbone, count: int, shape: tuple[int, int]) -> list[LabelledText]:
    """Rows whose answer repeats how the input begins. shape: tokens of a prompt, about, and of its answer."""
    prompt, answer = shape
    ids, decode, rng = _token_stream(backbone), backbone.tokenizer.decode, random.Random(0)
    rows = []
    for _ in range(count):
        length = round(prompt * rng.uniform(1 - SPREAD, 1 + SPREAD))
        part = [token for token, _ in zip(ids, range(length), strict=False)]
        rows.append(LabelledText(input=decode(part), output=decode(part[: answer - 1])))
    return rows


def _token_stream(backbone: Backbone) -> Iterator[int]:
    """Tokens of real texts, without end."""
    texts = [record["input"] + "\n" for record in plain_records(TEXTS)]
    rows = backbone.tokenizer(texts, add_special_tokens=False)["input_ids"]
    while True:
        for row in rows:
            yield from row
