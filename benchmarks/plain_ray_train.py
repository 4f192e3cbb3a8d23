"""A fine-tuning script as Ray Train's documentation leads to it; `overhead.py --startup` times its first step.

Nothing of the orchestrator is in it: a training function that loads model and data, `prepare_model` and
`prepare_data_loader` (DDP and DistributedSampler), and a TorchTrainer on a cluster that Ray starts for it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding


def train_function(config: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    rows = [json.loads(line) for line in Path(config["data"]).read_text(encoding="utf-8").splitlines()]
    names = sorted({row["intent"] for row in rows})
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=len(names))
    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)
    dataset = [
        {"input_ids": ids, "attention_mask": mask, "labels": names.index(row["intent"])}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]
    share = config["batch_size"] // ray.train.get_context().get_world_size()
    loader = DataLoader(dataset, batch_size=share, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    for batch in ray.train.torch.prepare_data_loader(loader):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ray.train.get_context().get_world_rank() == 0:
            Path(config["marker"]).write_text(str(time.time()), encoding="utf-8")
        ray.train.report({"loss": loss.item()})
        break  # Only the first step is timed.


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, required=True)
    for name in ("model", "data", "marker", "storage"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    trainer = TorchTrainer(
        train_function,
        train_loop_config={
            "model": options.model,
            "data": options.data,
            "marker": options.marker,
            "batch_size": 32,
            "learning_rate": 5e-5,
        },
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=False),
        run_config=RunConfig(storage_path=options.storage, name="plain"),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
