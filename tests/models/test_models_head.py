"""Heads take dropout and extra layers, and load again without this package."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import CONFIGS, EXAMPLE, build

from orchestrator.errors import ModelError
from orchestrator.models import find_blocks, load_config, load_model, open_folder, set_head, write_deep_head_code
from orchestrator.models.head import find_output_layer, head_modules
from orchestrator.recipe import Head

AUTO_CLASS = "AutoModelForSequenceClassification"


def head_dropouts(model):
    return [module for _, module in head_modules(model) if isinstance(module, torch.nn.Dropout)]


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_of_the_head_is_as_asked_and_the_body_keeps_its_own(name):
    model = build(name)
    before = [module.p for module in model.base_model.modules() if isinstance(module, torch.nn.Dropout)]
    assert set_head(model, Head(dropout=0.37), frozenset()) == frozenset()
    assert {module.p for module in head_dropouts(model)} <= {0.37}
    assert [module.p for module in model.base_model.modules() if isinstance(module, torch.nn.Dropout)] == before


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_acts_before_the_output_layer_in_training_only(name):
    model = build(name).eval()
    set_head(model, Head(dropout=0.9), frozenset())
    seen = []
    find_output_layer(model)[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    head = [module for _, module in head_modules(model)]
    for training, seeds in ((False, (1, 2)), (True, (1, 2))):
        for module in head:
            module.training = training
        for seed in seeds:
            torch.manual_seed(seed)
            with torch.no_grad():
                model(**EXAMPLE)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert", "t5", "bart", "xlm"]
)
def test_a_reload_has_the_dropout_that_was_asked_for(name, tmp_path):
    model = build(name)
    set_head(model, Head(dropout=0.37), frozenset())
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert 0.37 in {module.p for module in head_dropouts(reloaded)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reload_has_the_body_of_before(name, tmp_path):
    model = build(name)
    before = [module.p for module in model.base_model.modules() if isinstance(module, torch.nn.Dropout)]
    set_head(model, Head(dropout=0.37), frozenset())
    model.save_pretrained(tmp_path)
    body = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).base_model
    assert [module.p for module in body.modules() if isinstance(module, torch.nn.Dropout)] == before


def test_flags_are_not_taken_for_dropout_rates():
    model = build("esm")
    set_head(model, Head(dropout=0.37), frozenset())
    assert {module.p for module in head_dropouts(model)} == {0.37}
    assert model.config.token_dropout is False


def test_setting_dropout_draws_nothing():
    model = build("bert")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    set_head(model, Head(dropout=0.37), frozenset())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_extra_layers_come_before_the_output_layer(name):
    model = build(name)
    path, plain = find_output_layer(model)
    new = set_head(model, Head(layers=[8, 6], dropout=0.2), frozenset({f"{path}.weight"}))
    linears = [module for module in model.get_submodule(path).modules() if isinstance(module, torch.nn.Linear)]
    assert [module.out_features for module in linears] == [8, 6, 3]
    assert linears[0].in_features == plain.in_features
    assert new == {f"{path}.{named}" for named, _ in model.get_submodule(path).named_parameters()}
    blocks = find_blocks(model, EXAMPLE, new)
    assert new <= set(blocks.head.parameters)
    model(**EXAMPLE, labels=torch.tensor([1])).loss.backward()
    assert all(model.get_parameter(named).grad is not None for named in new)


RELOAD_ALONE = """
import importlib.util, json, sys, torch
from transformers import AutoModelForSequenceClassification

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "orchestrator":
            raise ImportError("not installed here")

sys.meta_path.insert(0, Refuse())
for folder in sys.argv[1:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([[1, 2, 3, 1]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    print(json.dumps([type(model).__name__, logits.tolist()]))
"""


def test_extra_layers_load_again_without_this_package(tmp_path):
    saved = {}
    for name in ("bert", "roberta", "gpt2", "t5", "qwen3"):
        model = build(name).eval()
        set_head(model, Head(layers=[16, 8], dropout=0.2), frozenset())
        model.save_pretrained(tmp_path / name)
        write_deep_head_code(model, tmp_path / name, AUTO_CLASS)
        saved[name] = model
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RELOAD_ALONE, *(str(tmp_path / name) for name in saved)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for model, line in zip(saved.values(), run.stdout.splitlines(), strict=True):
        class_name, logits = json.loads(line)
        assert class_name == f"DeepHead{type(model).__name__}"
        with torch.no_grad():
            assert torch.allclose(torch.tensor(logits), model(**EXAMPLE).logits, atol=1e-6)


def test_a_program_that_does_not_know_extra_layers_stops_instead_of_guessing(tmp_path):
    model = build("bert")
    # As wide as the body, so that a plain output layer would have the same shape as the last of these.
    set_head(model, Head(layers=[16]), frozenset())
    model.save_pretrained(tmp_path)
    write_deep_head_code(model, tmp_path, AUTO_CLASS)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=False)


def reload(folder, seed=0, **changes):
    source = open_folder(folder, "here")
    return load_model(source, AUTO_CLASS, load_config(source, **changes), False, seed)


def test_extra_layers_load_here_too(tmp_path):
    model = build("bert").eval()
    set_head(model, Head(layers=[8]), frozenset())
    model.save_pretrained(tmp_path)
    write_deep_head_code(model, tmp_path, AUTO_CLASS)
    loaded = reload(tmp_path)
    assert loaded.new_parameters == frozenset()
    with torch.no_grad():
        assert torch.equal(loaded.model(**EXAMPLE).logits, model(**EXAMPLE).logits)
    assert set_head(loaded.model, Head(layers=[8]), frozenset()) == frozenset()
    source = open_folder(tmp_path, "here")
    scratch = load_model(source, AUTO_CLASS, load_config(source), True, 0).model
    assert scratch.classifier.widths == [8]
    assert not torch.equal(scratch.classifier.output_layer.weight, model.classifier.output_layer.weight)


def test_a_source_with_extra_layers_keeps_them_for_other_labels_and_gives_them_up_when_asked(tmp_path):
    model = build("bert")
    set_head(model, Head(layers=[8]), frozenset())
    model.save_pretrained(tmp_path)
    loaded = reload(tmp_path, num_labels=5)
    assert loaded.new_parameters == {"classifier.output_layer.weight", "classifier.output_layer.bias"}
    new = set_head(loaded.model, Head(layers=[]), loaded.new_parameters)
    assert new == {"classifier.weight", "classifier.bias"}
    assert not any(module.training for module in loaded.model.modules())
    assert type(loaded.model) is transformers.BertForSequenceClassification
    loaded.model.save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.allclose(plain(**EXAMPLE).logits, loaded.model.eval()(**EXAMPLE).logits)


def test_a_model_without_an_output_layer_is_refused():
    model = build("bert")
    model.classifier = torch.nn.Identity()
    with pytest.raises(ModelError, match="no output layer for 3 labels"):
        set_head(model, Head(), frozenset())
