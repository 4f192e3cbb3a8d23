"""One worker's part of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import load_recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.training import session as sessions
from orchestrator.training.assembling import ModelParts
from orchestrator.training.prepare import prepare


class TriedOut(Exception):
    """Raised where the test ends."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_tried_out_on_the_device_of_its_worker(
    precision: str, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def try_out(_: Any, parts: ModelParts, *others: Any) -> None:
        assert {value.device.type for value in parts.module.parameters()} == {"meta"}
        raise TriedOut

    monkeypatch.setattr(sessions, "choose_precision", lambda *_: precision)
    monkeypatch.setattr(sessions, "extract_prefix_at_boundary", try_out)
    prepared = prepare(load_recipe(write_recipe(transfer={"freeze": 1})))
    session = sessions.open_session(prepared, RunDirectory(tmp_path / "run"), 0, torch.device("meta"), None)
    with pytest.raises(TriedOut), session:
        pass
