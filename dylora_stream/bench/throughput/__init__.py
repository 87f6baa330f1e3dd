"""What experts cost over the bare model: each number from one run, beside the bare model's in turn.

The parts: `mixed` a batch whose rows all have other experts; `decode` generation; `answer` scoring, routing and
answering together; `train` training an expert beside PEFT loops; `kafka` the daemon from Kafka to Kafka; `overhead` the
processor time that the daemon itself takes; `accuracy` what experts know that were trained our way and by PEFT.
Wherever two things are compared they run alternately, A, B, A, B …, and the median of the pairs' ratios is reported
with all pairs beside it.
"""

from dylora_stream.bench.throughput.config import USUAL_PARTS, Sizes, ThroughputConfig
from dylora_stream.bench.throughput.run import throughput

__all__ = ["USUAL_PARTS", "Sizes", "ThroughputConfig", "throughput"]
