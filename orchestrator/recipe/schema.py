"""The recipe: what a user may write, and every default.

Defaults stand here and nowhere else. Attribute docstrings become the descriptions in `orchestrator schema`.
Rules between fields are in `rules.py`; rules that need the data or the model are checked where those are read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer
from pydantic.json_schema import SkipJsonSchema

from orchestrator.recipe.origin import Origin
from orchestrator.recipe.sections import (
    Every,
    Fraction,
    Name,
    NotNegative,
    Positive,
    PositiveInt,
    PositiveRange,
    Range,
    Schedule,
    Section,
    Text,
    Values,
    WholeRange,
)
from orchestrator.recipe.transfer_schema import Transfer

__all__ = [
    "Case",
    "Data",
    "EarlyStopping",
    "Limit",
    "Recipe",
    "Scale",
    "Search",
    "Section",
    "Source",
    "Split",
    "Target",
    "Text",
    "Train",
    "Transfer",
]


class Source(Section):
    """The pre-trained model that knowledge is taken from."""

    model: Text
    """Hub id, `./folder` (relative to the recipe), or `package:NAME/PATH` for weights in an installed package. A folder
    may hold a LoRA of a language model, which is added to its base; a new adapter is saved with it, for that base."""
    revision: Text | None = None
    """Hub revision; a full commit hash is required when `trust_remote_code` is true."""
    config: Text | None = None
    """A copy of the model's config.json under any name, or its folder: for `orchestrator plan` where the model is out
    of reach."""
    trust_remote_code: bool = False
    """Run model code from the Hub. Refused without a pinned commit in `revision`."""


class Data(Section):
    """The target data, written out: either a `path` with named splits, or a file (or list of files) for each split."""

    path: Text | None = None
    """Hub id or folder; `train`, `select` and `test` then name its splits."""
    name: Text | None = None
    """Configuration of a Hub data set, such as `sst2` of `nyu-mll/glue`."""
    revision: Text | None = None
    """Hub revision of the data set."""
    train: Text | list[Text] | None = None
    """File(s) to train on, or the name of the split when `path` is given. `FILE#500` draws 500 of a file's examples."""
    weights: list[Positive] | None = None
    """How much of an epoch each of the files of `train` makes up: `[3, 1]` for three quarters and one. An epoch stays
    as long as all examples together: those of one file are repeated, of the other drawn. null: each example once."""
    stream: bool = False
    """Read only as many examples of *train* as the run needs, for data larger than memory: `limit.train` of them, or
    else `train.steps` x `train.global_batch_size` (one of the two must be given), and what missing splits are cut from.
    They come from many places of the files (JSON Lines, Parquet, Arrow), a few from each in turn, so that a sorted file
    gives of everything; which places is drawn by `target.split.seed`. Of Hub data the beginnings of the split's files
    are read."""
    select: Text | list[Text] | None = None
    """File(s) or split that stops early and picks the best checkpoint; cut from *train* when missing."""
    test: Text | list[Text] | None = None
    """File(s) or split that is only ever reported; cut from *train* when missing."""


class Split(Section):
    """The cutting of missing splits from *train*: stratified by label, and the same for every `train.seed`."""

    select: Fraction = 0.1
    """Share of *train* that becomes *select* where the data has none."""
    test: Fraction = 0.1
    """Share of *train* that becomes *test* where the data has none; 0 for no test."""
    seed: int = 0
    """Seed of the cut. It is not `train.seed`, so that runs with other seeds are scored on the same examples."""


class Limit(Section):
    """Fewer examples, for few-shot runs and data-efficiency curves. Drawn by `target.split.seed`."""

    train: PositiveInt | None = None
    """At most this many training examples, stratified by label."""
    per_class: PositiveInt | None = None
    """At most this many training examples of each label."""
    select: PositiveInt | None = None
    """At most this many examples of *select*."""
    test: PositiveInt | None = None
    """At most this many examples of *test*."""


