"""Write the package's own log messages to the logs of a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

PACKAGE = __name__.partition(".")[0]


@contextlib.contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Append the package's messages from level INFO on to `worker-<rank>.log`, which the first one creates."""
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
