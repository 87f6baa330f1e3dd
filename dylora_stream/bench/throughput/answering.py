"""Records scored, routed and answered together, over the bare backbone that answers in the same way.

The experts' B is zero: all of the cost is paid and the texts stay those of the bare model, so that both write as many
tokens. Beside it, the way most would go: transformers' own generate, and every choice in full behind its prompt.
"""

from functools import partial

from dylora_stream import bootstrap
from dylora_stream.bench.throughput.bare import (
    answer_barely,
    closed_pool,
    generate_plainly,
    rank_plainly,
    twin,
)
from dylora_stream.bench.throughput.measuring import Bench
from dylora_stream.bench.throughput.records import EXPERTS, plain_records, with_choices
from dylora_stream.core.messages import Position, Request
from dylora_stream.model.answering import MixtureAnswerer
from dylora_stream.model.attention import attends_plainly
from dylora_stream.model.backbone import Backbone

__all__ = ["measure_answering"]


def measure_answering(bench: Bench) -> None:
    """answer_choices and answer_generate over the same work without experts; answer_*_plain over the plain way."""
    backbone, bare = bench.backbone(), bench.bare()
    alike = twin(backbone)
    texts = [record["input"] for record in plain_records(bench.config.sizes.distinct)]
    with bootstrap.zero_experts(bench.settings, backbone, texts, EXPERTS) as answerer:
        for name in ("choices", "generate"):
            _compare(bench, name, (bare, alike), answerer)


def _compare(
    bench: Bench, name: str, backbones: tuple[Backbone, Backbone], answerer: MixtureAnswerer
) -> None:
    """backbones: the bare one, and the same with our attention."""
    bare, own = backbones
    requests = _requests(bench.config.sizes.requests, with_choice=name == "choices")
    generation, idle = bench.settings.generation, closed_pool(bare)
    barely, alike = (partial(answer_barely, each, idle, requests, generation) for each in (bare, own))

    def plainly() -> None:
        if name == "choices":
            pairs = [(request.input, choice) for request in requests for choice in request.choices]
            rank_plainly(bare, pairs, generation.micro_batch)
        else:
            inputs = [request.input for request in requests]
            generate_plainly(bare, inputs, generation.max_new_tokens, generation.micro_batch)

    same = [answer.output == text for answer, text in zip(answerer.answer(requests), alike(), strict=True)]
    bench.notes[f"answer_{name}_same_texts"] = sum(same) / len(same)
    beside = alike if attends_plainly(own.model) else None
    bench.compare(f"answer_{name}", barely, lambda: answerer.answer(requests), beside)
    bench.compare(f"answer_{name}_plain", plainly, lambda: answerer.answer(requests))


def _requests(count: int, *, with_choice: bool) -> list[Request]:
    records = plain_records(count)
    return [
        Request(
            position=Position(topic="bench", partition=0, offset=number),
            input=record["input"],
            choices=tuple(record.get("choices", ())),
        )
        for number, record in enumerate(with_choices(records) if with_choice else records)
    ]
