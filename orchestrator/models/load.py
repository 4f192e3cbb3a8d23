"""Load config, processor and weights of a source model: safetensors only, the same for the same seed; in fp32, or as
they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from orchestrator.errors import ModelError, Problem
from orchestrator.models.body import find_body
from orchestrator.models.deep_head import DeepHead, with_deep_head
from orchestrator.models.folder import weight_files
from orchestrator.models.head import find_output_layer, head_modules
from orchestrator.models.hub import LOADING_ERRORS, explain
from orchestrator.models.low_rank import add_lora_deltas, read_lora_deltas
from orchestrator.models.quantize import keep_quantized_weights, layers_outside_body, quantization, quantized_layers
from orchestrator.models.source import SourceModel

TOKENIZER_FILE = "tokenizer.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model, and the names of parameters that the source did not have."""

    model: Any
    new_parameters: frozenset[str]
    """Names (as in `named_parameters`) of newly initialised parameters; empty for a model from scratch."""


def load_config(source: SourceModel, **changes: Any) -> Any:
    """Load the source's config and change some of its values (label names, problem type).

    Raises:
        ModelError: it cannot be read, or its architecture is not known.
    """
    with _plain_errors(source):
        values, _ = transformers.PreTrainedConfig.get_config_dict(source.location, **_files(source))
        needs_code = "AutoConfig" in (values.get("auto_map") or {}) and values.get("model_type") not in CONFIG_MAPPING
        if needs_code and not source.trust_remote_code:
            what = f"{source.name!r} needs code of its own, which is not run unless the recipe says so"
            remedy = "read that code; then set source.trust_remote_code to true and source.revision to its commit hash"
            raise ModelError(Problem(what, source.where, remedy))
        return transformers.AutoConfig.from_pretrained(source.location, **_hub_arguments(source), **changes)


def load_tokenizer(source: SourceModel) -> tuple[Any, list[Problem]]:
    """Load the source's tokenizer, padding on the right; also return notes on what was set for it (not fatal).

    Where there is no padding token, the end-of-text token takes its place, or the unknown one; none is added, because
    the model has no embedding for it. Padding is masked, so the model does not read it.

    Raises:
        ModelError: it cannot be loaded, or has no token to pad with.
    """
    if source.adapter is not None and (Path(source.adapter) / TOKENIZER_FILE).is_file():
        source = replace(source, location=source.adapter, is_local=True, revision=None)
    with _plain_errors(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **_hub_arguments(source))
    # Without their files some tokenizers are built empty, and know no word.
    names = tokenizer.vocab_files_names.values()
    if names and not any(_has_file(source, name) for name in (TOKENIZER_FILE, *names)):
        remedy = f"copy {TOKENIZER_FILE} from where the model is from"
        raise ModelError(Problem(f"{source.name!r} has no tokenizer ({', '.join(names)})", source.where, remedy))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is not None:
        return tokenizer, []
    token = tokenizer.eos_token or tokenizer.unk_token
    if token is None:
        remedy = "set `pad_token` in the model's tokenizer_config.json"
        raise ModelError(Problem(f"the tokenizer of {source.name!r} has no token to pad with", source.where, remedy))
    tokenizer.pad_token = token
    note = f"the tokenizer of {source.name!r} has no padding token; {token!r} is used (it is masked)"
    return tokenizer, [Problem(note, source.where, fatal=False)]


def load_image_processor(source: SourceModel) -> Any:
    """The source's image processor, computing with Pillow and NumPy: where torchvision is installed too, it must not
    decide what the numbers are.

    Raises:
        ModelError: it cannot be loaded, or there is none.
    """
    with _plain_errors(source):
        if source.is_local and not any(_has_file(source, name) for name in PROCESSOR_FILES):
            remedy = f"copy {PROCESSOR_FILES[0]} from where the model is from"
            what = f"{source.name!r} has no image processor ({PROCESSOR_FILES[0]})"
            raise ModelError(Problem(what, source.where, remedy))
        return transformers.AutoImageProcessor.from_pretrained(source.location, backend="pil", **_hub_arguments(source))


