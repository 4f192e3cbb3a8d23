"""Rules between values of a recipe, each of which is valid on its own.

Each rule is a function that yields its findings. What needs the data or the model is checked where those are read;
the section `search` has rules of its own in `search_rules.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from orchestrator.errors import Problem, RecipeError
from orchestrator.recipe.deepspeed_rules import find_deepspeed_mistakes
from orchestrator.recipe.finding import Finding
from orchestrator.recipe.paths import DATA_SUFFIXES, PACKAGE_PREFIX, resolve_path
from orchestrator.recipe.phase_rules import find_phase_mistakes
from orchestrator.recipe.schema import Data, Recipe
from orchestrator.recipe.stream_rules import find_stream_mistakes
from orchestrator.storage import SCHEMES, holds_secrets, is_url

_COMMIT = re.compile(r"[0-9a-f]{40}")
SPLITS = ("train", "select", "test")


def check_rules(recipe: Recipe, unreliable: Sequence[str] = ()) -> list[Problem]:
    """Return the problems between a recipe's values, without those of a path at, above or below `unreliable`."""
    return as_problems(recipe, find_broken_rules(recipe), unreliable)


def find_broken_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the violated rules."""
    for rule in _RULES:
        yield from rule(recipe)


def as_problems(recipe: Recipe, findings: Iterable[Finding], unreliable: Sequence[str] = ()) -> list[Problem]:
    """Return findings as problems with their origins, without those of a path at, above or below `unreliable`."""
    return [
        Problem(finding.what, _place(recipe, finding), finding.remedy)
        for finding in findings
        if not any(overlap(path, other) for path in finding.paths for other in unreliable)
    ]


def overlap(path: str, other: str) -> bool:
    """Whether one of two dotted paths is the other, or lies below it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _place(recipe: Recipe, finding: Finding) -> str:
    written = [path for path in finding.paths if recipe.origin.wrote(path)]
    return recipe.origin.where((written or finding.paths)[0])


def _paths_lead_somewhere(recipe: Recipe) -> Iterator[Finding]:
    for place, text in _path_texts(recipe):
        try:
            resolve_path(text, recipe.origin)
        except RecipeError as error:
            for problem in error.problems:
                yield Finding((place,), problem.what, problem.remedy or "")
        if "://" in text and place != "scale.storage":
            yield Finding(
                (place,),
                f"`{place}` is the address {text!r}; only folders, files and Hub ids are read",
                "download it and name the local copy",
            )
        elif "://" in text and holds_secrets(text):
            yield Finding(
                (place,),
                f"`{place}` has a key in it, which would be kept with every run",
                "leave it out, and set it in the environment (AWS_ACCESS_KEY_ID, ...)",
            )
        elif "://" in text and not is_url(text):
            kinds = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            yield Finding((place,), f"`{place}` is {text!r}, which is not a known kind of address", f"use {kinds}")


def _path_texts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "source.model", recipe.source.model
    yield "scale.storage", recipe.scale.storage
    data = recipe.target.data
    if isinstance(data, str):
        yield "target.data", data
    elif data.path is not None:
        yield "target.data.path", data.path
    else:
        for split in SPLITS:
            files = getattr(data, split) or []
            named = isinstance(files, str)
            for index, file in enumerate([files] if named else files):
                yield f"target.data.{split}" if named else f"target.data.{split}.{index}", file


def _is_hub_id(text: str, recipe: Recipe) -> bool:
    try:
        return resolve_path(text, recipe.origin) is None and not text.startswith(PACKAGE_PREFIX)
    except RecipeError:
        return False


def _remote_code_is_pinned(recipe: Recipe) -> Iterator[Finding]:
    source = recipe.source
    if source.trust_remote_code and not _COMMIT.fullmatch(source.revision or ""):
        yield Finding(
            ("source.trust_remote_code", "source.revision"),
            "`source.trust_remote_code` runs code from the Hub, and `source.revision` does not pin a commit",
            "set `source.revision` to the full commit hash (40 hexadecimal digits) of code that you have read",
        )


