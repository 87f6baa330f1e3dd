"""Polling a broker that answers an empty fetch at once.

Kafka holds an empty fetch back for `fetch.max.wait.ms`; the embedded broker does not, so an idle consumer would fetch
in a tight loop: measured, 84 % of a core for one consumer, against 1 % on Apache Kafka. So there partitions are paused
between polls that bring nothing: fetch for a moment, then rest for what is left of the time.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord

__all__ = ["poll"]

FETCH_S = 0.02  # a round trip to a broker on this machine takes a fraction of it

Polled = Mapping[TopicPartition, Sequence[ConsumerRecord]]


def poll(
    consumer: KafkaConsumer, timeout_s: float, *, max_records: int | None = None, is_paced: bool
) -> Polled:
    """What `consumer.poll` gives; blocks at most `timeout_s`, paced at least for one fetch."""
    options: dict[str, Any] = {} if max_records is None else {"max_records": max_records}
    if not is_paced:
        polled: Polled = consumer.poll(timeout_ms=round(timeout_s * 1000), **options)
        return polled
    end_s = time.monotonic() + timeout_s
    consumer.resume(*consumer.paused())
    polled = consumer.poll(timeout_ms=round(FETCH_S * 1000), **options)
    if not polled:
        consumer.pause(*consumer.assignment())
        time.sleep(max(0.0, end_s - time.monotonic()))
    return polled