def load_model(
    source: SourceModel,
    auto_class: str,
    config: Any,
    from_scratch: bool,
    seed: int,
    quantize: str | None = None,
    as_stored: bool = False,
    draws_output: bool = False,
) -> LoadedModel:
    """Load the source's weights under the head of a transformers auto class, in fp32 and in evaluation mode.

    What the source lacks, or has in another shape (a head for other labels), is drawn under `seed`; the caller's random
    streams stay as they are. The output layer of a source that was trained for other labels is drawn anew too, even
    where its shape would fit.

    An adapter that the source names is added to the weights.

    Args:
        config: from `load_config`.
        from_scratch: draw all weights instead of loading any.
        quantize: `nf4` for linear weights in 4 bits, all but those of the head and of the output layer.
        as_stored: leave weights in bf16 that are stored so, where no adapter is added to them: half the memory, for
            those who widen what they train.
        draws_output: draw the output layer anew also for the source's own labels.

    Raises:
        ModelError: the weights cannot be loaded, or do not belong to the model's body; an adapter cannot be added.
    """
    loader = _find_loader(auto_class, config, source)
    with _plain_errors(source), seeded(seed):
        if from_scratch:
            return LoadedModel(_build(loader, config, source).eval(), frozenset())
        # An adapter is added in fp32, so that weights that are trained afterwards keep their digits.
        is_narrow = as_stored and source.adapter is None and is_stored_in_bf16(source, config)
        dtype = torch.bfloat16 if is_narrow else torch.float32
        model, report = _load_weights(loader, config, source, quantize, dtype)
        _widen_buffers(model, loader, config, source)
        keep_quantized_weights(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        new = (set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}) & set(names.values())
        _check_body(model, source, report["mismatched_keys"], new)
        if draws_output or load_config(source).id2label != config.id2label:
            new |= {names[parameter] for parameter in _draw_output_layer(model)}
    if source.adapter is not None:
        add_lora_deltas(model, read_lora_deltas(Path(source.adapter)), source.where)
    return LoadedModel(model, frozenset(new))


def set_padding_token(model: Any, tokenizer: Any, source: SourceModel) -> None:
    """Set the padding token of a model, which models that classify at the last token need.

    Raises:
        ModelError: the tokenizer has tokens that the model has no embedding for.
    """
    num_embedded = _count_embedded(model)
    if num_embedded is not None and len(tokenizer) > num_embedded:
        what = f"the tokenizer of {source.name!r} has {len(tokenizer)} tokens, its model embeds {num_embedded}"
        raise ModelError(Problem(what, source.where, "use the tokenizer that the model was trained with"))
    # Not before the model is built: an embedding does not learn its padding token, but an end-of-text token that is
    # used for padding has to be learned.
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def _count_embedded(model: Any) -> int | None:
    """Return the number of tokens that a model has embeddings for; None if there is no limit (CANINE hashes)."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        weight = None
    size: int | None = getattr(model.config.get_text_config(), "vocab_size", None) if weight is None else len(weight)
    return size


def add_embeddings(model: Any, tokenizer: Any) -> None:
    """Add embeddings of tokens that the model lacks, as the mean of all others (Hewitt 2021); also output weights."""
    num_known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= num_known:
        return
    with seeded(0):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None:
            with torch.no_grad():
                part.weight[num_known:] = part.weight[:num_known].mean(0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make random draws inside depend on `seed`; draws afterwards continue as if none had been made."""
    # If CUDA is not initialised, seeding it would take effect later, and replace a seed of the caller.
    is_started: Callable[[], bool] = torch.cuda.is_initialized
    devices = [torch.cuda.current_device()] if is_started() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def _build(loader: Any, config: Any, source: SourceModel) -> Any:
    with _building(source):
        if issubclass(loader, transformers.PreTrainedModel):
            return loader._from_config(config, dtype=torch.float32)
        return loader.from_config(config, dtype=torch.float32, trust_remote_code=source.trust_remote_code)


@contextmanager
def _building(source: SourceModel) -> Iterator[None]:
    """Turn errors of a model's own code, while only that code runs, into messages for users."""
    try:
        yield
    except (ImportError, AttributeError, KeyError, TypeError, AssertionError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, ImportError):
            what, remedy = f"the code of {source.name!r} needs a package: {said}", "install it, or use another model"
        else:
            what = f"transformers cannot build {source.name!r} from its config: {type(error).__name__}: {said}"
            remedy = "use another source model"
        raise ModelError(Problem(what, source.where, remedy)) from error


def is_stored_in_bf16(source: SourceModel, config: Any) -> bool:
    """Whether a source's weights are all in bf16, by its config and, if they are local, by their files."""
    if config.get_text_config().dtype != torch.bfloat16:
        return False
    if not source.is_local:
        return True
    formats: set[str] = set()
    for path in weight_files(Path(source.location)):
        with safe_open(path, framework="numpy") as weights:
            formats |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return formats == {"BF16"}


