"""Overrides from the command line: dotted paths, YAML values, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recipe.overrides import apply_overrides

KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
# What JSON writes as it is but YAML reads otherwise (control characters, line separators) is left out.
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Zl", "Zp"]))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**90), 10**90)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@pytest.mark.parametrize(
    ("override", "result"),
    [
        ("train.learning_rate=1e-4", {"train": {"learning_rate": 1e-4}}),
        ("transfer.head.layers=[64, 32]", {"transfer": {"head": {"layers": [64, 32]}}}),
        ("transfer.adapter={type: lora, r: 8}", {"transfer": {"adapter": {"type": "lora", "r": 8}}}),
        ("train.steps=null", {"train": {"steps": None}}),
        ("name=a=b", {"name": "a=b"}),
        ("name='1'", {"name": "1"}),
        ("name=''", {"name": ""}),
        (" name = x ", {"name": "x"}),
    ],
)
def test_values_are_yaml_and_sections_are_made(override: str, result: dict[str, Any]) -> None:
    assert apply_overrides({}, [override]) == (result, {override.partition("=")[0].strip(): override}, [])


def test_the_data_given_stays_as_it_was() -> None:
    data = {"a": {"b": [1]}}
    new, _, _ = apply_overrides(data, ["a.b.0=2", "a.c=3"])
    assert data == {"a": {"b": [1]}}
    assert new == {"a": {"b": [2], "c": 3}}


def test_a_section_that_is_null_is_made() -> None:
    assert apply_overrides({"a": None}, ["a.b.c=1"])[0] == {"a": {"b": {"c": 1}}}


def test_list_items_are_set_and_appended_by_number() -> None:
    assert apply_overrides({"a": [1, {"b": 2}]}, ["a.0=5", "a.1.b=6", "a.2=7", "a.3.b=8"])[0] == {
        "a": [5, {"b": 6}, 7, {"b": 8}]
    }


def test_a_later_override_wins_and_takes_the_place_of_what_it_replaces() -> None:
    data, texts, problems = apply_overrides({}, ["a.b=1", "a.c=2", "a={d: 3}", "a.e=4"])
    assert data == {"a": {"d": 3, "e": 4}}
    assert texts == {"a": "a={d: 3}", "a.e": "a.e=4"}
    assert problems == []


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.epochs", "no `=`"),
        ("=3", "empty key"),
        ("train..epochs=3", "empty key"),
        (".epochs=3", "empty key"),
        ("train.epochs=", "no value"),
        ("name.x=3", "`name` is 'mine', which has no key `x`"),
        ("items.x=3", "a list of 2, which has no item `x`"),
        ("items.3=3", "a list of 2, which has no item `3`"),
        ("items.-1=3", "a list of 2, which has no item `-1`"),
        ("train.epochs=[1", "bracket or brace is not closed"),
        ("train.epochs=!!python/name:os.system", "is not allowed"),
        ("train={a: 1, a: 2}", "given twice"),
    ],
)
def test_what_leads_nowhere_is_a_problem_and_changes_nothing(override: str, what: str) -> None:
    before = {"name": "mine", "items": [1, 2]}
    data, texts, problems = apply_overrides(before, [override])
    assert (data, texts) == (before, {})
    (problem,) = problems
    assert what in problem.what
    assert problem.where == f"{override} (command line)"
    assert problem.remedy


def test_all_wrong_overrides_are_reported() -> None:
    assert len(apply_overrides({}, ["a", "b", "c=1", "d..e=1"])[2]) == 3


@given(path=st.lists(KEYS, min_size=1, max_size=4), value=VALUES)
def test_any_value_written_as_json_arrives(path: list[str], value: Any) -> None:
    data, texts, problems = apply_overrides({}, [f"{'.'.join(path)}={json.dumps(value, ensure_ascii=False)}"])
    assert problems == []
    assert list(texts) == [".".join(path)]
    for key in path:
        data = data[key]
    assert data == value
