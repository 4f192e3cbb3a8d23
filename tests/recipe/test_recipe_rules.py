"""Rules between fields: each broken one is a problem at its place with a remedy that, when followed, mends it."""

from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.recipe import parse_recipe

GOOD = """\
name: mine
source: {model: owner/model}
target:
  task: text-classification
  data: owner/data
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("overrides", "what", "mended"),
    [
        (["source.trust_remote_code=true"], "does not pin a commit", [f"source.revision='{COMMIT}'"]),
        (["source.trust_remote_code=true", "source.revision=main"], "does not pin", [f"source.revision='{COMMIT}'"]),
        (["source.revision=main", "source.model=./here"], "is not a Hub model", ["source.revision=null"]),
        (["source.revision=main", "source.model=package:a/b"], "is not a Hub model", ["source.revision=null"]),
        (["source.model=https://example.org/m"], "address 'https://example.org/m'", ["source.model=owner/m"]),
        (["scale.storage=ftp://host/runs"], "not a known kind of address", ["scale.storage=s3://bucket/runs"]),
        (['target.data="a\\0b"'], "NUL byte", ["target.data=ab"]),
        (['target.data={train: [a.csv, "b\\0.csv"]}'], "NUL byte", ["target.data={train: [a.csv]}"]),
        (["target.data={test: a.csv}"], "names no training data", ["target.data.train=b.csv"]),
        (["target.data={train: []}"], "names no training data", ["target.data.train=[b.csv]"]),
        (["target.data={path: owner/x, train: a.jsonl}"], "is the file 'a.jsonl'", ["target.data.train=train"]),
        (["target.data={path: owner/x, test: [test, ./b]}"], "is the file './b'", ["target.data.test=[test]"]),
        (["target.data={train: a.csv, name: sst2}"], "are not a Hub data set", ["target.data.name=null"]),
        (["target.data={path: ./x, revision: main}"], "are not a Hub data set", ["target.data.path=owner/x"]),
        (["target.data={train: a.jsonl, stream: true}"], "nor `train.steps` says how many", ["train.steps=5"]),
        (["target.data={train: a.jsonl, stream: true}"], "nor `train.steps` says how", ["target.limit.train=100"]),
        (["target.data={path: owner/x, stream: true}"], "reads no more examples than", ["target.limit.train=100"]),
        (["target.data={train: [a.jsonl, b.jsonl#5], stream: true}", "train.steps=5"],
         "`target.data.train.1` draws from all of 'b.jsonl#5'", ["target.data.train=[a.jsonl, b.jsonl]"]),
        (["target.data={path: ./a.jsonl#5, stream: true}", "train.steps=5"],
         "`target.data.path` draws from all", ["target.data.path=./a.jsonl"]),
        (["target.limit.per_class=4", "target.data={train: a.jsonl, stream: true}", "train.steps=5"],
         "`target.limit.per_class` is 4", ["target.limit.per_class=null", "target.limit.train=8"]),
        (["target.split={select: 0.5, test: 0.5}"], "none is left for train", ["target.split.test=0.4"]),
        (["train.epochs=null"], "training has no end", ["train.steps=5"]),
        (["train.global_batch_size=10", "scale.workers=4"], "divide into 4 workers", ["train.global_batch_size=8"]),
        (["train.global_batch_size=30", "train.micro_batch_size=8"],
         "1 worker x 8 examples (`train.micro_batch_size`)", ["train.global_batch_size=24"]),
        (["train.global_batch_size=2", "scale.workers=4"], "4 workers", ["train.global_batch_size=4"]),
        (["transfer.adapter.type=lora", "transfer.freeze=all"], "no block to go into", ["transfer.freeze=stem"]),
        (["transfer.layer_decay=0.9", "transfer.freeze=all"], "no block has a rate", ["transfer.layer_decay=null"]),
        (["transfer.freeze=3", "transfer.from_scratch=true"], "would freeze random weights", ["transfer.freeze=0"]),
        (["transfer.adapter.type=lora", "transfer.from_scratch=true"], "adapts pre-trained", ["transfer.adapter=null"]),
        (["transfer.adapter={type: lora, targets: [q, v, q]}"], "'q' 2 times", ["transfer.adapter.targets=[q, v]"]),
        (["transfer.adapter={type: lora, targets: []}"], "is empty", ["transfer.adapter.targets=all-linear"]),
        (["scale.engine=torch", "scale.zero_stage=auto"], "leaves no room", ["scale.engine=auto"]),
        (["scale.wait_for_nodes=true"], "does not say what to wait for", ["scale.gpus_per_worker=1"]),
        (["scale.workers=[4, 2]"], "`scale.min_workers` is 4, more than the 2", ["scale.workers=[2, 4]"]),
        (["scale.min_workers=1", "scale.workers=2", "scale.zero_stage=2"],
         "checkpoints are in as many parts", ["scale.zero_stage=0"]),
        (["scale.zero_stage=2", "scale.engine=torch"], "engine `torch` does not have", ["scale.engine=auto"]),
        (["scale.offload=optimizer", "scale.engine=torch"], "engine `torch` does not have", ["scale.offload=none"]),
        (["scale.offload=all", "scale.zero_stage=2"], "moves the weights too", ["scale.zero_stage=3"]),
        (["scale.offload=all"], "moves the weights too", ["scale.zero_stage=3"]),
        (["scale.offload=optimizer"], "`scale.zero_stage` is 0", ["scale.zero_stage=1"]),
    ],
)  # fmt: skip
def test_a_broken_rule_is_one_problem_that_its_remedy_mends(overrides: list[str], what: str, mended: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD, overrides=overrides)
    (problem,) = caught.value.problems
    assert what in problem.what
    assert problem.where == f"{overrides[0]} (command line)"
    assert problem.remedy
    assert parse_recipe(GOOD, overrides=[*overrides, *mended]).name == "mine"


def test_two_numbers_of_workers_are_the_fewest_and_the_most() -> None:
    scale = parse_recipe(GOOD, overrides=["scale.workers=[2, 8]"]).scale
    assert (scale.min_workers, scale.workers) == (2, 8)
    with pytest.raises(RecipeError, match=r"scale.workers"):
        parse_recipe(GOOD, overrides=["scale.workers=[1, 2, 3]"])


def test_the_sizes_that_would_divide_are_named() -> None:
    with pytest.raises(RecipeError, match=r"set `train.global_batch_size` to 24 or 36"):
        parse_recipe(GOOD, overrides=["train.global_batch_size=30", "train.micro_batch_size=4", "scale.workers=3"])


def test_the_place_is_the_line_of_the_value() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD + "scale:\n  workers: 3\n  offload: optimizer\n", Path("mine.yaml"))
    assert [problem.where for problem in caught.value.problems] == [
        "mine.yaml:7 (scale.workers)",
        "mine.yaml:8 (scale.offload)",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["transfer.freeze=0%", "transfer.from_scratch=true"],
        ["transfer.layer_decay=0.9", "transfer.adapter.type=lora", "transfer.freeze=3"],
        ["source.trust_remote_code=true", f"source.revision='{COMMIT}'"],
        ["source.revision=main"],
        ["target.data={path: owner/x, name: sst2, revision: main, train: train, test: validation}"],
        ["target.data={path: ./folder, train: 'train[:10]'}"],
        ["train.epochs=null", "train.steps=5"],
        ["target.data={train: [a.jsonl, b.jsonl], weights: [1, 2], stream: true}", "target.limit.train=8"],
        ["scale.engine=deepspeed"],
        ["scale.offload=all", "scale.zero_stage=3"],
        ["train.global_batch_size=32", "train.micro_batch_size=4", "scale.workers=2"],
    ],
)
def test_what_goes_together_passes(overrides: list[str]) -> None:
    assert parse_recipe(GOOD, overrides=overrides).name == "mine"
