"""Settings of every process of this package, made before torch is imported."""

import ctypes
import os
import sys


def set_process_defaults() -> None:
    """Let waiting threads sleep soon, and keep freed memory.

    By default an OpenMP thread that waits for another one spins without end. On a machine with other work this keeps
    the other thread from running: steps took up to 20 times as long.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.platform == "linux":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step, instead of mapping and zeroing new ones.

    Activations are such blocks. Without this, the forward pass of a convolutional network took twice as long on a CPU.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # Only glibc has it.
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)
