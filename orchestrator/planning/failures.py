"""How much of its time a training uses where machines fail: how often to save, and what failures cost all the same.

Failures come as a Poisson process: at the same rate all the time, whatever has happened before. What fails takes the
whole group of workers with it (`training/worker.py`), and the group goes on from its last checkpoint. The symbols are
the papers': M the mean time between failures, delta the cost of a checkpoint, R that of a restart, tau the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Disturbance:
    """What takes time from a training besides its steps; seconds, all of them."""

    between_failures: float
    """Mean time between failures of the whole group of machines (M)."""
    checkpoint: float
    """For which the steps wait while one is saved (delta)."""
    restart: float
    """From a failure to the first step after it: noticing it, new processes, reading the checkpoint (R)."""

    def __post_init__(self) -> None:
        """Raises ValueError: failures without any time between them, or costs below nothing."""
        if not self.between_failures > 0:
            raise ValueError(f"the mean time between failures is {self.between_failures} s, must be above 0")
        if not (self.checkpoint > 0 and self.restart >= 0):
            raise ValueError(f"a checkpoint costs {self.checkpoint} s, a restart {self.restart} s: too little")


def between_failures(of_node: float, nodes: int) -> float:
    """Mean time between failures of `nodes` machines together, of which each fails every `of_node` seconds."""
    return of_node / nodes


def young_interval(disturbance: Disturbance) -> float:
    """Seconds of training between checkpoints that lose the least, to first order: sqrt(2 delta M).

    Young 1974, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17 (9).
    Good where checkpoints are cheap: delta far below M.
    """
    return math.sqrt(2 * disturbance.checkpoint * disturbance.between_failures)


def daly_interval(disturbance: Disturbance) -> float:
    """The same to a higher order, also where failures come nearly as fast as checkpoints can be saved.

    sqrt(2 delta M) (1 + 1/3 (delta / 2M)^(1/2) + 1/9 (delta / 2M)) - delta where delta < 2M, else M: Daly 2006, "A
    higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22
    (3), equation 37.
    """
    mean, cost = disturbance.between_failures, disturbance.checkpoint
    if cost >= 2 * mean:
        return mean
    share = cost / (2 * mean)
    return young_interval(disturbance) * (1 + math.sqrt(share) / 3 + share / 9) - cost


def useful_share(interval: float, disturbance: Disturbance) -> float:
    """The expected share of the time that goes into steps which are not lost; between 0 and 1.

    tau / (M e^(R/M) (e^((tau + delta)/M) - 1)), the complete model of Daly 2006. It counts failures while a checkpoint
    is saved and while the group restarts, too, and is exact for failures that come as a Poisson process.

    Args:
        interval: seconds of training between checkpoints (tau).

    Raises:
        ValueError: an interval of no length.
    """
    if not interval > 0:
        raise ValueError(f"checkpoints are {interval} s apart, must be above 0")
    mean = disturbance.between_failures
    exponent = (interval + disturbance.checkpoint) / mean
    if exponent + disturbance.restart / mean > 700:  # Beyond what a float holds: there is never an end to it.
        return 0.0
    return interval / (mean * math.exp(disturbance.restart / mean) * math.expm1(exponent))


def expected_failures(work: float, interval: float, disturbance: Disturbance) -> float:
    """How many failures a training of `work` seconds of steps has to live through, on average; infinite where it never
    ends. `scale.max_failures` should leave room for more: the number scatters by its square root.
    """
    share = useful_share(interval, disturbance)
    return math.inf if share == 0 else work / share / disturbance.between_failures
