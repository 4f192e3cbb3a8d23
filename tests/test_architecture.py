"""Imports point one way, read from the source: `errors, recipe <- data, models, planning <- tasks, ...`."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

# Each room, and those that it may know besides itself.
FOUNDATION = {"errors", "recipe", "storage"}
MAY_KNOW = {
    "errors": set[str](),
    "storage": {"errors"},
    "recipe": {"errors", "storage"},
    "planning": FOUNDATION,
    "data": FOUNDATION,
    "models": FOUNDATION,
    "tasks": {*FOUNDATION, "data", "models"},
    "transfer": {*FOUNDATION, "data", "models"},
    "training": {*FOUNDATION, "data", "models", "tasks", "transfer", "report", "planning"},
    "search": {*FOUNDATION, "data", "models", "tasks", "transfer", "training", "report"},
    "show": {*FOUNDATION, "doctor", "training", "search", "planning"},
    "doctor": {"training", "__init__"},
    "report": FOUNDATION,
    "jobs": FOUNDATION,
    "job_commands": {*FOUNDATION, "jobs", "training", "show", "__init__"},
    "cli": {
        *FOUNDATION,
        *("data", "models", "tasks", "transfer", "training", "search", "report", "show", "doctor", "__init__"),
        *("job_commands", "jobs", "planning"),
    },
    "__init__": {*FOUNDATION, "training", "search", "jobs", "planning"},
}
KNOWS_RAY = {
    "training/worker.py",
    "training/cluster.py",
    "training/dead_workers.py",
    "training/wish.py",
    "jobs/client.py",
    "jobs/on_cluster.py",
    *(f"search/{name}.py" for name in ("tuning", "searchers", "halving", "ending")),
}
TOO_HEAVY = {
    "recipe": {"torch", "ray", "transformers", "datasets", "deepspeed", "accelerate", "peft"},
    "planning": {"torch", "transformers"},
    "data": {"torch"},
}


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def rooms_known(path: Path) -> set[str]:
    """The rooms of this package that a file imports; names of the package itself count as `__init__`."""
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "orchestrator" and len(parts) > 1:
            found.add(parts[1] if parts[1] in rooms else "__init__")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_room_knows_only_those_below_it(name: str) -> None:
    room = room_of(name)
    assert room in MAY_KNOW, f"{room} is a new room: say here what it may import"
    assert rooms_known(PACKAGE / name) - {room} <= MAY_KNOW[room]


@pytest.mark.parametrize("name", NAMES)
def test_ray_is_known_where_the_design_says_and_nowhere_else(name: str) -> None:
    modules = {module.split(".")[0] for module in imported(PACKAGE / name)}
    assert "ray" not in modules or name in KNOWS_RAY
    assert not modules & TOO_HEAVY.get(room_of(name), set())


def test_the_reading_of_imports_finds_those_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("import os\ndef f():\n    from ray.train import x\n", encoding="utf-8")
    assert set(imported(path)) == {"os", "ray.train", "ray.train.x"}
    assert rooms_known(PACKAGE / "cli.py") >= {"errors", "show", "training", "__init__"}


def test_tasks_and_methods_stand_in_no_list() -> None:
    """Adding one is adding a file: no other file may import it by its name."""
    plugins = {f"orchestrator.tasks.{path.stem}" for path in (PACKAGE / "tasks").glob("*.py")}
    plugins -= {"orchestrator.tasks.base", "orchestrator.tasks.__init__"}
    assert "orchestrator.tasks.text_classification" in plugins
    for path in FILES:
        assert not plugins & set(imported(path)), f"{path} names a task"


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_use_names_that_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "orchestrator":
            home = importlib.import_module(str(node.module))
            for alias in node.names:
                found = getattr(home, alias.name, None)
                assert found is not None, f"{node.module} has no {alias.name}"
                if isinstance(found, ModuleType):
                    modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"
