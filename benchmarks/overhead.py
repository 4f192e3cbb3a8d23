"""What does the orchestrator cost next to training by hand? Steps, padding and the start are measured.

Model and data are those of the shipped recipe: all-MiniLM-L6-v2, fully tuned to support-intent, 32 messages a batch.

Steps (one processor thread, fp32 and bf16): examples per second after a warm-up, against a bare PyTorch loop (same
module, AdamW, autocast, clipping and schedule, over batches that are tensors already) and against transformers' Trainer
on those same tensors. Ours is a whole `orchestrator.train` with its hooks, collating as it goes; the time is that
between two train rows of its metrics.jsonl.

Padding (the same): on BANKING77, whose messages are of uneven length, ours with `train.group_by_length` against the
Trainer as it comes, with shuffled batches padded to their longest message. As many steps are timed as the messages make
batches, so that long and short batches both count as often as they occur.

Start (`--startup` runs this instead): seconds from the command to the end of the first optimizer step on one and on two
workers, `orchestrator train` against the script that Ray's documentation leads to (`plain_ray_train.py`).

Contenders take turns, each turn starting with another one. A ratio is taken within a turn; its median and its minimum
over the turns are shown, above 1 when ours is faster.

    python benchmarks/overhead.py [--startup] [--repeats 3] [--steps 40] [--assets DIR] [--json FILE]

Exits with 1 when a median misses its target.
"""

from __future__ import annotations

import os

# Before torch is imported: one thread, so that contenders differ in what they do and not in how it is spread.
os.environ.update({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    RECIPE,
    Ratio,
    batch_rows,
    compare_seconds,
    compare_speeds,
    interleave,
    print_table,
    read_train_rows,
    train_quietly,
    write_json,
)
from startup import measure_startup

import orchestrator
from orchestrator.recipe import Recipe

BARE_TARGET, TRAINER_TARGET, PADDING_TARGET, STARTUP_TARGET = 0.97, 1.0, 1.5, 2.0
NUM_WARMUP_STEPS = 5
NUM_PADDED_BATCHES = 25
BATCH_SIZE = 32
SETTINGS = [
    "transfer.freeze=0",
    f"train.global_batch_size={BATCH_SIZE}",
    "target.limit.select=20",
    "target.limit.test=20",
]


@dataclass(frozen=True)
class Stretch:
    """The steps that are timed: those after `first`, up to and including `last`."""

    first: int
    last: int
    num_examples: int

    def settings(self) -> list[str]:
        whole = [f"train.{name}={self.last}" for name in ("steps", "evaluate_every", "save_every")]
        return [*whole, f"train.log_every={self.first}"]


def our_speed(recipe: Recipe, stretch: Stretch) -> float:
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        train_quietly(recipe, Path(folder) / "run")
        seconds = {row["step"]: row["seconds"] for row in read_train_rows(Path(folder) / "run")}
    return stretch.num_examples / (seconds[stretch.last] - seconds[stretch.first])


def bare_speed(prepared: Any, batches: list[dict[str, Any]], stretch: Stretch) -> float:
    """A loop as short as it can be, over tensors that are ready."""
    import torch
    from transformers import get_scheduler

    from orchestrator.training.assembling import assemble

    gc.collect()
    train = prepared.recipe.train
    parts = assemble(prepared)
    model = parts.module.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parts.groups, fused=True)
    warmup = round(stretch.last * train.warmup_ratio)
    scheduler = get_scheduler(train.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=stretch.last)
    losses, started = [], 0.0
    for number, batch in enumerate(batches):
        if number == stretch.first:
            started = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return stretch.num_examples / (time.monotonic() - started)


