"""Training: the engine, the loop and its hooks, checkpoints, evaluation, the Ray Train worker, use of the result."""

import ctypes
import os
import sys

# An OpenMP thread that waits for another one spins, by default without end, which on a machine with other work keeps
# off the core the very thread it waits for: steps were seen to take 20 times as long. So it sleeps after a short while.
# Must be set before torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_freed_memory() -> None:
    """Have glibc keep large blocks for the next step, instead of having them mapped and zeroed anew.

    Activations are such blocks: with a convolutional net on the CPU, a forward pass took twice as long without.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # Other C libraries than glibc have none.
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)


if sys.platform == "linux":
    keep_freed_memory()
