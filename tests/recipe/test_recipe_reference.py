"""The JSON Schema: editors can use it, it describes every key, and it agrees with what loads."""

from typing import Any

import jsonschema
import pytest

from orchestrator.recipe import dump_recipe, json_schema, load_recipe, shipped_recipes
from orchestrator.recipe.reading import read_text, read_yaml
from orchestrator.recipe.reference import shape_of
from orchestrator.recipe.schema import Recipe

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def read(text: str) -> dict[str, Any]:
    return read_yaml(text, None).data


def test_the_schema_is_a_json_schema() -> None:
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("name", [recipe.name for recipe in shipped_recipes()])
def test_the_schema_accepts_shipped_recipes_as_written_and_as_dumped(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.origin.file is not None
    VALIDATOR.validate(read(read_text(recipe.origin.file)))
    VALIDATOR.validate(read(dump_recipe(recipe)))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "learning_rate", -1),
        ("train", "learning_rat", 1),
        ("transfer", "freeze", "half"),
        ("scale", "offload", "gpu"),
    ],
)
def test_the_schema_refuses_what_does_not_load(section: str, key: str, value: object) -> None:
    data = read(dump_recipe(load_recipe("minilm-to-support-intent")))
    data[section][key] = value
    assert not VALIDATOR.is_valid(data)


@pytest.mark.parametrize(
    "case", [{"chioce": [0]}, {"choice": []}, {"choice": "all"}, {"loguniform": [0, 1]}, {"integers": [1]}, 3, []]
)
def test_the_schema_refuses_cases_of_a_search_that_do_not_load(case: object) -> None:
    data = read(dump_recipe(load_recipe("minilm-to-support-intent-search")))
    assert VALIDATOR.is_valid(data)
    data["search"]["space"]["transfer.freeze"] = case
    assert not VALIDATOR.is_valid(data)


def test_every_key_of_a_case_is_described() -> None:
    described = json_schema()["$defs"]["Case"]["properties"]
    assert list(described) == ["when", "choice", "uniform", "loguniform", "integers"]
    assert all(node["description"] for node in described.values())


def test_every_key_is_described() -> None:
    shape = shape_of(Recipe)
    sections = list(shape.sections())
    assert ("train", "early_stopping") in sections
    bare = [
        (*path, key)
        for path in sections
        for key in shape.keys(path)
        if not (shape.find((*path, key)) or {}).get("description")
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("train", "learning_rate"), "a number above 0"),
        (("train", "micro_batch_size"), "`auto`, or a whole number above 0"),
        (("train", "gradient_checkpointing"), "`true` or `false`"),
        (("transfer", "head", "layers"), "a list with a whole number above 0 for each item"),
        (("transfer", "adapter", "variant"), "one of `lora`, `rslora`, `dora`"),
        (("target", "columns", "text"), "text"),
        (("target", "options", "anything"), "any value"),
        (("search", "space", "any.place", "choice"), "`every`, or a list of one value or more"),
        (("search", "space", "any.place", "uniform"), "two numbers, `[low, high]`"),
        (("search", "space", "any.place", 0, "integers"), "two whole numbers, `[low, high]`"),
    ],
)
def test_what_a_key_accepts_is_said_in_words(path: tuple[str, ...], words: str) -> None:
    shape = shape_of(Recipe)
    node = shape.find(path)
    assert node is not None
    assert shape.accepts(node) == words


def test_places_that_no_recipe_has_are_not_found() -> None:
    shape = shape_of(Recipe)
    assert shape.find(("train", "nonsense")) is None
    assert shape.find(("name", "x")) is None