def trainer_speed(recipe: Recipe, prepared: Any, stretch: Stretch, batches: list[dict[str, Any]] | None) -> float:
    """transformers' Trainer: over ready batches, or (None) from tokenised examples with its own order and padding."""
    import torch
    import transformers
    from accelerate.state import AcceleratorState

    from orchestrator.models import load_tokenizer

    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.times: dict[int, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.times[state.global_step] = time.monotonic()

    class ReadyBatches(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None)

    gc.collect()
    watch = Watch()
    tokenizer = load_tokenizer(prepared.source)[0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        prepared.source.location, num_labels=len(prepared.task.label_names), dtype=torch.float32
    )
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        trainer = (transformers.Trainer if batches is None else ReadyBatches)(
            model=model,
            args=trainer_arguments(recipe, stretch, folder),
            train_dataset=batches if batches is not None else tokenised_examples(prepared, tokenizer),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    # The Trainer leaves its precision behind for the whole process; the next contender's may be another.
    AcceleratorState._reset_state(reset_partial_state=True)
    return stretch.num_examples / (watch.times[stretch.last] - watch.times[stretch.first])


def trainer_arguments(recipe: Recipe, stretch: Stretch, folder: str) -> Any:
    import transformers

    train = recipe.train
    return transformers.TrainingArguments(
        output_dir=folder,
        max_steps=stretch.last,
        per_device_train_batch_size=train.global_batch_size,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bf16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=train.log_every,
        disable_tqdm=True,
    )


def tokenised_examples(prepared: Any, tokenizer: Any) -> list[dict[str, Any]]:
    table, names = prepared.examples["train"].table, prepared.task.label_names
    texts = tokenizer(table["text"].to_pylist(), truncation=True, max_length=prepared.task.options.max_length)
    labels = [names.index(name) for name in table["label"].to_pylist()]
    rows = zip(*texts.values(), labels, strict=True)
    return [dict(zip([*texts, "label"], row, strict=True)) for row in rows]


def measure_steps(precision: str, num_steps: int, num_repeats: int) -> list[Ratio]:
    from orchestrator.training.loop import make_schedule
    from orchestrator.training.prepare import prepare

    last = NUM_WARMUP_STEPS + num_steps
    stretch = Stretch(NUM_WARMUP_STEPS, last, 0)
    overrides = [*SETTINGS, *stretch.settings(), f"train.precision={precision}"]
    recipe = orchestrator.load_recipe(RECIPE, overrides)
    prepared = prepare(recipe)
    encoded = prepared.encoded("train")
    rows = list(batch_rows(make_schedule(recipe.train, encoded.lengths, BATCH_SIZE).order, last))
    stretch = Stretch(NUM_WARMUP_STEPS, last, sum(map(len, rows[NUM_WARMUP_STEPS:])))
    batches = [ready_batch(encoded, batch) for batch in rows]
    contenders = {
        "ours": partial(our_speed, recipe, stretch),
        "bare": partial(bare_speed, prepared, batches, stretch),
        "Trainer": partial(trainer_speed, recipe, prepared, stretch, batches),
    }
    found = interleave(contenders, num_repeats)
    return [
        compare_speeds(f"steps, {precision}: bare loop", BARE_TARGET, found["ours"], found["bare"]),
        compare_speeds(f"steps, {precision}: Trainer", TRAINER_TARGET, found["ours"], found["Trainer"]),
    ]


def ready_batch(encoded: Any, rows: Any) -> dict[str, Any]:
    import torch

    batch = encoded.batch(rows)
    return {name: torch.from_numpy(values) for name, values in (batch.inputs | batch.targets).items()}


def measure_padding(precision: str, folder: Path, num_repeats: int) -> list[Ratio]:
    from orchestrator.training.prepare import prepare

    num_examples = NUM_PADDED_BATCHES * BATCH_SIZE
    stretch = Stretch(NUM_WARMUP_STEPS, NUM_WARMUP_STEPS + NUM_PADDED_BATCHES, num_examples)
    overrides = [
        f"target.data={{train: {folder / 'train.jsonl'}, test: {folder / 'test.jsonl'}}}",
        "target.columns={text: text, label: label}",
        f"target.limit.train={num_examples}",
        "target.limit.select=100",
        "target.limit.test=100",
    ]
    chosen = [*SETTINGS, *overrides, *stretch.settings(), f"train.precision={precision}"]
    recipe = orchestrator.load_recipe(RECIPE, chosen)
    prepared = prepare(recipe)
    contenders = {
        "ours": partial(our_speed, recipe, stretch),
        "Trainer": partial(trainer_speed, recipe, prepared, stretch, None),
    }
    found = interleave(contenders, num_repeats)
    return [compare_speeds(f"padding, {precision}: Trainer", PADDING_TARGET, found["ours"], found["Trainer"])]


def measure_training(num_steps: int, num_repeats: int, assets: Path) -> list[Ratio]:
    import torch
    import transformers

    from orchestrator.training.engine.precision import has_bf16

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    precisions = ["fp32", "bf16"] if has_bf16(torch.device("cpu")) else ["fp32"]
    if precisions == ["fp32"]:
        print("bf16 is left out: this processor does not compute it in hardware", file=sys.stderr)
    ratios = [ratio for precision in precisions for ratio in measure_steps(precision, num_steps, num_repeats)]
    if not (assets / "banking77").is_dir():
        print(
            f"padding is left out: there is no banking77 in {assets} (name its folder with --assets)", file=sys.stderr
        )
        return ratios
    for precision in precisions:
        ratios += measure_padding(precision, assets / "banking77", num_repeats)
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--startup", action="store_true", help="measure the seconds to the first step instead")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=40, help="timed steps; a multiple of 5")
    assets = Path(__file__).resolve().parents[2] / "shared" / "assets"
    parser.add_argument("--assets", type=Path, default=assets, help="folder that holds banking77")
    parser.add_argument("--json", type=Path, help="write the numbers of every turn to this file")
    options = parser.parse_args()
    if options.steps % NUM_WARMUP_STEPS or min(options.steps, options.repeats) < 1:
        parser.error(f"--steps takes a multiple of {NUM_WARMUP_STEPS}, --repeats at least 1")
    if options.startup:
        found = measure_startup(options.repeats)
        ratios = [compare_seconds(f"start, {claim}", STARTUP_TARGET, *numbers) for claim, numbers in found.items()]
    else:
        ratios = measure_training(options.steps, options.repeats, options.assets.resolve())
    unit = "s" if options.startup else "examples/s"
    titles = ("claim", "target", "median ratio", "minimum", f"ours ({unit})", f"peer ({unit})", "")
    print_table(titles, (ratio.cells() for ratio in ratios))
    write_json(options.json, [{**asdict(ratio), "median": ratio.median, "ok": ratio.ok} for ratio in ratios])
    return 0 if all(ratio.ok for ratio in ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
