"""From text to recipe and back: every mistake at its place with a remedy, all in one report; dumps load back equal."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import Problem, RecipeError
from orchestrator.recipe import Data, Recipe, dump_recipe, load_recipe, parse_recipe
from orchestrator.recipe.load import check_section
from orchestrator.recipe.reading import read_yaml
from orchestrator.recipe.schema import Section

GOOD = """\
name: mine
source:
  model: owner/model
target:
  task: text-classification
  data: owner/data
"""
FILE = Path("mine.yaml").absolute()


def problems_of(text: str, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, FILE, overrides)
    assert all(problem.where and problem.remedy for problem in caught.value.problems)
    return list(caught.value.problems)


def test_a_short_recipe_takes_the_defaults() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.source.model == "owner/model"
    assert recipe.train.learning_rate == 5e-5
    assert recipe.transfer.adapter is None


def test_rates_written_as_1e_4_are_numbers() -> None:
    assert parse_recipe(GOOD + "train: {learning_rate: 1e-4}").train.learning_rate == 1e-4
    assert parse_recipe(GOOD, overrides=["train.learning_rate=1E-4"]).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("written", "line", "path", "what", "remedy"),
    [
        ("tain: {epochs: 3}", 7, "tain", "unknown key `tain` in a recipe", "did you mean `train`?"),
        ("train:\n  learning_rat: 1", 8, "train.learning_rat", "unknown key `learning_rat` in `train`",
         "did you mean `learning_rate`? the keys of `train` are `epochs`"),
        ("epochs: 3", 7, "epochs", "unknown key `epochs`", "move it to `train`;"),
        ("zzz: 3", 7, "zzz", "unknown key `zzz`", "the keys of a recipe are `name`, `source`"),
        ("train: {epochs: -1}", 7, "train.epochs", "`train.epochs` is -1, must be a number above 0, or `null`",
         "remove the key for the default, 3"),
        ("train: {learning_rate: 0}", 7, "train.learning_rate", "is 0, must be a number above 0", "5e-05"),
        ("train: {learning_rate: .nan}", 7, "train.learning_rate", "is nan, must be a number above 0", "5e-05"),
        ("train: {learning_rate: .inf}", 7, "train.learning_rate", "is inf, must be a number above 0", "5e-05"),
        ("train: {learning_rate: '1e-4'}", 7, "train.learning_rate", "is '1e-4'", "remove the quotes"),
        ("train: {warmup_ratio: 1}", 7, "train.warmup_ratio", "must be a number at least 0 and below 1", "0.1"),
        ("train: {schedule: linaer}", 7, "train.schedule", "must be one of `linear`, `cosine`",
         "did you mean `linear`?"),
        ("train: {gradient_checkpointing: yes}", 7, "train.gradient_checkpointing",
         "is 'yes', must be `true` or `false`", "without quotes"),
        ("train: {micro_batch_size: many}", 7, "train.micro_batch_size",
         "is 'many', must be `auto`, or a whole number above 0", "'auto'"),
        ("train: {evaluate_every: 0}", 7, "train.evaluate_every", "must be `epoch`, or a whole number above 0",
         "'epoch'"),
        ("train: {seed: 3.5}", 7, "train.seed", "must be a whole number at least 0 and below 2,147,483,648", "0"),
        ("train: {seed: true}", 7, "train.seed", "`train.seed` is true", "0"),
        ("train:", 7, "train", "`train` is null, must be a mapping", "put keys below it, or remove the line"),
        ("train: 3", 7, "train", "`train` is 3, must be a mapping", "change it"),
        ("transfer:\n  freeze: 120%", 8, "transfer.freeze",
         "must be one of `stem`, `all`, or a whole number at least 0, or a percentage such as `50%`", "default, 0"),
        ("transfer:\n  freeze: -1", 8, "transfer.freeze", "`transfer.freeze` is -1", "default, 0"),
        ("transfer:\n  freeze: stm", 8, "transfer.freeze", "is 'stm'", "did you mean `stem`?"),
        ("transfer:\n  head:\n    layers:\n      - 64\n      - -1", 11, "transfer.head.layers.1",
         "`transfer.head.layers.1` is -1, must be a whole number above 0", "change it"),
        ("transfer:\n  adapter:\n    r: 8", 8, "transfer.adapter", "`transfer.adapter.type` is missing", "`lora`"),
        ("transfer:\n  adapter: {type: lora, r: 0}", 8, "transfer.adapter.r", "is 0, must be a whole number above 0",
         "16"),
        ("transfer:\n  adapter: {type: lora, targets: [a, 3]}", 8, "transfer.adapter.targets.1",
         "is 3, must be text", "put it in quotes"),
        ("transfer:\n  adapter: {type: lora, targets: all}", 8, "transfer.adapter.targets",
         "must be `all-linear`, or a list with text for each item", "'all-linear'"),
        ("transfer:\n  layer_decay: 1.5", 8, "transfer.layer_decay", "must be a number above 0 and at most 1", "null"),
        ("scale: {zero_stage: 4}", 7, "scale.zero_stage", "is 4, must be a whole number at least 0 and at most 3",
         "0"),
        ("scale: {zero_stage: true}", 7, "scale.zero_stage", "is true", "0"),
        ("scale: {workers: 2.0}", 7, "scale.workers", "is 2.0, must be a whole number above 0", "1"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_problem_at_its_place(written: str, line: int, path: str, what: str, remedy: str) -> None:
    (problem,) = problems_of(GOOD + written)
    assert problem.where == f"mine.yaml:{line} ({path})"
    assert what in problem.what
    assert problem.remedy is not None
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("target", "line", "path", "what"),
    [
        ("data: 3", 6, "target.data", "`target.data` is 3, must be text, or a mapping with some of the keys `path`"),
        ("data: [a.jsonl]", 6, "target.data", "must be text, or a mapping"),
        ("data: ''", 6, "target.data", "is ''"),
        ("data: {trian: a.jsonl, train: b.jsonl}", 6, "target.data.trian", "unknown key `trian` in `target.data`"),
        ("data:\n    train: 3", 7, "target.data.train", "is 3, must be text, or a list with text for each item"),
        ("data:\n    train:\n      - a.jsonl\n      - 3", 9, "target.data.train.1", "is 3, must be text"),
        ("data: x\n  columns: {text: 0}", 7, "target.columns.text", "is 0, must be text"),
        ("data: x\n  columns: text", 7, "target.columns", "is 'text', must be a mapping"),
        ("data: x\n  limit: {train: 0}", 7, "target.limit.train", "is 0, must be a whole number above 0, or `null`"),
    ],
)  # fmt: skip
def test_a_union_complains_once_about_the_member_that_was_meant(target: str, line: int, path: str, what: str) -> None:
    (problem,) = problems_of(GOOD.replace("data: owner/data", target))
    assert problem.where == f"mine.yaml:{line} ({path})"
    assert what in problem.what


def test_missing_parts_are_named_with_what_belongs_there() -> None:
    problems = problems_of("source: {}\n")
    assert [(problem.where, problem.what) for problem in problems] == [
        ("mine.yaml (name)", "`name` is missing"),
        ("mine.yaml:1 (source)", "`source.model` is missing"),
        ("mine.yaml (target)", "`target` is missing"),
    ]
    assert "Hub id" in str(problems[1].remedy)


def test_a_misspelt_required_key_is_not_also_missing() -> None:
    (problem,) = problems_of(GOOD.replace("model:", "modell:"))
    assert problem.what == "unknown key `modell` in `source`"


def test_names_are_checked() -> None:
    (problem,) = problems_of(GOOD.replace("mine", "My Run"))
    assert problem.what == "`name` is 'My Run', must be 1 to 63 lower-case letters, digits and dashes, no dash first"


def test_one_report_names_everything() -> None:
    """Duplicate keys, a bad override, wrong values and a broken rule between the values that are left."""
    text = GOOD + "train:\n  epochs: -1\n  epochs: 2\n  global_batch_size: 10\nscale:\n  workers: 4\n  ofload: none\n"
    problems = problems_of(text, "transfer.head.dropout=2", "nonsense")
    assert [problem.where for problem in problems] == [
        "mine.yaml:9",
        "nonsense (command line)",
        "transfer.head.dropout=2 (command line)",
        "mine.yaml:8 (train.epochs)",
        "mine.yaml:13 (scale.ofload)",
        "mine.yaml:10 (train.global_batch_size)",
    ]


def test_rules_say_nothing_about_values_that_are_wrong_themselves() -> None:
    """The default of a refused or misspelt value must not break a rule in the user's name."""
    text = (
        GOOD + "train: {global_batch_size: 10, micro_batch_size: 5}\nscale: {workes: 2, offload: all, zero_stage: 9}\n"
    )
    assert [problem.where for problem in problems_of(text)] == [
        "mine.yaml:8 (scale.zero_stage)",
        "mine.yaml:8 (scale.workes)",
    ]


