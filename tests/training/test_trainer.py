"""One worker's part of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import load_recipe
from orchestrator.training import trainer
from orchestrator.training.assemble import Parts
from orchestrator.training.prepare import prepare
from orchestrator.training.run_directory import RunDirectory


class TriedOut(Exception):
    """So far the test goes."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_tried_out_on_the_device_of_its_worker(
    precision: str, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def try_out(_: Any, parts: Parts, *others: Any) -> None:
        assert {value.device.type for value in parts.module.parameters()} == {"meta"}
        raise TriedOut

    monkeypatch.setattr(trainer, "choose_precision", lambda *_: precision)
    monkeypatch.setattr(trainer, "split_at_boundary", try_out)
    prepared = prepare(load_recipe(write_recipe(transfer={"freeze": 1})))
    session = trainer.open_session(prepared, RunDirectory(tmp_path / "run"), 0, torch.device("meta"), None)
    with pytest.raises(TriedOut), session:
        pass
