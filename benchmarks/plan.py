"""Does a training hold as much memory, and take as long, as `orchestrator plan` said?

Models of three families with random weights, made here (a BERT of 42 M weights, a Llama of 31 M, a vision
transformer of 38 M), on made-up data of uneven lengths. For each configuration a fresh process plans; others train for
two epochs while PyTorch's profiler notes what its allocator hands out and takes back. Compared are the bytes that the
first worker held at the most, as `torch.cuda.max_memory_allocated` has it on a GPU. (What is resident on a CPU is more:
glibc keeps freed blocks for the next step, which saves up to a third of the time.) Beside it stand the estimators of
Accelerate (`accelerate estimate-memory`) and DeepSpeed (`estimate_zero*_model_states_mem_needs`), which know of
weights, gradients and optimizer alone.

With `--times`, one training of each family is run, and others are planned from it (`plan --from`) and run too: compared
are the seconds of their steps and evaluations.

    python benchmarks/plan.py [--times] [--only NAME ...] [--json FILE]

Exits with 1 where an error is above 10 %, or their median above 3 %; of times, where one is above 25 %.
"""

from __future__ import annotations

import os

os.environ.update({"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"})

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

WORST, MEDIAN, WORST_TIME = 0.10, 0.03, 0.25
BATCH, NUM_TRAIN, EPOCHS = 8, 32, 2
MAX_LENGTH, VOCABULARY = 256, 8000


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    sections: dict[str, Any] = field(default_factory=dict)


def case(name: str, family: str, **sections: dict[str, Any]) -> Case:
    return Case(name, family, sections)


LORA = {"type": "lora", "r": 16, "alpha": 32}
CASES = [
    case("bert full", "bert", train={"precision": "fp32"}),
    case("bert full bf16", "bert", train={"precision": "bf16"}),
    case("bert freeze 4", "bert", transfer={"freeze": 4}, train={"cache_prefix": False, "precision": "fp32"}),
    case("bert frozen, head alone", "bert", transfer={"freeze": "all"}, train={"cache_prefix": False}),
    case("bert LoRA", "bert", transfer={"adapter": LORA}, train={"precision": "fp32"}),
    case("bert checkpointing", "bert", train={"gradient_checkpointing": True, "precision": "fp32"}),
    case("bert accumulation", "bert", train={"micro_batch_size": 2, "precision": "fp32"}),
    case("bert two workers", "bert", train={"precision": "fp32"}, scale={"workers": 2}),
    case("bert ZeRO-1", "bert", scale={"workers": 2, "zero_stage": 1}),
    case("bert ZeRO-2", "bert", scale={"workers": 2, "zero_stage": 2}),
    case("bert ZeRO-3", "bert", scale={"workers": 2, "zero_stage": 3}),
    case("llama full packed", "llama", train={"precision": "fp32"}),
    case("llama full padded", "llama", target={"options": {"pack": False}}, train={"precision": "fp32"}),
    case("llama full bf16", "llama", train={"precision": "bf16"}),
    case("llama LoRA bf16", "llama", transfer={"adapter": LORA}, train={"precision": "bf16"}),
    case("llama LoRA checkpointing", "llama", transfer={"adapter": LORA}, train={"gradient_checkpointing": True}),
    case("llama last blocks", "llama", transfer={"freeze": 6}, train={"cache_prefix": False, "precision": "fp32"}),
    case("llama two workers", "llama", train={"precision": "fp32"}, scale={"workers": 2}),
    case("llama ZeRO-2 fp32", "llama", train={"precision": "fp32"}, scale={"workers": 2, "zero_stage": 2}),
    case("llama ZeRO-3", "llama", scale={"workers": 2, "zero_stage": 3}),
    case("vit full", "vit", train={"precision": "fp32"}),
    case("vit full bf16", "vit", train={"precision": "bf16"}),
    case("vit freeze 6", "vit", transfer={"freeze": 6}, train={"cache_prefix": False, "precision": "fp32"}),
    case("vit ZeRO-2", "vit", scale={"workers": 2, "zero_stage": 2}),
]