class Target(Section):
    """The task the model is tuned for, and its data."""

    task: Text
    """Name of the task, such as `text-classification`."""
    data: Text | Data
    """Hub id, folder of splits, or file (relative to the recipe); or the splits written out."""
    columns: dict[Text, Text] = Field(default_factory=dict)
    """The task's column names mapped to the data's: `{text: sentence, label: intent}`."""
    split: Split = Split()
    """How missing splits are cut from *train*."""
    limit: Limit = Limit()
    """Fewer examples than there are."""
    options: dict[Text, Any] = Field(default_factory=dict)
    """The task's own options; `orchestrator schema --task NAME` lists them."""


class EarlyStopping(Section):
    """Stop when *select* has not improved for a while."""

    metric: Text | None = None
    """A metric of the task, which also picks the best checkpoint; null for the task's main one."""
    patience: PositiveInt = 2
    """Evaluations without improvement before stopping."""


class Train(Section):
    """Length, rates, batches and precision of the training."""

    epochs: Positive | None = 3
    """Passes over the training data, in each phase that does not give its own length; null when `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps; takes the place of `epochs`."""
    learning_rate: Positive = 5e-5
    """Peak rate of AdamW."""
    schedule: Schedule = "linear"
    """Shape of the rate over the steps, as in `transformers.get_scheduler`."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the rate rises from 0."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay; biases and norms have none."""
    global_batch_size: PositiveInt = 32
    """Examples per optimizer step, over all workers."""
    micro_batch_size: Literal["auto"] | PositiveInt = "auto"
    """Examples per forward pass on one worker. `auto` is the worker's whole share of the global batch, up to 32, and
    halves the tokens of a pass each time memory runs out. Losses stay the same, except that dropout draws other
    numbers."""
    group_by_length: bool = True
    """Form batches of examples of similar length (in shuffled order), so that there is little padding."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 with fp32 master weights if the hardware supports it (GPU, AMX or AVX512-BF16), otherwise fp32."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are clipped to this norm; null for no clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache_prefix: Literal["auto"] | bool = "auto"
    """Compute the outputs of the frozen blocks once, store them, and start later epochs (and trials of a search) from
    them; losses stay the same. `auto`: if it saves time; `true`: whenever it is possible."""
    early_stopping: EarlyStopping | None = None
    """Stop when *select* has not improved for a while; null to train to the end."""
    evaluate_every: Every = "epoch"
    """Score *select* every epoch, or every this many steps."""
    log_every: PositiveInt = 10
    """Steps between train rows in metrics.jsonl."""
    save_every: Every = "epoch"
    """Save a checkpoint every epoch, or every this many steps."""
    keep: PositiveInt = 2
    """Checkpoints kept besides the best one."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the head, the data order and dropout."""


class Scale(Section):
    """The workers that it runs on."""

    workers: PositiveInt = 1
    """Ray Train workers; a single one runs in the calling process. `[2, 8]` is short for 8 here and 2 in
    `min_workers`."""
    min_workers: PositiveInt | None = None
    """Continue with fewer workers, but at least this many, while the cluster has no room for all; the global batch
    stays the same. null: always all. Only without DeepSpeed; trials of searches always have `workers`."""
    wait_for_nodes: bool = False
    """If the cluster has no room, wait for nodes from its autoscaler instead of refusing to start."""
    gpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=0, le=1)] = "auto"
    """GPUs of each worker; `auto` is one if the cluster has GPUs, 0 uses none."""
    cpus_per_worker: Literal["auto"] | PositiveInt = "auto"
    """Cores of each worker, all on one machine; `auto` divides each machine's cores among the workers on it."""
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """`torch` is plain PyTorch or DDP; `auto` is DeepSpeed if `zero_stage` is above 0."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO: 1 shards the optimizer, 2 the gradients too, 3 the weights too (Rajbhandari et al. 2020). `auto`
    is short for 0 with `fit`."""
    fit: bool = False
    """If the training does not fit into memory, let a plan choose ZeRO stage, offload, smaller passes and gradient
    checkpointing before it starts. Searches do not use it."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep the optimizer state (`all`: also the weights, with ZeRO-3) in main memory."""
    deepspeed: dict[Text, Any] | None = None
    """Further keys of DeepSpeed's configuration JSON, for experts: `{zero_optimization: {offload_optimizer: {device:
    nvme, nvme_path: /local}}}`. Settings that the recipe has keys for are refused here."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts from the last checkpoint after a worker died; -1 for no limit."""
    storage: Text = "runs"
    """Folder for runs, which all workers must be able to access, or one of an object store: `s3://bucket/folder`,
    `gs://...`, `abfs://...` (searches need a folder)."""
    cache_gigabytes: Literal["auto"] | Positive = "auto"
    """Disk space for stored outputs of frozen blocks; `auto` is half of the free space. Those used longest ago are
    deleted first."""


