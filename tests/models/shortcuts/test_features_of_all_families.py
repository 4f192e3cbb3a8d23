"""Stored features give the losses of the whole model, whatever draws at random in it, for every family of models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_families import PICTURES, make_inputs, set_statistics
from tiny_models import build, save_tokenizer

from orchestrator import load_recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.search.batched_heads import BatchedHeads
from orchestrator.training.loop import training_steps
from orchestrator.training.prepare import Prepared, prepare
from orchestrator.training.session import Session, open_session

WriteToy = Callable[..., Path]

# What draws at random in the blocks of each family; many have no dropout module for it.
TEXTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 40},  # Its positions are counted from the one of padding on.
    "distilbert": {},
    "electra": {},
    "deberta": {},
    "albert": {},
    "mpnet": {},
    "modernbert": {},
    "xlm": {},
    "gpt2": {},
    "llama": {"attention_dropout": 0.2},
    "qwen3": {"attention_dropout": 0.2},
    "xlnet": {},
    "longformer": {},
}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
    "beit": {"drop_path_rate": 0.3},
    "swin": {"drop_path_rate": 0.3},
    "mobilenet": {},
    "mobilenet-v1": {},
    "resnet": {},
    "convnext": {"drop_path_rate": 0.3},
}
# Their layers share something, or do not keep examples apart.
NOT_FED = {("albert", "1"), ("xlnet", "1"), ("xlnet", "all"), ("longformer", "1"), ("beit", "1")}
NUM_STEPS = 4
CASES = [
    *((name, freeze, "any order") for name in (*TEXTS, *IMAGES) for freeze in ("1", "all")),
    *((name, freeze, "grouped") for name in ("bert", "gpt2", "llama") for freeze in ("stem", "1", "all")),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 2 to 24 words, in three classes."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for split, size in (("train", 24), ("select", 6)):
        rows = [
            {"text": " ".join(f"w{draw.randrange(30)}" for _ in range(draw.randint(2, 24))), "label": "abc"[number % 3]}
            for number in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, size in (("train", 24), ("select", 6)):
        for number in range(size):
            place = folder / split / "abc"[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that saves a tiny model of a family, once."""
    root = tmp_path_factory.mktemp("sources")

    def save(name: str) -> Path:
        folder = root / name
        if folder.exists():
            return folder
        if name in TEXTS:
            save_tokenizer(folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
            build(name, **TEXTS[name]).save_pretrained(folder)
            return folder
        config_name, values = PICTURES[name]
        config = getattr(transformers, config_name)(**{**values, **IMAGES[name]}, num_labels=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForImageClassification.from_config(config)
        set_statistics(model, make_inputs(name, (1, 1, 1, 1)))
        model.save_pretrained(folder)
        transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def prepare_family(
    tmp_path: Path,
    write_toy: WriteToy,
    texts: Path,
    images: Path,
    source: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Prepared]:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))

    def prepare_it(name: str, *overrides: str) -> Prepared:
        pictures = name in IMAGES
        target = {"task": "image-classification", "options": {}} if pictures else {}
        path = write_toy(tmp_path / "recipe.yaml", source(name), images if pictures else texts, target=target)
        common = ["train.global_batch_size=12", "train.micro_batch_size=6", "train.learning_rate=3e-3"]
        return prepare(load_recipe(path, [*common, *overrides]))

    return prepare_it


def sessions(prepared: Prepared, root: Path) -> Iterator[Session]:
    """With stored features, and without."""
    for is_cached in (True, False):
        train = prepared.recipe.train.model_copy(update={"cache_prefix": is_cached})
        this = replace(prepared, recipe=prepared.recipe.model_copy(update={"train": train}))
        directory = RunDirectory(root / str(is_cached))
        directory.create()
        with open_session(this, directory, 0, torch.device("cpu"), None) as session:
            yield session


def losses_of(session: Session) -> list[float]:
    steps = training_steps(
        session.engine, session.prepared.task, session.loaders["train"], session.parts.frozen, session.schedule
    )
    return [step.loss for step, _ in zip(steps, range(NUM_STEPS), strict=False)]


@pytest.mark.parametrize(("name", "freeze", "order"), CASES)
def test_losses_are_the_same_with_stored_features(
    name: str, freeze: str, order: str, prepare_family: Callable[..., Prepared], tmp_path: Path
) -> None:
    grouped = str(order == "grouped").lower()
    prepared = prepare_family(name, f"transfer.freeze={freeze}", f"train.group_by_length={grouped}")
    found = []
    for session in sessions(prepared, tmp_path):
        is_fed = session.loaders["train"].features is not None
        notes = session.directory.read_record().get("notes", [])
        why = [note for note in notes if not note.startswith("tuned batch norms")]
        found.append((is_fed, losses_of(session), why))
    (is_fed, losses, notes), (is_fed_too, expected, _) = found
    assert not is_fed_too
    assert is_fed == (not notes), notes
    assert losses == pytest.approx(expected, rel=1e-6)
    assert is_fed == ((name, freeze) not in NOT_FED), notes


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet", "gpt2", "llama", "vit", "mobilenet"])
def test_heads_that_are_trained_together_have_them_too(
    name: str, prepare_family: Callable[..., Prepared], tmp_path: Path
) -> None:
    every_step = ["train.epochs=null", f"train.steps={NUM_STEPS}", "train.log_every=1"]
    prepared = prepare_family(name, "transfer.freeze=all", "train.group_by_length=false", *every_step)
    opened = sessions(prepared, tmp_path)  # One after the other: a session that is left holds nothing any more.
    together = BatchedHeads(next(opened), [prepared.recipe, prepared.recipe]).train()
    expected = losses_of(next(opened))
    for head in together:
        losses = [row["loss"] for row in head.rows if row["split"] == "train"]
        assert losses == pytest.approx(expected, rel=1e-6)
