"""Rules for `scale.deepspeed`: no keys that DeepSpeed does not have, and none that the recipe sets elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.errors import nearest
from orchestrator.recipe.finding import Finding
from orchestrator.recipe.schema import Recipe

PLACE = "scale.deepspeed"
AUTO = "auto"  # In transformers: a value that the trainer fills in.
OFFLOADS = ("offload_optimizer", "offload_param")
SAID_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.learning_rate",
    "scheduler": "train.schedule",
}
OTHERS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "sparse_gradients",
        "steps_per_print",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""The keys of DeepSpeed's configuration that a recipe may set."""


def find_deepspeed_mistakes(recipe: Recipe) -> Iterator[Finding]:
    given = recipe.scale.deepspeed
    if given is None:
        return
    if recipe.scale.engine == "torch" or (recipe.scale.engine == AUTO and recipe.scale.zero_stage == 0):
        yield Finding(
            (PLACE, "scale.engine", "scale.zero_stage"),
            f"`{PLACE}` is given, but the recipe does not run with DeepSpeed",
            "set `scale.engine` to `deepspeed` or `scale.zero_stage` to 1, 2 or 3, or remove it",
        )
    for key, value in given.items():
        place = f"{PLACE}.{key}"
        if key in SAID_BY and value != AUTO:
            yield _said_elsewhere(place, SAID_BY[key], recipe)
        elif key not in SAID_BY and key not in OTHERS:
            close = nearest(key, sorted(OTHERS))
            remedy = f"did you mean {close}?" if close else "remove it"
            yield Finding((place,), f"`{place}` is nothing that DeepSpeed is known to read", remedy)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield Finding((f"{PLACE}.zero_optimization",), f"`{PLACE}.zero_optimization` is {zero!r}", "give a mapping")
        return
    if zero.get("stage", AUTO) != AUTO:
        yield _said_elsewhere(f"{PLACE}.zero_optimization.stage", "scale.zero_stage", recipe)
    for key in OFFLOADS:
        if key in zero and recipe.scale.offload != "none":
            yield _said_elsewhere(f"{PLACE}.zero_optimization.{key}", "scale.offload", recipe)


def without_auto(given: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping without values of `auto`."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value for key, value in given.items() if value != AUTO
    }


def _said_elsewhere(place: str, key: str, recipe: Recipe) -> Finding:
    section, name = key.split(".")
    value = getattr(getattr(recipe, section), name)
    return Finding((place, key), f"`{place}` says again what `{key}` says ({value})", f"remove it, and set `{key}`")
