"""The task that the guide for new tasks has as its example works as it is printed there."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import orchestrator.tasks
from orchestrator import load_recipe, train
from orchestrator.errors import InputError
from orchestrator.training.prepare import prepare


def module_of(name: str, code: str, patch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType(name)
    patch.setitem(sys.modules, name, module)
    exec(compile(code, name, "exec"), vars(module))
    return module


def test_the_example_of_the_guide_is_a_task_with_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    guide = Path(orchestrator.tasks.__file__).with_name("README.md").read_text(encoding="utf-8")
    task_code, sample_code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    task = module_of("sentence_order_task", task_code, monkeypatch).TASK
    assert not inspect.isabstract(task)
    added = EntryPoint(task.name, "sentence_order_task:TASK", orchestrator.tasks.ENTRY_POINTS)
    monkeypatch.setattr(orchestrator.tasks, "entry_points", lambda **given: EntryPoints([added]).select(**given))
    sample = module_of("sentence_order_sample", sample_code, monkeypatch).make(tmp_path, request.getfixturevalue)
    recipe = {
        "name": "order",
        "source": {"model": str(sample.model)},
        "target": {"task": task.name, "data": str(sample.data), "options": dict(sample.options)},
        "train": {"steps": 2, "global_batch_size": 8, "learning_rate": 1e-3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert train(load_recipe(path), tmp_path / "run").result["metrics"]["test"].keys() >= {"accuracy", "loss"}
    for data, words in sample.bad:
        with pytest.raises(InputError, match=words):
            prepare(load_recipe(path, [f"target.data={data}"]))
