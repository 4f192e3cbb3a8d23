"""Stored features of the frozen blocks: the same losses as without, computed once, and off where they cannot be."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator import load_recipe, train
from orchestrator.models import PrefixUnavailable
from orchestrator.training.features.prefix_cache import PrefixCache

SHARED = ["train.epochs=2", "train.log_every=1", "train.evaluate_every=6", "train.learning_rate=1e-3"]
NUM_EXAMPLES = {"train": 60, "select": 30, "test": 30}


@dataclass(frozen=True)
class Case:
    """A model, how much of it is frozen, and what the names of frozen tensors begin with."""

    model: str
    freeze: str
    frozen: tuple[str, ...]
    overrides: list[str] = field(default_factory=list)


CASES = {
    "bert": Case("bert", "1", ("bert.embeddings.", "bert.encoder.layer.0.")),
    "bert-stem": Case("bert", "stem", ("bert.embeddings.",)),
    # The source has no pooler, so that it is new: trained with the head, though it is in the body.
    "bert-all": Case("bert", "all", ("bert.embeddings.", "bert.encoder.")),
    "bert-lora": Case("bert", "1", (), ["transfer.adapter={type: lora, r: 4}"]),
    "bert-zero": Case("bert", "1", ("bert.embeddings.", "bert.encoder.layer.0."), ["scale.zero_stage=2"]),
    "gpt2": Case("gpt2", "1", ("transformer.wte.", "transformer.wpe.", "transformer.h.0.")),
    "gpt2-all": Case("gpt2", "all", ("transformer.",)),
    "llama": Case("llama", "2", ("model.embed_tokens.", "model.layers.")),
    "vit": Case("vit", "2", ("vit.embeddings.", "vit.layers.0.", "vit.layers.1.")),
    "mobilenet": Case("mobilenet", "8", ("mobilenet_v2.conv_stem.", *(f"mobilenet_v2.layer.{n}." for n in range(8)))),
    "mobilenet-all": Case("mobilenet", "all", ("mobilenet_v2.",)),
}


@pytest.fixture(scope="module")
def tiny_llama(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 2 layers, 32 wide, random weights, and GPT-2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    shutil.copytree(tiny_gpt2, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = json.loads((tiny_gpt2 / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=64,
        attention_dropout=0.1,
        bos_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Runs:
    """Trainings of this file's cases, each in a directory of its own; they share a cache."""

    root: Path
    models: dict[str, Path]
    data: dict[str, Path]
    write: Callable[..., Path]

    cache: Path

    def train(self, name: str, case: Case, *overrides: str) -> Path:
        directory = self.root / name
        if not (directory / "result.json").exists():
            pictures = case.model in ("vit", "mobilenet")
            target = {"task": "image-classification", "options": {}} if pictures else {}
            data = self.data["pictures" if pictures else "texts"]
            recipe = self.write(self.root / f"{name}.yaml", self.models[case.model], data, target=target)
            given = [*SHARED, f"transfer.freeze={case.freeze}", *case.overrides, *overrides]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ORCHESTRATOR_CACHE", str(self.cache))
                train(load_recipe(recipe, given), directory)
        return directory

    @property
    def entries(self) -> set[str]:
        """Names of what is stored."""
        folder = self.cache / "features"
        return {path.name for path in folder.iterdir() if path.is_dir()} if folder.exists() else set()


@pytest.fixture(scope="module")
def models(tiny_bert: Path, tiny_gpt2: Path, tiny_llama: Path, tiny_vit: Path, tiny_mobilenet: Path) -> dict[str, Path]:
    return {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama, "vit": tiny_vit, "mobilenet": tiny_mobilenet}


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory,
    models: dict[str, Path],
    small_data: Path,
    small_pictures: Path,
    write_toy: Callable[..., Path],
) -> Runs:
    """For trainings with and without the cache, each done once for all tests."""
    root = tmp_path_factory.mktemp("pairs")
    return Runs(root, models, {"texts": small_data, "pictures": small_pictures}, write_toy, root / "cache")


