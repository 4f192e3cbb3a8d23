"""Is the loss of every step what the Hugging Face Trainer computes, and the same however the work is spread?

The model is all-MiniLM-L6-v2, tuned to the support-intent data of this repository for 30 steps in fp32 on processors,
all dropout off, with a linear schedule, warm-up, weight decay and clipping. Full tuning, freeze depth 3 and LoRA each
run (a) on one worker, held against `transformers.Trainer`, and (b) on two Ray workers, held against one worker.

The Trainer starts from a copy of the assembled module's initial weights (a new head is random, and so are adapters) and
is given the same examples in the same order. Everything else is its own: tokenising, padding, loss, optimizer, decay
groups, schedule and clipping. Adapters sit in the same modules; which parameters are trained is compared, too.

    python benchmarks/parity.py [--methods full freeze lora] [--spreads "2 x 16" "ZeRO 3"] [--json FILE]

Exits with 1 when a loss differs by more than its bound: 1e-5 of the Trainer's, 1e-4 of one worker's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# A processor's fp32 is the yardstick: on a GPU, one worker would run there and two would not.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from common import (
    RECIPE,
    batch_rows,
    copy_without_dropout,
    print_table,
    read_train_rows,
    source_folder,
    start_quietly,
    train_quietly,
    write_json,
)

import orchestrator
from orchestrator.errors import OrchestratorError
from orchestrator.recipe import Recipe
from orchestrator.training.assembling import assemble
from orchestrator.training.loop import make_schedule
from orchestrator.training.prepare import prepare

NUM_STEPS = 30
TRAINER_BOUND = 1e-5
SPREAD_BOUND = 1e-4
SETTINGS = [
    f"train.steps={NUM_STEPS}",
    f"train.evaluate_every={NUM_STEPS}",
    f"train.save_every={NUM_STEPS}",
    "train.log_every=1",
    "train.precision=fp32",
    "train.schedule=linear",
    "train.warmup_ratio=0.1",
    "train.weight_decay=0.01",
    "train.max_grad_norm=1.0",
    "train.global_batch_size=32",
    "transfer.head.dropout=0",
    "transfer.freeze=0",
]
FREEZE_DEPTH = 3
LORA = {"r": 8, "alpha": 16}
METHODS = {
    "full": [],
    "freeze": [f"transfer.freeze={FREEZE_DEPTH}"],
    # Adapters take about ten times the rate; at the recipe's own they would hardly learn in so few steps.
    "lora": ["train.learning_rate=3e-3", f"transfer.adapter={{type: lora, r: {LORA['r']}, alpha: {LORA['alpha']}}}"],
}
ONE_WORKER = "1 x 32"
SPREADS = {
    "2 x 16": ["scale.workers=2"],
    "2 x 4 x 4": ["scale.workers=2", "train.micro_batch_size=4"],
    "ZeRO 0": ["scale.workers=2", "scale.engine=deepspeed"],
    "ZeRO 1": ["scale.workers=2", "scale.zero_stage=1"],
    "ZeRO 2": ["scale.workers=2", "scale.zero_stage=2"],
    "ZeRO 3": ["scale.workers=2", "scale.zero_stage=3"],
}


@dataclass
class Row:
    """One configuration held against its reference."""

    configuration: str
    against: str
    bound: float
    losses: list[float]
    largest_difference: float | None
    """Largest |loss - reference| / |reference| over the steps; None when there are no losses to compare."""
    trouble: str | None = None

    @property
    def ok(self) -> bool:
        return self.largest_difference is not None and self.largest_difference <= self.bound

    def cells(self) -> list[str]:
        first, last = (f"{self.losses[end]:.6f}" if self.losses else "-" for end in (0, -1))
        difference = "-" if self.largest_difference is None else f"{self.largest_difference:.1e}"
        return [
            f"{self.configuration} / {self.against}",
            difference,
            f"{self.bound:.0e}",
            first,
            last,
            "ok" if self.ok else "FAIL",
        ]


def compare(
    configuration: str, run: Callable[[], list[float]], against: str, reference: list[float], bound: float
) -> Row:
    """Run a configuration and hold its losses against the reference's."""
    try:
        losses = run()
    except OrchestratorError as error:
        return Row(configuration, against, bound, [], None, str(error))
    if len(losses) != NUM_STEPS or len(reference) != NUM_STEPS:
        return Row(configuration, against, bound, losses, None, f"{len(losses)} and {len(reference)} losses")
    pairs = zip(losses, reference, strict=True)
    return Row(configuration, against, bound, losses, max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs))