def test_overrides_take_the_place_of_the_files_lines() -> None:
    text = GOOD + "transfer:\n  adapter: {type: lora, r: 0}\n"
    (problem,) = problems_of(text, "transfer.adapter={type: lora, r: -1}")
    assert problem.where == "transfer.adapter={type: lora, r: -1} (command line)"
    (problem,) = problems_of(GOOD, "scale.a.b=1")
    assert problem.where == "scale.a.b=1 (command line)"
    assert problem.what == "unknown key `a` in `scale`"


def test_a_text_without_a_file_still_has_lines() -> None:
    with pytest.raises(RecipeError, match=r"^line 7 \(train\.epochs\): "):
        parse_recipe(GOOD + "train: {epochs: 0}")


def test_options_elsewhere_are_checked_at_their_place() -> None:
    class Options(Section):
        max_length: int = 128

    recipe = parse_recipe(GOOD + "  options:\n    max_lenght: 64\n", FILE)
    with pytest.raises(RecipeError) as caught:
        check_section(Options, recipe.target.options, "target.options", recipe.origin)
    (problem,) = caught.value.problems
    assert problem.where == "mine.yaml:8 (target.options.max_lenght)"
    assert str(problem.remedy).startswith("did you mean `max_length`?")
    assert check_section(Options, {"max_length": 3}, "target.options", recipe.origin) == Options(max_length=3)


