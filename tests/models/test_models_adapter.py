"""Adapters sit above the freeze boundary alone, and what peft saves it loads again."""

import peft
import pytest
import torch
from tiny_models import CONFIGS, EXAMPLE, build, num_layers

from orchestrator.errors import ModelError
from orchestrator.models import adapted_blocks, add_adapter, find_blocks, freeze_blocks, resolve_depth, set_head
from orchestrator.recipe import Adapter, Head

POOLER = frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias"})


def adapt(name, freeze, new=frozenset(), **options):
    model = build(name)
    blocks = find_blocks(model, EXAMPLE, new)
    depth = resolve_depth(freeze, len(blocks.layers))
    frozen = freeze_blocks(model, blocks, depth)
    return add_adapter(model, blocks, depth, Adapter(type="lora", **options)), blocks, frozen


def disturb(model):
    """Weights as if they had been trained: adapters start at zero, and would hide a mistake."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def adapted_modules(model):
    return {
        name.removesuffix(".lora_A") for name, _ in model.get_base_model().named_modules() if name.endswith("lora_A")
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_above_the_boundary_alone(name):
    for freeze in (0, "stem", num_layers(name) - 1):
        model, blocks, _ = adapt(name, freeze)
        above = blocks.layers[freeze if isinstance(freeze, int) else 0 :]
        allowed = {named.rpartition(".")[0] for block in above for named in block.parameters}
        adapted = adapted_modules(model)
        assert adapted
        assert adapted <= allowed
        plain = build(name)
        linear = {named for named in allowed if type(plain.get_submodule(named)).__name__ in ("Linear", "Conv1D")}
        assert adapted == linear


@pytest.mark.parametrize("name", CONFIGS)
def test_only_adapters_and_the_head_are_trained(name):
    model, blocks, _ = adapt(name, "stem")
    trained = {named for named, parameter in model.named_parameters() if parameter.requires_grad}
    renamed = adapted_blocks(model, blocks)
    head = {named for named in renamed.head.parameters if ".original_module." not in named}
    layers = {named for block in renamed.layers for named in block.parameters if ".lora_" in named}
    assert head
    assert trained == head | layers
    everything = [named for block in renamed.in_order() for named in block.parameters]
    assert sorted(everything) == sorted(named for named, _ in model.named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_changes_adapters_and_head_alone(name):
    model, _, frozen = adapt(name, "stem")
    frozen.set_train_mode(model)
    disturb(model)
    before = {named: value.clone() for named, value in model.state_dict().items()}
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**EXAMPLE, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    changed = {named for named, value in model.state_dict().items() if not torch.equal(value, before[named])}
    assert any("lora_" in named for named in changed)
    assert any("modules_to_save" in named for named in changed)
    assert all("lora_" in named or "modules_to_save" in named for named in changed)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta", "gpt2", "llama", "t5", "bart"])
def test_a_saved_adapter_loads_with_plain_peft_and_gives_the_same_logits(name, variant, tmp_path):
    model, _, _ = adapt(name, 1, r=4, alpha=8, variant=variant)
    disturb(model)
    model.eval().save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        logits = model(**EXAMPLE).logits
        assert torch.equal(reloaded(**EXAMPLE).logits, logits)
        assert not torch.equal(build(name).eval()(**EXAMPLE).logits, logits)
        merged = reloaded.merge_and_unload()
        assert type(merged) is type(build(name))
        assert torch.allclose(merged(**EXAMPLE).logits, logits, atol=1e-5)


def test_new_parameters_outside_the_head_are_trained_and_saved(tmp_path):
    new = POOLER | {"classifier.weight", "classifier.bias"}
    model, _, _ = adapt("bert", 1, new)
    assert model.get_base_model().bert.pooler.dense.weight.requires_grad
    disturb(model)
    model.eval().save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(build("bert", seed=0), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**EXAMPLE).logits, model(**EXAMPLE).logits)


def test_the_dropout_of_a_head_without_one_goes_with_its_copy():
    model = build("gpt2").eval()
    set_head(model, Head(dropout=0.5), frozenset())
    blocks = find_blocks(model, EXAMPLE, frozenset())
    depth = resolve_depth("stem", 3)
    wrapped = add_adapter(model, blocks, depth, Adapter(type="lora"))
    seen = []
    wrapped.get_base_model().score.modules_to_save["default"].register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0])
    )
    wrapped.get_base_model().score.train()
    with torch.no_grad():
        wrapped(**EXAMPLE)
    share = (seen[0] == 0).float().mean()
    assert 0.3 < share < 0.7


def test_frozen_blocks_keep_their_mode_under_an_adapter():
    model, blocks, frozen = adapt("bert", 1)
    frozen.set_train_mode(model)
    assert not any(module.training for module in blocks.stem.modules + blocks.layers[0].modules)
    assert model.get_base_model().bert.encoder.layer[1].output.dropout.training


def test_targets_by_name_are_taken_above_the_boundary():
    model, _, _ = adapt("bert", 2, targets=["query", "value"])
    prefix = "bert.encoder.layer.2.attention.self"
    assert adapted_modules(model) == {f"{prefix}.query", f"{prefix}.value"}


def test_targets_that_match_nothing_are_refused_together_with_the_valid_names():
    with pytest.raises(ModelError) as caught:
        adapt("bert", 0, targets=["qurey", "value", "nothing"])
    assert [problem.what.split(" ")[0] for problem in caught.value.problems] == ["'qurey'", "'nothing'"]
    assert "did you mean query? this model has: dense, key, query, value" in str(caught.value)


def test_a_target_that_is_below_the_boundary_alone_is_refused():
    with pytest.raises(ModelError, match="'EncDecAttention' matches no linear module"):
        adapt("t5", 0, targets=["EncDecAttention"])
    model = build("bert")
    model.bert.encoder.layer[0].output.extra = torch.nn.Linear(2, 2)
    blocks = find_blocks(model, EXAMPLE, frozenset())
    with pytest.raises(ModelError, match="'extra' matches no linear module above the freeze boundary"):
        add_adapter(model, blocks, resolve_depth(1, 3), Adapter(type="lora", targets=["extra"]))


def test_an_adapter_with_every_layer_frozen_is_refused():
    with pytest.raises(ModelError, match="no layer with linear modules is left"):
        adapt("bert", "100%")


def test_a_model_without_linear_modules_in_its_layers_takes_no_adapter():
    with pytest.raises(ModelError, match="hold no linear modules"):
        adapt("squeezebert", 0)


def test_an_adapter_with_extra_head_layers_is_refused():
    model = build("bert")
    new = set_head(model, Head(layers=[8]), frozenset())
    blocks = find_blocks(model, EXAMPLE, new)
    with pytest.raises(ModelError, match="extra head layers do not go with an adapter"):
        add_adapter(model, blocks, resolve_depth(0, 3), Adapter(type="lora"))
