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
from orchestrator.planning.machines import Machine, cpu_machine, machine_from_nodes, parse_machine
from orchestrator.planning.memory import Memory, ModelSize, PassMemory, ShardingSetup, loading_bytes, memory_of

__all__ = [
    "EFFICIENCY",
    "ComputeCost",
    "Disturbance",
    "Machine",
    "Memory",
    "ModelSize",
    "PassMemory",
    "ShardingSetup",
    "between_failures",
    "cpu_machine",
    "daly_interval",
    "expected_failures",
    "loading_bytes",
    "machine_from_nodes",
    "memory_of",
    "network_bytes",
    "parse_machine",
    "step_seconds",
    "useful_share",
    "young_interval",
]
