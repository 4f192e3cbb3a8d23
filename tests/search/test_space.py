"""The space of a search: trials of a grid, of random draws and of TPE lie in it, follow its conditions, and run."""

from __future__ import annotations

import itertools
import math
import pickle
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.errors import RecipeError
from orchestrator.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from orchestrator.recipe.schema import Case
from orchestrator.search.distributions import Choice, Floats, Integers, distribution_of
from orchestrator.search.space import Space, describe, short_names, trial_recipe
from orchestrator.tasks import find_task

FREEZE, RATE, ADAPTER = "transfer.freeze", "train.learning_rate", "transfer.adapter"
BASE: dict[str, Any] = {
    "name": "mine",
    "source": {"model": "owner/model"},
    "target": {"task": "text-classification", "data": "owner/data"},
}
RATES = [{"when": {FREEZE: "all"}, "loguniform": [3e-3, 1.0]}, {"loguniform": [1e-5, 2e-4]}]


def recipe_of(space: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    search = {"trials": 10**6, **sections.pop("search", {})}
    if space is not None:
        search["space"] = space
    return parse_recipe(yaml.safe_dump({**BASE, **sections, "search": search}, sort_keys=False), Path("/x/mine.yaml"))


def space_of(space: dict[str, Any] | None = None, num_layers: int | None = 6, **sections: Any) -> Space:
    return Space.of(recipe_of(space, **sections), num_layers)


def has_the_values_of_its_space(parameters: dict[str, Any], written: dict[str, Any]) -> bool:
    """Whether each value lies in a case whose conditions hold; computed without the code that is tested."""
    depth, adapter = parameters.get(FREEZE, 0), parameters.get(ADAPTER)

    def applies(case: dict[str, Any]) -> bool:
        when = case.get("when", {})
        said = {FREEZE: depth, ADAPTER: adapter, f"{ADAPTER}.type": adapter["type"] if adapter else None}
        return all(said[path] == value for path, value in when.items())

    for path, entry in written.items():
        case = next((each for each in (entry if isinstance(entry, list) else [entry]) if applies(each)), None)
        if case is None or path not in parameters:
            assert (case is None) == (path not in parameters), f"{path} in {parameters}"
            continue
        value, (kind, values) = parameters[path], list(case.items())[-1]
        inside = value in values if kind == "choice" else values[0] <= value <= values[1]
        assert inside, f"{path}: {value} is not in {case}"
        assert kind != "integers" or isinstance(value, int)
    return True


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    """Spaces with some of eight places in any order: choices, ranges, conditions, a section and a value in it."""

    def some(values: list[Any]) -> list[Any]:
        return draw(st.lists(st.sampled_from(values), min_size=1, max_size=len(values), unique_by=repr))

    def ends(low: float, high: float) -> list[float]:
        return sorted(draw(st.lists(st.floats(low, high), min_size=2, max_size=2, unique=True)))

    depths = some([0, "stem", 1, 2, "50%", "all"])
    full = {"loguniform": ends(1e-5, 1e-3)}
    probe = {"when": {FREEZE: "all"}, "loguniform": ends(1e-2, 1.0)}
    lora = {"when": {f"{ADAPTER}.type": "lora"}, "loguniform": ends(1e-4, 1e-2)}
    conditional = "all" in depths and len(depths) > 1
    adapters = [{"when": {FREEZE: "all"}, "choice": [None]}, {"choice": [None, {"type": "lora"}]}]
    places: dict[str, Any] = {
        FREEZE: {"choice": depths},
        RATE: [probe, full] if conditional else full,
        ADAPTER: adapters if conditional else {"choice": [None, {"type": "lora"}]},
        f"{ADAPTER}.r": {"when": {f"{ADAPTER}.type": "lora"}, "integers": sorted(some([2, 4, 7, 9])[:2])},
        "train.weight_decay": {"uniform": ends(0.0, 0.3)},
        "train.schedule": {"choice": some(["linear", "cosine", "constant"])},
        "train.keep": {"integers": [1, draw(st.integers(2, 9))]},
        "train.max_grad_norm": [lora, {"choice": some([None, 0.5, 1.0])}] if depths != ["all"] else {"choice": [1.0]},
    }
    chosen = {path: places[path] for path in draw(st.permutations(some(list(places))))}
    if depths == ["all"] or (f"{ADAPTER}.r" in chosen and len(places[f"{ADAPTER}.r"]["integers"]) == 1):
        chosen.pop(ADAPTER, None), chosen.pop(f"{ADAPTER}.r", None)
    if conditional and FREEZE not in chosen:
        chosen |= {RATE: full} if RATE in chosen else {}
        chosen |= {ADAPTER: {"choice": [None, {"type": "lora"}]}} if ADAPTER in chosen else {}
    if ADAPTER not in chosen:
        chosen.pop(f"{ADAPTER}.r", None)
        chosen |= {"train.max_grad_norm": {"choice": [1.0]}} if "train.max_grad_norm" in chosen else {}
    assume(chosen)
    return chosen


class Suggestions:
    """Stands in for an `optuna.Trial`: draws, and holds to Optuna's rule of one domain for a name."""

    def __init__(self, generator: Random, known: dict[str, Any]) -> None:
        self.generator = generator
        self.known = known

    def _remember(self, name: str, distribution: Any) -> None:
        assert self.known.setdefault(name, distribution) == distribution

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self._remember(name, choices)
        return self.generator.choice(choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self._remember(name, (low, high))
        return self.generator.randint(low, high)

    def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
        self._remember(name, (low, high, log))
        return low + (high - low) * self.generator.random()


@settings(deadline=None, max_examples=60)
@given(written=spaces(), trials=st.integers(1, 200))
def test_a_grid_has_different_points_of_the_space_and_no_more_than_the_trials(
    written: dict[str, Any], trials: int
) -> None:
    space = space_of(written, num_layers=None)
    try:
        grid = space.grid(trials)
    except RecipeError as error:
        found = re.search(r"the grid has (\d+) points", str(error))
        assert found is not None
        least = int(found[1])
        assert least > trials
        grid = space.grid(least)
        assert len(grid) == least
    else:
        assert len(grid) <= trials
    assert len({repr(point) for point in grid}) == len(grid)
    assert all(has_the_values_of_its_space(point, written) for point in grid)


@settings(deadline=None, max_examples=60)
@given(written=spaces(), trials=st.integers(0, 12), more=st.integers(0, 12), seed=st.integers(0, 2**31 - 1))
def test_random_points_are_different_lie_in_the_space_and_begin_the_same_however_many_follow(
    written: dict[str, Any], trials: int, more: int, seed: int
) -> None:
    space = space_of(written, num_layers=None)
    points = space.random(trials + more, seed)
    assert space.random(trials, seed) == points[:trials]
    assert len({repr(point) for point in points}) == len(points)
    assert all(has_the_values_of_its_space(point, written) for point in points)


@settings(deadline=None, max_examples=60)
@given(written=spaces(), seed=st.integers(0, 999))
def test_suggested_points_lie_in_the_space(written: dict[str, Any], seed: int) -> None:
    space, generator, known = space_of(written, num_layers=None), Random(seed), dict[str, Any]()
    for _ in range(5):
        parameters = space.optuna_define(Suggestions(generator, known))
        assert has_the_values_of_its_space(parameters, written)


@settings(deadline=None, max_examples=40)
@given(written=spaces(), seed=st.integers(0, 999))
def test_every_point_makes_a_recipe_with_its_values(written: dict[str, Any], seed: int) -> None:
    space = space_of(written, num_layers=None)
    for parameters in space.random(3, seed):
        trial = trial_recipe(space.recipe, parameters)
        assert trial.search is None
        for path, value in parameters.items():
            found: Any = trial.model_dump()
            for part in path.split("."):
                found = found[part]
            assert found == value or (isinstance(value, dict) and value.items() <= found.items())
        assert parse_recipe(dump_recipe(trial)) == trial


def test_choices_are_crossed_in_written_order_with_points_of_the_ranges() -> None:
    space = space_of({FREEZE: {"choice": [0, "all"]}, RATE: RATES})
    assert [(point[FREEZE], point[RATE]) for point in space.grid(6)] == [
        (0, 1e-5), (0, pytest.approx(math.sqrt(1e-5 * 2e-4), rel=1e-4)), (0, 2e-4),
        ("all", 3e-3), ("all", pytest.approx(math.sqrt(3e-3), rel=1e-4)), ("all", 1.0),
    ]  # fmt: skip
    assert [point[RATE] for point in space.grid(3)] == pytest.approx([4.472e-5, 0.05477], rel=1e-3)


def test_ranges_get_as_many_points_as_the_trials_allow_in_turn() -> None:
    space = space_of({
        FREEZE: {"choice": [0, 1, 2]}, RATE: {"loguniform": [1e-5, 1e-3]}, "train.weight_decay": {"uniform": [0, 0.1]},
    })  # fmt: skip
    expected = {3: 3, 6: 6, 11: 9, 12: 12, 17: 12, 18: 18, 27: 27, 47: 45, 48: 48}
    grids = {trials: space.grid(trials) for trials in expected}
    assert {trials: len(grid) for trials, grid in grids.items()} == expected
    for trials, grid in grids.items():
        assert all(0 <= point["train.weight_decay"] <= 0.1 for point in grid)
        rates, decays = ({point[path] for point in grid} for path in (RATE, "train.weight_decay"))
        largest = max(p for p in range(1, 10) if p * p * 3 <= trials)
        assert min(len(rates), len(decays)) >= largest


def test_whole_numbers_have_no_more_points_than_there_are() -> None:
    space = space_of({"train.keep": {"integers": [1, 3]}, "train.weight_decay": {"uniform": [0, 0.1]}})
    grid = space.grid(100)
    assert {point["train.keep"] for point in grid} == {1, 2, 3}
    assert len(grid) == 99


def test_a_grid_that_does_not_fit_is_refused_once_the_model_is_known() -> None:
    space = space_of({FREEZE: {"choice": "every"}}, num_layers=12, search={"trials": 8})
    with pytest.raises(RecipeError, match=r"grid has 15 points, but `search\.trials` is 8") as caught:
        space.grid(8)
    assert str(caught.value.problems[0].where).startswith("/x/mine.yaml:")
    assert len(space.grid(15)) == 15


def test_every_boundary_of_the_model_is_written_out() -> None:
    space = space_of({FREEZE: {"choice": "every"}}, num_layers=3)
    assert space.grid(9) == [{FREEZE: depth} for depth in (0, "stem", 1, 2, 3, "all")]
    assert space.written() == {FREEZE: {"choice": [0, "stem", 1, 2, 3, "all"]}}
    with pytest.raises(RecipeError, match="whose layers are not known"):
        space_of({FREEZE: {"choice": "every"}}, num_layers=None)


def test_depths_that_freeze_the_same_blocks_are_tried_once() -> None:
    depths = [0, "0%", "20%", "stem", "50%", 1, "100%", 2, "all"]
    space = space_of({FREEZE: {"choice": depths}}, num_layers=2)
    assert space.written() == {FREEZE: {"choice": [0, "20%", "50%", "100%", "all"]}}
    assert space_of({FREEZE: {"choice": depths}}, num_layers=None).written() == {FREEZE: {"choice": depths}}


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ({FREEZE: {"choice": [0, 9]}}, f"search.space.{FREEZE}.choice.1"),
        ({FREEZE: {"integers": [0, 9]}}, f"search.space.{FREEZE}.integers"),
        ({FREEZE: {"choice": "every"}, "train.keep": [{"when": {FREEZE: [9, 0]}, "choice": [1]}]},
         f"search.space.train.keep.0.when.{FREEZE}"),
    ],
)  # fmt: skip
def test_depths_beyond_the_model_are_refused_in_their_line(written: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError, match="freeze depth is 9, but the model has 6 layers") as caught:
        space_of(written)
    assert str(caught.value.problems[0].where).endswith(f"({place})")


