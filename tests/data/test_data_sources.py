"""Opening what `target.data` names, and finding the task's columns in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import Column, open_file, open_splits, rename_columns
from orchestrator.data.fields.label import LabelField
from orchestrator.data.fields.text import TextField
from orchestrator.data.formats import hub
from orchestrator.errors import DataError
from orchestrator.recipe import parse_recipe

ROWS = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]


def test_importing_the_room_loads_no_heavy_library() -> None:
    script = "import sys, orchestrator.data; print({'torch', 'transformers', 'datasets', 'ray'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.parametrize("name", ["select", "validation", "valid", "val", "dev"])
def test_a_folder_of_splits_is_found_by_its_file_names(
    tmp_path: Path, write_jsonl: Any, make_recipe: Any, columns: Any, name: str
) -> None:
    for split in ("train", name, "test"):
        write_jsonl([{**ROWS[0], "text": split}], f"{split}.jsonl")
    (tmp_path / "README.md").write_text("not data")
    splits = open_splits(make_recipe(tmp_path), columns)
    assert {split: examples.table["text"].to_pylist() for split, examples in splits.items()} == {
        "train": ["train"],
        "select": [name],
        "test": ["test"],
    }


def test_shards_make_one_split_and_a_missing_shard_is_refused(tmp_path: Path, make_recipe: Any, columns: Any) -> None:
    for number in range(3):
        pq.write_table(
            pa.table({"text": [f"t{number}"], "label": [number]}), tmp_path / f"train-0000{number}-of-00003.parquet"
        )
    assert open_splits(make_recipe(tmp_path), columns)["train"].table["text"].to_pylist() == ["t0", "t1", "t2"]
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="1 of the 3 shards are missing, the first is number 00001"):
        open_splits(make_recipe(tmp_path), columns)


def test_subfolders_of_splits_and_what_datasets_saved_are_read(tmp_path: Path, make_recipe: Any, columns: Any) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, 1, -1]}, features=features)
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(str(tmp_path / "both"))
    data.save_to_disk(str(tmp_path / "one"))
    both = open_splits(make_recipe(tmp_path / "both"), columns)
    assert list(both) == ["train", "select"]
    assert both["train"].names.get("label") == ("no", "yes")
    # -1 is the Hub's mark for a label that is withheld.
    assert both["train"].table["label"].to_pylist() == ["no", "yes", None]
    assert open_splits(make_recipe(tmp_path / "one"), columns)["train"].fingerprint == both["train"].fingerprint


def test_label_names_come_from_a_list_beside_the_files(
    tmp_path: Path, write_jsonl: Any, make_recipe: Any, columns: Any
) -> None:
    path = write_jsonl([{"text": "x", "label": 1}])
    (tmp_path / "labels.json").write_text('["no", "yes"]')
    assert open_splits(make_recipe(tmp_path), columns)["train"].names.get("label") == ("no", "yes")
    assert open_splits(make_recipe(path), columns)["train"].names.get("label") == ("no", "yes")
    (tmp_path / "labels.json").write_text('{"other": "things"}')
    assert open_splits(make_recipe(path), columns)["train"].names.get("label") is None
    (tmp_path / "labels.json").write_text("[")
    with pytest.raises(DataError, match="not valid JSON"):
        open_splits(make_recipe(path), columns)


def test_label_names_come_from_a_dictionary_column(tmp_path: Path, make_recipe: Any, columns: Any) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([1, 0, None]), ["low", "high"])
    pq.write_table(pa.table({"text": ["x", "y", "z"], "label": labels}), tmp_path / "train.parquet")
    train = open_splits(make_recipe(tmp_path), columns)["train"]
    assert train.table["label"].to_pylist() == ["high", "low", None]
    assert train.names.get("label") == ("low", "high")


def test_written_out_files_are_relative_to_the_recipe(tmp_path: Path, write_jsonl: Any, columns: Any) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_jsonl([{**ROWS[0], "text": name}], f"data/{name}")
    (tmp_path / "recipes").mkdir()
    recipe = parse_recipe(
        "name: x\nsource: {model: m}\ntarget:\n  task: t\n"
        "  data: {train: [../data/a.jsonl, ../data/b.jsonl], test: ../data/c.jsonl}\n",
        file=tmp_path / "recipes" / "mine.yaml",
    )
    splits = open_splits(recipe, columns)
    assert splits["train"].table["text"].to_pylist() == ["a.jsonl", "b.jsonl"]
    assert list(splits) == ["train", "test"]
    assert splits["train"].where(1).endswith("data/b.jsonl:1")


def test_named_splits_of_a_folder_are_the_only_ones_taken(
    tmp_path: Path, write_jsonl: Any, make_recipe: Any, columns: Any
) -> None:
    for name in ("train", "validation", "test"):
        write_jsonl([{**ROWS[0], "text": name}], f"{name}.jsonl")
    splits = open_splits(make_recipe({"path": str(tmp_path), "test": "validation"}), columns)
    assert {split: examples.table["text"][0].as_py() for split, examples in splits.items()} == {
        "train": "train",
        "test": "validation",
    }
    with pytest.raises(DataError, match=r"neither a file hidden\.\* nor a subfolder"):
        open_splits(make_recipe({"path": str(tmp_path), "test": "hidden"}), columns)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["test.jsonl"], "no training data; it holds test.jsonl"),
        (["train.jsonl", "train.csv"], "2 candidates for one split: train.csv, train.jsonl"),
        (["train.jsonl", "dev.jsonl", "val.jsonl"], "2 candidates"),
        (["train/a.jsonl", "train/b.csv"], "mixes .csv, .jsonl files"),
    ],
)
def test_a_folder_that_is_unclear_is_refused(
    write_jsonl: Any, make_recipe: Any, columns: Any, files: list[str], what: str
) -> None:
    for name in files:
        folder = write_jsonl(ROWS, f"data/{name}").parents[name.count("/")]
    with pytest.raises(DataError, match=what):
        open_splits(make_recipe(folder), columns)


def test_all_problems_of_all_splits_come_in_one_report(
    tmp_path: Path, write_jsonl: Any, make_recipe: Any, columns: Any
) -> None:
    write_jsonl([{"txt": "x", "label": 1}], "train.jsonl")
    (tmp_path / "test.csv").write_text("text,label\nx\n")
    recipe = make_recipe(
        {
            "train": str(tmp_path / "train.jsonl"),
            "select": str(tmp_path / "none.csv"),
            "test": str(tmp_path / "test.csv"),
        },
        columns={"lable": "label"},
    )
    with pytest.raises(DataError) as caught:
        open_splits(recipe, columns)
    report = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("lable is not a column", "no column text", "no such file", "another number of fields"):
        assert part in report


def test_columns_are_found_by_mapping_then_own_name_then_alias(
    write_jsonl: Any, make_recipe: Any, columns: Any
) -> None:
    path = write_jsonl([{"sentence": "s", "content": "c", "intent": "i", "body": "b"}])
    found = open_splits(make_recipe(path), columns)["train"].table.to_pylist()[0]
    assert found == {"text": "s", "label": "i"}
    mapped = open_splits(make_recipe(path, columns={"text": "body", "text_pair": "sentence"}), columns)["train"].table
    assert mapped.to_pylist()[0] == {"text": "b", "text_pair": "s", "label": "i"}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"text": "sentense"}, r"no column sentense.*\n.*target.columns: \{text: sentence\}"),
        ({"txt": "sentence"}, r"txt is not a column of this task.*\n.*write text in place of txt"),
        ({"text": "sentence", "label": "sentence"}, r"is used for text and label\n.*a data column of its own"),
        ({"text_pair": "nothing"}, r"no column nothing.*\n.*\{text_pair: THE_DATA_COLUMN\}"),
    ],
)
def test_a_wrong_mapping_is_refused_with_the_nearest_name(
    write_jsonl: Any, make_recipe: Any, columns: Any, mapping: dict[str, str], message: str
) -> None:
    path = write_jsonl([{"sentence": "s", "intent": "i"}])
    with pytest.raises(DataError, match=message):
        open_splits(make_recipe(path, columns=mapping), columns)


def test_an_optional_column_that_one_split_lacks_is_refused(
    tmp_path: Path, write_jsonl: Any, make_recipe: Any, columns: Any
) -> None:
    write_jsonl([{**ROWS[0], "text_pair": "x"}], "train.jsonl")
    write_jsonl(ROWS, "test.jsonl")
    with pytest.raises(DataError, match=r"text_pair is a column of .*train.jsonl but not of .*test.jsonl"):
        open_splits(make_recipe(tmp_path), columns)


def test_an_optional_column_that_one_file_of_a_split_lacks_is_refused(
    write_jsonl: Any, make_recipe: Any, columns: Any
) -> None:
    paths = [str(write_jsonl([{**ROWS[0], "text_pair": "x"}], "a.jsonl")), str(write_jsonl(ROWS, "b.jsonl"))]
    with pytest.raises(DataError, match=r"text_pair is a column of .*a.jsonl but not of .*b.jsonl"):
        open_splits(make_recipe({"train": paths}), columns)


def test_files_of_one_split_must_agree_in_type_but_numbers_may_mix(
    write_jsonl: Any, make_recipe: Any, columns: Any
) -> None:
    paths = [
        str(write_jsonl([{"text": "x", "label": label}], f"{name}.jsonl"))
        for name, label in (("int", 1), ("float", 0.5), ("null", None), ("text", "a"))
    ]
    numbers = open_splits(make_recipe({"train": paths[:3]}), columns)["train"]
    assert numbers.table["label"].to_pylist() == [1.0, 0.5, None]
    with pytest.raises(DataError, match="label differs in type"):
        open_splits(make_recipe({"train": paths}), columns)


def test_a_file_is_opened_whole_and_its_columns_renamed(write_jsonl: Any, columns: Any) -> None:
    given = open_file(write_jsonl([{"id": 7, "sentence": "x", "tags": {"a": 1}}]))
    assert given.table.column_names == ["id", "sentence", "tags"]
    renamed = rename_columns(given, columns[:2], {"label": "intent"})
    assert renamed.table.to_pylist() == [{"text": "x"}]
    assert renamed.where(0) == given.where(0)
    with pytest.raises(DataError, match="no column id2"):
        rename_columns(given, columns[:2], {"text": "id2"})


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[dict[str, Any]]]:
    """Let `datasets.load_dataset` give this (or raise it), and note how it was asked."""

    def install(result: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def load(**options: Any) -> Any:
            calls.append(options)
            if isinstance(result, BaseException):
                raise result
            return result[options["split"]] if options["split"] else result

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(hub, "_reaches", lambda endpoint: True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        return calls

    return install


def hub_data() -> Any:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"sentence": ["x", "y", "z"], "label": [0, 1, 1]}, features=features)
    return datasets.DatasetDict({"train": data, "validation": data.select([2, 0]), "extra": data})


def test_splits_of_a_hub_data_set_are_found(fake_hub: Any, make_recipe: Any, columns: Any) -> None:
    calls = fake_hub(hub_data())
    splits = open_splits(make_recipe("some/data"), columns)
    assert [call["path"] for call in calls] == ["some/data"]
    assert list(splits) == ["train", "select"]
    assert splits["select"].table.to_pylist() == [{"text": "z", "label": "yes"}, {"text": "x", "label": "no"}]
    assert splits["select"].names.get("label") == ("no", "yes")
    assert splits["train"].where(2) == "some/data train row 2"


def test_named_splits_configuration_and_revision_reach_the_hub(fake_hub: Any, make_recipe: Any, columns: Any) -> None:
    calls = fake_hub(hub_data())
    data = {"path": "some/data", "name": "sst2", "revision": "abc", "train": "train", "test": "validation"}
    splits = open_splits(make_recipe(data), columns)
    assert list(splits) == ["train", "test"]
    assert calls == [
        {"path": "some/data", "name": "sst2", "revision": "abc", "split": split} for split in ("train", "validation")
    ]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ConnectionError("Couldn't reach"), "cannot be reached"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'some/data' is a gated dataset on the Hub."), "is gated"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'some/data' doesn't exist"),
            "is not on the Hugging Face Hub",
        ),
        (RuntimeError("Dataset scripts are no longer supported, but found data.py"), "never run"),
        (ValueError("Config name is missing.\nPlease pick one"), "cannot be loaded: Config name is missing."),
    ],
)
def test_a_hub_data_set_that_cannot_be_had_is_refused(
    fake_hub: Any, make_recipe: Any, columns: Any, error: Exception, what: str
) -> None:
    fake_hub(error)
    with pytest.raises(DataError, match=what) as caught:
        open_splits(make_recipe("some/data"), columns)
    assert caught.value.problems[0].remedy


def test_without_a_network_only_the_local_copy_is_tried(
    monkeypatch: pytest.MonkeyPatch, make_recipe: Any, columns: Any
) -> None:
    monkeypatch.setattr(hub, "_reaches", lambda endpoint: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"not on this machine, and the Hugging Face Hub cannot be reached"):
        open_splits(make_recipe("no-such-owner/no-such-data"), columns)
    assert datasets.config.HF_HUB_OFFLINE is False


def test_wrong_types_are_refused_in_plain_words(tmp_path: Path, make_recipe: Any) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": ["a"], "label": [0.5]}) + "\n")
    with pytest.raises(DataError) as caught:
        open_splits(make_recipe(path), (Column("text", TextField()), Column("label", LabelField())))
    assert [problem.what.split(";")[0] for problem in caught.value.problems] == [
        "the column text holds lists of text",
        "the column label holds lists of numbers with fractions, which are no labels",
    ]
