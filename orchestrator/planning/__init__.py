"""Memory, time and disk of a training before a machine is asked for: arithmetic on sizes. Imports no torch."""

from orchestrator.planning.effort import EFFICIENCY, Effort, network_bytes, step_seconds
from orchestrator.planning.machines import Machine, machine_of, processors, read_shape
from orchestrator.planning.memory import Memory, ModelSize, PassSize, Setting, memory_of

__all__ = [
    "EFFICIENCY",
    "Effort",
    "Machine",
    "Memory",
    "ModelSize",
    "PassSize",
    "Setting",
    "machine_of",
    "memory_of",
    "network_bytes",
    "processors",
    "read_shape",
    "step_seconds",
]
