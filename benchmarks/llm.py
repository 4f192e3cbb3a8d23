"""How fast, and in how much memory, is a language model tuned, against TRL as its documentation sets it up?

A Llama of 8 layers, 512 wide, with a vocabulary of 32,000 (42 million random weights), on the instructions of
alpaca_en_demo (completions are learned), batches of 8 on one processor thread, in fp32 or, as TRL has it by itself, in
bf16. Every contender runs in a process of its own, which tells target tokens a second over some steps after a warm-up,
and the most memory that it ever held (resident; imports included).

| defaults | TRL's own: padded batches in random order, gradient checkpointing |
| uneven | the same on answers of made-up words, whose lengths differ more: most are short, a few fill the context |
| packed | TRL with `packing=True` |
| memory | TRL's defaults, with a vocabulary of 128,000 on both sides |
| last blocks | the last 2 of 8 layers are trained: ours on stored features of the others, TRL with the others frozen |

    pip install trl
    python benchmarks/llm.py [--only ...] [--precision bf16] [--repeats 3] [--steps 12] [--assets DIR] [--json FILE]

Exits with 1 when a median misses its target.
"""

from __future__ import annotations

import os

# Before torch is imported: one thread, so that contenders differ in what they do and not in how it is spread.
os.environ.update({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from common import Ratio, compare_seconds, compare_speeds, interleave, print_table, read_train_rows, write_json

BATCH_SIZE, MAX_LENGTH, NUM_TRAIN, WARMUP = 8, 1024, 640, 3
NUM_LAYERS, NUM_FROZEN = 8, 6
SMALL, LARGE = 32_000, 128_000


@dataclass(frozen=True)
class Claim:
    """One of our numbers against one of TRL's."""

    name: str
    target: float
    vocabulary: int = SMALL
    freezes: bool = False
    packs: bool = False
    of_memory: bool = False
    is_uneven: bool = False


CLAIMS = [
    Claim("defaults", 2.0),
    Claim("uneven", 2.0, is_uneven=True),
    Claim("packed", 1.0, packs=True),
    Claim("memory", 1 / 0.6, vocabulary=LARGE, of_memory=True),
    Claim("last blocks", 5.0, freezes=True),
]


def build(folder: Path, source: Path, vocabulary: int) -> Path:
    """A model of random weights with the tokenizer of a small one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model = folder / f"model-{vocabulary}"
    if not model.exists():
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.model_max_length = MAX_LENGTH
        tokenizer.save_pretrained(model)
    return model


def read_instructions(assets: Path) -> list[dict[str, str]]:
    lines = (assets / "alpaca_en_demo" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {"prompt": f"{row['instruction']}\n{row['input']}".strip() + "\n", "completion": row["output"]} for row in rows
    ]


def make_uneven() -> list[dict[str, str]]:
    """Answers whose lengths are log-normal, as those of people's questions to a model are."""
    generator = random.Random(0)
    words = ["the", "little", "dog", "saw", "a", "big", "red", "ball", "and", "they", "ran", "to", "play"]
    lengths = [int(generator.lognormvariate(4.0, 1.2)) for _ in range(NUM_TRAIN + 8)]
    return [
        {"prompt": "Tell a story.\n", "completion": " ".join(generator.choices(words, k=max(1, min(700, length))))}
        for length in lengths
    ]


def write_data(folder: Path, pairs: list[dict[str, str]]) -> None:
    for name, part in {"train": pairs[:NUM_TRAIN], "select": pairs[NUM_TRAIN : NUM_TRAIN + 8]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part), encoding="utf-8")


def run_ours(folder: Path, model: Path, freezes: bool, precision: str, num_steps: int) -> float:
    """Target tokens a second."""
    from common import batch_rows, train_quietly

    import orchestrator
    from orchestrator.training.loop import make_schedule
    from orchestrator.training.prepare import prepare

    last = WARMUP + num_steps
    recipe = {
        "name": "speed",
        "source": {"model": str(model)},
        "target": {
            "task": "causal-lm",
            "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "select")},
            "split": {"test": 0},
            "options": {"max_length": MAX_LENGTH, "form": "prompt-completion"},
        },
        "transfer": {"freeze": NUM_FROZEN if freezes else 0},
        "train": {
            "steps": last,
            "global_batch_size": BATCH_SIZE,
            "precision": precision,
            "evaluate_every": last,
            "save_every": last,
            "log_every": WARMUP,
            "cache_prefix": freezes,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = orchestrator.load_recipe(path)
    encoded = prepare(loaded).encoded("train")
    rows = list(batch_rows(make_schedule(loaded.train, encoded.lengths, BATCH_SIZE).order, last))
    with tempfile.TemporaryDirectory(dir=folder) as output:
        train_quietly(loaded, Path(output) / "run")
        seconds = {row["step"]: row["seconds"] for row in read_train_rows(Path(output) / "run")}
    targets = sum(int(encoded.counts["targets"][batch].sum()) for batch in rows[WARMUP:])
    return targets / (seconds[last] - seconds[WARMUP])


def run_trl(folder: Path, model: Path, freezes: bool, packs: bool, precision: str, num_steps: int) -> float:
    """Target tokens a second."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    times: list[float] = []
    targets: list[int] = []

    class Counting(trl.SFTTrainer):  # type: ignore[misc]
        def training_step(self, module: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().training_step(module, inputs, *arguments, **named)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if freezes:
        for part in (loaded.model.embed_tokens, *loaded.model.layers[:NUM_FROZEN]):
            part.requires_grad_(False)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    Counting(
        model=loaded,
        args=trl.SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=WARMUP + num_steps,
            per_device_train_batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            packing=packs,
            bf16=precision == "bf16",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        callbacks=[Watch()],
    ).train()
    return sum(targets[WARMUP:]) / (times[-1] - times[WARMUP - 1])


def run_contender(settings: dict[str, Any]) -> None:
    """In a process of its own: prints speed and memory as JSON."""
    side, packs = settings.pop("side"), settings.pop("packs")
    folder, model = Path(settings.pop("folder")), Path(settings.pop("model"))
    speed = run_ours(folder, model, **settings) if side == "ours" else run_trl(folder, model, packs=packs, **settings)
    print(json.dumps({"speed": speed, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measure(claim: Claim, folder: Path, assets: Path, precision: str, num_steps: int, num_repeats: int) -> Ratio:
    write_data(folder, make_uneven() if claim.is_uneven else read_instructions(assets))
    model = build(folder, assets / "model_llama_stories260k", claim.vocabulary)

    def run(side: str) -> float:
        settings = {
            "side": side,
            "folder": str(folder),
            "model": str(model),
            "freezes": claim.freezes,
            "packs": claim.packs,
            "precision": precision,
            "num_steps": num_steps,
        }
        environment = {**os.environ, "ORCHESTRATOR_CACHE": str(folder / "cache")}
        command = [sys.executable, __file__, "--contender", json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return float(found["bytes"] / 1e9 if claim.of_memory else found["speed"])

    found = interleave({"ours": lambda: run("ours"), "TRL": lambda: run("TRL")}, num_repeats)
    compare = compare_seconds if claim.of_memory else compare_speeds  # Of memory, too, less is better.
    return compare(claim.name, claim.target, found["ours"], found["TRL"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [claim.name for claim in CLAIMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="timed steps; a multiple of 3")
    parser.add_argument("--assets", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "assets")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        run_contender(json.loads(options.contender))
        return 0
    if options.steps % WARMUP or min(options.steps, options.repeats) < 1:
        parser.error(f"--steps takes a multiple of {WARMUP}, --repeats at least 1")
    ratios = []
    with tempfile.TemporaryDirectory(prefix="llm-") as folder:
        for claim in CLAIMS:
            if claim.name in options.only:
                given = (options.assets, options.precision, options.steps, options.repeats)
                ratios.append(measure(claim, Path(folder), *given))
                print(*ratios[-1].cells(), file=sys.stderr, flush=True)
    titles = ("claim", "target", "median ratio", "minimum", "ours (tokens/s, GB)", "TRL", "")
    print_table(titles, (ratio.cells() for ratio in ratios))
    write_json(options.json, [{**asdict(ratio), "median": ratio.median, "ok": ratio.ok} for ratio in ratios])
    return 0 if all(ratio.ok for ratio in ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