def _load_weights(
    loader: Any, config: Any, source: SourceModel, quantize: str | None, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Return the model, and the loading report of transformers."""

    def load(**arguments: Any) -> tuple[Any, dict[str, Any]]:
        with _building(source):
            found: tuple[Any, dict[str, Any]] = loader.from_pretrained(
                source.location,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                # The caller checks the shapes, of head and body separately.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                adapter_kwargs={"local_files_only": source.is_offline},
                **arguments,
                **_hub_arguments(source),
            )
        return found

    if quantize is None:
        return load()
    with torch.device("meta"):
        whole = layers_outside_body(_build(loader, config, source))
    model, report = load(**quantization(quantize, whole))
    new = [
        name for name, layer in quantized_layers(model).items() if getattr(layer.weight, "quant_state", None) is None
    ]
    # Weights that the source does not have are drawn, and not quantized afterwards.
    return load(**quantization(quantize, [*whole, *new])) if new else (model, report)


def _widen_buffers(model: nn.Module, loader: Any, config: Any, source: SourceModel) -> None:
    """Convert buffers to fp32. Those that are not stored, such as scales, are computed again: bf16 rounded them."""
    narrow = {name for name, value in model.named_buffers() if value.dtype == torch.bfloat16}
    if not narrow:
        return
    stored = model.state_dict().keys()
    with init_empty_weights(include_buffers=False):
        wide = dict(_build(loader, config, source).named_buffers())
    for name in narrow:
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        buffers[leaf] = model.get_buffer(name).float() if name in stored else wide[name]


def _find_loader(auto_class: str, config: Any, source: SourceModel) -> Any:
    """Return the auto class; or, for a model saved with extra head layers, its class with such a head."""
    loader = getattr(transformers, auto_class)
    if type(config) not in loader._model_mapping:
        if auto_class in (getattr(config, "auto_map", None) or {}) and source.trust_remote_code:
            return loader
        what = f"{source.name!r} is of the type {config.model_type!r}, for which transformers has no {auto_class}"
        raise ModelError(Problem(what, source.where, "use a source model of another type"))
    found = loader._model_mapping[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    # Of a multimodal model the text model is loaded, and saved with its own config.
    own: Any = type(config).sub_configs.get("text_config")
    is_part = own is not None and getattr(model_class, "config_class", None) is own
    if is_part and own not in loader._model_mapping:
        what = f"the part of {source.name!r} that reads texts would be saved as the type {own.model_type!r}, "
        what += f"for which transformers has no {auto_class}, so it could not be loaded again"
        raise ModelError(Problem(what, source.where, "use a source model of another type"))
    return loader if getattr(config, "deep_head", None) is None else with_deep_head(model_class)


def _check_body(model: Any, source: SourceModel, mismatched: Any, new: set[str]) -> None:
    """Check that the body comes from the source; only a head may be missing, or have another shape."""
    head = {parameter for _, module in head_modules(model) for parameter in module.parameters()}
    inside = set(find_body(model).parameters()) - head
    body = {name for name, parameter in model.named_parameters() if parameter in inside}
    remedy = "check that config.json and the weights belong together"
    if wrong := sorted(entry for entry in mismatched if entry[0] in body):
        name, stored, expected = wrong[0]
        shapes = f"{tuple(stored)} in the weights, but {tuple(expected)} by config.json"
        raise ModelError(Problem(f"{name} of {source.name!r} is {shapes}", source.where, remedy))
    if body <= new:
        what = f"the weights of {source.name!r} hold nothing that a {type(model).__name__} can use"
        raise ModelError(Problem(what, source.where, remedy))


def _draw_output_layer(model: Any) -> list[nn.Parameter]:
    found = find_output_layer(model)[1]
    output = found.output_layer if isinstance(found, DeepHead) else found
    # transformers does not initialise parameters with this mark.
    for part in (output, *output.parameters()):
        vars(part).pop("_is_hf_initialized", None)
    with torch.no_grad():
        model._init_weights(output)
    return list(output.parameters())


def _has_file(source: SourceModel, name: str) -> bool:
    if source.is_local:
        return (Path(source.location) / name).is_file()
    return isinstance(try_to_load_from_cache(source.location, name, revision=source.revision), str)


def _hub_arguments(source: SourceModel) -> dict[str, Any]:
    # An explicit False: otherwise transformers would ask on the terminal.
    return {**_files(source), "trust_remote_code": source.trust_remote_code}


def _files(source: SourceModel) -> dict[str, Any]:
    return {"revision": source.revision, "local_files_only": source.is_offline}


@contextmanager
def _plain_errors(source: SourceModel) -> Iterator[None]:
    """Turn errors of transformers into messages for users, and hide its warnings and progress bars."""
    with quiet_transformers():
        try:
            yield
        except LOADING_ERRORS as error:
            raise ModelError(explain(error, source.name, source.revision, source.where)) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide warnings and progress bars of transformers."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
