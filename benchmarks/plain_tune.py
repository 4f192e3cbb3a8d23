"""A search as Ray's documentation leads to it; `search.py` runs it as the peer. Nothing of the orchestrator is in it.

A Tuner over a function that runs transformers' Trainer on a model whose lower layers are frozen, once in a new process
for every trial (as it comes), once with `reuse_actors`. It is spared what it would do in vain: the texts are tokenized
once, outside the trials; batches are padded to their longest text; nothing is saved.

    python benchmarks/plain_tune.py SETTINGS.json

Prints one line of JSON: seconds inside `Tuner.fit`, each trial's best accuracy and its last loss on *select*.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune


def train_function(config: dict[str, Any], settings: dict[str, Any], data: dict[str, list[Any]]) -> None:
    import torch
    import transformers

    if settings["nothing"]:
        assert transformers.Trainer is not None
        tune.report({"accuracy": float(config["trial"]["number"]), "loss": 0.0})
        return
    torch.set_num_threads(1)
    trial = config["trial"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(settings["model"])
    freeze(model, trial["freeze"])

    class FixedOrder(torch.utils.data.Sampler):  # type: ignore[type-arg]
        epoch = 0

        def __iter__(self) -> Iterator[int]:
            FixedOrder.epoch += 1
            return iter(settings["orders"][FixedOrder.epoch - 1])

        def __len__(self) -> int:
            return len(settings["orders"][0])

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return FixedOrder()

    class Report(transformers.TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
            tune.report({"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]})

    arguments = transformers.TrainingArguments(
        output_dir=str(Path.cwd() / "out"),
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"] * 2,
        learning_rate=trial["learning_rate"],
        weight_decay=trial["weight_decay"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        bf16=settings["bf16"],
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10_000,
        use_cpu=True,
        seed=0,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["select"],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[Report()],
    ).train()


def freeze(model: Any, depth: int | str) -> None:
    body = model.bert
    frozen = [body] if depth == "all" else [body.embeddings, *body.encoder.layer[: int(depth)]] if depth else []
    for part in frozen:
        for parameter in part.parameters():
            parameter.requires_grad = False


def tokenize(settings: dict[str, Any], split: str) -> list[dict[str, Any]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    names = json.loads((Path(settings["model"]) / "config.json").read_text(encoding="utf-8"))["label2id"]
    rows = [json.loads(line) for line in Path(settings[split]).read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=settings["max_length"])
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": names[row["label"]]}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    data = {} if settings["nothing"] else {split: tokenize(settings, split) for split in ("train", "select")}
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    ray.init(num_cpus=settings["cpus"], include_dashboard=False, log_to_driver=False)
    trainable = tune.with_resources(
        tune.with_parameters(train_function, settings=settings, data=data), {"cpu": settings["cpus_per_trial"]}
    )
    asha = tune.schedulers.ASHAScheduler(grace_period=1, reduction_factor=3, max_t=settings["epochs"])
    began = time.perf_counter()
    results = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(settings["trials"])},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            scheduler=asha if settings["asha"] else None,
            reuse_actors=settings["reuse"],
        ),
        run_config=tune.RunConfig(storage_path=settings["storage"], name=settings["name"], verbose=0),
    ).fit()
    seconds = time.perf_counter() - began
    best = [
        {
            **result.config["trial"],
            "accuracy": max(result.metrics_dataframe["accuracy"], default=None),
            "loss": float(result.metrics_dataframe["loss"].iloc[-1]),
        }
        for result in results
        if result.metrics_dataframe is not None
    ]
    errors = [str(error) for error in results.errors]
    print(json.dumps({"fit_seconds": seconds, "trials": best, "errors": errors}))


if __name__ == "__main__":
    main()