def _only_hub_models_have_revisions(recipe: Recipe) -> Iterator[Finding]:
    source = recipe.source
    if source.revision is not None and not source.trust_remote_code and not _is_hub_id(source.model, recipe):
        yield Finding(
            ("source.revision", "source.model"),
            f"`source.revision` is {source.revision!r}, but `{source.model}` is not a Hub model",
            "remove `source.revision`",
        )


def _data_has_a_train_split(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.target.data
    if isinstance(data, Data) and data.path is None and not data.train:
        yield Finding(
            ("target.data", "target.data.path", "target.data.train"),
            "`target.data` names no training data",
            "give `target.data.train` a file, or `target.data.path` a folder or Hub id",
        )


def _path_and_files_are_not_mixed(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.target.data
    if not isinstance(data, Data) or data.path is None:
        return
    for split in SPLITS:
        value = getattr(data, split) or []
        for name in [value] if isinstance(value, str) else value:
            if name.lower().endswith(DATA_SUFFIXES) or "/" in name:
                yield Finding(
                    (f"target.data.{split}", "target.data.path"),
                    f"`target.data.{split}` is the file {name!r}, but with `target.data.path` it must name a split",
                    "name a split of that data, or remove `target.data.path` and write each file's path in full",
                )


def _each_file_has_a_weight(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.target.data
    if not isinstance(data, Data) or data.weights is None:
        return
    files = [data.train] if isinstance(data.train, str) else data.train or []
    paths = ("target.data.weights", "target.data.train")
    if data.path is not None:
        what = "`target.data.weights` weighs files, but `target.data.path` names them together"
        yield Finding((*paths, "target.data.path"), what, "name each file in `target.data.train`, without `path`")
    elif len(files) != len(data.weights):
        what = f"`target.data.weights` has {len(data.weights)} numbers for {len(files)} entries of `target.data.train`"
        yield Finding(paths, what, "give one number for each")


def _only_hub_data_have_configurations(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.target.data
    if not isinstance(data, Data) or (data.path is not None and _is_hub_id(data.path, recipe)):
        return
    for key in ("name", "revision"):
        if getattr(data, key) is not None:
            yield Finding(
                (f"target.data.{key}", "target.data.path"),
                f"`target.data.{key}` is {getattr(data, key)!r}, but the data are not a Hub data set",
                f"remove `target.data.{key}`, or set `target.data.path` to the id of the Hub data set",
            )


def _cut_leaves_training_data(recipe: Recipe) -> Iterator[Finding]:
    split = recipe.target.split
    if split.select + split.test >= 1:
        yield Finding(
            ("target.split", "target.split.select", "target.split.test"),
            f"`target.split` gives {split.select:g} to select and {split.test:g} to test, so none is left for train",
            "lower them until their sum is well below 1",
        )


def _training_has_a_length(recipe: Recipe) -> Iterator[Finding]:
    if recipe.train.epochs is None and recipe.train.steps is None:
        yield Finding(
            ("train.epochs", "train.steps"),
            "`train.epochs` and `train.steps` are both null, so training has no end",
            "set one of them",
        )


def _batch_divides(recipe: Recipe) -> Iterator[Finding]:
    size, workers, micro = recipe.train.global_batch_size, recipe.scale.workers, recipe.train.micro_batch_size
    unit = workers if micro == "auto" else workers * micro
    if size % unit == 0:
        return
    shares = (
        f"{workers} workers" if micro == "auto" else f"{workers} workers x {micro} examples (`train.micro_batch_size`)"
    )
    sizes = [str(near) for near in (size // unit * unit, size // unit * unit + unit) if near]
    yield Finding(
        ("train.global_batch_size", "scale.workers", "train.micro_batch_size"),
        f"`train.global_batch_size` is {size}, which does not divide into {shares.replace('1 workers', '1 worker')}",
        f"set `train.global_batch_size` to {' or '.join(sizes)}",
    )


def _fewer_workers_will_do(recipe: Recipe) -> Iterator[Finding]:
    scale = recipe.scale
    if scale.min_workers is None:
        return
    if scale.min_workers > scale.workers:
        yield Finding(
            ("scale.min_workers", "scale.workers"),
            f"`scale.min_workers` is {scale.min_workers}, more than the {scale.workers} of `scale.workers`",
            f"set `scale.min_workers` to {scale.workers} or less",
        )
    if scale.zero_stage or scale.engine == "deepspeed" or scale.deepspeed is not None:
        yield Finding(
            ("scale.min_workers", "scale.zero_stage", "scale.engine"),
            "DeepSpeed's checkpoints are in as many parts as there are workers, so `scale.min_workers` cannot be used",
            "remove it, or set `scale.zero_stage` to 0 without DeepSpeed",
        )


def _awaited_nodes_are_known(recipe: Recipe) -> Iterator[Finding]:
    if recipe.scale.wait_for_nodes and recipe.scale.gpus_per_worker == "auto":
        yield Finding(
            ("scale.gpus_per_worker", "scale.wait_for_nodes"),
            "`scale.wait_for_nodes` is true, and `scale.gpus_per_worker` does not say what to wait for",
            "set `scale.gpus_per_worker` to 1, or to 0",
        )


def _plan_may_choose(recipe: Recipe) -> Iterator[Finding]:
    scale = recipe.scale
    taken = {
        "scale.engine": scale.engine == "torch",
        "scale.min_workers": scale.min_workers is not None,
    }
    for place in (place for place, is_taken in taken.items() if scale.fit and is_taken):
        yield Finding(
            (place, "scale.fit", "scale.zero_stage"),
            f"`scale.fit` has a plan choose ZeRO and offload, for which `{place}` leaves no room",
            f"remove `{place}`, or set `scale.fit` to false",
        )


def _frozen_body_has_nothing_to_tune(recipe: Recipe) -> Iterator[Finding]:
    transfer = recipe.transfer
    if not transfer.depth.freezes_body:
        return
    for key, why in (
        ("adapter", "the adapter has no block to go into"),
        ("layer_decay", "no block has a rate to decay"),
    ):
        if getattr(transfer, key) is not None:
            yield Finding(
                (f"transfer.{key}", "transfer.freeze"),
                f"`transfer.freeze` is `all`, so {why}",
                f"remove `transfer.{key}`, or lower `transfer.freeze`",
            )


def _scratch_trains_everything(recipe: Recipe) -> Iterator[Finding]:
    transfer = recipe.transfer
    if not transfer.from_scratch:
        return
    if not transfer.depth.freezes_nothing:
        yield Finding(
            ("transfer.freeze", "transfer.from_scratch"),
            f"`transfer.freeze` is {transfer.freeze}, but `transfer.from_scratch` would freeze random weights",
            "set `transfer.freeze` to 0",
        )
    if transfer.adapter is not None:
        yield Finding(
            ("transfer.adapter", "transfer.from_scratch"),
            "`transfer.adapter` adapts pre-trained weights, but `transfer.from_scratch` has none",
            "remove one of the two",
        )


def _adapter_modules_are_distinct(recipe: Recipe) -> Iterator[Finding]:
    adapter = recipe.transfer.adapter
    if adapter is None:
        return
    targets = adapter.targets if isinstance(adapter.targets, list) else None
    if targets == []:
        yield Finding(
            ("transfer.adapter.targets",), "`transfer.adapter.targets` is empty", "name modules, or `all-linear`"
        )
    for key, names in (("targets", targets or []), ("modules_to_save", adapter.modules_to_save)):
        place = f"transfer.adapter.{key}"
        for name, count in Counter(names).items():
            if count > 1:
                yield Finding((place,), f"`{place}` names {name!r} {count} times", "name it once")
    for name in sorted({*adapter.modules_to_save} & {*(targets or [])}):
        yield Finding(
            ("transfer.adapter.modules_to_save", "transfer.adapter.targets"),
            f"{name!r} is in `transfer.adapter.targets` and in `transfer.adapter.modules_to_save`",
            "remove it from one of them: what is trained whole needs no adapter",
        )


def _adapter_begins_as_it_can(recipe: Recipe) -> Iterator[Finding]:
    adapter = recipe.transfer.adapter
    if adapter is None or adapter.init == "zero":
        return
    if adapter.variant == "dora":
        yield Finding(
            ("transfer.adapter.init", "transfer.adapter.variant"),
            f"`transfer.adapter.init` is {adapter.init}, which is saved as a plain LoRA, but the variant is `dora`",
            "set `transfer.adapter.init` to zero, or `transfer.adapter.variant` to lora or rslora",
        )
    if adapter.quantize is not None:
        yield Finding(
            ("transfer.adapter.init", "transfer.adapter.quantize"),
            f"`transfer.adapter.init` is {adapter.init}, which changes the weights that `{adapter.quantize}` has fixed",
            "set `transfer.adapter.init` to zero, or `transfer.adapter.quantize` to null",
        )


def _quantized_weights_stay_whole(recipe: Recipe) -> Iterator[Finding]:
    adapter = recipe.transfer.adapter
    if adapter is not None and adapter.quantize is not None and recipe.scale.zero_stage == 3:
        yield Finding(
            ("transfer.adapter.quantize", "scale.zero_stage"),
            f"`transfer.adapter.quantize` is {adapter.quantize}, but `scale.zero_stage` 3 cannot spread 4-bit weights",
            "set `scale.zero_stage` to 2 or less, or `transfer.adapter.quantize` to null",
        )


def _torch_engine_stays_plain(recipe: Recipe) -> Iterator[Finding]:
    scale = recipe.scale
    if scale.engine != "torch":
        return
    for key, value, off in (("zero_stage", scale.zero_stage, 0), ("offload", scale.offload, "none")):
        if value != off:
            yield Finding(
                (f"scale.{key}", "scale.engine"),
                f"`scale.{key}` is `{value}`, which the engine `torch` does not have",
                f"set `scale.engine` to `auto`, or `scale.{key}` to `{off}`",
            )


def _offload_fits_the_stage(recipe: Recipe) -> Iterator[Finding]:
    scale = recipe.scale
    if scale.engine == "torch":
        return
    paths = ("scale.offload", "scale.zero_stage", "scale.engine")
    if scale.offload == "all" and scale.zero_stage != 3:
        yield Finding(
            paths,
            f"`scale.offload` is `all`, which moves the weights too, but `scale.zero_stage` is {scale.zero_stage}",
            "set `scale.zero_stage` to 3, or `scale.offload` to `optimizer` with `scale.zero_stage` 1 or 2",
        )
    elif scale.offload == "optimizer" and scale.zero_stage == 0:
        yield Finding(
            paths,
            "`scale.offload` is `optimizer`, but `scale.zero_stage` is 0, which shards nothing that could be moved",
            "set `scale.zero_stage` to 1, 2 or 3, or `scale.offload` to `none`",
        )


_RULES = (
    _paths_lead_somewhere,
    _remote_code_is_pinned,
    _only_hub_models_have_revisions,
    _data_has_a_train_split,
    _path_and_files_are_not_mixed,
    _each_file_has_a_weight,
    _only_hub_data_have_configurations,
    _cut_leaves_training_data,
    _training_has_a_length,
    _batch_divides,
    _fewer_workers_will_do,
    _plan_may_choose,
    _awaited_nodes_are_known,
    _frozen_body_has_nothing_to_tune,
    _scratch_trains_everything,
    _adapter_modules_are_distinct,
    _adapter_begins_as_it_can,
    _quantized_weights_stay_whole,
    _torch_engine_stays_plain,
    _offload_fits_the_stage,
    find_stream_mistakes,
    find_deepspeed_mistakes,
    find_phase_mistakes,
)
