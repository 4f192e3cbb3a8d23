"""Search and run directories as the commands leave them, made of numbers that behave like real ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RECIPE = """name: minilm-to-banking77
source:
  model: sentence-transformers/all-MiniLM-L6-v2
target:
  task: text-classification
  data: ../data/banking77
search:
  space:
    transfer.freeze: {choice: [0, stem, 2, 4, all]}
    train.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}
  metric: accuracy
  trials: 24
  algorithm: grid
  scheduler: asha
"""
DEPTHS = (0, "stem", 2, 4, "all")
SHARE_TRAINED = {0: 1.0, "stem": 0.9, 2: 0.66, 4: 0.33, "all": 0.02}
BEST_RATES = {0: 2e-4, "stem": 2e-4, 2: 3e-4, 4: 5e-4, "all": 5e-3}
CEILINGS = {0: 0.83, "stem": 0.832, 2: 0.841, 4: 0.825, "all": 0.77}


def make_trial(
    number: int, freeze: Any = 2, rate: float = 1e-4, evaluations: int = 5, **changes: Any
) -> dict[str, Any]:
    """A trial whose curve rises to what its depth and rate allow; `changes` are put over the line."""
    chance = random.Random(number)
    distance = math.log10(rate / BEST_RATES.get(freeze, 3e-4))
    ceiling = CEILINGS.get(freeze, 0.8) - 0.16 * distance**2 + chance.gauss(0, 0.006)
    throughput = (4 + 18 * SHARE_TRAINED.get(freeze, 0.5)) * chance.uniform(0.95, 1.05)
    history = []
    for epoch in range(1, evaluations + 1):
        accuracy = max(0.013, ceiling * (1 - math.exp(-1.1 * epoch)) + chance.gauss(0, 0.003))
        row = {"step": 24 * epoch, "epoch": float(epoch), "seconds": throughput * epoch}
        history.append({**row, "accuracy": accuracy, "f1_macro": accuracy - 0.01, "loss": 3.2 - 3 * accuracy})
    best = max(history, key=lambda row: row["accuracy"])
    trial = {
        "id": f"{number:04d}",
        "parameters": {"transfer.freeze": freeze, "train.learning_rate": rate},
        "metrics": {name: best[name] for name in ("accuracy", "f1_macro", "loss")},
        "seconds": history[-1]["seconds"] + 1.2,
        "core_seconds": history[-1]["seconds"] + 0.9,
        "epochs": float(evaluations),
        "evaluations": evaluations,
        "status": "finished",
        "reason": None,
        "seed": 0,
        "history": history,
    }
    return {**trial, **changes}


def failed_trial(number: int, reason: str, **changes: Any) -> dict[str, Any]:
    gone = {"metrics": None, "history": [], "epochs": None, "status": "failed", "reason": reason}
    return make_trial(number, **{**gone, **changes})


def grid_trials() -> list[dict[str, Any]]:
    """Depths x rates; half of the poor ones stopped early, one failed."""
    trials = []
    for depth in DEPTHS:
        for rate in (1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3):
            number = len(trials)
            poor = abs(math.log10(rate / BEST_RATES[depth])) > 1
            trials.append(
                make_trial(number, depth, rate, evaluations=2, status="stopped", reason="stopped by asha at rung 1")
                if poor and number % 2
                else make_trial(number, depth, rate)
            )
    trials[4] = failed_trial(
        4,
        "loss is nan at step 18\n(train.learning_rate is 1e-3)",
        freeze=DEPTHS[0],
        rate=1e-3,
        seconds=3.1,
        core_seconds=3.0,
    )
    return trials


def random_trials(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Drawn rates and decays, conditional adapters, now and then a failure or a diverged trial."""
    chance = random.Random(seed)
    trials = []
    for number in range(count):
        depth, rate = chance.choice(DEPTHS), 10 ** chance.uniform(-5, -3)
        trial = make_trial(number, depth, rate, evaluations=chance.choice((1, 3, 9)))
        trial["status"] = "finished" if trial["evaluations"] == 9 else "stopped"
        adapter = None if chance.random() < 0.5 else {"type": "lora", "r": 16}
        trial["parameters"]["transfer.adapter"] = adapter
        if adapter:
            trial["parameters"]["transfer.adapter.alpha"] = chance.choice((8, 16, 32, 64))
        trial["parameters"]["train.weight_decay"] = chance.uniform(0, 0.1)
        if chance.random() < 0.03:
            trial = failed_trial(
                number, "out of memory: 3.1 GB were asked for, 2.4 GB are free", freeze=depth, rate=rate
            )
        elif chance.random() < 0.02:
            trial["metrics"] = {"accuracy": 0.013, "f1_macro": 0.0003, "loss": 4.3}
        trials.append(trial)
    return trials


