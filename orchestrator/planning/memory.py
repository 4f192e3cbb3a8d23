"""What one worker holds while it trains, part by part.

With T trained and F frozen numbers on n workers, Adam in mixed precision (Rajbhandari et al. 2020, "ZeRO", section 3):
plain PyTorch holds fp32 weights, gradients and two moments, 16 T, and the frozen weights. DeepSpeed's ZeRO holds the
weights in bf16 and an fp32 copy of the trained ones beside the moments: 12 T / n from stage 1 on, the gradients 2 T / n
from stage 2 on, and with stage 3 the weights 2 (T + F) / n, with those that are in use gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.training.engine.sizes import BF16, BUCKET, FP32, LIVE, MOMENTS, PREFETCHED

CUDA_CONTEXT = 2**30
"""Bytes that CUDA, its libraries' workspaces and the communication between GPUs take before anything is computed."""


@dataclass(frozen=True)
class ModelSize:
    """A model with its frozen blocks and adapter."""

    trained: int
    """Numbers."""
    frozen: int
    held: int
    """Bytes of all weights and buffers as plain PyTorch holds them, on one worker."""
    layers: int
    methods: int = 0
    """Bytes that methods of `transfer.methods` hold for the trained numbers."""


@dataclass(frozen=True)
class PassSize:
    """What a forward and a backward pass hold besides weights and the optimizer; bytes."""

    activations: int
    """Of the largest pass that begins a step."""
    logits: int
    """The part of it that the head and the loss hold."""
    with_gradients: int
    """The most of it with its gradients, which come into being one after the other."""
    gradients: int
    later: int = 0
    """Of the largest pass that finds all gradients there; 0 where a step is one pass."""


@dataclass(frozen=True)
class Setting:
    """How a training is spread."""

    workers: int
    deepspeed: bool
    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    precision: Literal["fp32", "bf16"]
    passes: int
    """Micro batches of a step on each worker."""
    is_gpu: bool
    process: int = 0
    """Bytes of a worker before it has a model, on a machine without GPUs."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker, by part."""

    parts: dict[str, int]
    main: int
    """In the main memory of the worker's machine, beside a GPU."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory_of(model: ModelSize, size: PassSize, setting: Setting) -> Memory:
    """The most that a worker holds during a step."""
    parts = _plain(model, size, setting) if setting.zero_stage == 0 else _sharded(model, size, setting)
    # What methods hold of a weight lies where the optimizer's state of it does.
    parts["methods"] = model.methods if setting.zero_stage == 0 else -(-model.methods // setting.workers)
    parts["process"] = CUDA_CONTEXT if setting.is_gpu else setting.process
    main = parts.pop("main memory", 0)
    if not setting.is_gpu:
        parts["offloaded"], main = main, 0
    return Memory({name: each for name, each in parts.items() if each}, main)


def loading_bytes(numbers: int, stored: int, held: int, copies: int) -> int:
    """Return the bytes of a machine's main memory that loading a model takes.

    What is held as it is stored is a map of its file, which all workers of a machine share. What is not is a copy, one
    for each of them.

    Args:
        numbers: of the model.
        stored: bytes of a number in its file.
        held: bytes of a number in memory.
        copies: workers of a machine that load it.
    """
    return numbers * stored if held == stored else numbers * held * copies


def _plain(model: ModelSize, size: PassSize, setting: Setting) -> dict[str, int]:
    """PyTorch alone, DDP, and DeepSpeed without ZeRO, all of which keep everything on every worker."""
    gradients = size.gradients
    # DDP has all gradients in its buckets all the time.
    first = size.activations if setting.workers > 1 else size.with_gradients - gradients
    activations = max(0, first, size.later)
    logits = min(size.logits, activations)
    return {
        "weights": model.held,
        "gradients": gradients,
        "optimizer": MOMENTS * FP32 * model.trained,
        "activations": activations - logits,
        "logits": logits,
        # DeepSpeed sums up gradients in copies of them.
        "buffers": gradients if setting.deepspeed and setting.workers > 1 else 0,
    }


def _sharded(model: ModelSize, size: PassSize, setting: Setting) -> dict[str, int]:
    """ZeRO. Gradients are gathered in a bucket before they go where they belong."""
    narrow, stage = setting.precision == "bf16", setting.zero_stage
    wide = BF16 if narrow else FP32
    share, total = -(-model.trained // setting.workers), model.trained + model.frozen
    # Trained weights in fp32 beside those in bf16; where all are in fp32 there is one copy, except with stage 3.
    optimizer = (MOMENTS + (narrow or stage == 3)) * FP32 * share
    kept = wide * (model.trained if stage == 1 else share)
    # Kept between the passes of a step; stage 3 has room for them all the time.
    gradients, activations = (kept if stage == 3 else 0), size.activations
    if size.later and size.later + kept > gradients + activations:
        gradients, activations = kept, size.later
    in_step = kept + FP32 * share
    if in_step > activations + gradients:
        gradients, activations = in_step, 0
    logits = min(size.logits, activations)
    weights, buffers = wide * total, wide * min(BUCKET, model.trained)
    if stage == 3:
        weights = -(-weights // setting.workers)
        # What is in use, and the next ones, which are put together from their parts.
        buffers += wide * (min(LIVE, total) + min(PREFETCHED, total))
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations - logits,
        "logits": logits,
        "buffers": buffers,
    }
    away = 0
    if setting.offload != "none":
        away += parts.pop("optimizer") + FP32 * share
    if setting.offload == "all":
        away += parts.pop("weights")
    return {**parts, "main memory": away}