def test_a_recipe_loads_from_its_file_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/mine.yaml")
    assert recipe.origin.folder == tmp_path / "recipes"
    assert recipe.origin.where("source.model") == "recipes/mine.yaml:3 (source.model)"
    assert recipe.origin.where("train.seed") == "recipes/mine.yaml (train.seed)"


def test_a_recipe_survives_pickling_with_its_origin() -> None:
    recipe = parse_recipe(GOOD, FILE)
    copy = pickle.loads(pickle.dumps(recipe))
    assert copy == recipe
    assert copy.origin.where("name") == "mine.yaml:1 (name)"


def test_the_dumped_recipe_writes_every_default_in_the_order_of_the_schema() -> None:
    dumped = yaml.safe_load(dump_recipe(parse_recipe(GOOD)))
    assert list(dumped) == list(Recipe.model_fields)
    assert dumped["train"]["learning_rate"] == 5e-5
    assert list(dumped["train"]) == list(type(parse_recipe(GOOD).train).model_fields)


@pytest.mark.parametrize(
    ("data", "dumped"),
    [
        ("../data/x", "{root}/data/x"),
        ("owner/data", "owner/data"),
        ("train.jsonl", "{root}/recipes/train.jsonl"),
        ("{path: ./x, train: train}", {"path": "{root}/recipes/x", "train": "train"}),
        ("{path: owner/x, train: train}", {"path": "owner/x", "train": "train"}),
        ("{train: [a.csv, b.csv], test: /t.csv}",
         {"train": ["{root}/recipes/a.csv", "{root}/recipes/b.csv"], "test": "/t.csv"}),
    ],
)  # fmt: skip
def test_local_paths_are_dumped_in_full(data: str, dumped: Any, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    file = tmp_path / "recipes" / "mine.yaml"
    text = GOOD.replace("owner/data", data).replace("owner/model", "../models/m")
    copy = parse_recipe(dump_recipe(parse_recipe(text, file)), tmp_path / "elsewhere" / "recipe.yaml")
    assert copy.source.model == str(tmp_path / "models" / "m")
    found = (
        copy.target.data.model_dump(exclude_defaults=True) if isinstance(copy.target.data, Data) else copy.target.data
    )
    assert found == yaml.safe_load(yaml.safe_dump(dumped).replace("{root}", str(tmp_path)))


def test_paths_from_the_command_line_start_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes", "here/corpus", "recipes/both", "here/both"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipes" / "mine.yaml").write_text(GOOD.replace("owner/data", "both"))
    monkeypatch.chdir(tmp_path / "here")

    def load(*overrides: str) -> str | Data:
        return load_recipe("../recipes/mine.yaml", overrides).target.data

    assert load() == "both"
    assert load("target.data=corpus") == str(tmp_path / "here" / "corpus")
    assert load("target.data=both") == str(tmp_path / "here" / "both")
    assert load("target.data=./missing") == "./missing"
    assert load("target.data=owner/other") == "owner/other"


