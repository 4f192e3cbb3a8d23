"""L2-SP: weights are held near those of the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_samples import MethodSample, rows_of, weights_of

from orchestrator import load_recipe, train
from orchestrator.errors import RecipeError
from orchestrator.recipe import Recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.training.prepare import prepare
from orchestrator.training.session import open_session
from orchestrator.transfer import read_methods

SAMPLE = MethodSample(
    {"methods": [{"name": "l2-sp", "weight": 0.5}]},
    off={"methods": [{"name": "l2-sp", "weight": 0.0}]},
    terms=("l2-sp",),
)
STRONG = {"methods": [{"name": "l2-sp", "weight": 2.0, "new_weight": 0.3}]}
STEPS = ["train.epochs=null", "train.steps=20"]
Write = Callable[..., Recipe]


def loop_by_hand(recipe: Recipe, folder: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Train as the paper has it: the penalty is a part of the loss that the gradient is taken of."""
    directory = RunDirectory(folder)
    directory.create()
    losses, penalties = [], []
    with open_session(prepare(recipe), directory, 0, torch.device("cpu"), None) as session:
        model, task, loader, order = (
            session.parts.module,
            session.prepared.task,
            session.loaders["train"],
            session.schedule.order,
        )
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        new = session.parts.new_parameters
        decayed = [value for value in model.parameters() if value.ndim > 1]
        others = [value for value in model.parameters() if value.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.train.learning_rate)
        batches = [rows for epoch in range(7) for rows in order.epoch(epoch)][:20]
        for index, rows in enumerate(batches):
            model.train()
            batch = loader.batch(rows)
            loss = task.loss(model(**batch.inputs), batch, loader.encoded.totals(rows))
            penalty = torch.zeros(())
            for name, value in model.named_parameters():
                far = value if name in new else value - start[name]
                penalty = penalty + (0.3 if name in new else 2.0) / 2 * far.square().sum()
            (loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = recipe.train.learning_rate * session.schedule.rate_factor(index)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            penalties.append(float(penalty.detach()))
        return losses, penalties, {name: value.detach().clone() for name, value in model.named_parameters()}


def check_against_hand(curve_recipe: Write, tmp_path: Path, *overrides: str, tolerance: float = 1e-6) -> None:
    losses, penalties, weights = loop_by_hand(curve_recipe({}, *STEPS), tmp_path / "hand")
    run = train(curve_recipe(STRONG, *STEPS, "train.evaluate_every=20", *overrides), tmp_path / "run").directory
    rows = rows_of(run)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=tolerance)
    assert [row["l2-sp"] for row in rows] == pytest.approx(penalties, rel=tolerance, abs=1e-9)
    if "scale.workers=2" in overrides:
        # They sum gradients in another order. Those of the attention's key biases are nothing but rounding, of which
        # Adam makes whole steps; the losses do not depend on them.
        return
    exported = weights_of(run)
    assert all(torch.allclose(torch.from_numpy(exported[name]), weights[name], atol=1e-6) for name in weights)


def test_one_worker_equals_a_loop_by_hand(curve_recipe: Write, tmp_path: Path) -> None:
    check_against_hand(curve_recipe, tmp_path)


def test_two_workers_equal_a_loop_by_hand(curve_recipe: Write, tmp_path: Path, ray_cluster: None) -> None:
    check_against_hand(curve_recipe, tmp_path, "scale.workers=2")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_equals_a_loop_by_hand(stage: int, curve_recipe: Write, tmp_path: Path) -> None:
    check_against_hand(curve_recipe, tmp_path, "scale.engine=deepspeed", f"scale.zero_stage={stage}", tolerance=1e-5)


def test_the_stronger_the_nearer(curve_recipe: Write, still_bert: Path, tmp_path: Path) -> None:
    source = torch.cat([value.flatten() for value in body_of(load(still_bert))])
    found = []
    for weight in (0.01, 100.0):
        recipe = curve_recipe({"methods": [{"name": "l2-sp", "weight": weight}]}, "train.weight_decay=0", *STEPS)
        run = train(recipe, tmp_path / f"run-{weight}").directory
        found.append(float((torch.cat([value.flatten() for value in body_of(load(run / "model"))]) - source).norm()))
    assert found[1] < 0.5 * found[0]


def load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def body_of(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [weights[name] for name in sorted(weights) if name.startswith("bert.encoder.")]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"transfer": {"adapter": {"type": "lora"}}}, "`transfer.adapter` trains new weights"),
        ({"transfer": {"from_scratch": True}}, "`transfer.from_scratch` has no source"),
        ({"scale": {"zero_stage": 3}}, "`scale.zero_stage` shards the weights"),
        ({"scale": {"zero_stage": 2, "offload": "optimizer"}}, "`scale.offload` measures gradients"),
    ],
)
def test_what_it_cannot_go_with_is_refused(
    changes: dict[str, Any], what: str, write_recipe: Callable[..., Path]
) -> None:
    transfer = {**SAMPLE.transfer, **changes.get("transfer", {})}
    recipe = load_recipe(write_recipe(transfer=transfer, scale=changes.get("scale", {})))
    with pytest.raises(RecipeError, match=what):
        read_methods(recipe)


def test_the_distance_is_from_the_source_in_later_phases_too(curve_recipe: Write, tmp_path: Path) -> None:
    methods = [{"name": "l2-sp", "weight": 2.0, "new_weight": 0.0}]
    phases = [{"name": "a"}, {"name": "b"}]
    run = train(curve_recipe({"methods": methods, "phases": phases}, "train.epochs=1"), tmp_path / "run").directory
    values = [row["l2-sp"] for row in rows_of(run)]
    # The first step's rate is 0, so the penalty of the next one is 0 as well.
    assert values[:2] == [0.0, 0.0]
    # The second phase begins at the weights of the first, and not at those of the source.
    assert values[3] == values[4] > 0.0