def test_random_draws_of_a_small_space_end_when_it_is_used_up() -> None:
    assert len(space_of({FREEZE: {"choice": [0, 1, "all"]}}).random(50, seed=0)) == 3


def test_random_draws_cover_a_range_by_orders_of_magnitude() -> None:
    rates = [point[RATE] for point in space_of({RATE: {"loguniform": [1e-5, 1e-1]}}).random(400, seed=1)]
    shares = [sum(10.0**low <= rate < 10.0 ** (low + 1) for rate in rates) / 400 for low in range(-5, -1)]
    assert all(0.18 < share < 0.32 for share in shares)
    assert rates != [point[RATE] for point in space_of({RATE: {"loguniform": [1e-5, 1e-1]}}).random(400, seed=2)]


def test_a_space_can_be_sent_to_another_process() -> None:
    space = space_of({FREEZE: {"choice": [0, "all"]}, RATE: RATES})
    assert pickle.loads(pickle.dumps(space)).grid(8) == space.grid(8)


def test_messages_about_a_trial_name_the_line_of_the_space(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nsource: {model: owner/model}\ntarget: {task: text-classification, data: owner/data}\n"
        "transfer:\n  freeze: 3\n  layer_decay: 0.9\nsearch:\n  space:\n    transfer.freeze: {choice: [0, 1]}\n"
    )
    recipe = load_recipe(file)
    trial = trial_recipe(recipe, {FREEZE: 1})
    assert trial.origin.where(FREEZE) == f"{file}:9 ({FREEZE})"
    assert trial.origin.where("transfer.layer_decay") == f"{file}:6 (transfer.layer_decay)"
    assert trial.origin.folder == tmp_path
    with pytest.raises(RecipeError, match=r"mine.yaml:6 \(transfer.layer_decay\): `transfer.freeze` is `all`"):
        trial_recipe(recipe, {FREEZE: "all"})
    overridden = load_recipe(file, ["search.space.transfer.freeze.choice=[0, 2]", "transfer.freeze=1"])
    where = trial_recipe(overridden, {FREEZE: 2}).origin.where(FREEZE)
    assert where == "search.space.transfer.freeze.choice=[0, 2] (command line)"


