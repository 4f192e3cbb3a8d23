"""What is frozen has no gradients, is bit-identical after training, and behaves the same in training mode."""

import copy

import pytest
import torch
from tiny_models import CONFIGS, EXAMPLE, build, num_layers
from torch import nn

from orchestrator.errors import ModelError
from orchestrator.models import find_blocks, freeze_blocks, resolve_depth
from orchestrator.recipe import FrozenRange


def freeze(name, freeze_depth, **changes):
    model = build(name, **changes)
    blocks = find_blocks(model, EXAMPLE, frozenset())
    frozen = freeze_blocks(model, blocks, resolve_depth(freeze_depth, len(blocks.layers)))
    return model, blocks, frozen


def test_depth_means_what_the_recipe_says():
    expected = {
        0: FrozenRange(False, 0, False),
        "0%": FrozenRange(False, 0, False),
        "stem": FrozenRange(True, 0, False),
        1: FrozenRange(True, 1, False),
        7: FrozenRange(True, 7, False),
        "10%": FrozenRange(True, 0, False),
        "50%": FrozenRange(True, 3, False),
        "100%": FrozenRange(True, 7, False),
        "all": FrozenRange(True, 7, True),
    }
    assert {asked: resolve_depth(asked, 7) for asked in expected} == expected


def test_a_depth_beyond_the_layers_is_refused_with_their_number():
    with pytest.raises(ModelError, match="freeze depth is 8, but the model has 7 layers"):
        resolve_depth(8, 7, "mine.yaml:3 (transfer.freeze)")


@pytest.mark.parametrize("name", CONFIGS)
def test_requires_grad_is_off_below_the_boundary_and_on_above(name):
    for depth in (0, "stem", 1, num_layers(name), "all"):
        model, blocks, frozen = freeze(name, depth)
        off = {named for named, parameter in model.named_parameters() if not parameter.requires_grad}
        assert off == frozen.parameters
        expected = [] if depth == 0 else list(blocks.stem.parameters)
        for block in blocks.layers[: {"stem": 0, "all": None}.get(depth, depth)]:
            expected += block.parameters
        expected += blocks.tail.parameters if depth == "all" else ()
        assert off == set(expected)


def test_parameters_frozen_before_are_trained_where_the_recipe_says_so():
    model = build("bert").requires_grad_(False)
    blocks = find_blocks(model, EXAMPLE, frozenset())
    freeze_blocks(model, blocks, resolve_depth(0, 3))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_changes_what_is_trained_and_not_one_bit_of_what_is_frozen(name):
    depth = 1 if num_layers(name) > 1 else "stem"
    model, _, frozen = freeze(name, depth)
    frozen.set_train_mode(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    model(**EXAMPLE, labels=torch.tensor([1])).loss.backward()
    learning = {named for named, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    optimizer.step()
    after = model.state_dict()
    assert learning.isdisjoint(frozen.parameters)
    for named, value in before.items():
        assert torch.equal(value, after[named]) == (named not in learning), named
    assert any(named.startswith(("classif", "score", "sequence_summary")) for named in learning)


@pytest.mark.parametrize("depth", ["stem", 1, 2, "all"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if num_layers(name) > 1])
def test_frozen_blocks_do_the_same_twice_in_training_mode(name, depth):
    model, blocks, frozen = freeze(name, depth)
    frozen.set_train_mode(model)
    last = {"stem": 0, "all": num_layers(name)}.get(depth, depth)
    # The stem's output is what the first layer reads.
    watched = blocks.layers[last].modules[0] if last < num_layers(name) else blocks.layers[last - 1].modules[-1]
    assert torch.equal(*record_inputs_twice(model, watched))


@pytest.mark.parametrize("name", ["bert", "bart", "t5", "gpt2", "deberta", "xlm"])
def test_blocks_that_are_not_frozen_differ_in_training_mode(name):
    model, blocks, frozen = freeze(name, 0, **({"encoder_layerdrop": 0.0} if name == "bart" else {}))
    frozen.set_train_mode(model)
    assert not torch.equal(*record_inputs_twice(model, blocks.layers[0].modules[0]))


def record_inputs_twice(model, module):
    seen = []
    module.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            model(**EXAMPLE)
    return seen


def test_batch_norm_statistics_of_frozen_blocks_stay():
    model = build("bert")
    model.bert.encoder.layer[0].output.LayerNorm = ChannelNorm(16)
    model.bert.encoder.layer[1].output.LayerNorm = ChannelNorm(16)
    blocks = find_blocks(model, EXAMPLE, frozenset())
    frozen = freeze_blocks(model, blocks, resolve_depth(1, 3))
    frozen.set_train_mode(model)
    before = copy.deepcopy(model.state_dict())
    model(**EXAMPLE)
    name = "bert.encoder.layer.{}.output.LayerNorm.norm.running_mean"
    assert torch.equal(model.state_dict()[name.format(0)], before[name.format(0)])
    assert not torch.equal(model.state_dict()[name.format(1)], before[name.format(1)])


class ChannelNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm = nn.BatchNorm1d(size)

    def forward(self, hidden_states):
        return self.norm(hidden_states.transpose(1, 2)).transpose(1, 2)


def test_modes_hold_under_wrappers_and_after_evaluation():
    model, blocks, frozen = freeze("bert", 1)
    wrapped = nn.Sequential(model)
    wrapped.eval()
    frozen.set_train_mode(wrapped)
    assert not any(module.training for module in blocks.stem.modules + blocks.layers[0].modules)
    assert all(module.training for module in blocks.layers[1].modules + blocks.head.modules)


def test_a_model_with_nothing_left_to_train_is_refused():
    model = build("bert")
    blocks = find_blocks(model, EXAMPLE, frozenset())
    model.classifier = nn.Identity()
    with pytest.raises(ModelError, match="every parameter of the model is frozen"):
        freeze_blocks(model, blocks, resolve_depth("all", 3))
