"""Steps 5 and 6 of learn's round: what the database has committed goes to Kafka, each message once.

The transaction's offset metadata carries the mark of its last message. Between Kafka's commit and the database's own
note of it the process may die, or the answer may be lost: then the mark, read back, says what is out already. While it
cannot be read, nothing is sent.
"""

from collections.abc import Mapping

import structlog

from dylora_stream.core.errors import BrokerUnreachable, TransactionAborted
from dylora_stream.core.ledger import Ledger
from dylora_stream.core.messages import OutboundMessage
from dylora_stream.core.ports import Checkpoint, Partition, Sink, Source

__all__ = ["Outbox"]

log = structlog.get_logger(__name__)


class Outbox:
    """The messages that wait in the database."""

    def __init__(self, ledger: Ledger, source: Source, sink: Sink) -> None:
        self._ledger, self._source, self._sink = ledger, source, sink
        self._is_in_doubt = False  # whether an aborted transaction may have happened after all

    def publish(self, checkpoint: Checkpoint, positions: Mapping[Partition, int]) -> list[OutboundMessage]:
        """Everything that waits, in one transaction; what went out. Where nothing was polled, `positions` are
        committed, if their partitions are owned.

        On TransactionAborted the source is rewound, and what is not out already waits on.
        """
        pending = self._ledger.outbox()
        if not pending or checkpoint.group is None:
            return []
        if self._is_in_doubt:
            self._resolve_doubt()
            return []
        messages, last = [message for _, message in pending], pending[-1][0]
        mine = self._source.assignment()  # the database also knows topics that are gone
        offsets = dict(checkpoint.offsets) or {part: at for part, at in positions.items() if part in mine}
        if positions and not offsets:
            return []
        try:
            self._sink.publish(messages, Checkpoint(offsets=offsets, group=checkpoint.group, note=last))
        except TransactionAborted:
            self._is_in_doubt = True  # a commit that ran into its time-out may have happened all the same
            self._source.rewind()
            raise
        self._ledger.published(last)
        return messages

    def forget_published(self) -> None:
        """Messages that are out, as the marks beside the committed offsets say."""
        for mark in self._source.committed_notes():
            self._ledger.published(mark)

    def _resolve_doubt(self) -> None:
        """Read what the aborted transaction published after all; where that fails, ask again in the next round."""
        try:
            self.forget_published()
        except (BrokerUnreachable, TransactionAborted) as error:
            log.warning("outbox_in_doubt", reason=str(error))
            return
        self._is_in_doubt = False
