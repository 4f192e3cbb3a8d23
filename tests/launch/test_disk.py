"""Room on the disk, before a run starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator import load_recipe, train
from orchestrator.cli.main import main
from orchestrator.errors import ClusterError
from orchestrator.launch.disk import bytes_needed, refuse_disk_without_room_for_model

WriteRecipe = Callable[..., Path]


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("transfer", [{"freeze": 0}, {"freeze": 1}, {"freeze": 0, "adapter": {"type": "lora", "r": 4}}])
def test_a_run_takes_no_more_than_was_foreseen(
    transfer: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(transfer=transfer), ["train.steps=6", "train.save_every=1", "train.keep=2"])
    run = train(recipe, tmp_path / "run")
    counts = run.result["parameters"]
    in_files = used(run.directory / "checkpoints") + used(run.directory / "model")
    foreseen = bytes_needed(recipe, counts)
    # Two checkpoints, and a third where the best is another; at most one more while one is written. And small files.
    assert foreseen / 2.5 < in_files < foreseen + 200_000


def test_a_full_disk_is_refused_before_anything_starts(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=100_000))
    assert main(["train", str(write_recipe()), "--output", str(tmp_path / "run")]) == 3
    told = capsys.readouterr().err
    assert "checkpoints and model take" in told
    assert "train.keep (2)" in told
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_disk_that_cannot_even_hold_the_model_is_refused_at_once(
    write_recipe: WriteRecipe, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny_bert / "model.safetensors").stat().st_size
    storage = tmp_path / "not" / "there" / "yet"
    adapter = {"adapter": {"type": "lora"}}
    for free, transfer, is_refused in ((size - 1, {}, True), (size, {}, False), (0, adapter, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(total=10**9, free=free))
        recipe = load_recipe(write_recipe(transfer=transfer))
        if not is_refused:
            refuse_disk_without_room_for_model(storage, recipe)
            continue
        with pytest.raises(ClusterError, match="the model alone takes"):
            refuse_disk_without_room_for_model(storage, recipe)
