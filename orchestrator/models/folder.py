"""Check a model's folder before anything is loaded: its config, and that its weights are safetensors and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orchestrator.errors import Problem
from orchestrator.recipe.paths import show_path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
MERGE = "fold it into its model with `orchestrator export --merge` and name the result"
# Formats of other tools; all but .gguf can hold code that runs when they are loaded.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


def check_model_folder(folder: Path, where: str) -> list[Problem]:
    """Return every problem that prevents loading a folder as a model. Only the headers of weights are read."""
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        # transformers would load the adapter into it.
        what = f"{show_path(folder)} holds a whole model and an adapter ({ADAPTER_CONFIG_FILE})"
        return [Problem(what, where, "keep each in a folder of its own")]
    found = [Problem(what, where, remedy) for what, remedy in _check_config(folder / CONFIG_FILE)]
    return found + [Problem(what, where, remedy) for what, remedy in _check_weights(folder)]


def check_adapter_folder(folder: Path, where: str) -> list[Problem]:
    """Return every problem that prevents adding a folder's adapter to its model's weights as a plain LoRA."""
    config, findings = _read_json_object(folder / ADAPTER_CONFIG_FILE)
    if not (folder / ADAPTER_FILE).is_file():
        findings.append((f"{show_path(folder)} has no {ADAPTER_FILE}", "name the folder that an adapter was saved to"))
    else:
        findings += _check_file(folder / ADAPTER_FILE, frozenset())
    if config is not None and not findings:
        with safe_open(folder / ADAPTER_FILE, framework="numpy") as weights:
            others = [name for name in weights.keys() if not name.endswith((".lora_A.weight", ".lora_B.weight"))]  # noqa: SIM118
        if config.get("peft_type") != "LORA" or others:
            part = f"holds {others[0]}" if others else f"is of the type {config.get('peft_type')}"
            findings.append(
                (
                    f"the adapter in {show_path(folder)} {part}, so it is not a plain LoRA, which could be continued",
                    MERGE,
                )
            )
        if not isinstance(config.get("base_model_name_or_path"), str):
            findings.append(
                (f"{show_path(folder / ADAPTER_CONFIG_FILE)} names no base model", "write `base_model_name_or_path`")
            )
    return [Problem(what, where, remedy) for what, remedy in findings]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checked folder, sorted by name."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in sorted(set(weight_map.values()))]


Finding = tuple[str, str]  # what is wrong, and the remedy


def _check_config(path: Path) -> Iterator[Finding]:
    config, findings = _read_json_object(path)
    yield from findings
    if config is not None and not isinstance(config.get("model_type"), str):
        yield (
            f"{show_path(path)} has no `model_type`, so the architecture is not known",
            "save the model with `save_pretrained` of transformers, or copy config.json from its Hub page",
        )


def _check_weights(folder: Path) -> Iterator[Finding]:
    if (folder / WEIGHTS_FILE).is_file():
        yield from _check_file(folder / WEIGHTS_FILE, frozenset())
    elif (folder / INDEX_FILE).is_file():
        yield from _check_shards(folder)
    else:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS)
        if others:
            yield (
                f"{show_path(folder)} has weights only as {', '.join(others)}, not as safetensors",
                "convert them where you trust their origin: load the model with transformers and call "
                "`model.save_pretrained(FOLDER)`, then name FOLDER here",
            )
        else:
            yield f"{show_path(folder)} has no {WEIGHTS_FILE}", "name the folder that the weights lie in"


def _check_shards(folder: Path) -> Iterator[Finding]:
    index, findings = _read_json_object(folder / INDEX_FILE)
    yield from findings
    if index is None:
        return
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        yield f"{show_path(folder / INDEX_FILE)} has no `weight_map`", "download the model's files again"
        return
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            yield f"{INDEX_FILE} names {shard!r}, which is outside the model's folder", "use a model that you trust"
        elif not (folder / shard).is_file():
            yield f"{show_path(folder / shard)} is missing, but {INDEX_FILE} names it", "download that file too"
        else:
            yield from _check_file(folder / shard, frozenset(name for name in weight_map if weight_map[name] == shard))


def _check_file(path: Path, expected: frozenset[str]) -> Iterator[Finding]:
    """Open the file, which reads only the header and compares the length that it states with the file's."""
    try:
        with safe_open(path, framework="numpy") as weights:
            names = frozenset(weights.keys())
    except (SafetensorError, OSError) as error:
        yield f"{show_path(path)} is damaged or cut short ({error})", "download or copy the file again"
        return
    if not names:
        yield f"{show_path(path)} holds no weights", "download or copy the file again"
    if missing := sorted(expected - names):
        yield (
            f"{show_path(path)} lacks {len(missing)} weights that {INDEX_FILE} expects in it ({missing[0]}, ...)",
            "download the model's files again, all of one revision",
        )


def _read_json_object(path: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    if not path.is_file():
        return None, [(f"{show_path(path)} does not exist", "name the folder that a model was saved to")]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # Also raised for text that is not UTF-8.
        return None, [(f"{show_path(path)} is not valid JSON ({error})", "download or save the file again")]
    if not isinstance(value, dict):
        return None, [(f"{show_path(path)} is not a JSON object", "download or save the file again")]
    return value, []
