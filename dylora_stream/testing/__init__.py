"""The ports in memory, with the contracts of the real ones: for tests of this project and of its users.

One contract suite (tests/contracts) runs over these and over the real implementations alike.
"""

from dylora_stream.testing.learning import MemoryExpertStore, MemoryLedger, ScriptedChild
from dylora_stream.testing.model import MemoryIndex, UniformAnswerer
from dylora_stream.testing.stream import (
    ManualClock,
    MemoryBroker,
    MemoryChangelog,
    MemoryJournal,
    MemorySink,
    MemorySource,
)

__all__ = [
    "ManualClock", "MemoryBroker", "MemoryChangelog", "MemoryExpertStore", "MemoryIndex", "MemoryJournal",
    "MemoryLedger", "MemorySink", "MemorySource", "ScriptedChild", "UniformAnswerer",
]  # fmt: skip