CALIBRATION = {"bert": "bert full", "llama": "llama full packed", "vit": "vit full"}
TIMED = [
    "bert freeze 4",
    "bert LoRA",
    "bert checkpointing",
    "bert accumulation",
    "llama full padded",
    "llama last blocks",
    "vit freeze 6",
]


def build(folder: Path) -> None:
    """The models and the data."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    torch.manual_seed(0)
    words = [f"w{number}" for number in range(VOCABULARY - 10)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = transformers.BertTokenizerFast(
        {token: index for index, token in enumerate(tokens)}, model_max_length=MAX_LENGTH
    )
    bert = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=2048
    )
    transformers.BertForMaskedLM(bert).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    transformers.BertTokenizerFast(
        {token: index for index, token in enumerate(tokens)}, model_max_length=MAX_LENGTH, eos_token="[SEP]"
    ).save_pretrained(folder / "llama")
    vit = transformers.ViTConfig(
        image_size=128,
        patch_size=16,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        intermediate_size=2048,
    )
    transformers.ViTForImageClassification(vit).save_pretrained(folder / "vit")
    transformers.ViTImageProcessorPil(size={"height": 128, "width": 128}).save_pretrained(folder / "vit")
    generator = np.random.default_rng(0)
    for split, number in {"train": NUM_TRAIN, "select": 8}.items():
        texts = [" ".join(generator.choice(words, generator.integers(16, MAX_LENGTH - 8))) for _ in range(number)]
        rows = [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for index in range(number):
            home = folder / "pictures" / split / "ab"[index % 2]
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (128, 128, 3), np.uint8)).save(home / f"{index}.png")


def write_recipe(folder: Path, given: Case) -> Path:
    texts = {split: str(folder / f"{split}.jsonl") for split in ("train", "select")}
    target: dict[str, dict[str, Any]] = {
        "bert": {"task": "text-classification", "data": texts, "options": {"max_length": MAX_LENGTH}},
        "llama": {"task": "causal-lm", "data": texts, "options": {"max_length": MAX_LENGTH, "form": "text"}},
        "vit": {"task": "image-classification", "data": str(folder / "pictures")},
    }
    own = dict(given.sections)
    options = {**target[given.family].get("options", {}), **own.pop("target", {}).get("options", {})}
    recipe = {
        "name": "plan",
        "source": {"model": str(folder / given.family)},
        "target": {**target[given.family], "options": options, "split": {"test": 0}},
        **own,
        "train": {"epochs": EPOCHS, "global_batch_size": BATCH, **own.get("train", {})},
    }
    path = folder / f"{given.name.replace(' ', '-').replace(',', '').lower()}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def ask(verb: str, recipe: Path, *options: str) -> dict[str, Any]:
    """Return the object that a command prints with `--json`."""
    command = [sys.executable, "-m", "orchestrator.cli", verb, str(recipe), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare_times(folder: Path, chosen: list[Case]) -> list[dict[str, Any]]:
    """Plans from one run of each family, and the runs."""
    os.environ["OMP_NUM_THREADS"] = "1"  # With more, one run takes a third longer than the same one before it.
    runs: dict[str, Path] = {}
    rows = []
    print(f"{'case':28}{'planned':>10}{'taken':>10}{'error':>8}   (seconds)")
    for each in chosen:
        recipe = write_recipe(folder, each)
        if each.family not in runs:
            runs[each.family] = folder / f"run of {each.family}"
            known = next(other for other in CASES if other.name == CALIBRATION[each.family])
            ask("train", write_recipe(folder, known), "--output", str(runs[each.family]))
        planned = ask("plan", recipe, "--from", str(runs[each.family]))["effort"]["seconds"]
        taken = ask("train", recipe, "--output", str(folder / each.name))["seconds"]
        rows.append({"case": each.name, "planned": planned, "taken": taken, "error": planned / taken - 1})
        print(f"{each.name:28}{planned:10.1f}{taken:10.1f}{planned / taken - 1:+8.1%}", flush=True)
    return rows


def train(recipe: Path, workers: int) -> int:
    """Bytes that the first worker held at the most."""
    with tempfile.TemporaryDirectory() as home:
        own = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        command = [sys.executable, __file__, "--worker", str(recipe), home]
        running = [
            subprocess.Popen(
                [*command, str(rank), str(workers)],
                env=own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(workers)
        ]
        told = [each.communicate()[1] for each in running]
        if any(each.returncode for each in running):
            raise SystemExit("\n".join(told))
        return int((Path(home) / "held").read_text(encoding="utf-8"))


def work(recipe: Path, home: Path, rank: int, workers: int) -> None:
    """One worker: trains, and the first one writes what it held."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from orchestrator import load_recipe
    from orchestrator.runs.directory import RunDirectory
    from orchestrator.training.loop import training_steps
    from orchestrator.training.prepare import prepare
    from orchestrator.training.session import open_session

    if workers > 1:
        os.environ.update(
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
        )
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(home / "store"), workers), rank=rank, world_size=workers
        )
    loaded = load_recipe(recipe)
    prepared = prepare(loaded)
    directory = RunDirectory(home / "run")
    directory.create()
    held, most = 0, 0
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        open_session(prepared, directory, 1, torch.device("cpu"), None) as session,
    ):
        began = time.time_ns()
        loader, frozen = session.loaders["train"], session.parts.frozen
        for _ in training_steps(session.engine, prepared.task, loader, frozen, session.schedule):
            pass
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() > began:
                most = max(most, held)
    if rank == 0:
        (home / "held").write_text(str(most), encoding="utf-8")


