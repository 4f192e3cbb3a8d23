"""The head, which is the modules outside a model's body: its dropout, its extra layers, and the code of these."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn

from orchestrator.errors import ModelError, Problem
from orchestrator.models import deep_head
from orchestrator.models.attempt import CallFailed, calling_model
from orchestrator.models.body import find_body
from orchestrator.models.deep_head import DeepHead, put_deep_head
from orchestrator.models.folder import CONFIG_FILE
from orchestrator.recipe import Head

CODE_FILE = "modeling_deep_head.py"
LOWEST_MARK, MARK_STEP = 0.25, 1e-4  # placeholders for dropout rates, each different from all others


def set_head(model: Any, head: Head, new_parameters: frozenset[str]) -> frozenset[str]:
    """Add extra layers to the head, and set its dropout. New layers use the caller's random stream.

    Dropout goes to every dropout module of the head and to the config's value for it, where it has one; a head without
    any gets it before its output layer, in training only.

    Args:
        new_parameters: names of parameters that the source did not have.

    Returns:
        The same for the model as it is now.

    Raises:
        ModelError: the model has no output layer that extra layers could go before.
    """
    path, output = find_output_layer(model)
    present = output.widths if isinstance(output, DeepHead) else []
    if head.layers != present:
        replacement = _replace_output(model, path, output, head)
        new_parameters = frozenset(name for name in new_parameters if not name.startswith(f"{path}."))
        new_parameters |= {f"{path}.{name}" for name, _ in replacement.named_parameters()}
    _set_dropout(model, head.dropout)
    return new_parameters


def head_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Return names and modules neither inside the body nor around it; if there are none, the output layer."""
    body = find_body(model)
    inside = set(body.modules())
    outside = [
        (name, module)
        for name, module in model.named_modules()
        if module not in inside and body not in set(module.modules())
    ]
    yield from outside or _output_layers_inside(model)


def _output_layers_inside(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Return names and modules with an output for each label, in a model whose body contains its head."""
    deep = getattr(model.config, "deep_head", None)
    paths = _find_sized_by_labels(model) if deep is None else [deep["path"]]
    for path in paths:
        yield from model.get_submodule(path).named_modules(prefix=path)


def _find_sized_by_labels(model: Any) -> list[str]:
    """Return the names of modules whose own weights have another shape if there is one label more."""
    config = copy.deepcopy(model.config)
    shapes = []
    for _ in range(2):
        shapes.append({name: parameter.shape for name, parameter in _outline(model, config).named_parameters()})
        config.num_labels += 1
    differ = (name for name, shape in shapes[0].items() if shapes[1].get(name) != shape)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in differ))


def _outline(model: Any, config: Any) -> Any:
    """Return a model of the same class with another config, without memory for weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(config)


def find_output_layer(model: Any) -> tuple[str, nn.Linear | DeepHead]:
    """Return the head's last layer and its name: the one with an output for each label.

    Raises:
        ModelError: there is none.
    """
    found: tuple[str, nn.Linear | DeepHead] | None = None
    for name, module in head_modules(model):
        if isinstance(module, DeepHead):
            return name, module
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels:
            found = name, module
    if found is None:
        what = f"{type(model).__name__} has no output layer for {model.config.num_labels} labels"
        raise ModelError(Problem(what, remedy="use a source model of another architecture"))
    return found


def _replace_output(model: Any, path: str, output: nn.Linear | DeepHead, head: Head) -> nn.Module:
    if isinstance(output, DeepHead):
        last = output.output_layer
        plain = nn.Linear(output.in_features, output.out_features, bias=last.bias is not None)
        model.set_submodule(path, plain.to(last.weight.device, last.weight.dtype).train(output.training))
        del model.config.deep_head
        # Its value again, which is also saved in config.json.
        model.__class__ = getattr(type(model), "plain_class", type(model))
    if head.layers:
        return put_deep_head(model, path, list(head.layers), head.dropout)
    replacement: nn.Module = model.get_submodule(path)
    return replacement


def _set_dropout(model: Any, rate: float) -> None:
    dropouts = [module for _, module in head_modules(model) if isinstance(module, nn.Dropout)]
    if not dropouts:
        find_output_layer(model)[1].register_forward_pre_hook(partial(_drop_features, rate))
        return
    for name in _find_dropout_settings(model):
        setattr(model.config, name, rate)
    if getattr(model.config, "deep_head", None) is not None:
        model.config.deep_head = {**model.config.deep_head, "dropout": rate}
    for module in dropouts:
        module.p = rate


def _drop_features(rate: float, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    features, *others = inputs
    return (nn.functional.dropout(features, rate, training=module.training), *others)


def _find_dropout_settings(model: Any) -> list[str]:
    """Return the names of config values that set the head's dropout and nothing in the body.

    Every architecture calls it differently. So each rate gets a number of its own, the model is built from them without
    memory for weights, and the numbers are looked for.
    """
    config = copy.deepcopy(model.config)
    settings = config.to_dict().items()
    names = [name for name, value in settings if "drop" in name and (value is None or isinstance(value, float | int))]
    marks = {name: LOWEST_MARK + MARK_STEP * index for index, name in enumerate(names)}
    for name, mark in marks.items():
        with contextlib.suppress(StrictDataclassFieldValidationError):  # It is not a rate, but a flag or a count.
            setattr(config, name, mark)
    try:
        with calling_model("finding the dropout settings"):
            probe = _outline(model, config)
    except CallFailed:
        return []
    head = {module for _, module in head_modules(probe)}
    in_head = {module.p for module in head if isinstance(module, nn.Dropout)}
    body = set(find_body(probe).modules()) - head
    in_body = {value for module in body for value in vars(module).values() if isinstance(value, float)}
    return [name for name, mark in marks.items() if mark in in_head and mark not in in_body]


def write_deep_head_code(model: Any, folder: Path, auto_class: str) -> None:
    """Write the code of a model with extra head layers into the folder it was saved to, and name it in config.json.

    Then `auto_class` of transformers loads the folder with `trust_remote_code=True`, without this package.

    Raises:
        ModelError: the model's own code came from the Hub, so the file could not import it.
    """
    plain = getattr(type(model), "plain_class", type(model))
    if plain.__module__.split(".")[0] != "transformers":
        remedy = "set transfer.head.layers to []"
        raise ModelError(Problem(f"{plain.__name__} is code from the Hub, which takes no extra layers", remedy=remedy))
    name = f"DeepHead{plain.__name__}"
    shutil.copyfile(Path(deep_head.__file__), folder / CODE_FILE)
    with (folder / CODE_FILE).open("a", encoding="utf-8") as file:
        file.write(
            f"\n\nfrom {plain.__module__} import {plain.__name__}\n\n\n"
            f"class {name}(with_deep_head({plain.__name__})):\n"
            f'    """{plain.__name__} with the extra head layers that `config.deep_head` describes."""\n'
        )
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["architectures"] = [name]
    config["auto_map"] = {**config.get("auto_map", {}), auto_class: f"{Path(CODE_FILE).stem}.{name}"}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
