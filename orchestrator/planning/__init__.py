"""Memory, time and disk of a training before machines are requested. This module is arithmetic and imports no torch."""

from orchestrator.planning.compute_cost import EFFICIENCY, ComputeCost, network_bytes, step_seconds
from orchestrator.planning.machines import Machine, cpu_machine, machine_from_nodes, parse_machine
from orchestrator.planning.memory import (
    Memory,
    ModelSize,
    PassMemory,
    ShardingSetup,
    estimate_memory,
    loading_bytes,
)

__all__ = [
    "EFFICIENCY",
    "ComputeCost",
    "Machine",
    "Memory",
    "ModelSize",
    "PassMemory",
    "ShardingSetup",
    "cpu_machine",
    "estimate_memory",
    "loading_bytes",
    "machine_from_nodes",
    "network_bytes",
    "parse_machine",
    "step_seconds",
]
