"""Steps 5 and 6 of learn's round: what the database has committed goes to Kafka, each message once.

The transaction's offset metadata carries the mark of its last message. Between Kafka's commit and the database's own
note of it the process may die, or the answer may be lost: then the mark, read back, says what is out already.
"""

from collections.abc import Mapping

from dylora_stream.core.errors import TransactionAborted
from dylora_stream.core.ledger import Ledger
from dylora_stream.core.messages import OutboundMessage
from dylora_stream.core.ports import Checkpoint, Partition, Sink, Source

__all__ = ["Outbox"]


class Outbox:
    """The messages that wait in the database."""

    def __init__(self, ledger: Ledger, source: Source, sink: Sink) -> None:
        self._ledger, self._source, self._sink = ledger, source, sink

    def publish(self, checkpoint: Checkpoint, positions: Mapping[Partition, int]) -> list[OutboundMessage]:
        """Everything that waits, in one transaction; what went out. `positions` are committed where nothing was polled.

        On TransactionAborted the source is where the database says, and what is not out already waits on.
        """
        pending = self._ledger.outbox()
        if not pending or checkpoint.group is None:
            return []
        messages, last = [message for _, message in pending], pending[-1][0]
        offsets = dict(checkpoint.offsets) or dict(positions)
        try:
            self._sink.publish(messages, Checkpoint(offsets=offsets, group=checkpoint.group, note=last))
        except TransactionAborted:
            self.forget_published()  # a commit that ran into its time-out may have happened all the same
            self._source.rewind()
            raise
        self._ledger.published(last)
        return messages

    def forget_published(self) -> None:
        """Messages that are out, as the marks beside the committed offsets say."""
        for mark in self._source.committed_notes():
            self._ledger.published(mark)
