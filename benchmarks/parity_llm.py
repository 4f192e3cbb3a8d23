"""Are loss and gradient norm of every step those of TRL's trainers, and the same however the work is spread?

The model is a Llama of 260,000 parameters that tells children's stories, tuned to the instructions of alpaca_en_demo in
30 steps in fp32 on processors: full tuning and LoRA; texts, completions, the answers of conversations (SFTTrainer), and
preferences between two answers (DPOTrainer). TRL gets our initial weights and our order of examples; templates, tokens,
masks, padding, loss and optimizer are its own. Ours runs (a) with examples padded, as TRL's are, and packed, and (b) on
two Ray workers.

TRL finds answers only by the marks of a template; ours does without them in "answers, unmarked".

    pip install trl
    python benchmarks/parity_llm.py [--cases ...] [--spreads ...] [--assets DIR] [--json FILE]

Exits with 1 when a number differs by more than its bound: 1e-5 of TRL's, 1e-4 of one worker's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A processor's fp32 is the yardstick: on a GPU, one worker would run there and two would not.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import yaml
from common import batch_rows, print_table, read_train_rows, start_quietly, train_quietly, write_json

import orchestrator
from orchestrator.recipe import Recipe
from orchestrator.training.assembling import assemble
from orchestrator.training.loop import make_schedule
from orchestrator.training.prepare import prepare

NUM_STEPS, BATCH_SIZE, MAX_LENGTH, NUM_TRAIN = 30, 8, 256, 160
LONGEST_PROMPT = 200  # Characters.
TRL_BOUND, SPREAD_BOUND = 1e-5, 1e-4
MARKED = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORMS = {
    "texts": "text",
    "completions": "prompt-completion",
    "answers": "messages",
    "answers, unmarked": "messages",
    "preferences": "preference",
}
METHODS = ("full", "lora")
ADAPTER = {"type": "lora", "r": 8, "alpha": 16}
SPREADS: dict[str, dict[str, Any]] = {
    "2 workers": {"workers": 2},
    "ZeRO 0": {"workers": 2, "engine": "deepspeed"},
    "ZeRO 1": {"workers": 2, "zero_stage": 1},
    "ZeRO 2": {"workers": 2, "zero_stage": 2},
    "ZeRO 3": {"workers": 2, "zero_stage": 3},
}
Numbers = list[tuple[float, float]]  # Loss and gradient norm of each step.


@dataclass
class Row:
    """One configuration held against its reference."""

    configuration: str
    against: str
    bound: float
    loss: float
    """Largest relative difference over the steps."""
    gradient_norm: float
    first_loss: float
    last_loss: float

    @property
    def ok(self) -> bool:
        return self.loss <= self.bound and self.gradient_norm <= self.bound

    def cells(self) -> list[str]:
        return [
            f"{self.configuration} / {self.against}",
            f"{self.loss:.1e}",
            f"{self.gradient_norm:.1e}",
            f"{self.bound:.0e}",
            f"{self.first_loss:.6f}",
            f"{self.last_loss:.6f}",
            "ok" if self.ok else "FAIL",
        ]


def compare(configuration: str, found: Numbers, against: str, expected: Numbers, bound: float) -> Row:
    assert len(found) == len(expected) == NUM_STEPS
    loss, norm = (
        max(abs(mine[which] - other[which]) / abs(other[which]) for mine, other in zip(found, expected, strict=True))
        for which in (0, 1)
    )
    row = Row(configuration, against, bound, loss, norm, found[0][0], found[-1][0])
    print(*row.cells(), sep="  ", file=sys.stderr, flush=True)
    return row


class Bench:
    """The data in each form, and a folder for runs."""

    def __init__(self, folder: Path, assets: Path) -> None:
        self.folder = folder
        self.source = assets / "model_llama_stories260k"
        lines = (assets / "alpaca_en_demo" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        # TRL drops examples whose completions are cut off, which would shift its order of examples.
        rows = [row for row in map(json.loads, lines) if len(row["instruction"] + row["input"]) < LONGEST_PROMPT]
        rows = rows[: NUM_TRAIN + 20]
        for form in set(FORMS.values()):
            others = [*rows[1:], rows[0]]
            written = [json.dumps(as_form(*pair, form)) + "\n" for pair in zip(rows, others, strict=True)]
            (folder / f"{form}-train.jsonl").write_text("".join(written[:NUM_TRAIN]), encoding="utf-8")
            (folder / f"{form}-select.jsonl").write_text("".join(written[NUM_TRAIN:]), encoding="utf-8")
        (folder / "marked.jinja").write_text(MARKED, encoding="utf-8")
        (folder / "unmarked.jinja").write_text(UNMARKED, encoding="utf-8")

    def recipe(self, case: str, method: str, packs: bool, spread: str | None = None) -> Recipe:
        form = FORMS[case]
        options: dict[str, Any] = {"max_length": MAX_LENGTH}
        if form != "preference":
            options |= {"pack": packs, "form": form}
        if form == "messages":
            options["chat_template"] = "unmarked.jinja" if "unmarked" in case else "marked.jinja"
        recipe = {
            "name": "parity",
            "source": {"model": str(self.source)},
            "target": {
                "task": "preference" if form == "preference" else "causal-lm",
                "data": {split: str(self.folder / f"{form}-{split}.jsonl") for split in ("train", "select")},
                "split": {"test": 0},
                "options": options,
            },
            "transfer": {"adapter": ADAPTER if method == "lora" else None},
            "train": {
                "steps": NUM_STEPS,
                # Preferences want a tenth of the rate; at more, rounding grows faster than what is learned.
                "learning_rate": (3.0e-3 if method == "lora" else 1.0e-3) / (10 if form == "preference" else 1),
                "warmup_ratio": 0.1,
                "weight_decay": 0.0,
                "global_batch_size": BATCH_SIZE,
                "group_by_length": False,
                "precision": "fp32",
                "log_every": 1,
                "evaluate_every": NUM_STEPS,
                "save_every": NUM_STEPS,
            },
            "scale": SPREADS[spread] if spread else {},
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return orchestrator.load_recipe(path)

    def ours(self, case: str, method: str, packs: bool, spread: str | None = None) -> Numbers:
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            train_quietly(self.recipe(case, method, packs, spread), Path(output) / "run")
            return [(row["loss"], row["gradient_norm"]) for row in read_train_rows(Path(output) / "run")]

    def theirs(self, case: str, method: str) -> Numbers:
        """TRL's numbers, from our initial weights and on our order of examples."""
        import datasets
        import peft
        import transformers
        import trl

        recipe = self.recipe(case, method, packs=False)
        prepared = prepare(recipe)
        module = assemble(prepared).module
        order = make_schedule(recipe.train, prepared.encoded("train").lengths, BATCH_SIZE).order
        rows = [row for batch in batch_rows(order, NUM_STEPS) for row in batch.tolist()]
        lines = (self.folder / f"{FORMS[case]}-train.jsonl").read_text(encoding="utf-8").splitlines()
        data = datasets.Dataset.from_list([json.loads(lines[row]) for row in rows])
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
        tokenizer.chat_template = MARKED
        model = transformers.AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        if method == "lora":
            targets = list(module.peft_config["default"].target_modules)
            settings = peft.LoraConfig(r=ADAPTER["r"], lora_alpha=ADAPTER["alpha"], target_modules=targets)
            model = peft.get_peft_model(model, settings)
        model.load_state_dict(module.state_dict())
        losses: list[float] = []
        norms: list[float] = []

        is_preference = case == "preferences"

        class InOrder(trl.DPOTrainer if is_preference else trl.SFTTrainer):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

            def training_step(self, *arguments: Any, **named: Any) -> Any:
                loss = super().training_step(*arguments, **named)
                losses.append(float(loss))
                return loss

            def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
                if "grad_norm" in logs:  # The loss here is rounded.
                    norms.append(float(logs["grad_norm"]))

        train = recipe.train
        InOrder(
            model=model,
            args=(trl.DPOConfig if is_preference else trl.SFTConfig)(
                output_dir=str(self.folder / "trl"),
                max_steps=NUM_STEPS,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=train.learning_rate,
                lr_scheduler_type=train.schedule,
                warmup_steps=train.warmup_ratio,
                weight_decay=train.weight_decay,
                max_grad_norm=train.max_grad_norm,
                max_length=MAX_LENGTH,
                **({} if is_preference else {"assistant_only_loss": FORMS[case] == "messages"}),
                gradient_checkpointing=False,
                logging_steps=1,
                logging_nan_inf_filter=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=tokenizer,
        ).train()
        return list(zip(losses, norms, strict=True))


def as_form(row: dict[str, str], other: dict[str, str], form: str) -> dict[str, Any]:
    """A row in the words of a form; `other` has an answer that does not belong."""
    asked = f"{row['instruction']}\n{row['input']}".strip()
    if form == "messages":
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}
    if form == "text":
        return {"text": f"{asked}\n{row['output']}"}
    if form == "preference":
        return {"prompt": f"{asked}\n", "chosen": row["output"], "rejected": other["output"]}
    return {"prompt": f"{asked}\n", "completion": row["output"]}


