"""Write log messages, and everything that a process prints, to the logs of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = __name__.partition(".")[0]


@contextlib.contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Append the package's messages from level INFO on to `worker-<rank>.log`, which the first one creates."""
    import torch.distributed as dist  # Importing it takes seconds, which commands that redirect output do not have.

    rank = dist.get_rank() if dist.is_initialized() else 0
    handler = logging.FileHandler(folder / f"worker-{rank}.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@contextlib.contextmanager
def redirect_output(path: Path) -> Iterator[None]:
    """Append everything that this process prints, in Python or in native code, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