def test_the_trial_differs_from_the_recipe_in_its_parameters_alone() -> None:
    recipe = recipe_of({RATE: {"loguniform": [1e-5, 1e-3]}}, train={"epochs": 7, "seed": 5})
    trial = trial_recipe(recipe, {RATE: 1e-4, f"{ADAPTER}.r": 4, ADAPTER: {"type": "lora"}})
    assert (trial.train.learning_rate, trial.train.epochs, trial.train.seed) == (1e-4, 7, 5)
    assert trial.transfer.adapter is not None
    assert trial.transfer.adapter.r == 4
    assert recipe.search is not None
    assert trial.source == recipe.source


def test_parameters_are_described_in_short() -> None:
    assert describe({FREEZE: 3, RATE: 5e-5}) == "freeze=3 learning_rate=5e-05"
    assert describe({ADAPTER: {"type": "lora", "r": 8}, "train.schedule": "linear"}) == (
        "adapter={type: lora, r: 8} schedule=linear"
    )
    assert describe({ADAPTER: None, "transfer.from_scratch": True, "transfer.head.layers": [64]}) == (
        "adapter=null from_scratch=true layers=[64]"
    )
    assert list(short_names({"transfer.head.dropout": 0.1, f"{ADAPTER}.dropout": 0.2, FREEZE: 1})) == [
        "head.dropout", "adapter.dropout", "freeze",
    ]  # fmt: skip
    assert describe({}) == ""