class Case(Section):
    """The values of one place of the recipe in a search: exactly one of the kinds below."""

    when: dict[Text, Any] | None = None
    """Places of the recipe, each with the value (or a list of the values) it must have for this case to apply; a
    mapping fits when its keys do. null: always."""
    choice: Literal["every"] | Values | SkipJsonSchema[None] = None
    """One of these values; for `transfer.freeze` also `every`: each boundary that the model has (0, stem, 1, 2, ...,
    all)."""
    uniform: Range | SkipJsonSchema[None] = None
    """A number from low to high (both may occur), each as likely."""
    loguniform: PositiveRange | SkipJsonSchema[None] = None
    """The same with each order of magnitude as likely: for learning rates."""
    integers: WholeRange | SkipJsonSchema[None] = None
    """A whole number from low to high (both may occur)."""

    @model_serializer(mode="wrap")
    def _write_what_is_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the kinds that are not used."""
        return {key: value for key, value in write(self).items() if value is not None}


class Search(Section):
    """Trials of this recipe with other values: which values, how many trials, and how the winner is chosen. Only
    `orchestrator search` uses it."""

    space: dict[Text, Case | Annotated[list[Case], Field(min_length=1, title="a list of such cases")]] | None = None
    """What varies: dotted places of the recipe with their values, or with a list of cases, of which the first that
    applies counts: `{transfer.freeze: {choice: every}, train.learning_rate: {loguniform: [1.0e-5, 1.0e-4]}}`. null:
    freeze depth and learning rate, in ranges that suit the kind of model."""
    metric: Text | None = None
    """A metric of the task, on *select*, at each trial's best evaluation; null for the task's main one."""
    mode: Literal["max", "min"] | None = None
    """Whether high or low is good; null as the metric says."""
    trials: PositiveInt = 16
    """The largest number of trials."""
    seconds: Positive | None = None
    """Time after which no trial starts and running ones are stopped; null for no limit."""
    algorithm: Literal["grid", "random", "tpe"] = "grid"
    """`grid` crosses all choices, with as many points of each range as `trials` allows; `random` draws; `tpe` learns
    from earlier trials where good values lie (Bergstra et al. 2011), which pays from some twenty trials on."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """`none` trains every trial to its end; `asha` leaves those that fall behind (Li et al. 2018); `pbt` lets poor
    trials go on from good ones with other rates (Jaderberg et al. 2017)."""
    grace: PositiveInt = 1
    """`asha`: evaluations that every trial gets before it may be left; it is judged at `grace`, `grace * reduction`,
    `grace * reduction^2`, ... evaluations. `pbt`: evaluations between two exchanges."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """`asha`: one in this many trials continues each time trials are judged."""
    concurrent: Literal["auto"] | PositiveInt = "auto"
    """Trials at the same time; `auto`: as many as the machine has cores or GPUs for."""
    reseed_top: Annotated[int, Field(ge=0)] = 0
    """Train this many of the best trials again with other seeds before a winner is chosen; the best mean wins."""
    reseeds: PositiveInt = 2
    """Other seeds for each of `reseed_top`."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the search. All trials have `train.seed`, so that they differ only in what is searched."""


class Recipe(Section):
    """One source-to-target transfer."""

    name: Name
    """Name of the run and of its directory: lower-case letters, digits and dashes."""
    source: Source
    """The pre-trained model."""
    target: Target
    """The task and its data."""
    transfer: Transfer = Transfer()
    """What is frozen, adapted and added."""
    train: Train = Train()
    """Length, rates, batches and precision of the training."""
    scale: Scale = Scale()
    """The workers that it runs on."""
    search: Search | None = None
    """The values that `orchestrator search` tries; null for its defaults."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """The place of each value in its file, for messages."""
        return self._origin
