"""A record that kills the process each time: it ends as a dead letter, and the others are answered once."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dylora_stream.core.messages import OutboundMessage, RawRecord, Topic
from dylora_stream.serve.poison import MOST_ENDS
from dylora_stream.stream.changelog import KafkaChangelog
from dylora_stream.stream.codec import decode_dead_letter
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.sink import KafkaSink
from dylora_stream.stream.topics import TopicLayout, ensure_topics

WORKER = Path(__file__).with_name("fragile_worker.py")
PATIENCE_S = 60.0
OTHERS = 20


def all_of(config: KafkaConfig, topic: Topic) -> list[RawRecord]:
    """Every committed record of a topic, as a fresh reader sees it."""
    changelog = KafkaChangelog(config, topic)
    try:
        return changelog.catch_up(PATIENCE_S)
    finally:
        changelog.close()


def until_it_ends(config: KafkaConfig, folder: Path) -> int | None:
    """One life of the worker: its exit code, None where it lived until all was settled."""
    arguments = [sys.executable, str(WORKER), config.bootstrap_servers, config.prefix, str(folder)]
    worker = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            code = worker.poll()
            if code is not None:
                return code
            if len(all_of(config, Topic.RESULTS)) + len(all_of(config, Topic.DEAD_LETTERS)) > OTHERS:
                return None
            time.sleep(0.2)
    finally:
        worker.kill()
        worker.wait()
    raise AssertionError(f"nothing came of it in {PATIENCE_S} s")


@pytest.mark.timeout(240)
def test_what_kills_the_process_is_buried_and_everything_else_is_answered_once(
    broker: str, kafka_config: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    """One end with the whole batch in hand, `MOST_ENDS` with the culprit alone; then the stream goes on."""
    config = kafka_config(broker)
    ensure_topics(config, TopicLayout(requests_partitions=1))
    sink = KafkaSink(config, config.prefix + "asker")
    texts = [f"text {number}" for number in range(OTHERS)]
    texts.insert(OTHERS // 2, "poison")
    sink.publish([OutboundMessage(topic=Topic.REQUESTS, key=None, value=text.encode()) for text in texts])
    sink.close()
    codes = []
    while not codes or codes[-1] is not None:
        codes.append(until_it_ends(config, tmp_path))
        assert len(codes) <= MOST_ENDS + 2
    assert codes == [-signal.SIGKILL] * (MOST_ENDS + 1) + [None]
    (letter,) = all_of(config, Topic.DEAD_LETTERS)
    assert letter.value == b"poison"
    assert decode_dead_letter(letter).attempts == MOST_ENDS
    positions = Counter(
        json.loads(result.value or b"")["position"] for result in all_of(config, Topic.RESULTS)
    )
    assert len(positions) == OTHERS
    assert set(positions.values()) == {1}