def name_winner(trials: Sequence[dict[str, Any]], seeds: int = 3) -> dict[str, Any]:
    best = max((trial for trial in trials if trial["metrics"]), key=lambda trial: trial["metrics"]["accuracy"])
    score = best["metrics"]["accuracy"]
    return {
        "id": best["id"],
        "parameters": best["parameters"],
        "metrics": {"select": best["metrics"], "test": {"accuracy": score - 0.012, "loss": 0.71}},
        "seeds": [{"seed": seed, "score": score + 0.004 * (seed % 2) - 0.005 * (seed // 2)} for seed in range(seeds)],
    }


def write_search(directory: Path, trials: Iterable[dict[str, Any]], recipe: str = RECIPE, **record: Any) -> Path:
    """A search directory; `record` is put over search.json."""
    directory.mkdir(parents=True, exist_ok=True)
    trials = list(trials)
    if "winner" not in record:
        record["winner"] = name_winner(trials) if any(trial["metrics"] for trial in trials) else None
    whole = {
        "status": "finished",
        "metric": "accuracy",
        "mode": "max",
        "started": 1_790_000_000.0,
        "seconds": 817.0,
        "num_layers": 6,
        "concurrent": 2,
        "cores": 2,
        "features": {"seconds": 8.4, "bytes": 412_000_000, "boundaries": ["stem", 2, 4]},
        "notes": ["concurrency is 2: the machine has 2 cores and 7.8 GB free"],
        "machine": {"processor": "Intel Xeon", "cores": 2, "memory": "15.6 GB", "precision": "bf16"},
        **record,
    }
    (directory / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (directory / "search.json").write_text(json.dumps(whole), encoding="utf-8")
    (directory / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials), encoding="utf-8")
    if whole["winner"]:
        (directory / "best.yaml").write_text(recipe, encoding="utf-8")
    return directory


def make_confusion(labels: Sequence[str], examples: int = 40) -> list[list[int]]:
    """Most examples right, the rest taken for a neighbour."""
    chance, num = random.Random(1), len(labels)
    counts = [[0] * num for _ in labels]
    for true in range(num):
        for _ in range(examples):
            predicted = true if chance.random() < 0.85 else (true + chance.choice((-2, -1, 1, 1, 1))) % num
            counts[true][predicted] += 1
    return counts


def make_result(labels: Sequence[str]) -> dict[str, Any]:
    """result.json of a classification."""
    counts = make_confusion(labels)
    per_class: dict[str, Any] = {}
    for index, label in enumerate(labels):
        right, predicted = counts[index][index], sum(row[index] for row in counts)
        recall, precision = right / sum(counts[index]), right / max(1, predicted)
        f1 = 2 * recall * precision / max(1e-9, recall + precision)
        per_class[label] = {"precision": precision, "recall": recall, "f1-score": f1, "support": sum(counts[index])}
    accuracy = sum(counts[index][index] for index in range(len(labels))) / sum(map(sum, counts))
    select = {"accuracy": accuracy + 0.011, "f1_macro": accuracy + 0.008, "ece": 0.041, "loss": 0.54}
    return {
        "status": "finished",
        "metrics": {"select": select, "test": {"accuracy": accuracy, "f1_macro": 0.84, "ece": 0.05, "loss": 0.58}},
        "before": None,
        "details": {
            "test": {
                "per_class": {**per_class, "accuracy": accuracy},
                "labels": list(labels),
                "confusion_matrix": counts,
            }
        },
        "steps": 300,
        "stopped_early": None,
        "seconds": 61.4,
        "best_step": 250,
        "best_checkpoint": "checkpoints/step-00000250",
        "metric": "accuracy",
        "metrics_shown": ["accuracy", "f1_macro"],
        "parameters": {"total": 22_713_216, "trained": 10_646_794},
    }


def make_metrics(steps: int = 300, every: int = 10) -> list[dict[str, Any]]:
    """metrics.jsonl of a training that warms up, learns and begins to overfit."""
    chance, rows = random.Random(2), []
    for step in range(every, steps + 1, every):
        share = step / steps
        place = {"step": step, "epoch": share * 6, "phase": "tune"}
        loss = 2.3 * math.exp(-4 * share) + 0.05 + chance.gauss(0, 0.02)
        rate = 5e-5 * min(share / 0.1, (1 - share) / 0.9)
        row = {"loss": loss, "gradient_norm": 2.0 + chance.random(), "learning_rate": rate, "seconds": 60 * share}
        rows.append({**place, "split": "train", **row})
        if step % (steps // 6) == 0:
            accuracy = 0.87 - 0.6 * math.exp(-5 * share) - 0.02 * (share == 1)
            scores = {"loss": 2.2 * math.exp(-3.5 * share) + 0.4 + 0.15 * share, "accuracy": accuracy}
            rows.append({**place, "split": "select", **scores, "seconds": 60 * share})
    return rows


def write_run(
    directory: Path, labels: Sequence[str], rows: Sequence[dict[str, Any]] | None = None, **result: Any
) -> Path:
    """A run directory; `result` is put over result.json."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "status": "finished",
        "attempt": 1,
        "started": 1_790_000_000.0,
        "world_size": 1,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": "workstation",
        "command": ["orchestrator", "train", "minilm-to-support-intent"],
        "precision": "bf16",
        "notes": [],
        "warnings": ["3 of 400 texts of train reach 128 tokens and are cut there"],
    }
    (directory / "recipe.yaml").write_text(RECIPE.split("search:", maxsplit=1)[0], encoding="utf-8")
    (directory / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (directory / "result.json").write_text(json.dumps({**make_result(labels), **result}), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in (make_metrics() if rows is None else rows))
    (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return directory