def test_population_based_training_gets_the_bounds_of_what_it_may_change() -> None:
    written = {RATE: {"loguniform": [1e-5, 1e-3]}, "train.weight_decay": {"choice": [0.0, 0.1]}}
    space = space_of(written, search={"scheduler": "pbt", "trials": 8})
    rate, decay = space.mutations().values()
    assert isinstance(rate, Floats)
    assert (rate.clip(1.0), rate.clip(0.0), rate.clip(1e-4)) == (1e-3, 1e-5, 1e-4)
    assert isinstance(decay, Choice)
    assert (decay.clip(0.08), decay.clip(0.0)) == (0.1, 0.0)
    (default,) = space_of(None, search={"scheduler": "pbt", "trials": 8}).mutations().items()
    assert default == (RATE, Floats(1e-5, 5e-5, logarithmic=True))


@pytest.mark.parametrize(
    ("distribution", "points"),
    [
        (Integers(1, 4), {1: [2], 2: [1, 4], 3: [1, 3, 4], 4: [1, 2, 3, 4], 9: [1, 2, 3, 4]}),
        (Floats(0.0, 1.0, False), {1: [0.5], 2: [0.0, 1.0], 5: [0.0, 0.25, 0.5, 0.75, 1.0]}),
        (Floats(1e-4, 1.0, True), {1: [1e-2], 3: [1e-4, 1e-2, 1.0], 5: [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}),
        (Choice(("a", None)), {1: ["a", None], 5: ["a", None]}),
    ],
)
def test_points_are_evenly_spread_with_both_ends(distribution: Any, points: dict[int, list[Any]]) -> None:
    assert {count: distribution.points(count) for count in points} == points


@given(ends=st.lists(st.integers(-(10**9), 10**9), min_size=2, max_size=2, unique=True), count=st.integers(1, 50))
def test_whole_points_are_different_and_inside(ends: list[int], count: int) -> None:
    low, high = sorted(ends)
    points = Integers(low, high).points(count)
    assert len(set(points)) == len(points) == min(count, high - low + 1)
    assert all(low <= point <= high for point in points)


@given(
    ends=st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=2, unique=True),
    logarithmic=st.booleans(),
    count=st.integers(2, 20),
    seed=st.integers(0, 99),
)
def test_numbers_stay_inside_their_range(ends: list[float], logarithmic: bool, count: int, seed: int) -> None:
    low, high = sorted(ends)
    distribution = Floats(low, high, logarithmic)
    points = distribution.points(count)
    assert (points[0], points[-1]) == (low, high)
    assert points == sorted(points)
    assert all(low <= value <= high for value in [*points, distribution.sample(Random(seed))])


