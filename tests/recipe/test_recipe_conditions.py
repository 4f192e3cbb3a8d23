"""Which values of a search go together: cases, their order, and every combination."""

from collections.abc import Iterable
from typing import Any

import pytest

from orchestrator.recipe import parse_recipe
from orchestrator.recipe.conditions import (
    Combinations,
    boundaries,
    depends_on,
    holds,
    put,
    put_all,
    put_in_order,
    write_boundaries,
)
from orchestrator.recipe.schema import Case

RECIPE = parse_recipe("name: mine\nsource: {model: owner/model}\ntarget: {task: text-classification, data: owner/data}")
DATA = RECIPE.model_dump()
ADAPTER = "transfer.adapter"
RANK = "transfer.adapter.r"


def case(**parts: Any) -> tuple[Case, ...]:
    return (Case(**parts),)


def choices(_path: str, _number: int, case: Case) -> Iterable[Any]:
    assert isinstance(case.choice, list)
    return case.choice


@pytest.mark.parametrize(
    ("when", "met"),
    [
        (None, True),
        ({"transfer.freeze": 0}, True),
        ({"transfer.freeze": "all"}, False),
        ({"transfer.freeze": ["all", 0]}, True),
        ({"transfer.freeze": 0, "train.seed": 1}, False),
        ({"transfer.from_scratch": 0}, False),
        ({"train.weight_decay": 0.01}, True),
        ({ADAPTER: None}, True),
        ({f"{ADAPTER}.type": "lora"}, False),
        ({f"{ADAPTER}.type": None}, True),
        ({"transfer.head": {"dropout": 0.1}}, True),
        ({"transfer.head": {"dropout": 0.1, "layers": [3]}}, False),
        ({"transfer.head.layers": [[], [64]]}, True),
        ({"transfer.head.layers": [[64]]}, False),
    ],
)
def test_a_condition_holds_when_all_its_places_have_one_of_the_values(when: dict[str, Any] | None, met: bool) -> None:
    assert holds(when, DATA) is met


def test_values_are_put_into_a_copy_and_parts_after_the_whole() -> None:
    assert put({"a": {"b": 1, "c": 2}}, "a.b", 3) == {"a": {"b": 3, "c": 2}}
    assert put({"a": None}, "a.b.c", 3) == {"a": {"b": {"c": 3}}}
    before = {"a": {"b": 1}}
    assert put_all(before, {"a.b": 2, "a": {"b": 0, "c": 0}}) == {"a": {"b": 2, "c": 0}}
    assert before == {"a": {"b": 1}}


def test_what_is_asked_for_comes_first_and_the_rest_stays_as_written() -> None:
    space = {
        "train.learning_rate": case(when={ADAPTER: {"type": "lora"}}, loguniform=[1e-5, 1e-3]),
        RANK: case(when={f"{ADAPTER}.type": "lora"}, choice=[4]),
        "train.seed": case(choice=[0, 1]),
        ADAPTER: case(choice=[None, {"type": "lora"}]),
    }
    assert put_in_order(space) == (["train.seed", ADAPTER, "train.learning_rate", RANK], [])


def test_a_condition_on_a_section_asks_for_the_keys_that_it_names_alone() -> None:
    on_type = case(when={ADAPTER: {"type": "lora"}}, choice=[1])
    assert not depends_on("transfer.adapter.alpha", on_type, RANK)
    assert depends_on("transfer.adapter.alpha", case(when={ADAPTER: {"r": 8}}, choice=[1]), RANK)
    assert depends_on("transfer.adapter.alpha", case(when={ADAPTER: [None, {"r": 8}]}, choice=[1]), RANK)
    assert depends_on("transfer.adapter.alpha", case(choice=[1]), ADAPTER)


def test_places_in_a_circle_are_named() -> None:
    space = {
        "train.seed": case(choice=[0]),
        "train.keep": case(when={"train.epochs": 1}, choice=[1]),
        "train.epochs": case(when={"train.keep": 1}, choice=[1]),
    }
    assert put_in_order(space) == (["train.seed"], ["train.keep", "train.epochs"])


def test_combinations_are_crossed_in_written_order_and_follow_the_conditions() -> None:
    space = {
        "transfer.freeze": case(choice=[0, "all"]),
        ADAPTER: (Case(when={"transfer.freeze": "all"}, choice=[None]), Case(choice=[None, {"type": "lora"}])),
        RANK: case(when={f"{ADAPTER}.type": "lora"}, choice=[4, 8]),
    }
    lora = {"type": "lora"}
    assert list(Combinations(RECIPE, space).walk(choices)) == [
        {"transfer.freeze": 0, ADAPTER: None},
        {"transfer.freeze": 0, ADAPTER: lora, RANK: 4},
        {"transfer.freeze": 0, ADAPTER: lora, RANK: 8},
        {"transfer.freeze": "all", ADAPTER: None},
    ]


def test_conditions_see_the_defaults_of_a_chosen_section() -> None:
    """`{type: lora}` has `variant: lora`, though it does not say so."""
    space = {
        ADAPTER: case(choice=[{"type": "lora"}, {"type": "lora", "variant": "dora"}]),
        "train.seed": (Case(when={f"{ADAPTER}.variant": "lora"}, choice=[1]), Case(choice=[2])),
    }
    assert [each["train.seed"] for each in Combinations(RECIPE, space).walk(choices)] == [1, 2]


def test_the_first_case_that_applies_counts() -> None:
    space = {
        "train.seed": (
            Case(when={"transfer.freeze": 0}, choice=[1]),
            Case(when={"transfer.freeze": [0, 1]}, choice=[2]),
        ),
        "transfer.freeze": case(choice=[0, 1, 2]),
    }
    assert list(Combinations(RECIPE, space).walk(choices)) == [
        {"train.seed": 1, "transfer.freeze": 0},
        {"train.seed": 2, "transfer.freeze": 1},
        {"transfer.freeze": 2},
    ]


def test_every_stands_for_what_leaves_something_to_train() -> None:
    assert boundaries(RECIPE, 3) == [0, "stem", 1, 2, 3, "all"]

    def of(override: str) -> list[int | str]:
        text = "name: m\nsource: {model: a/b}\ntarget: {task: t, data: c/d}"
        return boundaries(parse_recipe(text, overrides=[override]), 3)

    assert of("transfer.adapter.type=lora") == [0, "stem", 1, 2]
    assert of("transfer.layer_decay=0.9") == [0, "stem", 1, 2, 3]
    written = write_boundaries({"transfer.freeze": case(choice="every"), "train.seed": case(choice=[1])}, [0, "all"])
    assert written == {"transfer.freeze": case(choice=[0, "all"]), "train.seed": case(choice=[1])}
