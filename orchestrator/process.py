"""Settings of every process of this package that must be there before torch is imported."""

import ctypes
import os
import sys


def set_process_defaults() -> None:
    """Let waiting threads sleep soon, and keep freed memory.

    An OpenMP thread that waits for another one spins, by default without end. On a machine with other work that keeps
    the other thread off the core: steps were seen to take 20 times as long.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.platform == "linux":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step, instead of mapping and zeroing them anew.

    Activations are such blocks. With a convolutional network on the CPU, a forward pass took twice as long without.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # Other C libraries than glibc have none.
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)
