"""Write the README.md of an exported model: its source, its training and its scores."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import yaml

from orchestrator.recipe import dump_recipe
from orchestrator.tasks import Task
from orchestrator.training.prepare import Prepared

_FULL = """from transformers import {auto_class}, {processor_class}

model = {auto_class}.from_pretrained("path/to/this/folder"{remote})
{processor} = {processor_class}.from_pretrained("path/to/this/folder")"""
_ADAPTER = """from peft import {peft_class}
from transformers import {processor_class}

model = {peft_class}.from_pretrained("path/to/this/folder"{labels})
{processor} = {processor_class}.from_pretrained("path/to/this/folder")"""
# For tasks that peft has no class for.
_ADAPTER_ON_SOURCE = """from peft import PeftConfig, PeftModel
from transformers import {auto_class}, {processor_class}

adapter = PeftConfig.from_pretrained("path/to/this/folder")
source = {auto_class}.from_pretrained(
    adapter.base_model_name_or_path,
    revision=adapter.revision{labels},
    ignore_mismatched_sizes=True,  # the head is the adapter's
)
model = PeftModel.from_pretrained(source, "path/to/this/folder")
{processor} = {processor_class}.from_pretrained("path/to/this/folder")"""


def model_card(prepared: Prepared, result: dict[str, Any], dtype: torch.dtype) -> str:
    """Return a model card in Markdown with the front matter that model hubs read.

    Args:
        dtype: the format that most weights are written in.
    """
    recipe, source = prepared.recipe, prepared.source
    front = {
        "library_name": "peft" if recipe.transfer.adapter else "transformers",
        "pipeline_tag": prepared.task.pipeline_tag or recipe.target.task,
        "base_model": source.name,
        **({"license": source.licence} if source.licence else {}),
    }
    best = f"weights of step {result['best_step']}"
    licence = source.licence or "not stated by the source; check it before you share this model"
    name = str(dtype).removeprefix("torch.")
    rounding = (
        [] if dtype == torch.float32 else [f"| weights | {name}, as the source's; scored before rounding to it |"]
    )
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {recipe.name}",
        f"`{source.name}`, fine-tuned for {recipe.target.task}"
        + (" from random weights (a control, not a transfer)." if recipe.transfer.from_scratch else "."),
        "\n".join(
            [
                "| | |",
                "|---|---|",
                f"| source | `{source.name}`{f' at `{source.revision}`' if source.revision else ''} |",
                f"| licence of the source | {licence} |",
                f"| target | {recipe.target.task}: {describe_labels(prepared)} |",
                f"| data | {describe_data(prepared)} |",
                f"| trained | {result['parameters']['trained']:,} of {result['parameters']['total']:,} parameters |",
                f"| training | {result['steps']} steps in {result['seconds']:.0f} s; {best} |",
                *rounding,
            ]
        ),
        "## Results\n\n" + results_table(result["metrics"]),
        f"## Use\n\n```python\n{loading_code(prepared)}\n```",
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe).strip()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def loading_code(prepared: Prepared) -> str:
    transfer = prepared.recipe.transfer
    return adapter_code(prepared.task) if transfer.adapter else model_code(prepared.task, bool(transfer.head.layers))


def model_code(task: Task, has_own_code: bool = False) -> str:
    """Return code that loads a model with its processor."""
    return _FULL.format(remote=", trust_remote_code=True" if has_own_code else "", **_names(task))


def adapter_code(task: Task) -> str:
    """Return code that loads a source with an adapter, by peft's class for the task if there is one."""
    import peft

    peft_class = task.auto_class.replace("AutoModel", "AutoPeftModel")
    template = _ADAPTER if hasattr(peft, peft_class) else _ADAPTER_ON_SOURCE
    num_labels = task.config_changes().get("num_labels")
    labels = "" if num_labels is None else f", num_labels={num_labels}"
    code = template.format(peft_class=peft_class, labels=labels, **_names(task))
    if not task.is_language_model:
        return code
    # peft does not load it, and it holds the tokens that end an answer.
    code = code.replace("import AutoTokenizer", "import AutoTokenizer, GenerationConfig")
    return f'{code}\nmodel.generation_config = GenerationConfig.from_pretrained("path/to/this/folder")'


def _names(task: Task) -> dict[str, str]:
    """Return the names in the code; the processor is named after its class: `tokenizer`, `image_processor`."""
    words = re.findall("[A-Z][a-z]+", task.processor_class.removeprefix("Auto"))
    return {
        "auto_class": task.auto_class,
        "processor_class": task.processor_class,
        "processor": "_".join(words).lower(),
    }


def card_of_merged(card: str, task: Task, note: str | None = None) -> str:
    """Return the card of an adapter, changed for the model that it was merged into.

    Args:
        note: a sentence on its weights.
    """
    card = card.replace("library_name: peft", "library_name: transformers", 1)
    if note is not None:
        card = card.replace("\n\n## Results", f"\n\nThe adapter is merged; {note}.\n\n## Results", 1)
    return card.replace(adapter_code(task), model_code(task))


def describe_labels(prepared: Prepared) -> str:
    """Return the task's description, escaped for a table, because label names come from data."""
    return json.dumps(prepared.task.describe(), ensure_ascii=False)[1:-1].replace("|", "\\|")


def describe_data(prepared: Prepared) -> str:
    data = prepared.recipe.target.data
    name = data if isinstance(data, str) else data.path or "files"
    counts = ", ".join(f"{len(split):,} {name}" for name, split in prepared.examples.items())
    return f"`{name.rsplit('/', 1)[-1] if name.startswith(('/', '.')) else name}` ({counts})"


def results_table(metrics: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(metrics.values())))
    lines = ["| split | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {split} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |" for split, row in metrics.items()
    ]
    return "\n".join(lines)
