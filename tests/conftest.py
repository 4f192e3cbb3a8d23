"""What many tests share: tiny models with real tokenizers, a toy problem that they learn, recipes, a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

# Before torch is imported: the tests share few cores, and more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every label has words of its own, so that the problem is learnable; the rest of each sentence is the same for all.
CLASS_WORDS = {
    "animal": ("cat", "dog", "horse", "bird", "fish", "cow", "sheep", "goat"),
    "fruit": ("apple", "pear", "plum", "cherry", "lemon", "grape", "peach", "melon"),
    "vehicle": ("car", "truck", "train", "boat", "plane", "bicycle", "tram", "bus"),
}
OPENINGS = ("i saw a", "there is the", "look at this", "she likes her", "we had one", "he found a")
ENDINGS = ("today", "in the garden", "near the old house", "yesterday morning", "again")
SIZES = {"train": 60, "select": 30, "test": 30}

RAY = "ray"
"""The group of tests that start Ray; for those that do not use `ray_cluster`, a marker says so."""


def make_sentences() -> list[tuple[str, str]]:
    """Different (sentence, label) pairs, the labels in turn, openings and endings spread over them."""
    pairs = []
    for number in range(sum(SIZES.values()) // len(CLASS_WORDS)):
        for label, words in CLASS_WORDS.items():
            opening = OPENINGS[number % len(OPENINGS)]
            ending = ENDINGS[number // len(words) % len(ENDINGS)]
            pairs.append((f"{opening} {words[number % len(words)]} {ending}", label))
    return pairs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one worker of pytest-xdist, so that its fixtures are built once; and all tests that
    need the Ray cluster in another, so that there is one cluster and no two tests compete for it.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            uses_ray = "ray_cluster" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group(RAY if uses_ray else item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] != RAY)  # The longest group first.


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests neither read nor fill the cache of whoever runs them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATOR_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train (60), select (30) and test (30) of a toy problem: sentences (`text`), 3 classes (`label`)."""
    folder = tmp_path_factory.mktemp("small-data")
    pairs = iter(make_sentences())
    for split, size in SIZES.items():
        rows = [dict(zip(("text", "label"), next(pairs), strict=True)) for _ in range(size)]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of 2 layers, 32 wide, random weights, and a WordPiece tokenizer of the toy's words."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    letters = [f"{prefix}{letter}" for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words = dict.fromkeys(word for sentence, _ in make_sentences() for word in sentence.split() if len(word) > 1)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words, *".,!?'-"]
    folder = tmp_path_factory.mktemp("tiny-bert")
    BertTokenizerFast({token: index for index, token in enumerate(tokens)}, model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-2 of 2 layers, 32 wide, random weights, and a tokenizer of bytes without a padding token."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    GPT2TokenizerFast(vocabulary, [], model_max_length=64).save_pretrained(folder)
    end = vocabulary["<|endoftext|>"]
    config = GPT2Config(
        vocab_size=len(tokens), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=end, eos_token_id=end
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train (48), select (24) and test (24) of a toy problem: PNGs, in a folder for each of 3 colours."""
    folder = tmp_path_factory.mktemp("small-pictures")
    generator = np.random.default_rng(0)
    for split, size in {"train": 16, "select": 8, "test": 8}.items():
        for colour, name in enumerate(("red", "green", "blue")):
            for number in range(size):
                pixels = generator.integers(0, 160, (24, 20, 3), dtype=np.uint8)
                pixels[..., colour] += 95
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="session")
def tiny_mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a MobileNetV2 a quarter as wide, random weights, 5 labels, and an image processor for 32 x 32."""
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, MobileNetV2ImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny-mobilenet")
    processor = MobileNetV2ImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MobileNetV2ForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vision transformer of 3 layers, 16 wide, random weights, and an image processor for 32 x 32."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny-vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_toy() -> Callable[..., Path]:
    """`write_toy_recipe`, for fixtures of a wider scope than `write_recipe`."""
    return write_toy_recipe


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_bert: Path, small_data: Path) -> Callable[..., Path]:
    """Write a recipe of the toy problem into the test's folder; sections given are put over it, key by key.

    `write_recipe(train={"epochs": 1}, transfer={"freeze": 1})`
    """

    def write(file: str = "recipe.yaml", **sections: Any) -> Path:
        return write_toy_recipe(tmp_path / file, tiny_bert, small_data, **sections)

    return write


@pytest.fixture
def takes_signals() -> Iterator[None]:
    """Signals arrive also where the tests were started in the background, for which shells ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {number: signal.getsignal(number) for number in handlers}
    signal.signal(signal.SIGINT, before)
    assert after == handlers


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of 4 (nominal) cores for all tests that need one."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_V2_ENABLED", "1")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()


def write_toy_recipe(path: Path, model: Path, data: Path, **sections: Any) -> Path:
    """A recipe that learns the toy problem in a second or two; keys of `sections` are put over it."""
    recipe: dict[str, Any] = {
        "name": "toy",
        "source": {"model": str(model)},
        "target": {"task": "text-classification", "data": str(data), "options": {"max_length": 32}},
        "train": {"epochs": 2, "learning_rate": 1.0e-3, "global_batch_size": 8, "precision": "fp32"},
        "scale": {"storage": str(path.parent / "runs")},
    }
    for name, section in sections.items():
        both = isinstance(recipe.get(name), dict) and isinstance(section, dict)
        recipe[name] = {**recipe[name], **section} if both else section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
