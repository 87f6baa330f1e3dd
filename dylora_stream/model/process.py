"""What a process that runs a model sets once, so that its passes do not pay for what lies beside them.

Memory that a pass frees stays with the process for the next one. glibc gives the top of its heap back to the system
whenever enough of it is free, and a pass frees nearly all that it allocates: the next one then meets every page anew,
40,000 to 80,000 page faults for 16 rows of 64 tokens with experts, 95 ms of system time beside 2.5 s of one core's
work. With the thresholds below there are none. What is kept is bounded by the largest pass so far.

numpy's products run on one thread. They are small (scoring 16 rows: a hundredth of a pass), and a second pool of
threads waits awake for the same cores as torch's: with those busy, fitting novelty on ten experts took 17 s of CPU with
two threads and 1.9 s with one.
"""

import ctypes

from threadpoolctl import threadpool_limits

__all__ = ["keep_freed_memory", "prepare_process"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = (
    1 << 30
)  # free memory above which the heap shrinks, and size from which a block has a mapping of its own


def prepare_process() -> None:
    """Both of the above; may be called again."""
    keep_freed_memory()
    threadpool_limits(limits=1, user_api="blas")  # torch's threads are OpenMP's and its own


def keep_freed_memory() -> bool:
    """Set the allocator's thresholds for this process; False where its C library has none (musl, macOS, Windows)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES))