WORDS = st.text(min_size=1).filter(lambda text: "\0" not in text and "://" not in text)
OPTIONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**90), 10**90) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
CASES = st.fixed_dictionaries(
    {},
    optional={
        "when": st.dictionaries(WORDS, OPTIONS, max_size=2),
        "choice": st.just("every") | st.lists(OPTIONS, min_size=1, max_size=3),
        "loguniform": st.lists(st.floats(1e-30, 1e30), min_size=2, max_size=2),
        "integers": st.lists(st.integers(), min_size=2, max_size=2),
    },
)
RECIPES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
        "source": st.fixed_dictionaries({"model": st.just("owner/model")}, optional={"revision": WORDS}),
        "target": st.fixed_dictionaries(
            {"task": WORDS, "data": st.just("owner/data")},
            optional={
                "columns": st.dictionaries(WORDS, WORDS, max_size=3),
                "options": st.dictionaries(WORDS, OPTIONS, max_size=3),
                "limit": st.fixed_dictionaries({}, optional={"train": st.none() | st.integers(1, 10**9)}),
            },
        ),
    },
    optional={
        "transfer": st.fixed_dictionaries(
            {},
            optional={
                "freeze": st.sampled_from(["stem", 0, 3, "50%"]),
                "head": st.fixed_dictionaries({"layers": st.lists(st.integers(1, 999), max_size=3)}),
                "adapter": st.none() | st.fixed_dictionaries({"type": st.just("lora"), "r": st.integers(1, 64)}),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": st.floats(1e-30, 1e30),
                "epochs": st.floats(1e-3, 1e9) | st.integers(1, 10**9),
                "evaluate_every": st.just("epoch") | st.integers(1, 10**9),
                "cache_prefix": st.just("auto") | st.booleans(),
            },
        ),
        "search": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "space": st.none()
                | st.dictionaries(WORDS, CASES | st.lists(CASES, min_size=1, max_size=3), max_size=3),
                "seconds": st.none() | st.floats(1e-3, 1e9),
                "concurrent": st.just("auto") | st.integers(1, 10**9),
            },
        ),
    },
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=RECIPES)
def test_a_dumped_recipe_loads_back_equal(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    dumped = dump_recipe(recipe)
    # A space is read as it is written, though most made up here would be refused for what they say.
    assert Recipe.model_validate(read_yaml(dumped, None).data) == recipe
    assert dump_recipe(Recipe.model_validate(read_yaml(dumped, None).data)) == dumped
    assert yaml.safe_load(dumped) == recipe.model_dump()
    if recipe.search is None:
        assert parse_recipe(dumped) == recipe