class TestDefaultSpace:
    """The default space, where the recipe names none."""

    def test_it_fits_any_model_and_any_number_of_trials(self) -> None:
        transfers: list[dict[str, Any]] = [{}, {"adapter": {"type": "lora"}}, {"layer_decay": 0.9}, {"freeze": "all"}]
        transfers.append({"from_scratch": True})
        wrong = []
        for transfer, num_layers in itertools.product(transfers, (1, 2, 6, 12)):
            # For `tpe` the space is that of `random`.
            for algorithm, trials in itertools.product(("grid", "random"), (1, 2, 5, 16, 24)):
                space = space_of(None, num_layers, transfer=transfer, search={"trials": trials, "algorithm": algorithm})
                points = space.grid(trials) if algorithm == "grid" else space.random(trials, seed=0)
                if not 0 < len(points) <= trials or not all(trial_recipe(space.recipe, point) for point in points):
                    wrong.append((transfer, num_layers, algorithm, trials))
        assert not wrong

    def test_depth_and_rate_are_searched_about_evenly_by_a_grid(self) -> None:
        grid = space_of(None, 12, search={"trials": 16}).grid(16)
        assert len(grid) == 16
        assert {point[FREEZE] for point in grid} == {0, "33%", "66%", "all"}
        assert len({point[RATE] for point in grid if point[FREEZE] == 0}) == 4

    def test_full_tuning_adapters_and_probes_have_rates_of_their_own(self) -> None:
        (full, probe) = (
            [point[RATE] for point in space_of(None, 12).random(40, 0) if (point[FREEZE] == "all") == head]
            for head in (False, True)
        )
        adapted = [point[RATE] for point in space_of(None, 12, transfer={"adapter": {"type": "lora"}}).random(40, 0)]
        assert max(full) < min(adapted)
        assert max(adapted) < min(probe)

    def test_a_frozen_recipe_gets_the_rates_of_a_probe_where_depth_is_not_searched(self) -> None:
        (point,) = space_of(None, 12, transfer={"freeze": "all"}, search={"trials": 1}).grid(1)
        assert point == {RATE: pytest.approx(math.sqrt(3e-3), rel=1e-3)}

    def test_rates_follow_the_kind_and_the_size_of_the_model(self) -> None:
        rates = find_task("text-classification").rates
        small, base, large = (rates(size).full[1] for size in (22 * 10**6, None, 7 * 10**9))
        assert large < base < small
        assert rates(110 * 10**6) == find_task("causal-lm").rates()
        assert find_task("image-classification").rates().full == (1e-5, 1e-3)

    def test_a_recipe_without_the_section_has_the_same(self) -> None:
        recipe = Recipe.model_validate(BASE)
        assert Space.of(recipe, 12).written() == space_of(None, 12, search={"trials": 16}).written()

    def test_it_may_be_written_into_a_recipe(self) -> None:
        written = space_of(None, 12, search={"trials": 16}).written()
        assert space_of(written, 12).grid(16) == space_of(None, 12, search={"trials": 16}).grid(16)


def test_the_shipped_search_tries_sixteen_points_each_of_which_runs() -> None:
    recipe = load_recipe("minilm-to-support-intent-search")
    assert recipe.search is not None
    grid = Space.of(recipe, num_layers=6).grid(recipe.search.trials)
    assert len(grid) == recipe.search.trials
    assert all(trial_recipe(recipe, point).train.seed == 0 for point in grid)


def test_a_case_becomes_the_distribution_of_its_kind() -> None:
    assert distribution_of(Case(choice=[0, "all"])) == Choice((0, "all"))
    assert distribution_of(Case(integers=[1, 3])) == Integers(1, 3)
    assert distribution_of(Case(uniform=[0, 1])) == Floats(0, 1, logarithmic=False)
    assert distribution_of(Case(loguniform=[0.1, 1])) == Floats(0.1, 1, logarithmic=True)
