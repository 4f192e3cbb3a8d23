"""The README.md of an exported model: where it comes from, what it learned, how well it does."""

from __future__ import annotations

import json
from typing import Any

import yaml

from orchestrator.recipe import dump_recipe
from orchestrator.training.prepare import Prepared

_FULL = """from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/this/folder"{remote})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
_ADAPTER = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained("path/to/this/folder", num_labels={num_labels})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""


def model_card(prepared: Prepared, result: dict[str, Any]) -> str:
    """A model card in Markdown with the front matter that model hubs read."""
    recipe, source = prepared.recipe, prepared.source
    front = {
        "library_name": "peft" if recipe.transfer.adapter else "transformers",
        "pipeline_tag": recipe.target.task,
        "base_model": source.name,
        **({"license": source.licence} if source.licence else {}),
    }
    best = f"weights of step {result['best_step']}"
    licence = source.licence or "not stated by the source; check it before you share this model"
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
            ]
        ),
        "## Results\n\n" + results_table(result["metrics"]),
        f"## Use\n\n```python\n{loading_code(prepared)}\n```",
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe).strip()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def loading_code(prepared: Prepared) -> str:
    transfer = prepared.recipe.transfer
    if transfer.adapter:
        return _ADAPTER.format(num_labels=prepared.task.config_changes().get("num_labels"))
    remote = ", trust_remote_code=True" if transfer.head.layers else ""
    return _FULL.format(auto_class=prepared.task.auto_class, remote=remote)


def card_of_merged(card: str, auto_class: str, config_changes: dict[str, Any]) -> str:
    """The card of an adapter, for the model that it was folded into."""
    as_adapter = _ADAPTER.format(num_labels=config_changes.get("num_labels"))
    card = card.replace("library_name: peft", "library_name: transformers", 1)
    return card.replace(as_adapter, _FULL.format(auto_class=auto_class, remote=""))


def describe_labels(prepared: Prepared) -> str:
    """The task's own words, fit for a table: label names come from data."""
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
