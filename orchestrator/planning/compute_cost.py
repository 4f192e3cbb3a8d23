"""The time of a step, and the bytes that it sends."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.machines import Machine
from orchestrator.planning.memory import ModelSize, ShardingSetup
from orchestrator.training.engine.sizes import BF16, FP32

EFFICIENCY = 0.4
"""The share of a device's peak rate that is assumed where none was measured: well-tuned trainings reach 0.35 to 0.5
(Chowdhery et al. 2022, "PaLM", appendix B)."""


@dataclass(frozen=True)
class ComputeCost:
    """The time that a training takes."""

    operations: float
    """Floating-point operations of an average step, on the busiest worker."""
    rate: float
    """Operations a second."""
    basis: str
    """Where the rate comes from, as a phrase."""
    seconds_a_step: float
    seconds: float | None
    """Seconds of steps, evaluations and stored features; None where the number of steps is unknown."""


def network_bytes(model: ModelSize, setup: ShardingSetup) -> int:
    """Return the bytes that each worker sends in a step, in rings of all workers (Rajbhandari et al. 2020, section 7).

    Gradients are all-reduced once a step, which sends 2 (n - 1) / n of their size. ZeRO-3 gathers the weights in each
    forward and backward pass, (n - 1) / n of their size each, and reduce-scatters gradients after each backward pass.
    """
    share = (setup.workers - 1) / setup.workers
    number = BF16 if setup.precision == "bf16" and setup.zero_stage > 0 else FP32
    if setup.zero_stage < 3:
        return int(2 * share * number * model.trained)
    return int(share * number * (2 * (model.trained + model.frozen) + model.trained) * setup.passes)


def step_seconds(operations: float, rate: float, network: int, workers: int, machine: Machine) -> float:
    """Return the seconds of a step; computation and communication overlap, so the longer one counts."""
    # The ring crosses from each node to the next once, so it has the whole network of a node.
    bandwidth = machine.link if workers <= machine.devices else min(machine.link, machine.network)
    return max(operations / rate, network / bandwidth)