def others(trained: int, total: int, workers: int, stage: int) -> tuple[float, float]:
    """Bytes as Accelerate and DeepSpeed estimate them."""
    import contextlib
    import io

    from deepspeed.runtime.zero import stage3, stage_1_and_2

    with contextlib.redirect_stdout(io.StringIO()):
        if stage == 3:
            _, per_gpu, _ = stage3.estimate_zero3_model_states_mem_needs(total, 0, workers, 1, False, False, False, 1.0)
        else:
            _, per_gpu = stage_1_and_2.estimate_zero2_model_states_mem_needs(total, workers, 1, False, 1.0)
    return 4.0 * 4 * total, float(per_gpu)


def compare_memory(folder: Path, chosen: list[Case]) -> list[dict[str, Any]]:
    """Plans, and what the first worker held."""
    rows = []
    print(f"{'case':28}{'planned':>10}{'held':>10}{'error':>8}{'Accelerate':>12}{'DeepSpeed':>11}   (MB)")
    for each in chosen:
        recipe = write_recipe(folder, each)
        scale = each.sections.get("scale", {})
        planned, held = ask("plan", recipe), train(recipe, scale.get("workers", 1))
        parts = planned["chosen"]["memory"]["parts"]
        predicted = sum(size for name, size in parts.items() if name != "process")
        accelerate, deepspeed = others(
            planned["trained"], planned["total"], scale.get("workers", 1), scale.get("zero_stage", 0)
        )
        error = predicted / held - 1
        rows.append(
            {
                "case": each.name,
                "planned": predicted,
                "held": held,
                "error": error,
                "parts": parts,
                "accelerate": accelerate,
                "deepspeed": deepspeed,
            }
        )
        sizes = f"{predicted / 1e6:10,.0f}{held / 1e6:10,.0f}{error:+8.1%}"
        print(f"{each.name:28}{sizes}{accelerate / 1e6:12,.0f}{deepspeed / 1e6:11,.0f}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose names begin so")
    parser.add_argument("--times", action="store_true", help="compare times, not memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        recipe, home, rank, workers = options.worker
        work(Path(recipe), Path(home), int(rank), int(workers))
        return 0
    chosen = [each for each in CASES if not options.only or each.name.startswith(tuple(options.only))]
    with tempfile.TemporaryDirectory() as home:
        build(Path(home))
        if options.times:
            rows = compare_times(Path(home), [each for each in chosen if each.name in TIMED])
        else:
            rows = compare_memory(Path(home), chosen)
    errors = [abs(row["error"]) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if options.times:
        print(f"largest error {max(errors):.1%} (target {WORST_TIME:.0%})")
        return int(max(errors) > WORST_TIME)
    print(f"largest error {max(errors):.1%} (target {WORST:.0%}), median {median(errors):.1%} (target {MEDIAN:.0%})")
    return int(max(errors) > WORST or median(errors) > MEDIAN)


if __name__ == "__main__":
    sys.exit(main())
