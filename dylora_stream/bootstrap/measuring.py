"""Serve in one process with a given model, for measurements: requests that stand on the broker, taken to their end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dylora_stream.bootstrap.parts import SystemClock, expert_store, kafka_of, model_path, router_parts
from dylora_stream.core.experts import Registry
from dylora_stream.core.messages import Answer, Novelty, Request, Topic
from dylora_stream.core.ports import Activation, Answerer
from dylora_stream.ops.metrics import Metrics
from dylora_stream.serve.pipeline import Pipeline, PipelineConfig
from dylora_stream.serve.service import ServePorts, ServeService, Worker
from dylora_stream.settings import Settings
from dylora_stream.store.journal import FileJournal
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.sink import KafkaSink
from dylora_stream.stream.source import KafkaSource
from dylora_stream.stream.wire import WireCodec

if TYPE_CHECKING:
    from dylora_stream.model.answering import MixtureAnswerer
    from dylora_stream.model.backbone import Backbone

__all__ = ["Passage", "serve_through", "tiny_model", "zero_experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What it took to bring records from the requests topic to the results topic."""

    records: int
    seconds: float
    cpu_s: float  # of this process, all threads
    model_cpu_s: float  # of it, inside the model


class _Metered:
    """An answerer whose processor time is added up."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self.cpu_s = 0.0

    def prepare(self, registry: Registry) -> Activation:
        return self._answerer.prepare(registry)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        began = time.process_time()
        answers = self._answerer.answer(requests)
        self.cpu_s += time.process_time() - began
        return answers

    def score(self, inputs: Sequence[str], tenant: str) -> list[Novelty]:
        return self._answerer.score(inputs, tenant)


def serve_through(settings: Settings, answerer: Answerer, records: int, group: str) -> Passage:
    """Answer `records` records from the beginning of the topic, in a group of its own; joining is not counted."""
    kafka = kafka_of(settings, group, group)
    metered, clock = _Metered(answerer), SystemClock()
    codec = WireCodec(source="/dylora/bench")
    with ExitStack() as closing:
        source = KafkaSource(kafka, [Topic.REQUESTS])
        closing.callback(source.close)
        sink = KafkaSink(kafka, f"{kafka.prefix}{group}")
        closing.callback(sink.close)
        changelog = KafkaChangelog(kafka, Topic.EXPERTS)
        closing.callback(changelog.close)
        ports = ServePorts(
            source=source,
            sink=sink,
            changelog=changelog,
            answerer=metered,
            codec=codec,
            clock=clock,
            metrics=Metrics(clock),
            journal=FileJournal(Path(closing.enter_context(TemporaryDirectory())) / "in-hand"),
        )
        pipeline = Pipeline(metered, codec, clock, PipelineConfig(sample_share=settings.serve.sample_share))
        worker = Worker(model="bench", feature_space="bench", boot=group)
        service = ServeService(ports, pipeline, settings.serve, worker)
        done, cpu_s, began_s = 0, 0.0, 0.0
        while done < records:
            step_s, step_cpu_s = time.monotonic(), time.process_time()
            taken = service.step()
            if taken:
                began_s = began_s or step_s
                cpu_s += time.process_time() - step_cpu_s
                done += taken
        return Passage(
            records=done, seconds=time.monotonic() - began_s, cpu_s=cpu_s, model_cpu_s=metered.cpu_s
        )


@contextmanager
def zero_experts(
    settings: Settings, backbone: "Backbone", texts: Sequence[str], count: int
) -> Iterator["MixtureAnswerer"]:
    """An answerer with `count` mature experts whose B is zero: all of the cost, none of the effect on the texts."""
    import torch

    from dylora_stream.model.adapters import Adapter
    from dylora_stream.model.answering import MixtureAnswerer
    from dylora_stream.model.backbone import linear_shape
    from dylora_stream.model.features import read_rows
    from dylora_stream.model.live import LiveExperts, LoadedExpert
    from dylora_stream.model.network import RouterNetwork

    rank = settings.pool.rank
    tensors = {}
    for name, module in backbone.upper_linears().items():
        d_in, d_out = linear_shape(module)
        tensors[name] = (torch.randn(rank, d_in), torch.zeros(d_out, rank))
    features = read_rows(backbone, texts)
    experts = [
        LoadedExpert(
            expert_id=f"zero-{number}",
            version=1,
            adapter=Adapter(rank=rank, tensors=dict(tensors)),
            features=features[number::count],
            is_mature=True,
        )
        for number in range(count)
    ]
    live = LiveExperts(backbone, settings.pool, router_parts(settings))
    live.install(experts, RouterNetwork(backbone.width))
    answerer = MixtureAnswerer(
        live, expert_store(settings), settings.generation, settings.model.max_input_tokens
    )
    try:
        yield answerer
    finally:
        answerer.close()


def tiny_model(settings: Settings, folder: Path) -> Path:
    """A two-layer model of random weights under the configured model's tokenizer: all daemon, hardly any model."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_path(settings), local_files_only=True)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