@pytest.fixture
def runs(pairs: Runs, tmp_path: Path) -> Runs:
    """The same with a cache of the test's own."""
    return replace(pairs, root=tmp_path, cache=tmp_path / "cache")


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl, without their times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def notes_of(directory: Path) -> list[str]:
    """Return the run's notes about stored features."""
    notes = json.loads((directory / "run.json").read_text()).get("notes", [])
    return [note for note in notes if not note.startswith("tuned batch norms")]


def check_same_course(found: Path, expected: Path, tolerance: float = 1e-6) -> None:
    rows, expected_rows = rows_of(found), rows_of(expected)
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row["step"] == expected_row["step"]
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=tolerance)
        assert row.get("accuracy") == expected_row.get("accuracy")


@pytest.mark.parametrize("name", CASES)
def test_cached_and_uncached_training_have_the_same_loss_at_every_step(name: str, pairs: Runs) -> None:
    pairs.cache = pairs.root / f"cache-of-{name}"
    cached = pairs.train(f"{name}-cached", CASES[name], "train.cache_prefix=true")
    assert len(pairs.entries) == 2  # of train and of select
    assert not notes_of(cached)
    uncached = pairs.train(f"{name}-uncached", CASES[name], "train.cache_prefix=false")
    assert len(pairs.entries) == 2
    steps_of = [row["step"] for row in rows_of(cached) if row["split"] == "train"]
    assert len(steps_of) >= 12
    check_same_course(cached, uncached)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].frozen])
def test_frozen_blocks_are_bit_identical_afterwards_and_the_others_are_not(name: str, pairs: Runs) -> None:
    directory = pairs.train(f"{name}-cached", CASES[name], "train.cache_prefix=true")
    before = load_file(pairs.models[CASES[name].model] / "model.safetensors")
    after = load_file(directory / "model" / "model.safetensors")
    kept = {key: value for key, value in before.items() if key in after}
    frozen = [key for key in kept if key.startswith(CASES[name].frozen)]
    assert len(frozen) >= 3
    assert [key for key in frozen if not torch.equal(after[key], kept[key])] == []
    trained = [key for key in after if key not in frozen]
    assert any(key not in kept or not torch.equal(after[key], kept[key]) for key in trained)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_two_workers_have_the_same_losses_with_and_without_the_cache(
    engine: str, runs: Runs, own_cache: Path, ray_cluster: None
) -> None:
    options = ["scale.workers=2", "train.micro_batch_size=2", f"scale.engine={engine}"]
    # Texts cut at other lengths than elsewhere: Ray's processes share the cache of all tests.
    case = Case("bert", "1", (), [*options, f"target.options.max_length={len(engine)}"])
    runs.cache = own_cache
    before = runs.entries
    cached = runs.train("cached", case, "train.cache_prefix=true")
    assert len(runs.entries - before) == 2
    assert notes_of(cached) == []
    check_same_course(cached, runs.train("uncached", case, "train.cache_prefix=false"))


def test_bf16_has_the_same_losses_but_for_rounding(runs: Runs) -> None:
    case = Case("bert", "1", (), ["train.precision=bf16"])
    cached = runs.train("cached", case, "train.cache_prefix=true")
    assert len(runs.entries) == 2
    check_same_course(cached, runs.train("uncached", case, "train.cache_prefix=false"), tolerance=1e-2)


def test_a_run_that_goes_on_reads_what_it_had_stored(runs: Runs) -> None:
    case = Case("bert", "1", (), ["train.save_every=4", "train.keep=5"])
    whole = runs.train("whole", case)
    torn = runs.train("torn", case)
    (torn / "result.json").unlink()
    for step in (12, 16):
        shutil.rmtree(torn / "checkpoints" / f"step-{step:08d}")
    runs.train("torn", case)
    assert len(runs.entries) == 2
    assert rows_of(torn) == rows_of(whole)


