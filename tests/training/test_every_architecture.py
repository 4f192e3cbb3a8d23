"""Every causal language model and every classifier of texts and pictures that transformers knows is trained or refused.

Each is built from a tiny config, trained for two steps, exported, and loaded with plain transformers, which must compute
what we do. What we refuse is named here with the reason, and it is refused before anything starts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every_architecture import answers, recipe_for, save_source, write_data
from transformers.models.auto import modeling_auto

from orchestrator import train
from orchestrator.errors import InputError
from orchestrator.training.run import check

MAPPINGS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
EVERY = [
    pytest.param(auto_class, model_type, id=f"{auto_class.removeprefix('AutoModelFor')}-{model_type}")
    for auto_class, names in MAPPINGS.items()
    for model_type in names
]

# What cannot be built here, and the error that says why.
NOT_BUILT: dict[tuple[str, str], str] = {}

# What `validate` refuses, and a part of the message.
REFUSED: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize(("auto_class", "model_type"), EVERY)
def test_every_architecture_is_trained_and_loaded_again_or_refused_with_a_reason(
    auto_class: str, model_type: str, data: Path, tmp_path: Path
) -> None:
    source, named = tmp_path / "source", (auto_class, model_type)
    if named in NOT_BUILT:
        with pytest.raises((ImportError, AttributeError), match=NOT_BUILT[named]):
            save_source(source, model_type, auto_class)
        return
    save_source(source, model_type, auto_class)
    recipe = recipe_for(source, data, auto_class)
    if named in REFUSED:
        with pytest.raises(InputError, match=REFUSED[named]):
            check(recipe)
        return
    model = train(recipe, tmp_path / "run").directory / "model"
    ours, theirs = answers(model, data, auto_class)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
