"""Time and network of a step."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.machines import Machine
from orchestrator.planning.memory import ModelSize, ShardingSetup
from orchestrator.training.engine.sizes import BF16, FP32

EFFICIENCY = 0.4
"""The share of a device's best rate that training reaches where nobody has measured it: well-tuned runs have 0.35 to
0.5 (Chowdhery et al. 2022, "PaLM", appendix B)."""


@dataclass(frozen=True)
class ComputeCost:
    """How long a training takes."""

    operations: float
    """Floating-point operations of a mean step, on the busiest worker."""
    rate: float
    """Operations a second."""
    basis: str
    """Where the rate is from."""
    seconds_a_step: float
    seconds: float | None
    """Steps, evaluations and what is computed once; None where nobody knows how many there are."""


def network_bytes(model: ModelSize, setting: ShardingSetup) -> int:
    """What each worker sends in a step, with rings of all workers (Rajbhandari et al. 2020, section 7).

    Gradients are summed up once a step, 2 (n - 1) / n of their size. ZeRO-3 gathers the weights in each pass, forward
    and backward, (n - 1) / n of their size each, and reduces gradients to where they belong after each backward one.
    """
    away = (setting.workers - 1) / setting.workers
    wide = BF16 if setting.precision == "bf16" and setting.zero_stage > 0 else FP32
    if setting.zero_stage < 3:
        return int(2 * away * wide * model.trained)
    return int(away * wide * (2 * (model.trained + model.frozen) + model.trained) * setting.passes)


def step_seconds(operations: float, rate: float, network: int, workers: int, machine: Machine) -> float:
    """Computing and sending overlap, so the longer of the two counts."""
    # A ring passes from each machine to the next once, so all of a node's network is the ring's.
    bandwidth = machine.link if workers <= machine.devices else min(machine.link, machine.network)
    return max(operations / rate, network / bandwidth)