class Bench:
    """A model without dropout, and a folder for runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = copy_without_dropout(source_folder(orchestrator.load_recipe(RECIPE)), folder / "minilm")

    def recipe(self, method: str, spread: str) -> Recipe:
        overrides = [f"source.model={self.model}", *SETTINGS, *METHODS[method], *SPREADS.get(spread, [])]
        return orchestrator.load_recipe(RECIPE, overrides)

    def our_losses(self, method: str, spread: str = ONE_WORKER) -> list[float]:
        output = self.folder / "run"
        try:
            train_quietly(self.recipe(method, spread), output)
            return [row["loss"] for row in read_train_rows(output)]
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def trainer_losses(self, method: str) -> list[float]:
        """The losses of transformers' Trainer, from our initial weights and on our order of examples."""
        import transformers

        recipe = self.recipe(method, ONE_WORKER)
        prepared = prepare(recipe)
        module = assemble(prepared).module
        model = build_peer(method, self.model, len(prepared.task.label_names), module)
        order = make_schedule(recipe.train, prepared.encoded("train").lengths, recipe.train.global_batch_size).order
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        table, names = prepared.examples["train"].table, prepared.task.label_names
        encoded = tokenizer(table["text"].to_pylist(), truncation=True, max_length=prepared.task.options.max_length)
        labels = [names.index(name) for name in table["label"].to_pylist()]
        examples = [
            {**{name: column[row] for name, column in encoded.items()}, "label": label}
            for row, label in enumerate(labels)
        ]
        collate = transformers.DataCollatorWithPadding(tokenizer)
        batches = [collate([examples[row] for row in rows]) for rows in batch_rows(order, NUM_STEPS)]
        return run_trainer(model, batches, recipe, self.folder / "trainer")


def build_peer(method: str, folder: Path, num_labels: int, ours: Any) -> Any:
    """The model as a user of transformers builds it, with our module's weights; the same parameters are trained."""
    import peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=num_labels, dtype=torch.float32
    )
    if method == "freeze":
        for part in (model.bert.embeddings, *model.bert.encoder.layer[:FREEZE_DEPTH]):
            part.requires_grad_(False)
    if method == "lora":
        chosen = ours.peft_config["default"]
        targets, saved = list(chosen.target_modules), list(chosen.modules_to_save)
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.0, target_modules=targets, modules_to_save=saved
            ),
        )
    model.load_state_dict(ours.state_dict())
    trained, expected = ({n for n, value in m.named_parameters() if value.requires_grad} for m in (model, ours))
    assert trained == expected, f"the peers train different parameters: {sorted(trained ^ expected)}"
    return model


def run_trainer(model: Any, batches: list[Any], recipe: Recipe, output: Path) -> list[float]:
    """transformers' own training over these batches; the loss of each step."""
    import transformers

    losses: list[float] = []

    class FixedOrder(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None)

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            losses.append(float(loss))
            return loss

    train = recipe.train
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=NUM_STEPS,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = FixedOrder(model=model, args=arguments, train_dataset=batches)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return losses


def run_all(bench: Bench, methods: list[str], spreads: list[str]) -> list[Row]:
    rows = []
    for method in methods:
        theirs = bench.trainer_losses(method)
        alone = compare(f"{method}, {ONE_WORKER}", partial(bench.our_losses, method), "Trainer", theirs, TRAINER_BOUND)
        announce(alone)
        rows.append(alone)
        for spread in spreads:
            run = partial(bench.our_losses, method, spread)
            rows.append(compare(f"{method}, {spread}", run, ONE_WORKER, alone.losses, SPREAD_BOUND))
            announce(rows[-1])
    return rows


def announce(row: Row) -> None:
    print(*row.cells(), row.trouble or "", sep="  ", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--spreads", nargs="*", choices=SPREADS, default=list(SPREADS))
    parser.add_argument("--json", type=Path, help="write the numbers, with every step's loss, to this file")
    options = parser.parse_args()
    start_quietly(bool(options.spreads))
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        rows = run_all(Bench(Path(folder)), options.methods, options.spreads)
    titles = ("configuration / against", "largest relative difference", "bound", "first loss", "last loss", "")
    print_table(titles, (row.cells() for row in rows))
    write_json(options.json, [{**asdict(row), "ok": row.ok} for row in rows])
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
