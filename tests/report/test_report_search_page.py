"""The page of a search: says what won, survives whatever the records hold, loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from report_examples import (
    RECIPE,
    failed_trial,
    grid_trials,
    make_result,
    make_trial,
    name_winner,
    random_trials,
    write_run,
    write_search,
)
from report_reading import Page

from orchestrator.errors import InputError
from orchestrator.report import write_report
from orchestrator.report.charts.base import View, is_logarithmic
from orchestrator.report.charts.depth_rate import Plane, evenly_spaced
from orchestrator.report.records import read_search

HOSTILE = "<script>alert(1)</script>\"'&\u202e\x00"


def read(directory: Path) -> Page:
    return Page.read(write_report(directory))


def rows_of_trials(page: Page) -> list[str]:
    """Ids in the first column of the table of trials, in its order."""
    table = page.text[page.text.index("<h2>Trials</h2>") :]
    return re.findall(r"<tr(?: class=\"marked\")?><td>([^<]*)</td>", table.split("</table>")[0])


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return write_search(tmp_path / "grid", grid_trials())


def test_the_result_is_told_in_one_sentence(grid: Path) -> None:
    winner = name_winner(grid_trials())
    score, test = winner["metrics"]["select"]["accuracy"], winner["metrics"]["test"]["accuracy"]
    shown = read(grid).shown
    assert f"Trial {winner['id']} wins with accuracy {score:.4f} on select and {test:.4f} on test" in shown
    assert "better than the median of 24 trials." in shown
    assert "orchestrator train best.yaml" in shown
    assert "13 min" in shown and "2 at a time on 2 cores" in shown


def test_the_winner_stands_with_its_parameters_and_seeds(grid: Path) -> None:
    page = read(grid)
    assert "transfer.freeze 2 0, stem, 2, 4, all" in page.shown
    scores = [item["score"] for item in name_winner(grid_trials())["seeds"]]
    listed = ", ".join(f"{score:.4f}" for score in scores)
    assert f"{sum(scores) / 3:.4f} 0.0045 {listed}" in page.shown
    assert "within a deviation of the winner's mean, or better." in page.shown


def test_a_grid_has_all_pictures_in_order(grid: Path) -> None:
    titles = read(grid).titles()
    assert titles == [
        "Figure 1. Freeze depth and learning rate",
        "Figure 2. Score over time",
        "Figure 3. All parameters at once",
        "Figure 4. Best so far",
        "Figure 5. Score against cost",
    ]


def test_trials_are_listed_best_first_and_failures_last(grid: Path) -> None:
    trials = grid_trials()
    scored = sorted((trial for trial in trials if trial["metrics"]), key=lambda trial: -trial["metrics"]["accuracy"])
    ids = rows_of_trials(read(grid))
    assert ids[0] == scored[0]["id"] and ids[-1] == "0004"
    assert len(ids) == len(trials) and ids[:20] == [trial["id"] for trial in scored[:20]]


def test_lower_is_better_where_the_search_says_so(tmp_path: Path) -> None:
    trials = [make_trial(number, rate=10 ** (-5 + number / 4)) for number in range(9)]
    page = read(write_search(tmp_path, trials, metric="loss", mode="min", winner=None))
    best = min(trials, key=lambda trial: trial["metrics"]["loss"])
    assert f"Trial {best['id']} leads with loss {best['metrics']['loss']:.4f} on select" in page.shown
    assert rows_of_trials(page)[0] == best["id"]
    assert "Further down is better" in page.shown


def test_reruns_with_other_seeds_stand_beside_their_trial_and_not_among_the_trials(tmp_path: Path) -> None:
    trials = grid_trials()
    first, second = trials[12], trials[7]
    reruns = []
    for trial, shifts in ((first, (-0.02, -0.04)), (second, (0.01,))):
        for seed, shift in enumerate(shifts, start=1):
            metrics = {"accuracy": trial["metrics"]["accuracy"] + shift}
            parameters = {**trial["parameters"], "train.seed": seed}
            reruns.append({**trial, "id": f"{trial['id']}-seed-{seed}", "metrics": metrics, "parameters": parameters})
    page = read(write_search(tmp_path, [*trials, *reruns], winner=None))
    score, other = first["metrics"]["accuracy"], second["metrics"]["accuracy"]
    assert f"0012 {score - 0.02:.4f} 0.0200 {score:.4f}, {score - 0.02:.4f}, {score - 0.04:.4f}" in page.shown
    assert f"0007 {other + 0.005:.4f} 0.0071 {other:.4f}, {other + 0.01:.4f}" in page.shown
    assert "and 3 reruns with other seeds" in page.shown
    assert len(rows_of_trials(page)) == len(trials), "the table has the trials of the space"
    assert "train.seed" not in page.shown


def test_where_the_winner_errs_is_shown_when_its_result_says_so(grid: Path) -> None:
    (grid / "result.json").write_text(json.dumps(make_result(["refund", "card lost"])), encoding="utf-8")
    page = read(grid)
    assert "The winner's classes on test" in page.shown
    assert page.titles()[-1] == "Figure 6. Confusion matrix"


def test_the_space_in_the_record_says_which_axes_are_logarithmic(tmp_path: Path) -> None:
    case = dict.fromkeys(("when", "choice", "uniform", "loguniform", "integers"))
    space = {"a": {**case, "loguniform": [1, 2]}, "b": [{**case, "uniform": [1, 900]}], "c": {**case, "choice": [1]}}
    search = read_search(write_search(tmp_path, grid_trials(), space=space))
    assert [is_logarithmic(search, path) for path in "abcd"] == [True, False, None, None]


def test_failures_are_grouped_by_their_reason(tmp_path: Path) -> None:
    trials = [make_trial(0), *(failed_trial(number, "out of memory") for number in range(1, 9))]
    trials.append(failed_trial(9, "loss is nan"))
    shown = read(write_search(tmp_path, trials)).shown
    assert "8 out of memory 0001, 0002, 0003, 0004, 0005, 0006 and 2 more" in shown
    assert "1 loss is nan 0009" in shown


def test_notes_are_shown_and_lines_that_cannot_be_read_are_counted(grid: Path) -> None:
    with (grid / "trials.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "0099", "par\n[1, 2]\n{"no": "id"}\n')
    shown = read(grid).shown
    assert "concurrency is 2" in shown
    assert "3 lines of trials.jsonl could not be read" in shown


def test_the_last_line_of_a_trial_counts(tmp_path: Path) -> None:
    first, second = make_trial(0), make_trial(0, metrics={"accuracy": 0.999, "loss": 0.1})
    page = read(write_search(tmp_path, [first, second, make_trial(1)], winner=None))
    assert "Trial 0000 leads with accuracy 0.9990" in page.shown
    assert sorted(rows_of_trials(page)) == ["0000", "0001"]


def test_an_optimum_at_the_end_of_the_grid_is_told(tmp_path: Path) -> None:
    inside = [make_trial(number, rate=rate) for number, rate in enumerate([1e-5, 3e-4, 1e-2] * 2)]
    at_end = [make_trial(number, rate=rate) for number, rate in enumerate([1e-6, 1e-5, 1e-4] * 2)]
    words = "train.learning_rate is at the end of what was tried"
    assert words not in read(write_search(tmp_path / "inside", inside)).shown
    assert words in read(write_search(tmp_path / "end", at_end)).shown


@pytest.mark.parametrize(
    ("status", "words"), [("running", "still running"), ("interrupted", "was interrupted"), ("failed", "search failed")]
)
def test_a_search_that_is_not_finished_says_so(tmp_path: Path, status: str, words: str) -> None:
    page = read(write_search(tmp_path, grid_trials()[:8], status=status, winner=None))
    assert words in page.shown and "leads with accuracy" in page.shown
    assert "orchestrator train" not in page.shown


def test_no_trial_at_all(tmp_path: Path) -> None:
    directory = write_search(tmp_path, [], status="running", winner=None)
    assert "No trial has a score yet." in read(directory).shown
    (directory / "trials.jsonl").unlink()
    assert "No trial has a score yet." in read(directory).shown


def test_no_trial_with_a_score(tmp_path: Path) -> None:
    page = read(write_search(tmp_path, [failed_trial(n, "loss is nan") for n in range(3)], winner=None))
    assert "No trial got a score." in page.shown and "3 loss is nan" in page.shown
    assert page.titles() == []


def test_one_trial(tmp_path: Path) -> None:
    page = read(write_search(tmp_path, [make_trial(0)]))
    assert page.titles() == ["Figure 1. Score over time"]
    assert "the median" not in page.shown and "click" not in page.shown


def test_one_parameter_gets_a_picture_of_its_own(tmp_path: Path) -> None:
    trials = [make_trial(n, parameters={"train.learning_rate": 10 ** (-5 + n / 3)}) for n in range(7)]
    assert read(write_search(tmp_path, trials)).titles()[0] == "Figure 1. Score over the parameter"


def test_a_winner_whose_line_is_lost_is_still_named(tmp_path: Path) -> None:
    trials = grid_trials()
    winner = {**name_winner(trials), "id": "0500"}
    page = read(write_search(tmp_path, trials, winner=winner))
    assert "Trial 0500 wins with accuracy" in page.shown


ODD_VALUES = [None, math.nan, math.inf, -1, 0, True, "text", [], {}, [1], {"a": {"b": None}}, 10**400, 1e308]


@pytest.mark.parametrize("odd", ODD_VALUES, ids=lambda odd: repr(odd)[:12])
def test_any_value_may_be_missing_or_odd(tmp_path: Path, odd: Any) -> None:
    fields = ("parameters", "metrics", "seconds", "core_seconds", "epochs", "status", "reason", "seed", "history")
    trials = [make_trial(number, **{field: odd}) for number, field in enumerate(fields)]
    paths = ("transfer.freeze", "train.learning_rate")
    trials += [
        make_trial(20 + number, parameters={**make_trial(0)["parameters"], path: odd})
        for number, path in enumerate(paths)
    ]
    row = dict.fromkeys(("step", "epoch", "seconds", "accuracy"), odd)
    trials += [
        make_trial(30, history=[odd, row]),
        make_trial(31, metrics={"accuracy": odd, "loss": odd}),
        make_trial(32),
    ]
    del trials[-1]["parameters"]
    read(write_search(tmp_path / "trials", trials, winner=None))
    names = ("status", "mode", "started", "seconds", "num_layers", "concurrent", "cores", "winner", "features")
    for name in (*names, "metric", "notes", "machine", "space", "warnings"):
        read(write_search(tmp_path / name, grid_trials(), **{name: odd}))
    inner = {"id": odd, "parameters": odd, "metrics": odd, "seeds": odd}
    read(write_search(tmp_path / "winner-inside", grid_trials(), winner=inner))
    inner = {
        "id": "0001",
        "metrics": {"select": odd, "test": {"accuracy": odd}},
        "seeds": [odd, {"seed": odd, "score": odd}],
    }
    read(write_search(tmp_path / "winner-deep", grid_trials(), winner=inner))


@pytest.mark.parametrize(
    "recipe", ["", "name: [", "- 1", "search: 3", "search: {space: [1]}", "name: {a: b}", "\x00", "\t"]
)
def test_a_recipe_that_cannot_be_understood_is_shown_as_it_is(tmp_path: Path, recipe: str) -> None:
    page = read(write_search(tmp_path, grid_trials(), recipe))
    assert "wins with accuracy" in page.shown


def test_no_text_from_data_becomes_markup(tmp_path: Path) -> None:
    parameters = {"transfer.freeze": HOSTILE, "train.learning_rate": 1e-3, HOSTILE: {HOSTILE: HOSTILE}}
    trials = [make_trial(0, id=HOSTILE, parameters=parameters), make_trial(1), make_trial(2, rate=1e-3)]
    trials += [failed_trial(3, HOSTILE), make_trial(4, status=HOSTILE, reason=HOSTILE)]
    trials[0]["metrics"][HOSTILE] = 0.5
    for trial in trials:
        trial["metrics"] = trial["metrics"] and {**trial["metrics"], HOSTILE: 0.5 + trial["metrics"]["accuracy"] / 9}
        for row in trial["history"]:
            row[HOSTILE] = row["accuracy"]
    winner = {**name_winner(trials), "seeds": [{"seed": HOSTILE, "score": 0.5}]}
    recipe = RECIPE.replace("minilm-to-banking77", json.dumps(HOSTILE.replace("\x00", "")))
    machine, notes = {HOSTILE: HOSTILE}, [HOSTILE]
    directory = write_search(
        tmp_path, trials, recipe, metric=HOSTILE, winner=winner, machine=machine, notes=notes, status=HOSTILE
    )
    page = read(directory)
    assert len(page.tags("script")) == 1, "the page's own"
    assert page.shown.count("<script>alert(1)</script>") > 20, "shown as text"
    assert "\u202e" not in page.text and "\x00" not in page.text


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    read(write_search(tmp_path, [make_trial(0), failed_trial(1, "bad text \ud800")]))


@pytest.mark.parametrize(
    "write", [lambda path: write_search(path, grid_trials()), lambda path: write_run(path, ["a", "b"])]
)
def test_the_page_loads_nothing_and_allows_only_its_own_style_and_script(tmp_path: Path, write: Any) -> None:
    page = read(write(tmp_path))
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", page.text.replace("// ", ""))
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "form", "base")
        assert not any(name in ("src", "srcset", "style") or name.startswith("on") for name in attributes), tag
        assert (attributes.get("href") or "best.yaml") in ("best.yaml", "trials.jsonl", "model")
    policy = next(item["content"] for item in page.tags("meta") if item.get("http-equiv")) or ""
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(write_search(tmp_path / "a", random_trials(60))).read_bytes()
    second = write_report(write_search(tmp_path / "b", random_trials(60))).read_bytes()
    assert first == second
    assert write_report(tmp_path / "a").read_bytes() == first, "an earlier report changes nothing"


def test_nothing_but_the_page_is_left_behind(grid: Path) -> None:
    before = {path.name for path in grid.iterdir()}
    assert write_report(grid) == grid / "report.html"
    assert {path.name for path in grid.iterdir()} == before | {"report.html"}


@pytest.mark.timeout(120)
def test_two_thousand_trials_make_a_small_page(tmp_path: Path) -> None:
    directory = write_search(tmp_path, random_trials(2000))
    path = write_report(directory)
    assert path.stat().st_size < 5e6
    page = Page.read(path)
    assert len(rows_of_trials(page)) == 2000
    assert [title.split(". ")[1] for title in page.titles()] == [
        "Freeze depth and learning rate",
        "All parameters at once",
        "Score over time",
        "Best so far",
        "Score against cost",
    ]


def test_every_picture_is_drawn_for_wide_and_for_narrow_pages(grid: Path) -> None:
    page = read(grid)
    assert len(page.classes("wide")) == len(page.classes("narrow")) == len(page.titles()) == 5
    for drawing in [*page.classes("wide"), *page.classes("narrow")]:
        assert drawing["role"] == "img" and drawing["aria-label"]


def test_rates_that_come_again_make_cells_and_drawn_ones_points(tmp_path: Path, grid: Path) -> None:
    plane = Plane.of(read_search(grid))
    assert plane.depths == ["0", "stem", "2", "4", "all"] and len(plane.rates) == 5
    assert plane.has_cells and evenly_spaced(plane.rates)
    assert plane.best_at()["0", 1e-3].score is None, "the cell of a failed trial is not empty"
    assert not Plane.of(read_search(write_search(tmp_path / "random", random_trials(60)))).has_cells
    assert not evenly_spaced([1e-5, 2e-5, 3e-3])


def test_a_cell_shows_the_best_of_its_trials(tmp_path: Path) -> None:
    trials = [make_trial(n, 2, rate, metrics={"accuracy": 0.5 + n / 100}) for n, rate in enumerate([1e-5, 1e-4] * 3)]
    search = read_search(write_search(tmp_path, trials, winner=None))
    assert Plane.of(search).best_at()["2", 1e-5].score == 0.54


def test_the_median_has_the_middle_colour_and_diverged_trials_the_first(tmp_path: Path) -> None:
    scores = [0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.01]
    trials = [make_trial(n, metrics={"accuracy": score}) for n, score in enumerate(scores)]
    view = View.of(read_search(write_search(tmp_path, trials, winner=None)))
    steps = {trial.score: view.step(trial) for trial in view.search.ranked}
    assert steps[0.97] == 11 and steps[0.9] in (5, 6) and steps[0.01] == 0
    assert view.low > 0.01 and view.clamp(0.01) == view.low


def test_a_directory_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a search nor a run"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_damaged_record_is_refused_by_its_name(grid: Path, content: str) -> None:
    (grid / "search.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"search\.json: it is damaged"):
        write_report(grid)