def run_all(bench: Bench, cases: list[str], spreads: list[str]) -> list[Row]:
    rows = []
    for case in cases:
        for method in METHODS:
            name, theirs = f"{case}, {method}", bench.theirs(case, method)
            alone = bench.ours(case, method, packs=False)
            rows.append(compare(f"{name}, padded", alone, "TRL", theirs, TRL_BOUND))
            if case == "preferences":
                continue
            packed = bench.ours(case, method, packs=True)
            rows.append(compare(f"{name}, packed", packed, "TRL", theirs, TRL_BOUND))
            for spread in spreads if case == "completions" else []:
                spreaded = bench.ours(case, method, packs=True, spread=spread)
                rows.append(compare(f"{name}, {spread}", spreaded, "one worker", packed, SPREAD_BOUND))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--spreads", nargs="*", choices=SPREADS, default=list(SPREADS))
    parser.add_argument("--assets", type=Path, default=Path(__file__).parents[2] / "shared" / "assets")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    start_quietly(bool(options.spreads))
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        rows = run_all(Bench(Path(folder), options.assets), options.cases, options.spreads)
    titles = ("configuration / against", "loss", "gradient norm", "bound", "first loss", "last loss", "")
    print_table(titles, (row.cells() for row in rows))
    write_json(options.json, [{**asdict(row), "ok": row.ok} for row in rows])
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
