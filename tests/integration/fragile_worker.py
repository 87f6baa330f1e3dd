"""A serve loop whose model ends the process at the text "poison", for test_killing_record.py.

Arguments: bootstrap servers, prefix, data folder. It prints `worker_started` and goes on until it is killed.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dylora_stream.bootstrap.parts import SystemClock
from dylora_stream.core.messages import Answer, Request, Topic
from dylora_stream.ops.metrics import Metrics
from dylora_stream.serve.pipeline import Pipeline, PipelineConfig
from dylora_stream.serve.service import ServeConfig, ServePorts, ServeService, Worker
from dylora_stream.store.journal import FileJournal
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.sink import KafkaSink
from dylora_stream.stream.source import KafkaSource
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import UniformAnswerer


class Fragile(UniformAnswerer):
    """As a model that runs out of memory on one input, and is killed for it."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See the port."""
        if any(request.input == "poison" for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(requests)


def main(servers: str, prefix: str, folder: Path) -> None:
    """Serve until killed."""
    config = KafkaConfig(
        bootstrap_servers=servers, prefix=prefix, group=prefix + "group", instance="fragile", session_timeout_s=6.0,
        connect_timeout_s=10.0, request_timeout_s=10.0, transaction_timeout_s=10.0,
    )  # fmt: skip
    answerer, codec, clock = Fragile(), WireCodec(source="/test"), SystemClock()
    ports = ServePorts(
        source=KafkaSource(config, [Topic.REQUESTS], witness=Topic.RESULTS),
        sink=KafkaSink(config, f"{prefix}fragile.serve"),
        changelog=KafkaChangelog(config, Topic.EXPERTS),
        answerer=answerer,
        codec=codec,
        clock=clock,
        metrics=Metrics(clock),
        journal=FileJournal(folder / "in-hand"),
    )
    worker = Worker(model="tiny", feature_space="space", boot=str(os.getpid()))
    ServeService(ports, Pipeline(answerer, codec, clock, PipelineConfig()), ServeConfig(), worker).run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