class Counter:
    """Counts the examples that pass through the embeddings of BERT, whose output is what is stored first."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from transformers.models.bert.modeling_bert import BertEmbeddings

        self.count = 0
        original = BertEmbeddings.forward

        def forward(module: Any, input_ids: Any = None, *arguments: Any, **options: Any) -> Any:
            self.count += len(input_ids)
            return original(module, input_ids, *arguments, **options)

        patch.setattr(BertEmbeddings, "forward", forward)

    def take(self) -> int:
        """The count so far; it starts at 0 again."""
        count, self.count = self.count, 0
        return count


FEW = 40  # Examples on which the split is tried out, at most.


@pytest.fixture
def counter() -> Iterator[Counter]:
    with pytest.MonkeyPatch.context() as patch:
        yield Counter(patch)


def test_what_is_stored_is_computed_once_for_epochs_and_for_later_runs(runs: Runs, counter: Counter) -> None:
    case = CASES["bert"]
    runs.train("uncached", case, "train.cache_prefix=false")
    assert counter.take() >= 2 * 60 + 4 * 30
    first = runs.train("first", case)
    assert 60 + 30 + 30 <= counter.take() <= 60 + 30 + 30 + FEW
    stored = runs.entries
    # Neither the seed of a training nor its rates change what frozen blocks make of an example.
    second = runs.train("second", case, "train.seed=5", "train.learning_rate=2e-3")
    assert 30 <= counter.take() <= 30 + FEW
    assert runs.entries == stored
    assert rows_of(first) != rows_of(second)


def test_a_deeper_boundary_goes_on_from_a_shallower_one(runs: Runs, counter: Counter) -> None:
    runs.train("shallow", CASES["bert"])
    stored = runs.entries
    counter.take()
    deep = runs.train("deep", CASES["bert-all"])
    assert 30 <= counter.take() <= 30 + FEW
    assert len(runs.entries) == 4
    assert stored < runs.entries
    check_same_course(deep, runs.train("uncached", CASES["bert-all"], "train.cache_prefix=false"))


def test_each_kind_of_examples_boundary_and_source_has_entries_of_its_own(
    runs: Runs, tiny_bert: Path, small_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other-weights"
    shutil.copytree(tiny_bert, other)
    weights = load_file(other / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(small_data / "train.jsonl", alone)
    runs.models = {**runs.models, "other": other}
    short = ["train.steps=9", "train.epochs=null", "train.cache_prefix=true"]
    case = CASES["bert"]
    runs.train("first", case, *short)
    assert len(runs.entries) == 2
    runs.train("shorter-texts", case, *short, "target.options.max_length=6")
    assert len(runs.entries) == 4
    runs.train("other-source", Case("other", "1", ()), *short)
    assert len(runs.entries) == 6
    runs.train("deeper", Case("bert", "2", ()), *short)
    assert len(runs.entries) == 8
    runs.train("fewer", case, *short, "target.limit.train=30")
    assert len(runs.entries) == 9  # select is the same
    runs.train("cut", case, *short, f"target.data={alone}", "target.split.seed=0")
    assert len(runs.entries) == 11
    runs.train("cut-otherwise", case, *short, f"target.data={alone}", "target.split.seed=1")
    assert len(runs.entries) == 13
    runs.train("first-again", case, *short)
    assert len(runs.entries) == 13


@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        (Case("bert", "0", ()), ["train.cache_prefix=true"]),
        (Case("bert", "1", ()), ["train.cache_prefix=false"]),
        # Where nothing is saved: a single pass over the data, and a stem that is no work.
        (Case("bert", "1", ()), ["train.epochs=1"]),
        (Case("bert", "stem", ()), []),
    ],
    ids=["nothing frozen", "not wanted", "one epoch", "embeddings"],
)
def test_nothing_is_stored_and_nothing_said_where_nothing_would_be_saved(
    case: Case, overrides: list[str], runs: Runs
) -> None:
    directory = runs.train("run", case, *overrides)
    assert runs.entries == set()
    assert notes_of(directory) == []


@pytest.mark.parametrize(
    ("case", "overrides", "reason"),
    [
        (CASES["vit"], ["target.options.augment=flip-crop"], "training examples are changed at random"),
        (CASES["bert"], ["scale.zero_stage=3"], "ZeRO-3 spreads its weights over the workers"),
        (CASES["bert"], ["scale.cache_gigabytes=0.00001"], "it needs "),
    ],
    ids=["augmentation", "zero-3", "budget"],
)
def test_where_it_cannot_hold_it_is_off_and_a_note_says_why(
    case: Case, overrides: list[str], reason: str, runs: Runs
) -> None:
    directory = runs.train("run", case, "train.cache_prefix=true", *overrides)
    (note,) = notes_of(directory)
    assert note.startswith(f"the frozen blocks are computed in every epoch: {reason}")
    assert runs.entries == set()


def test_a_model_that_cannot_be_split_trains_uncached_and_says_why(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = runs.train("uncached", CASES["bert"], "train.cache_prefix=false")
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.models.extract_prefix", lambda *_: PrefixUnavailable("its layers are odd"))
        directory = runs.train("run", CASES["bert"])
    assert notes_of(directory) == ["the frozen blocks are computed in every epoch: its layers are odd"]
    check_same_course(directory, expected)


def test_a_model_that_fails_while_features_are_stored_trains_uncached_and_says_why(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runs.train("uncached", CASES["bert"], "train.cache_prefix=false")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("this layer is odd")

    def forward(self: PrefixCache, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.prefix.model), "forward", fail)
            return original(self, *arguments)

    original = PrefixCache._forward
    with monkeypatch.context() as patch:
        # Where the split is tried out, the model works.
        patch.setattr(PrefixCache, "_forward", forward)
        directory = runs.train("run", CASES["bert"])
    (note,) = notes_of(directory)
    assert "this layer is odd" in note
    assert "Traceback" in (directory / "logs" / "worker-0.log").read_text()
    check_same_course(directory, expected)


def test_what_an_example_gives_beside_others_only_is_not_stored(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert.modeling_bert import BertEmbeddings

    original = BertEmbeddings.forward

    def forward(module: Any, *arguments: Any, **options: Any) -> Any:
        found = original(module, *arguments, **options)
        return found + len(found) * torch.linspace(-1, 1, found.shape[-1]) ** 3

    monkeypatch.setattr(BertEmbeddings, "forward", forward)
    directory = runs.train("run", CASES["bert"])
    (note,) = notes_of(directory)
    assert note.endswith("their output for an example depends on the other examples of its batch")
    assert runs.entries == set()


def test_on_a_full_disk_a_run_trains_uncached_and_says_why(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = runs.train("uncached", CASES["bert"], "train.cache_prefix=false")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        directory = runs.train("run", CASES["bert"])
    assert notes_of(directory) == [
        "the frozen blocks are computed in every epoch: features cannot be stored: No space left on device"
    ]
    check_same_course(directory, expected)
    # When there is room again, the next run stores them.
    runs.train("later", CASES["bert"])
    assert len(runs.entries) == 2
    assert not any(name.endswith(".partial") for name in runs.entries)


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(runs: Runs) -> None:
    (runs.root / "cache").mkdir()
    (runs.root / "cache" / "features").write_text("a file stands where the folder should be")
    directory = runs.train("run", CASES["bert"])
    (note,) = notes_of(directory)
    assert "features cannot be stored: File exists" in note


def test_the_least_used_features_make_room_for_others(runs: Runs) -> None:
    # A boundary's features take about 90 kB: 90 sentences of 8 tokens, 32 wide, in fp32.
    budget = "scale.cache_gigabytes=0.00015"
    runs.train("first", CASES["bert"], budget)
    first = runs.entries
    directory = runs.train("second", CASES["bert-stem"], budget, "train.cache_prefix=true")
    assert notes_of(directory) == []
    assert len(runs.entries - first) == 2
    assert first - runs.entries


def test_the_cache_may_be_turned_off_midway(runs: Runs) -> None:
    case = Case("bert", "1", (), ["train.save_every=4", "train.keep=5"])
    whole = runs.train("whole", case)
    torn = runs.train("torn", case)
    (torn / "result.json").unlink()
    for step in (12, 16):
        shutil.rmtree(torn / "checkpoints" / f"step-{step:08d}")
    runs.train("torn", case, "train.cache_prefix=false")
    check_same_course(torn, whole)
