"""The section `search`: each mistake in it is one problem at its place, all of them in one report."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import Problem, RecipeError
from orchestrator.recipe import Recipe, dump_recipe, parse_recipe
from orchestrator.recipe.combination_rules import count_evaluations
from orchestrator.recipe.reference import shape_of
from orchestrator.recipe.schema import Case, Search, Train

GOOD = """\
name: mine
source: {model: owner/model}
target: {task: text-classification, data: owner/data}
search:
  trials: 64
  space:
"""
FILE = Path("mine.yaml").absolute()


def with_space(*lines: str) -> str:
    """A recipe whose space has these lines; the first is line 7."""
    return GOOD + "".join(f"    {line}\n" for line in lines)


def problems_of(text: str, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, FILE, overrides)
    assert all(problem.where and problem.remedy for problem in caught.value.problems)
    return list(caught.value.problems)


def search_of(text: str, *overrides: str) -> Search:
    search = parse_recipe(text, FILE, overrides).search
    assert search is not None
    return search


def test_a_recipe_without_the_section_has_none() -> None:
    recipe = parse_recipe(GOOD.partition("search")[0])
    assert recipe.search is None
    assert yaml.safe_load(dump_recipe(recipe))["search"] is None


def test_the_whole_section_is_read_and_dumped_again() -> None:
    text = with_space(
        "transfer.freeze: {choice: every}",
        "train.learning_rate:",
        "  - {when: {transfer.freeze: all}, loguniform: [3e-3, 1]}",
        "  - {loguniform: [1e-5, 2e-4]}",
        "train.weight_decay: {uniform: [0, 0.1]}",
        "train.keep: {integers: [1, 3]}",
        "transfer.head.layers: {choice: [[], [64]]}",
        "transfer.layer_decay: {when: {transfer.freeze: [0, stem]}, choice: [null, 0.9]}",
    )
    recipe = parse_recipe(text, FILE)
    dumped = yaml.safe_load(dump_recipe(recipe))["search"]
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert list(dumped) == list(Search.model_fields)
    assert dumped["space"]["train.learning_rate"] == [
        {"when": {"transfer.freeze": "all"}, "loguniform": [0.003, 1.0]},
        {"loguniform": [1e-5, 2e-4]},
    ]
    assert dumped["space"]["transfer.layer_decay"] == {
        "when": {"transfer.freeze": [0, "stem"]},
        "choice": [None, 0.9],
    }


def test_the_defaults_stand_in_the_schema() -> None:
    search = search_of("\n".join(GOOD.splitlines()[:3]) + "\nsearch: {}\n")
    assert (search.space, search.trials, search.algorithm, search.scheduler) == (None, 16, "grid", "none")
    assert (search.grace, search.reduction, search.reseed_top, search.concurrent) == (1, 3, 0, "auto")


@pytest.mark.parametrize(
    ("line", "place", "what", "remedy"),
    [
        ("transfer.freez: {choice: [0]}", "transfer.freez", "`transfer.freez` is not a key", "mean `transfer.freeze`?"),
        ("learning_rate: {loguniform: [1e-5, 1]}", "learning_rate", "is not a key", "mean `train.learning_rate`?"),
        ("zzz: {choice: [0]}", "zzz", "`zzz` is not a key of a recipe", "write one as `train.learning_rate`"),
        ("train.epochs.x: {choice: [0]}", "train.epochs.x", "is not a key of a recipe", "mean `train.epochs`?"),
        ("transfer: {freeze: {choice: [0]}}", "transfer.freeze", "unknown key `freeze`", "with dots: `transfer.freeze"),
        ("name: {choice: [a]}", "name", "cannot vary between trials: a search names", "take it out"),
        ("scale.workers: {choice: [1, 2]}", "scale.workers", "cannot vary between trials: all trials", "take it out"),
        ("target.data: {choice: [a/b]}", "target.data", "compared on the same examples", "take it out"),
        ("target.limit.test: {choice: [5]}", "target.limit.test", "compared on the same examples", "take it out"),
        ("search.seed: {choice: [5]}", "search.seed", "a search does not search itself", "take it out"),
        ("transfer.head: {choice: [{}]}", "transfer.head", "is a whole section", "`transfer.head.dropout`"),
        ("train.keep: {chioce: [1]}", "train.keep.chioce", "unknown key `chioce`", "did you mean `choice`?"),
        ("train.keep: 3", "train.keep", "is 3, must be a mapping with some of the keys `when`, `choice`", "change it"),
        ("train.keep: []", "train.keep", "or a list of such cases", "change it"),
        ("train.keep: {}", "train.keep", "says no values", "add `choice: [...]`"),
        ("train.keep: {choice: []}", "train.keep.choice", "must be `every`, or a list of one value or more", "change"),
        ("train.keep: {choice: every}", "train.keep.choice", "which `train.keep` does not have", "list the values"),
        ("train.keep: {choice: [1], integers: [1, 2]}", "train.keep", "has `choice` and `integers`", "keep one"),
        ("train.keep: {choice: [1, 2, 1]}", "train.keep.choice.2", "`train.keep` may be 1 twice", "keep one"),
        ("train.keep: {integers: [3, 1]}", "train.keep.integers", "is [3, 1], from high to low", "write [1, 3]"),
        ("train.keep: {integers: [1, 2, 3]}", "train.keep.integers", "must be two whole numbers, `[low, hi", "change"),
        ("train.keep: {integers: [0, 3]}", "train.keep.integers.0", "`train.keep` cannot be 0", "change it"),
        ("train.keep: {uniform: [1, 3]}", "train.keep.uniform.0", "cannot be 1.0", "write `integers: [1, 3]`"),
        ("train.schedule: {integers: [1, 3]}", "train.schedule.integers.0", "cannot be 1", "list its values with"),
        ("train.weight_decay: {uniform: [1, 1]}", "train.weight_decay.uniform", "a single value", "`choice: [1]`"),
        ("train.weight_decay: {loguniform: [0, 1]}", "train.weight_decay.loguniform.0", "a number above 0", "change"),
        ("train.weight_decay: {uniform: [0, .inf]}", "train.weight_decay.uniform.1", "is inf", "change it"),
        ("train.warmup_ratio: {uniform: [0, 1]}", "train.warmup_ratio.uniform.1", "cannot be 1.0", "change it"),
        ("transfer.freeze: {choice: [0, 120%]}", "transfer.freeze.choice.1", "cannot be '120%'", "change it"),
        ("transfer.freeze: {choice: [0, stm]}", "transfer.freeze.choice.1", "cannot be 'stm'", "mean `stem`?"),
        ("transfer.freeze: {choice: ['3']}", "transfer.freeze.choice.0", "cannot be '3'", "remove the quotes"),
        ("transfer.adapter: {choice: [{r: 8}]}", "transfer.adapter.choice.0", "`transfer.adapter.type` is miss", "add"),
        ("transfer.adapter: {choice: [{type: lora, rr: 8}]}", "transfer.adapter.choice.0", "unknown key `rr`", "keys"),
        ("transfer.adapter: {choice: [{type: lora, r: 0}]}", "transfer.adapter.choice.0", "`transfer.adapter.r` cannot",
         "change it, or remove it"),
        ("transfer.adapter.r: {choice: [8]}", "transfer.adapter.r", "but `transfer.adapter` is null in this recipe",
         "give `transfer.adapter` a value"),
        ("train.keep: {when: {}, choice: [1]}", "train.keep.when", "names no condition", "remove it"),
        ("train.keep: {when: {train.epoch: 1}, choice: [1]}", "train.keep.when.train.epoch", "is not a key of a recipe",
         "did you mean `train.epochs`?"),
        ("train.keep: {when: {train.epochs: -1}, choice: [1]}", "train.keep.when.train.epochs",
         "`train.epochs` cannot be -1", "change it"),
        ("train.keep: {when: {train.epochs: []}, choice: [1]}", "train.keep.when.train.epochs", "names no value",
         "name one"),
        ("train.keep: {when: {train.keep: 1}, choice: [1]}", "train.keep.when.train.keep",
         "asks for the value that it decides about", "another place's value"),
    ],
)  # fmt: skip
def test_a_wrong_place_or_value_is_one_problem_in_its_line(line: str, place: str, what: str, remedy: str) -> None:
    (problem,) = problems_of(with_space(line))
    assert problem.where == f"mine.yaml:7 (search.space.{place})"
    assert what in problem.what
    assert remedy in str(problem.remedy)


@pytest.mark.parametrize(
    ("lines", "where", "what", "remedy"),
    [
        (["train.keep:", "  - {choice: [1]}", "  - {when: {transfer.freeze: 0}, choice: [2]}"],
         "8 (search.space.train.keep.0)", "this case of `train.keep` always applies", "or put it last"),
        (["transfer.freeze: {choice: [0, all]}", "train.keep:", "  - {when: {transfer.freeze: 5}, choice: [1]}",
          "  - {choice: [2]}"],
         "9 (search.space.train.keep.0.when)", "never applies: no trial has `transfer.freeze: 5`", "values that the"),
        (["transfer.freeze: {choice: [0, all]}", "train.keep:", "  - {when: {transfer.freeze: [0, all]}, choice: [1]}",
          "  - {when: {transfer.freeze: 0}, choice: [2]}"],
         "10 (search.space.train.keep.1.when)", "when it is reached", "put the case first"),
        (["train.weight_decay: {uniform: [0, 0.1]}", "train.keep: {when: {train.weight_decay: 0}, choice: [1]}"],
         "8 (search.space.train.keep.when.train.weight_decay)", "drawn from a range", "a `choice`"),
        (["train.epochs: {when: {train.keep: 1}, choice: [1]}", "train.keep: {when: {train.epochs: 1}, choice: [1]}"],
         "7 (search.space.train.epochs)", "`train.epochs` and `train.keep` depend on each other", "remove the `when`"),
        (["transfer.adapter: {choice: [null, {type: lora}]}", "transfer.adapter.r: {integers: [4, 8]}"],
         "8 (search.space.transfer.adapter.r)", "but `transfer.adapter` may be null",
         "give `transfer.adapter.r` `when: {transfer.adapter.type: lora}`"),
        (["transfer.adapter: {choice: [{type: lora, r: 8}]}", "transfer.adapter.r: {integers: [4, 8]}"],
         "8 (search.space.transfer.adapter.r)", "`transfer.adapter` sets `r` to 8", "take `r` out"),
        (["transfer.freeze: {choice: [0, all]}", "transfer.adapter: {choice: [null, {type: lora}]}"],
         "7 (search.space.transfer.freeze)",
         "trials with `transfer.freeze: all` and `transfer.adapter: {type: lora}` cannot run: ",
         "`transfer.adapter: [{when: {transfer.freeze: all}, choice: [...]}"),
        (["source.model: {choice: [a/b, c/d]}", "transfer.freeze: {choice: every}"],
         "8 (search.space.transfer.freeze.choice)", "but `source.model` is searched too", "25%"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_problem(lines: list[str], where: str, what: str, remedy: str) -> None:
    (problem,) = problems_of(with_space(*lines))
    assert problem.where == f"mine.yaml:{where}"
    assert what in problem.what
    assert remedy in str(problem.remedy)


@pytest.mark.parametrize(
    ("lines", "overrides", "what"),
    [
        (["transfer.freeze: {choice: [0, all]}"], ["transfer.adapter.type=lora"], "has no block to go into"),
        (["train.global_batch_size: {integers: [8, 16]}"], ["scale.workers=4"], "`train.global_batch_size: 9` cannot"),
        (["source.revision: {choice: [main]}"], ["source.trust_remote_code=true", f"source.revision='{'0' * 40}'"],
         "does not pin a commit"),
    ],
)  # fmt: skip
def test_values_that_break_a_rule_with_the_rest_of_the_recipe_are_told(
    lines: list[str], overrides: list[str], what: str
) -> None:
    (problem,) = problems_of(with_space(*lines), *overrides)
    assert what in problem.what


@pytest.mark.parametrize(
    "lines",
    [
        ["transfer.adapter: {choice: [null, {type: lora}]}",
         "transfer.adapter.r: {when: {transfer.adapter.type: lora}, integers: [4, 64]}",
         "transfer.adapter.alpha: {when: {transfer.adapter: {type: lora}}, choice: [16, 32]}"],
        ["transfer.adapter: {choice: [{type: lora}, {type: lora, variant: dora}]}",
         "transfer.adapter.r: {integers: [4, 64]}"],
        ["transfer.freeze: {choice: [0, all]}",
         "transfer.adapter: [{when: {transfer.freeze: all}, choice: [null]}, {choice: [null, {type: lora}]}]"],
        ["transfer.freeze: {choice: every}", "train.keep: [{when: {transfer.freeze: [all, 12]}, choice: [1]}]"],
        ["target.limit.per_class: {choice: [8, 16]}", "target.options.max_length: {choice: [32, 64]}"],
        ["train.keep: {when: {transfer.adapter.type: lora}, choice: [1, 2]}"],
        ["transfer.from_scratch: {choice: [true, false]}", "train.max_grad_norm: {choice: [null, 1]}"],
        ["source.model: {choice: [a/b, c/d]}", "transfer.freeze: {choice: [0, 50%]}"],
    ],
)  # fmt: skip
def test_what_makes_sense_is_accepted(lines: list[str]) -> None:
    assert search_of(with_space(*lines)).space


def test_a_place_may_be_narrowed_on_the_command_line_though_a_case_asks_for_more() -> None:
    text = with_space(
        "transfer.freeze: {choice: [0, all]}",
        "train.keep: [{when: {transfer.freeze: all}, choice: [1]}, {choice: [2]}]",
    )
    assert search_of(text, "search.space.transfer.freeze.choice=[0]")
    (problem,) = problems_of(text.replace("[0, all]", "[0]"))
    assert "never applies" in problem.what


def test_every_leaves_out_what_an_adapter_of_the_recipe_cannot_have() -> None:
    assert search_of(with_space("transfer.freeze: {choice: every}"), "transfer.adapter.type=lora").space


def test_one_report_names_everything_that_is_wrong_with_the_section() -> None:
    text = with_space(
        "transfer.freez: {choice: [0]}",
        "train.keep: {choice: [0, 1], when: {train.epoch: 1}}",
        "train.learning_rate: {loguniform: [1e-3, 1e-5]}",
        "transfer.adapter: {choice: [null, {type: lora}]}",
        "transfer.adapter.r: {choice: [8]}",
    )
    problems = problems_of(text, "search.trials=0", "search.reseed_top=-1", "search.mode=max")
    assert [str(problem.where).partition(" ")[0] for problem in problems] == [
        "search.trials=0", "search.reseed_top=-1", "search.mode=max",
        "mine.yaml:7", "mine.yaml:8", "mine.yaml:8", "mine.yaml:9", "mine.yaml:11",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "what", "mended"),
    [
        (["search.mode=min"], "does not say of which metric", ["search.metric=loss"]),
        (["search.reseed_top=65"], "at most 64 trials", ["search.reseed_top=64"]),
        (["search.scheduler=asha", "train.epochs=1"], "evaluated once", ["train.epochs=3"]),
        (["search.scheduler=asha", "search.grace=3"], "evaluated 3 times", ["search.grace=2"]),
        (["search.scheduler=asha", "train.steps=50", "train.evaluate_every=50"], "evaluated once",
         ["train.evaluate_every=10"]),
        (["search.scheduler=pbt", "search.grace=9"], "too late to exchange anything", ["search.grace=1"]),
        (["search.scheduler=pbt", "search.trials=1"], "learn from each other", ["search.trials=8"]),
        (["search.scheduler=pbt", "search.algorithm=tpe"], "would learn from wrong ones", ["search.algorithm=random"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_one_problem_that_its_remedy_mends(
    overrides: list[str], what: str, mended: list[str]
) -> None:
    text = with_space("train.learning_rate: {loguniform: [1e-5, 1e-3]}")
    (problem,) = problems_of(text, *overrides)
    assert what in problem.what
    assert str(problem.where).endswith("(command line)")
    assert search_of(text, *overrides, *mended)


def test_a_searched_length_of_training_is_held_against_the_scheduler() -> None:
    (problem,) = problems_of(with_space("train.epochs: {choice: [4, 1]}"), "search.scheduler=asha")
    assert "evaluated once" in problem.what


def test_seeds_are_searched_or_the_best_get_others() -> None:
    text = with_space("train.seed: {choice: [0, 1, 2]}")
    assert search_of(text)
    (problem,) = problems_of(text, "search.reseed_top=1")
    assert "other seeds too" in problem.what


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("transfer.freeze: {choice: [0, 1]}", "`transfer.freeze` cannot change in the middle of a trial"),
        ("train.epochs: {choice: [2, 3]}", "`train.epochs` cannot change in the middle of a trial"),
        (
            "train.weight_decay: {when: {train.learning_rate: 1e-3}, choice: [0, 0.1]}",
            "depend on what else is searched",
        ),
    ],
)
def test_population_based_training_changes_rates_only(line: str, what: str) -> None:
    (problem,) = problems_of(with_space("train.learning_rate: {choice: [1e-3, 1e-4]}", line), "search.scheduler=pbt")
    assert what in problem.what


def test_a_grid_larger_than_the_trials_is_counted_and_refused() -> None:
    text = with_space(
        "transfer.freeze: {choice: [0, 2, all]}",
        "train.schedule: [{when: {transfer.freeze: all}, choice: [constant]}, {choice: [linear, cosine]}]",
        "train.learning_rate: {loguniform: [1e-5, 1e-3]}",
    )
    (problem,) = problems_of(text, "search.trials=4")
    assert problem.what == "the grid has 5 points with a single value of each range, but `search.trials` is 4"
    assert "set `search.trials` to 5 or more, or `search.algorithm` to random" in str(problem.remedy)
    assert search_of(text, "search.trials=5")
    assert search_of(text, "search.trials=4", "search.algorithm=tpe")


@pytest.mark.timeout(120)
def test_a_space_of_a_million_combinations_is_checked_without_going_through_them() -> None:
    tens = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"
    text = with_space(
        *(f"train.{key}: {{choice: {tens}}}" for key in ("keep", "log_every", "weight_decay", "max_grad_norm")),
        f"train.epochs: {{choice: {tens}}}",
        "transfer.freeze: {choice: [0, all]}",
        "transfer.adapter: {choice: [null, {type: lora}]}",
    )
    problems = problems_of(text)
    assert ["has no block to go into" in problem.what for problem in problems] == [True, False]
    assert "more than 100,000 points" in problems[1].what


def test_an_empty_space_is_refused() -> None:
    (problem,) = problems_of(GOOD.replace("space:", "space: {}"))
    assert problem.what == "`search.space` is empty, so there is nothing to search"


def test_places_of_the_space_are_overridden_by_their_dotted_names() -> None:
    text = with_space(
        "train.learning_rate:",
        "  - {when: {transfer.freeze: all}, loguniform: [1e-3, 1]}",
        "  - {loguniform: [1e-5, 1e-3]}",
    )
    overrides = [
        "search.space.transfer.freeze.choice=[0, all]",
        "search.space.transfer.head.dropout={uniform: [0, 0.5]}",
        "search.space.train.learning_rate.1.loguniform=[1e-4, 1e-3]",
    ]
    space = search_of(text, *overrides).space
    assert space is not None
    assert space["transfer.freeze"] == Case(choice=[0, "all"])
    assert space["transfer.head.dropout"] == Case(uniform=[0, 0.5])
    assert isinstance(space["train.learning_rate"], list)
    assert space["train.learning_rate"][1] == Case(loguniform=[1e-4, 1e-3])
    (problem,) = problems_of(text, "search.space.train.keep.chioce=[1]")
    assert "did you mean `choice`?" in str(problem.remedy)
    assert problem.where == "search.space.train.keep.chioce=[1] (command line)"


def test_no_key_of_a_recipe_looks_like_a_word_of_a_case() -> None:
    """Else an override of a place in the space would be cut in the wrong place."""
    from orchestrator.errors import nearest

    shape = shape_of(Recipe)
    keys = {key for path in shape.sections() for key in shape.keys(path)}
    assert "learning_rate" in keys
    assert {key: nearest(key, Case.model_fields) for key in keys if nearest(key, Case.model_fields)} == {}


@pytest.mark.parametrize(
    ("train", "number"),
    [
        (Train(epochs=3), 3),
        (Train(epochs=2.5), 3),
        (Train(steps=100, evaluate_every=30), 4),
        (Train(steps=100), None),
        (Train(epochs=2, evaluate_every=30), None),
    ],
)
def test_evaluations_are_counted_where_the_recipe_says_enough(train: Train, number: int | None) -> None:
    assert count_evaluations(train) == number


def test_the_prefix_is_cached_where_it_pays_unless_told_otherwise() -> None:
    text = "\n".join(GOOD.splitlines()[:3]) + "\n"
    recipe = parse_recipe(text)
    assert (recipe.train.cache_prefix, recipe.scale.cache_gigabytes) == ("auto", "auto")
    recipe = parse_recipe(text, overrides=["train.cache_prefix=false", "scale.cache_gigabytes=2"])
    assert (recipe.train.cache_prefix, recipe.scale.cache_gigabytes) == (False, 2)
    with pytest.raises(RecipeError, match="write `true` or `false`"):
        parse_recipe(text, overrides=["train.cache_prefix=yes"])
    with pytest.raises(RecipeError, match="must be `auto`, or a number above 0"):
        parse_recipe(text, overrides=["scale.cache_gigabytes=0"])


PLACES = st.sampled_from(
    ["transfer.freeze", "transfer.adapter", "transfer.adapter.r", "train.learning_rate", "train.keep", "train",
     "target.options.x", "target.columns", "transfer.head.layers", "train.early_stopping", "search", "..", "a b"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(0, 1) | st.sampled_from(["all", "stem", "lora", "50%"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "r", "patience"]), inner, max_size=2)
    ),
    max_leaves=4,
)
NUMBERS = st.lists(st.integers(-1, 10**30) | st.floats(1e-9, 9), min_size=2, max_size=2)
ENTRIES = st.fixed_dictionaries({"choice": st.just("every") | st.lists(VALUES, min_size=1, max_size=3)}) | st.one_of(
    *(st.fixed_dictionaries({kind: NUMBERS}) for kind in ("uniform", "loguniform", "integers"))
)
WITH_CONDITIONS = st.tuples(st.dictionaries(PLACES, VALUES, max_size=2), ENTRIES).map(
    lambda parts: {"when": parts[0], **parts[1]}
)


@settings(deadline=None, max_examples=300)
@given(
    space=st.dictionaries(PLACES, ENTRIES | WITH_CONDITIONS | st.lists(ENTRIES | WITH_CONDITIONS, max_size=3)),
    scheduler=st.sampled_from(["none", "asha", "pbt"]),
)
def test_whatever_a_space_holds_is_read_or_refused_with_places_and_remedies(
    space: dict[str, Any], scheduler: str
) -> None:
    data = {**yaml.safe_load(GOOD), "search": {"space": space, "scheduler": scheduler, "algorithm": "random"}}
    try:
        search = parse_recipe(yaml.safe_dump(data), FILE).search
    except RecipeError as error:
        assert all(problem.where and problem.remedy for problem in error.problems)
    else:
        assert search is not None
