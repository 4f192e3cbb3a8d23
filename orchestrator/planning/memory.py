"""The memory that one worker holds while it trains, part by part.

With T trained and F frozen numbers on n workers, Adam in mixed precision (Rajbhandari et al. 2020, "ZeRO", section 3):
plain PyTorch holds fp32 weights, gradients and two moments, 16 T, and the frozen weights. DeepSpeed's ZeRO holds the
weights in bf16, and an fp32 copy of the trained ones with the moments: 12 T / n from stage 1 on. It holds the gradients
in 2 T / n from stage 2 on, and with stage 3 the weights in 2 (T + F) / n, and gathers those that are in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.training.engine.sizes import BF16, BUCKET, FP32, LIVE, MOMENTS, PREFETCHED

CUDA_CONTEXT = 2**30
"""Bytes that CUDA, its libraries' workspaces and the communication between GPUs take before anything is computed."""


@dataclass(frozen=True)
class ModelSize:
    """The size of a model, adapter included."""

    trained: int
    """Parameters."""
    frozen: int
    """Parameters."""
    held: int
    """Bytes of all weights and buffers as plain PyTorch holds them, on one worker."""
    layers: int
    methods: int = 0
    """Bytes that methods of `transfer.methods` hold for the trained numbers."""


@dataclass(frozen=True)
class PassMemory:
    """Memory of a forward and a backward pass besides weights and the optimizer; bytes."""

    activations: int
    """Activations of the largest pass that begins a step."""
    logits: int
    """The part of it that the head and the loss hold."""
    with_gradients: int
    """The most of activations and gradients together, where gradients are allocated one after the other."""
    gradients: int
    later: int = 0
    """Activations of the largest pass that runs while all gradients are held; 0 where a step is one pass."""


@dataclass(frozen=True)
class ShardingSetup:
    """The distribution of a training over its workers."""

    workers: int
    deepspeed: bool
    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    precision: Literal["fp32", "bf16"]
    passes: int
    """Micro batches of a step on each worker."""
    is_gpu: bool
    process: int = 0
    """Bytes of a worker process without a model, on a machine without GPUs."""


@dataclass(frozen=True)
class Memory:
    """The memory of one worker; bytes."""

    parts: dict[str, int]
    """Memory of its device."""
    main: int
    """In the main memory of its machine, where the device is a GPU."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate_memory(model: ModelSize, size: PassMemory, setup: ShardingSetup) -> Memory:
    """Return the most memory that a worker holds during a step."""
    parts = _plain(model, size, setup) if setup.zero_stage == 0 else _sharded(model, size, setup)
    # What methods hold for a weight lies with the optimizer's state of it.
    parts["methods"] = model.methods if setup.zero_stage == 0 else -(-model.methods // setup.workers)
    parts["process"] = CUDA_CONTEXT if setup.is_gpu else setup.process
    main = parts.pop("main memory", 0)
    if not setup.is_gpu:
        parts["offloaded"], main = main, 0
    return Memory({name: each for name, each in parts.items() if each}, main)


def loading_bytes(numbers: int, stored: int, held: int, copies: int) -> int:
    """Return the bytes of a machine's main memory that loading a model takes.

    Weights that are held as they are stored are mapped from their file, which all workers of a machine share. Others
    are copies, one for each worker.

    Args:
        numbers: parameters of the model.
        stored: bytes of a parameter in its file.
        held: bytes of a parameter in memory.
        copies: workers of a machine that load it.
    """
    return numbers * stored if held == stored else numbers * held * copies


def _plain(model: ModelSize, size: PassMemory, setup: ShardingSetup) -> dict[str, int]:
    """Return the parts for engines that keep everything on every worker: PyTorch, DDP, DeepSpeed without ZeRO."""
    gradients = size.gradients
    # DDP holds the buckets of all gradients all the time.
    first = size.activations if setup.workers > 1 else size.with_gradients - gradients
    activations = max(0, first, size.later)
    logits = min(size.logits, activations)
    return {
        "weights": model.held,
        "gradients": gradients,
        "optimizer": MOMENTS * FP32 * model.trained,
        "activations": activations - logits,
        "logits": logits,
        # DeepSpeed reduces copies of gradients.
        "buffers": gradients if setup.deepspeed and setup.workers > 1 else 0,
    }


def _sharded(model: ModelSize, size: PassMemory, setup: ShardingSetup) -> dict[str, int]:
    """Return the parts with ZeRO, which collects gradients in a bucket before it reduces them."""
    is_bf16, stage = setup.precision == "bf16", setup.zero_stage
    number = BF16 if is_bf16 else FP32
    share, total = -(-model.trained // setup.workers), model.trained + model.frozen
    # An fp32 copy of trained weights in bf16; weights in fp32 have a second copy with stage 3 alone.
    optimizer = (MOMENTS + (is_bf16 or stage == 3)) * FP32 * share
    kept = number * (model.trained if stage == 1 else share)
    # Gradients are kept between the passes of a step; stage 3 keeps their memory all the time.
    gradients, activations = (kept if stage == 3 else 0), size.activations
    if size.later and size.later + kept > gradients + activations:
        gradients, activations = kept, size.later
    in_step = kept + FP32 * share
    if in_step > activations + gradients:
        gradients, activations = in_step, 0
    logits = min(size.logits, activations)
    weights, buffers = number * total, number * min(BUCKET, model.trained)
    if stage == 3:
        weights = -(-weights // setup.workers)
        # Parameters in use, and the next ones, are gathered.
        buffers += number * (min(LIVE, total) + min(PREFETCHED, total))
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations - logits,
        "logits": logits,
        "buffers": buffers,
    }
    offloaded = 0
    if setup.offload != "none":
        offloaded += parts.pop("optimizer") + FP32 * share
    if setup.offload == "all":
        offloaded += parts.pop("weights")
    return {**parts, "main memory": offloaded}
