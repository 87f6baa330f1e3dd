"""One model for the stream and for whoever asks `POST /novelty`: a lock around an `Answerer`."""

import threading
from collections.abc import Sequence

from dylora_stream.core.experts import Registry
from dylora_stream.core.messages import Answer, Novelty, Request
from dylora_stream.core.ports import Activation, Answerer, LoadFailure

__all__ = ["SharedAnswerer"]


class SharedAnswerer:
    """`core.ports.Answerer` that threads may share; a question waits for the batch at hand."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._lock = threading.Lock()

    def prepare(self, registry: Registry) -> Activation:
        """See the port; only the swap waits for the batch at hand."""
        activation = self._answerer.prepare(registry)

        def activate() -> tuple[LoadFailure, ...]:
            with self._lock:
                return activation()

        return activate

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See the port."""
        with self._lock:
            return self._answerer.answer(requests)

    def score(self, inputs: Sequence[str], tenant: str) -> list[Novelty]:
        """See the port."""
        with self._lock:
            return self._answerer.score(inputs, tenant)
