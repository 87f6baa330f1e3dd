"""Everything that can go wrong, as one tree.

    DyloraError
    ├── SettingsError              a setting is wrong or unknown: the process exits 2
    ├── BadRecord                  this record cannot be answered: dead letter, the stream goes on
    ├── TrainingFailed             this job gave no expert: event, the stream goes on
    │   └── RowsUnlearnable        ... because of its rows: the cluster is rejected
    ├── ExpertUnknown              no expert, or more than one, is called that
    ├── BrokerError                Kafka does not do what it must: the process stops
    │   ├── BrokerUnreachable      no answer, or credentials refused
    │   ├── TopicMissing           a topic does not exist and may not be created
    │   ├── OffsetsLost            the committed offsets are gone or out of range
    │   ├── TransactionAborted     nothing of the transaction happened: rewind and go on
    │   └── Fenced                 another process took over our identity: exit
    ├── StoreError                 the database or the expert store does not do what it must
    │   ├── DatabaseBusy           another process has the DuckDB file open
    │   ├── DatabaseBroken         the file cannot be read
    │   ├── DiskFull               no room left
    │   └── ExpertCorrupt          an expert's files are missing or differ from their digest
    └── ModelError
        ├── ModelNotFound          neither a folder with a model nor a name that can be fetched
        └── ModelMismatch          an expert or a feature belongs to another backbone

The three fates (bad record, failed training, broken infrastructure) are the first three branches a caller meets;
`exit_code` is what the command line ends with.
"""

__all__ = [
    "BadRecord", "BrokerError", "BrokerUnreachable", "DatabaseBroken", "DatabaseBusy", "DiskFull", "DyloraError",
    "ExpertCorrupt", "ExpertUnknown", "Fenced", "ModelError", "ModelMismatch", "ModelNotFound", "OffsetsLost",
    "RowsUnlearnable", "SettingsError", "StoreError", "TopicMissing", "TrainingFailed", "TransactionAborted",
]  # fmt: skip


class DyloraError(Exception):
    """Root of every error this package raises; its text says what happened and what to do."""

    exit_code = 1


class SettingsError(DyloraError):
    """A setting is wrong, or a variable is misspelt."""

    exit_code = 2


class BadRecord(DyloraError):
    """A record that can never be answered.

    `stage` is where it failed (`decode`, `answer`), `reason` a short snake_case class for counters.
    """

    def __init__(self, reason: str, message: str, *, stage: str = "decode") -> None:
        super().__init__(message)
        self.reason = reason
        self.stage = stage


class ExpertUnknown(DyloraError):
    """No expert of the registry is called that, or several begin so."""


class TrainingFailed(DyloraError):
    """A job ended without a usable result."""


class RowsUnlearnable(TrainingFailed):
    """The rows are the reason: none is usable, or the loss is lost on them."""


class BrokerError(DyloraError):
    """Kafka failed in a way that this process cannot repair."""

    exit_code = 3


class BrokerUnreachable(BrokerError):
    """No broker answered within the time allowed, or it refused the credentials."""


class TopicMissing(BrokerError):
    """A topic that is needed does not exist."""


class OffsetsLost(BrokerError):
    """The group has no usable committed offset on a partition that it has read before."""


class TransactionAborted(BrokerError):
    """The transaction did not happen, as a whole; rewind the source and take the records again."""


class Fenced(BrokerError):
    """A younger process uses the same transactional id or group instance; this one must end."""


class StoreError(DyloraError):
    """The database or the expert store failed."""

    exit_code = 4


class DatabaseBusy(StoreError):
    """Another process holds the database file."""


class DatabaseBroken(StoreError):
    """The database file or its write-ahead log cannot be read."""


class DiskFull(StoreError):
    """There is no room left where the data lies."""


class ExpertCorrupt(StoreError):
    """Files of an expert are missing, unreadable, or not what their digest says."""


class ModelError(DyloraError):
    """The backbone cannot be used."""

    exit_code = 5


class ModelNotFound(ModelError):
    """No usable model at that folder or under that name."""


class ModelMismatch(ModelError):
    """An artefact was made for another backbone or feature space."""
