"""How much faster is `orchestrator search` than a search written by hand with Ray Tune and transformers' Trainer?

Four workloads, each a search of both sides on the same data, weights, batches and order, dropout off. Ours pays for the
stored features: its cache is empty each time. Times are wall-clock seconds of whole commands, imports and the start of
Ray included (B4: of running the trials alone, which is all that B4 is about).

| B1 | freeze all; 64 rates and weight decays, 10 epochs |
| B2 | depths 9 to 12 of 12, 4 rates, 3 epochs, messages of uneven length; in fp32 and in bf16 |
| B3 | depths 0, 3, 6, 9, 12, 4 rates, 9 epochs, ours with ASHA; against all trials to the end, and against ASHA |
| B4 | 16 trials of nothing that import torch and the Trainer; as it comes, and with reused actors |

The encoder has 12 layers, 384 wide, of random weights (or is the real MiniLM, `--minilm`, with depths scaled to its 6
layers); the data are BANKING77, or AG News with its longer texts. By hand, B1 takes hours: `--peer-share 32` runs one
of at most 32 of its trials, spread over all depths, and multiplies the time inside `Tuner.fit`; so for B2 and B3
without ASHA. Trials that ran to the end on both sides must have the same accuracy (fp32: to 1e-4).

    python benchmarks/search.py [--only B1 B2 ...] [--repeats 3] [--peer-share 32] [--minilm] [--data ag_news]
                                [--assets DIR] [--json F]

Exits with 1 when a median misses its target or scores differ.
"""

from __future__ import annotations

import os

