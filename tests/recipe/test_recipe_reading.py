"""Reading YAML: plain data, the line of every value, plain words for what is wrong, and caps that hold."""

from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.recipe.reading import MAX_BYTES, read_text, read_yaml

FILE = Path("mine.yaml").absolute()


def refuse(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, FILE)
    return caught.value


def test_every_path_has_its_line() -> None:
    text = "a: 1\n# comment\nb:\n  c: [x,\n      y]\n  d:\n    - e: 1\n    - f: {g: 2}\n"
    document = read_yaml(text, FILE)
    assert document.data == {"a": 1, "b": {"c": ["x", "y"], "d": [{"e": 1}, {"f": {"g": 2}}]}}
    assert document.lines == {
        "a": 1, "b": 3, "b.c": 4, "b.c.0": 4, "b.c.1": 5, "b.d": 6,
        "b.d.0": 7, "b.d.0.e": 7, "b.d.1": 8, "b.d.1.f": 8, "b.d.1.f.g": 8,
    }  # fmt: skip
    assert document.problems == []


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-4", 1e-4), ("5E-5", 5e-5), ("1e5", 1e5), ("3", 3), ("-3", -3), ("+3", 3), ("010", 10),
        (".5", 0.5), ("2.", 2.0), ("-.inf", float("-inf")),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("on", "on"), ("no", "no"), ("yes", "yes"), ("Off", "Off"), ("12:30", "12:30"), ("2024-01-02", "2024-01-02"),
        ("0x1F", "0x1F"), ("0o17", "0o17"), ("1_000", "1_000"), ("e5", "e5"), ("1e", "1e"), (".", "."), ("50%", "50%"),
        ("'1'", "1"), ('"true"', "true"), ("=", "="), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2_has_them(written: str, read: object) -> None:
    value = read_yaml(f"a: {written}", None).data["a"]
    assert value == read
    assert type(value) is type(read)


def test_keys_are_text() -> None:
    assert read_yaml("1: a\ntrue: b\nnull: c\n1.5: d", None).data == {"1": "a", "true": "b", "null": "c", "1.5": "d"}


def test_explicit_tags_of_plain_values_are_read() -> None:
    assert read_yaml("a: !!str 5\nb: !!int 5", None).data == {"a": "5", "b": 5}


def test_a_byte_order_mark_is_stripped(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(read_text(file), file).data == {"a": 1}
    assert read_yaml("\ufeffa: 1", None).data == {"a": 1}


def test_windows_line_ends_keep_the_lines_right() -> None:
    assert read_yaml("a: 1\r\nb: 2\r\n", None).lines == {"a": 1, "b": 2}


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: the recipe is not UTF-8: byte 0xe9"):
        read_text(file)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than 1,048,576 bytes"):
        read_text(file)


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_text(tmp_path)


def test_duplicate_keys_name_both_lines_and_keep_the_first() -> None:
    document = read_yaml("a:\n  b: 1\n  c: 2\n  b: 3\na: 4\n", FILE)
    assert document.data == {"a": {"b": 1, "c": 2}}
    assert [(problem.where, problem.what) for problem in document.problems] == [
        ("mine.yaml:4", "the key `a.b` is given twice, first in line 2"),
        ("mine.yaml:5", "the key `a` is given twice, first in line 1"),
    ]


@pytest.mark.parametrize(
    "written",
    [
        "!!python/object/apply:os.system [echo]", "!!python/name:os.system", "!!python/tuple [1, 2]", "!mine 1",
        "!!set {a, b}", "!!binary aGk=", "!!timestamp 2024-01-02", "!!omap [a: 1]", "!!int abc", "!!map [1]",
    ],
)  # fmt: skip
def test_tags_that_make_objects_are_refused(written: str) -> None:
    document = read_yaml(f"b: 1\na: {written}", FILE)
    assert [(problem.where, "is not allowed" in problem.what) for problem in document.problems] == [
        ("mine.yaml:2", True)
    ]
    assert document.data["a"] is None


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a:\n\tb: 1", "mine.yaml:2", "there is a tab"),
        ("a: b: c", "mine.yaml:1", "a `:` is not allowed here"),
        ("a: 1\n  b: 2", "mine.yaml:2", "a `:` is not allowed here"),
        ("b: 1\na: [1, 2", "mine.yaml:2", "bracket or brace is not closed"),
        ("b: 1\na: 'x\n\n", "mine.yaml:4", "a quote is not closed (begun in line 2)"),
        ("a: *x", "mine.yaml:1", "has no anchor"),
        ("a: @x", "mine.yaml:1", "a value begins with a character that YAML reserves"),
        ("a: - b", "mine.yaml:1", "a `-` is not allowed here"),
        ("a: 1\n---\nb: 2", "mine.yaml:2", "second document"),
        ("a: 1\nb: \x01", "mine.yaml:2", "U+0001 is not allowed"),
        ("a: 1\nb: x\0y", "mine.yaml:2", "U+0000 is not allowed"),
        ('a: "\\q"', "mine.yaml:1", "not a known escape"),
        ("a: }", "mine.yaml:1", "not valid YAML"),
        ("", "mine.yaml", "empty"),
        ("# nothing\n", "mine.yaml", "empty"),
        ("- a\n- b", "mine.yaml:1", "not a mapping"),
        ("hello", "mine.yaml:1", "not a mapping"),
    ],
)  # fmt: skip
def test_what_is_not_a_yaml_mapping_is_refused_in_plain_words(text: str, where: str, what: str) -> None:
    (problem,) = refuse(text).problems
    assert problem.where == where
    assert what in problem.what
    assert problem.remedy


def test_merge_keys_and_keys_that_are_lists_are_problems() -> None:
    document = read_yaml("a: &a {x: 1}\nb: {<<: *a}\n? [c]\n: 1", FILE)
    assert [problem.where for problem in document.problems] == ["mine.yaml:2", "mine.yaml:3"]


def test_plain_aliases_are_read() -> None:
    assert read_yaml("a: &x [1, 2]\nb: *x", None).data == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "a: &a [*a]",
        "a: " + "[" * MAX_BYTES,
        "a:\n" + "- 1\n" * 200_000,
        "\n".join(" " * depth + "a:" for depth in range(1_200)),
    ],
    ids=["billion laughs", "alias of itself", "open brackets", "many values", "deep"],
)
@pytest.mark.timeout(120)
def test_hostile_yaml_is_refused_before_it_fills_the_memory(text: str) -> None:
    refuse(text)
