"""Machines to plan for: a table of common accelerators, and shapes of clusters such as `4x8xH100-80GB`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from orchestrator.errors import InputError, Problem, nearest

GIB = 2**30  # Bytes.
_SHAPE = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([a-z][a-z0-9-]*?)(?:-(\d+)GB)?", re.IGNORECASE)


@dataclass(frozen=True)
class Accelerator:
    """One device: its rates are those of its data sheet, its memory is what PyTorch reports."""

    memory: dict[int, float]
    """GiB that PyTorch reports (`torch.cuda.get_device_properties(0).total_memory`), by the nominal gigabytes, the most
    common size first. Drivers reserve different amounts for themselves and for error correction, so each number is the
    smallest "total capacity" in out-of-memory errors of public logs."""
    teraflops: float
    """Rate of dense matrix products in bf16 (in fp16 without bf16); 10^12 operations a second."""
    teraflops_fp32: float
    """Rate of dense matrix products in fp32, not TF32, which PyTorch does not use for them by default."""
    link: float
    """Bandwidth to other devices of its machine, in one direction; 10^9 bytes a second."""
    bandwidth: float
    """Bandwidth of its own memory; 10^9 bytes a second."""
    has_bf16: bool = True


ACCELERATORS = MappingProxyType(
    {
        "T4": Accelerator({16: 14.56}, 65.0, 8.1, 16.0, 320.0, has_bf16=False),
        "V100": Accelerator({32: 31.73, 16: 15.77}, 125.0, 15.7, 150.0, 900.0, has_bf16=False),
        "RTX3090": Accelerator({24: 23.56}, 71.0, 35.6, 32.0, 936.0),
        "RTX4090": Accelerator({24: 23.49}, 165.0, 82.6, 32.0, 1008.0),
        "A10": Accelerator({24: 21.96}, 125.0, 31.2, 32.0, 600.0),
        "A10G": Accelerator({24: 21.96}, 70.0, 35.0, 32.0, 600.0),
        "A6000": Accelerator({48: 47.26}, 155.0, 38.7, 56.0, 768.0),
        "L4": Accelerator({24: 21.96}, 121.0, 30.3, 32.0, 300.0),
        "L40S": Accelerator({48: 44.34}, 362.0, 91.6, 32.0, 864.0),
        "A100": Accelerator({80: 79.10, 40: 39.38}, 312.0, 19.5, 300.0, 2039.0),
        "H100": Accelerator({80: 79.10, 94: 93.02}, 989.0, 67.0, 450.0, 3350.0),
        "H200": Accelerator({141: 139.72}, 989.0, 67.0, 450.0, 4800.0),
        "B200": Accelerator({180: 178.35}, 2250.0, 75.0, 900.0, 7672.0),
        # One of the two devices that PyTorch and Ray find on a card.
        "MI250X": Accelerator({64: 63.98}, 191.5, 47.9, 200.0, 1638.0),
        "MI300X": Accelerator({192: 191.69}, 1307.0, 163.4, 448.0, 5300.0),
    }
)
NETWORK = 25e9
"""Bytes a second between nodes, assumed: 200 Gbit/s."""


@dataclass(frozen=True)
class Machine:
    """The machines of a training: nodes of one kind."""

    name: str
    nodes: int
    devices: int
    """Accelerators of each node, or its cores."""
    memory: int
    """Bytes of one accelerator; of a node without any, whose workers share them."""
    rate: float | None
    """Peak floating-point operations a second of one device, in bf16; None where it is not known."""
    link: float
    """Bytes a second between devices of a node."""
    network: float
    """Bytes a second of a node's network."""
    is_gpu: bool
    has_bf16: bool
    bandwidth: float | None = None
    """Bytes a second of a device's own memory; None where it is not known."""
    rate_fp32: float | None = None
    """As `rate`, in fp32; None where it is the same."""

    def rate_in(self, precision: Literal["fp32", "bf16"]) -> float | None:
        """Return the peak operations a second of one device in a precision; None where it is not known."""
        return self.rate if precision == "bf16" or self.rate_fp32 is None else self.rate_fp32

    @property
    def places(self) -> int:
        """Workers that it has room for, one on each device."""
        return self.nodes * self.devices


