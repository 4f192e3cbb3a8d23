"""Memory, time, disk and failures of a training before machines are asked for: arithmetic. Imports no torch."""

from orchestrator.planning.compute_cost import EFFICIENCY, ComputeCost, network_bytes, step_seconds
from orchestrator.planning.failures import (
    Disturbance,
    between_failures,
    daly_interval,
    expected_failures,
    useful_share,
    young_interval,
)
from orchestrator.planning.machines import Machine, machine_of, processors, read_shape
from orchestrator.planning.memory import Memory, ModelSize, PassSize, Setting, loading_bytes, memory_of

__all__ = [
    "EFFICIENCY",
    "ComputeCost",
    "Disturbance",
    "Machine",
    "Memory",
    "ModelSize",
    "PassSize",
    "Setting",
    "between_failures",
    "daly_interval",
    "expected_failures",
    "loading_bytes",
    "machine_of",
    "memory_of",
    "network_bytes",
    "processors",
    "read_shape",
    "step_seconds",
    "useful_share",
    "young_interval",
]
