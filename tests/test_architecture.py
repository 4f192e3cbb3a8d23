"""Imports point one way, read from the source; and what is to be read stays of a size that can be read."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

# Each room may import those before it.
ORDER = (
    *("errors", "formatting", "json_lines", "process", "storage", "distributed"),
    *("recipe", "report", "jobs", "data", "models", "tasks", "transfer"),
    *("runs", "training", "planning", "inference", "launch", "search", "__init__", "cli"),
)
KNOWS_RAY = (
    *("jobs/client.py", "jobs/on_cluster.py", "search/ray/"),
    *(f"launch/{name}.py" for name in ("cluster", "dead_workers", "ray_train", "stop_request", "trainer")),
)
TOO_HEAVY = {
    "recipe": {"torch", "ray", "transformers", "datasets", "deepspeed", "accelerate", "peft"},
    "data": {"torch"},
}
MOST_LINES, MOST_FILES = 400, 25


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


def test_a_room_imports_only_those_before_it() -> None:
    new = {room_of(name) for name in NAMES} - set(ORDER)
    assert not new, "say in ORDER what these rooms may import"
    wrong = {
        (name, room)
        for name in NAMES
        for room in rooms_known(PACKAGE / name) - {room_of(name)}
        if ORDER.index(room) > ORDER.index(room_of(name))
    }
    assert not wrong


def test_ray_is_imported_where_the_design_says_and_nowhere_else() -> None:
    found = {name: {module.split(".")[0] for module in imported(PACKAGE / name)} for name in NAMES}
    assert not [name for name, modules in found.items() if "ray" in modules and not name.startswith(KNOWS_RAY)]
    assert not [name for name, modules in found.items() if modules & TOO_HEAVY.get(room_of(name), set())]


def test_files_and_folders_stay_small_enough_to_be_read() -> None:
    sizes = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in NAMES}
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES}
    folders = Counter(path.parent for path in FILES)
    assert not {str(folder): number for folder, number in folders.items() if number >= MOST_FILES}


def test_the_reading_of_imports_finds_those_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("import os\ndef f():\n    from ray.train import x\n", encoding="utf-8")
    assert set(imported(path)) == {"os", "ray.train", "ray.train.x"}
    assert rooms_known(PACKAGE / "cli/training.py") >= {"cli", "launch", "search"}


def test_tasks_and_methods_stand_in_no_list() -> None:
    """Adding one is adding a file: no other file may import it by its name."""
    plugins = {f"orchestrator.tasks.{path.stem}" for path in (PACKAGE / "tasks").glob("*.py")}
    plugins -= {"orchestrator.tasks.base", "orchestrator.tasks.__init__"}
    assert "orchestrator.tasks.text_classification" in plugins
    for path in FILES:
        assert not plugins & set(imported(path)), f"{path} names a task"


def test_no_room_but_tasks_decides_by_the_name_of_a_task_or_of_the_class_of_its_model() -> None:
    """Whatever another room needs to know of a task, the task declares."""
    tasks = {path.stem.replace("_", "-") for path in (PACKAGE / "tasks").glob("*.py")} - {"base", "--init--"}

    def names(node: ast.AST) -> bool:
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        return text in tasks or text.startswith("AutoModelFor")

    others = [PACKAGE / name for name in NAMES if room_of(name) != "tasks"]
    found = [str(path) for path in others if any(map(names, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))]
    assert not found


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