def parse_machine(text: str, option: str = "--on") -> Machine:
    """Parse `H100-80GB`, `8xH100-80GB` or `4x8xH100-80GB`: nodes, devices of each node, and their kind.

    Raises:
        InputError: there is no such accelerator; the remedy has the nearest name.
    """
    found = _SHAPE.fullmatch(text)
    kinds = {name.lower(): name for name in ACCELERATORS}
    name = kinds.get(found[3].lower()) if found else None
    if found is None or name is None:
        close = nearest(found[3].upper() if found else text, list(ACCELERATORS))
        known = f"did you mean {close}?" if close else f"use one of: {', '.join(ACCELERATORS)}"
        raise InputError(Problem(f"{text!r} is not a shape such as 4x8xH100-80GB", option, known))
    kind = ACCELERATORS[name]
    size = int(found[4]) if found[4] else next(iter(kind.memory))
    if size not in kind.memory:
        sizes = " or ".join(f"{each}GB" for each in kind.memory)
        raise InputError(Problem(f"{text!r}: an {name} has {sizes}, not {size}GB", option, f"write {name}-{sizes}"))
    first, second = (int(number) if number else None for number in (found[1], found[2]))
    nodes, devices = (first, second) if second is not None else (1, first or 1)
    if not nodes or not devices:
        raise InputError(Problem(f"{text!r} has no devices", option, "write numbers above 0"))
    return Machine(
        name=f"{name}-{size}GB",
        nodes=nodes,
        devices=devices,
        memory=int(kind.memory[size] * GIB),
        rate=kind.teraflops * 1e12,
        link=kind.link * 1e9,
        network=NETWORK,
        is_gpu=True,
        has_bf16=kind.has_bf16,
        bandwidth=kind.bandwidth * 1e9,
        rate_fp32=kind.teraflops_fp32 * 1e12,
    )


def machine_from_nodes(nodes: Sequence[Mapping[str, float]]) -> Machine:
    """Return the machine that a cluster's nodes make up; where any node has GPUs, the others do not count.

    Args:
        nodes: the resources of each, as Ray names them.

    Raises:
        InputError: the GPUs are of different kinds, or of one that is not in the table.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if not with_gpus:
        # A head node may have no cores for workers.
        workers = [node for node in nodes if node.get("CPU", 0) >= 1] or nodes
        cores = min(int(node.get("CPU", 0)) for node in workers)
        memory = int(min(node.get("memory", 0) for node in workers))
        return cpu_machine("the cluster's CPUs", len(workers), cores, memory)
    kinds = {name.partition(":")[2] for node in with_gpus for name in node if name.startswith("accelerator_type:")}
    if len(kinds) != 1:
        what = f"the cluster's GPUs are of {len(kinds)} kinds ({', '.join(sorted(kinds)) or 'their names are missing'})"
        raise InputError(Problem(what, "--address", "name the machines of the training: --on 4x8xH100-80GB"))
    # Ray writes some sizes without the B: A100-40G.
    kind = re.sub(r"-(\d+)G$", r"-\1GB", kinds.pop())
    if kind in ACCELERATORS:
        # Ray may leave out the size, so the smallest is assumed.
        kind = f"{kind}-{min(ACCELERATORS[kind].memory)}GB"
    devices = int(min(node["GPU"] for node in with_gpus))
    return parse_machine(f"{len(with_gpus)}x{devices}x{kind}", "--address")


def cpu_machine(name: str, nodes: int, cores: int, memory: int, has_bf16: bool = False) -> Machine:
    """Return machines without accelerators, whose cores can each have a worker; `memory` is a node's, in bytes."""
    return Machine(
        name=name,
        nodes=nodes,
        devices=max(1, cores),
        memory=memory,
        rate=None,
        link=10e9,
        network=NETWORK,
        is_gpu=False,
        has_bf16=has_bf16,
    )
