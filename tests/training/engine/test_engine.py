"""The engines: which devices their tensors are on, how often workers exchange gradients, what is left of them."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.training.engine import build
from orchestrator.training.engine.base import Engine
from orchestrator.training.engine.build import build_engine
from orchestrator.training.engine.deepspeed_config import restoring_linear
from orchestrator.training.engine.precision import Precision

CUDA = torch.device("cuda", 0)
NUM_PASSES, NUM_STEPS = 4, 3
ENGINES = ["engine: torch", "engine: deepspeed", "zero_stage: 1", "zero_stage: 2", "zero_stage: 3"]


def recipe_with(scale: str) -> Recipe:
    return parse_recipe(f"name: a\nsource: {{model: ./m}}\ntarget: {{task: causal-lm, data: ./d}}\nscale: {{{scale}}}")


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "lr": 0.1, "initial_lr": 0.1}]


def take_step(engine: Engine, num_passes: int = 1) -> None:
    inputs = torch.ones(3, 4, device=engine.device, dtype=engine.input_dtype)
    for number in range(num_passes):
        with engine.accumulate(last=number == num_passes - 1):
            engine.backward(engine.model(inputs).square().mean() / num_passes / engine.num_workers)
    engine.step(1.0)


def step_optimizer(engine: Engine) -> None:
    """Take the optimizer's step with gradients that have no values."""
    for parameter in engine.trained.values():
        parameter.grad = torch.empty_like(parameter)
    engine.optimizer.step()


@pytest.fixture(autouse=True)
def linear_stays() -> Iterator[None]:
    """Engines are built here without the session that puts PyTorch's linear function back."""
    with restoring_linear():
        yield


@pytest.fixture
def files_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make optimizer files hold tensors without values, which are loaded on the requested device."""
    written: dict[Path, dict[str, Tensor]] = {}

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        written[path] = {name: value.to("cpu") for name, value in tensors.items()}

    def load(path: Path, device: str = "cpu") -> dict[str, Tensor]:
        # Values that are not there cannot be copied into weights.
        tensors = written[path] if path.stem == "optimizer" else {}
        return {name: value.to(device) for name, value in tensors.items()}

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    monkeypatch.setattr(safetensors.torch, "load_file", load)


def test_a_resumed_adam_has_all_its_state_on_the_device_of_its_parameters(
    files_without_values: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "choose_device", lambda _: CUDA)
    monkeypatch.setattr(nn.Module, "to", lambda module, _: module)  # Which is not possible without values.
    recipe = recipe_with("engine: torch")
    first, second = make_model(), make_model()
    with FakeTensorMode():
        for layer in (*first, *second):
            for name, value in layer.named_parameters():
                layer.register_parameter(name, nn.Parameter(torch.empty(value.shape, device=CUDA)))
        with build_engine(first, groups_of(first), recipe, "fp32") as engine:
            step_optimizer(engine)
            engine.write_state(tmp_path)
        with build_engine(second, groups_of(second), recipe, "fp32") as engine:
            engine.read_state(tmp_path)
            step_optimizer(engine)
            state = [engine.optimizer.state[parameter] for parameter in engine.trained.values()]
            found = {(key, value.device) for entries in state for key, value in entries.items()}
    assert found == {("step", CUDA), ("exp_avg", CUDA), ("exp_avg_sq", CUDA)}


class WithUnused(nn.Sequential):
    """A model with a parameter that its outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__(*make_model())
        self.unused = nn.Parameter(torch.zeros(2))


def count_and_reduce(reduced: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    reduced[-1] += 1
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


# DDP compares them with the classes themselves.
count_and_reduce.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def train_together(rank: int, folder: Path) -> None:
    """One of two workers: writes how often gradients are summed up in each step, and what it has learned."""
    os.environ.update({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    model = WithUnused()
    reduced: list[int] = []
    with build_engine(model, groups_of(model), recipe_with("engine: torch"), "fp32") as engine:
        engine.model.register_comm_hook(reduced, count_and_reduce)
        for _ in range(NUM_STEPS):
            reduced.append(0)
            take_step(engine, NUM_PASSES)
        learned = {name: value.tolist() for name, value in engine.trained.items()}
    (folder / f"{rank}.json").write_text(json.dumps({"reduced": reduced, "learned": learned}), encoding="utf-8")
    dist.destroy_process_group()


def test_ddp_sums_up_gradients_once_in_a_step_of_several_passes(tmp_path: Path) -> None:
    multiprocessing.spawn(train_together, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    model = WithUnused()
    with build_engine(model, groups_of(model), recipe_with("engine: torch"), "fp32") as engine:
        for _ in range(NUM_STEPS):
            take_step(engine, NUM_PASSES)
        expected = engine.trained_weights()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert found["reduced"] == [1] * NUM_STEPS
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(found["learned"][name]), value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scale", [*ENGINES, "zero_stage: 3, offload: all"])
def test_an_engine_that_failed_in_a_step_leaves_nothing_behind(scale: str, precision: Precision) -> None:
    references: dict[str, weakref.ref[Any]] = {}

    def fail() -> None:
        model = make_model()
        with build_engine(model, groups_of(model), recipe_with(scale), precision) as engine:
            take_step(engine, num_passes=2)
            model[1].register_forward_hook(out_of_memory)
            found = {"model": model, "parameter": model[0].weight, "optimizer": engine.optimizer, "engine": engine}
            references.update({name: weakref.ref(each) for name, each in found.items()})
            take_step(engine)

    with pytest.raises(torch.OutOfMemoryError):
        fail()
    gc.collect()
    assert [name for name, reference in references.items() if reference() is not None] == []


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("scale", ENGINES)
def test_an_engine_goes_on_from_what_it_wrote_as_if_nothing_had_happened(scale: str, tmp_path: Path) -> None:
    whole, first, second = make_model(), make_model(), make_model()
    with build_engine(whole, groups_of(whole), recipe_with(scale), "fp32") as engine:
        take_step(engine)
        take_step(engine)
        expected = engine.trained_weights()
    with build_engine(first, groups_of(first), recipe_with(scale), "fp32") as engine:
        take_step(engine)
        engine.write_state(tmp_path)
    with build_engine(second, groups_of(second), recipe_with(scale), "fp32") as engine:
        engine.read_state(tmp_path)
        take_step(engine)
        found = engine.trained_weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("scale", ["engine: deepspeed", "zero_stage: 1"])
def test_deepspeed_sums_up_whole_gradients_once_in_a_step(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[int] = []
    all_reduce = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", count)
    model = make_model()
    size = sum(value.numel() for value in model.parameters())
    with build_engine(model, groups_of(model), recipe_with(scale), "fp32") as engine:
        for _ in range(2):
            reduced.clear()
            take_step(engine, NUM_PASSES)
            assert [number for number in reduced if number >= size] == [size]


def test_autocast_is_around_the_models_forward_pass_while_the_engine_is_open() -> None:
    model, inputs = make_model(), torch.randn(3, 4)
    plain = model(inputs)
    with build_engine(model, groups_of(model), recipe_with("engine: torch"), "bf16") as engine:
        rounded = engine.model(inputs)
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, rounded.bfloat16().float()), "losses are computed in fp32 from bf16 outputs"
        assert not torch.equal(rounded, plain)
    assert torch.equal(model(inputs), plain)
    assert "forward" not in vars(model)