# Before torch is imported: one thread a trial on both sides.
os.environ.update({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import Ratio, compare_seconds, interleave, print_table, source_folder, write_json

import orchestrator
from orchestrator.data.batches import BatchOrder

HERE = Path(__file__).parent
RATES = [3e-5, 1e-4, 3e-4, 1e-3]
# Above about 0.1 a head on random features is chaotic: what differs in the last bit of a feature differs by as much as
# the loss itself after a hundred steps, and accuracies say nothing (0.275 to 0.325 at a rate of 0.25, also in fp64).
HEAD_RATES = [float(f"{10 ** (-3 + 1.7 * step / 15):.3g}") for step in range(16)]
DECAYS = [0.0, 0.001, 0.01, 0.1]
BATCH_SIZE, MAX_LENGTH, CORES = 32, 128, 2
SAME_SCORE = 1e-4


@dataclass(frozen=True)
class Workload:
    """One search, as both sides are told."""

    name: str
    depths: list[int | str]
    rates: list[float]
    decays: list[float]
    epochs: int
    num_train: int
    num_select: int
    asha: bool = False

    def trials(self) -> list[dict[str, Any]]:
        return [
            {"number": number, "freeze": depth, "learning_rate": rate, "weight_decay": decay}
            for number, (depth, rate, decay) in enumerate(
                (depth, rate, decay) for depth in self.depths for rate in self.rates for decay in self.decays
            )
        ]


WORKLOADS = {
    "B1": Workload("B1", ["all"], HEAD_RATES, DECAYS, 10, 600, 120),
    "B2": Workload("B2", [9, 10, 11, 12], RATES, [0.01], 3, 600, 120),
    "B3": Workload("B3", [0, 3, 6, 9, 12], RATES, [0.01], 9, 160, 60, asha=True),
}


@dataclass
class Claim:
    """One measurement: one of our runs against one of theirs."""

    text: str
    target: float
    workload: str
    precision: str = "fp32"
    peer_asha: bool = False
    peer_reuses: bool = False


CLAIMS = [
    Claim("B1, as it comes", 300, "B1"),
    Claim("B1, reused actors", 300, "B1", peer_reuses=True),
    Claim("B2, fp32", 10, "B2"),
    Claim("B2, ours in bf16", 25, "B2", precision="bf16"),
    Claim("B3, all to the end", 10, "B3"),
    Claim("B3, their ASHA", 3, "B3", peer_asha=True),
    Claim("B4, as it comes", 100, "B4"),
    Claim("B4, reused actors", 12, "B4", peer_reuses=True),
]


@dataclass
class Bench:
    """Both sides of the workloads."""

    folder: Path
    assets: Path
    share: int
    minilm: bool
    data: str
    scores: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    """Best accuracy and last loss of each trial on *select*, by workload and side."""

    def prepare(self, workload: Workload) -> Path:
        """The model and the data of a workload, made once."""
        folder = self.folder / workload.name
        if folder.exists():
            return folder
        folder.mkdir()
        lines = (self.assets / self.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        given = [json.loads(line) for line in lines]
        rows = [{"text": row["text"], "label": row.get("label_name", row["label"])} for row in given]
        random.Random(0).shuffle(rows)
        seen: set[str] = set()
        rows = [row for row in rows if not (row["text"].lower() in seen or seen.add(row["text"].lower()))]
        # Every label is in *train*, or it would be refused.
        first = {row["label"]: row for row in reversed(rows)}
        train = list(first.values())
        chosen = {row["text"] for row in train}
        others = [row for row in rows if row["text"] not in chosen]
        train += others[: workload.num_train - len(train)]
        rest = others[workload.num_train :]
        splits = {"train": train, "select": rest[: workload.num_select], "test": rest[-100:]}
        for name, part in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        self.build_model(folder / "model", sorted(first))
        return folder

    def build_model(self, folder: Path, labels: list[str]) -> None:
        """A classifier of these labels, so that both sides begin with the same head."""
        import torch
        from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

        recipe = orchestrator.load_recipe("text-classification/minilm-to-support-intent")
        source = source_folder(recipe)
        config = BertConfig.from_pretrained(source)
        config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
        config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
        torch.manual_seed(0)
        if self.minilm:
            model = BertForSequenceClassification.from_pretrained(source, config=config)
        else:
            config.num_hidden_layers = 12
            model = BertForSequenceClassification(config)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    def depths(self, workload: Workload) -> list[int | str]:
        if not self.minilm:
            return workload.depths
        return list(dict.fromkeys(depth if depth == "all" else int(depth) // 2 for depth in workload.depths))

    def ours(self, name: str, precision: str) -> float:
        if name == "B4":
            return self.run([sys.executable, str(HERE / "search_nothing.py")], {})[1]["seconds"]
        workload = WORKLOADS[name]
        folder = self.prepare(workload)
        space: dict[str, Any] = {
            "transfer.freeze": {"choice": self.depths(workload)},
            "train.learning_rate": {"choice": workload.rates},
            "train.weight_decay": {"choice": workload.decays},
        }
        recipe = {
            "name": "bench",
            "source": {"model": str(folder / "model")},
            "target": {
                "task": "text-classification",
                "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "select", "test")},
                "options": {"max_length": MAX_LENGTH},
            },
            "transfer": {"head": {"dropout": 0.0}},
            "train": {
                "epochs": workload.epochs,
                "global_batch_size": BATCH_SIZE,
                "group_by_length": False,
                "warmup_ratio": 0.0,
                "precision": precision,
            },
            "search": {"space": space, "trials": 1000, "scheduler": "asha" if workload.asha else "none"},
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            command = [
                sys.executable,
                "-m",
                "orchestrator.cli",
                "search",
                str(path),
                "--json",
                "--output",
                f"{output}/s",
            ]
            seconds, _ = self.run(command, {"ORCHESTRATOR_CACHE": f"{output}/cache"})
            rows = [json.loads(line) for line in (Path(output) / "s" / "trials.jsonl").read_text().splitlines()]
        # An ASHA-stopped trial has not seen what the peer's saw.
        self.scores[f"{name} ours {precision}"] = {
            self.number_of(workload, row["parameters"]): (row["metrics"]["accuracy"], row["history"][-1]["loss"])
            for row in rows
            if row["status"] == "finished"
        }
        return seconds

    def number_of(self, workload: Workload, parameters: dict[str, Any]) -> int:
        """Our trials are in the order of the recipe's keys, the peer's in that of the workload."""
        given = {path.rpartition(".")[2]: value for path, value in parameters.items()}
        return next(trial["number"] for trial in self.trials(workload) if given.items() <= trial.items())

    def trials(self, workload: Workload) -> list[dict[str, Any]]:
        return replace(workload, depths=self.depths(workload)).trials()

    def peer(self, claim: Claim) -> float:
        """Seconds of theirs; of a share of the trials the time inside `fit` is multiplied."""
        nothing = claim.workload == "B4"
        settings: dict[str, Any] = {
            "nothing": nothing,
            "asha": claim.peer_asha,
            "reuse": claim.peer_reuses,
            "bf16": False,
            "cpus": CORES,
            "cpus_per_trial": 1,
            "storage": str(self.folder / "ray"),
            "name": f"{time.time()}",
            "epochs": 1,
            "trials": [{"number": number} for number in range(16)],
        }
        share = 1
        if not nothing:
            workload = WORKLOADS[claim.workload]
            folder = self.prepare(workload)
            trials = self.trials(workload)
            share = 1 if claim.peer_asha else self.share_of(len(trials), len(self.depths(workload)))
            order = BatchOrder(np.ones(workload.num_train, np.int64), BATCH_SIZE, False, 0)
            settings |= {
                "model": str(folder / "model"),
                "max_length": MAX_LENGTH,
                "epochs": workload.epochs,
                "batch_size": BATCH_SIZE,
                "trials": trials[share // 2 :: share],
                "orders": [np.concatenate(order.epoch(epoch)).tolist() for epoch in range(workload.epochs)],
                **{split: str(folder / f"{split}.jsonl") for split in ("train", "select")},
            }
        path = self.folder / "settings.json"
        path.write_text(json.dumps(settings))
        seconds, found = self.run([sys.executable, str(HERE / "plain_tune.py"), str(path)], {})
        assert not found["errors"], found["errors"][0]
        if nothing:
            return float(found["fit_seconds"])
        if not claim.peer_asha:
            self.scores[f"{claim.workload} peer"] = {
                trial["number"]: (trial["accuracy"], trial["loss"]) for trial in found["trials"]
            }
        return seconds + (share - 1) * found["fit_seconds"]

    def share_of(self, num_trials: int, num_depths: int) -> int:
        """One of how many trials is run: so that every depth is there, and as many trials as fill the cores."""
        return next(
            share
            for share in range(min(self.share, num_trials), 0, -1)
            if num_trials % share == 0 and num_trials // share >= num_depths and num_trials // share % CORES == 0
        )

    def run(self, command: list[str], environment: dict[str, str]) -> tuple[float, Any]:
        """Seconds of a command, and the JSON on its last line."""
        began = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=self.folder
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return seconds, json.loads(done.stdout.strip().splitlines()[-1])

    def differing(self, name: str) -> tuple[int, float, float]:
        """Return the number of trials on both sides, and the largest differences of accuracy and loss."""
        ours, peer = self.scores.get(f"{name} ours fp32", {}), self.scores.get(f"{name} peer", {})
        both = ours.keys() & peer.keys()
        accuracy, loss = (
            max((abs(ours[number][which] - peer[number][which]) for number in both), default=0.0) for which in (0, 1)
        )
        return len(both), accuracy, loss


def measure(bench: Bench, claim: Claim, num_repeats: int) -> Ratio:
    contenders: dict[str, Callable[[], float]] = {
        "ours": lambda: bench.ours(claim.workload, claim.precision),
        "peer": lambda: bench.peer(claim),
    }
    numbers = interleave(contenders, num_repeats)
    ratio = compare_seconds(claim.text, claim.target, numbers["ours"], numbers["peer"])
    print_table(["claim", "target", "median ratio", "minimum", "ours (s)", "peer (s)", ""], [ratio.cells()])
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["B1", "B2", "B3", "B4"], help="workloads, or whole claims")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-share", type=int, default=32, help="one of so many of the peer's trials is run")
    parser.add_argument("--minilm", action="store_true", help="the real MiniLM instead of 12 random layers")
    parser.add_argument("--data", choices=["banking77", "ag_news"], default="banking77")
    parser.add_argument("--assets", type=Path, default=HERE.parent.parent / "shared" / "assets")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    claims = [claim for claim in CLAIMS if claim.workload in options.only or claim.text in options.only]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.assets, options.peer_share, options.minilm, options.data)
        ratios = [measure(bench, claim, options.repeats) for claim in claims]
        agreements = {name: bench.differing(name) for name in WORKLOADS if any(name == c.workload for c in claims)}
    print_table(["claim", "target", "median ratio", "minimum", "ours (s)", "peer (s)", ""], [r.cells() for r in ratios])
    for name, (count, accuracy, loss) in agreements.items():
        print(
            f"{name}: {count} trials ran to the end on both sides; accuracies differ by at most {accuracy:.1e}", end=""
        )
        print(f", last losses by {loss:.1e}")
    found = {"ratios": [asdict(ratio) for ratio in ratios], "agreements": agreements, "scores": bench.scores}
    write_json(options.json, found)
    return int(not (all(r.ok for r in ratios) and all(d <= SAME_SCORE for _, d, _ in agreements.values())))


if __name__ == "__main__":
    sys.exit(main())
