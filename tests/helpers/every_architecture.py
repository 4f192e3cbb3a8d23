"""Runs of any architecture that transformers knows: from a tiny config to an exported model that is loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny_configs import PICTURE, tiny_config
from torch import Tensor, nn

from orchestrator import load_recipe
from orchestrator.data import open_file, open_values, rename_columns
from orchestrator.data.cache import as_table
from orchestrator.inference.predict import predict_examples
from orchestrator.inference.trained_model import load_trained_model
from orchestrator.recipe import Recipe

WORDS = tuple(f"{first}{second}" for first in "bcdfghjk" for second in "aeiou")
LABELS = ("first", "second", "third")
ROWS = {"train": (0, 8), "select": (8, 11), "test": (11, 14)}
TASKS = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}


def write_data(folder: Path) -> Path:
    """Write a few examples for each task, in a folder of the task's name."""
    for split, numbers in ROWS.items():
        texts = [{"text": _sentence(number)} for number in range(*numbers)]
        labelled = [{**text, "label": LABELS[number % 3]} for number, text in enumerate(texts)]
        for task, rows in {"causal-lm": texts, "text-classification": labelled}.items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
        for number in range(*numbers):
            path = folder / "image-classification" / split / LABELS[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return folder


def _sentence(number: int) -> str:
    draw = np.random.default_rng(number)
    return " ".join(WORDS[index] for index in draw.integers(0, len(WORDS), 4 + number % 5))


def save_source(folder: Path, model_type: str, auto_class: str, with_weights: bool = True) -> None:
    """Save a tiny model with random weights, and what prepares its inputs.

    Args:
        with_weights: False for a config alone, beside a file without weights: for what cannot be built.
    """
    config = tiny_config(model_type)
    loader = getattr(transformers, auto_class)
    classes = loader._model_mapping[type(config)]
    model_class = classes[0] if isinstance(classes, tuple) else classes
    config.architectures = [model_class.__name__]
    if model_class.config_class is type(config).sub_configs.get("text_config"):
        # The weights of such types come with their other parts.
        loader = transformers.AutoModelForMultimodalLM
    if with_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loader.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    if auto_class == "AutoModelForImageClassification":
        image_processor(model_type).save_pretrained(folder)
    else:
        save_tokenizer(folder)


def image_processor(model_type: str) -> Any:
    """Return the image processor of this type; one like ViT's for most."""
    size = {"height": PICTURE, "width": PICTURE}
    if model_type == "siglip2":
        return transformers.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    if model_type == "imagegpt":
        return transformers.ImageGPTImageProcessorPil(clusters=[[0, 0, 0], [1, 1, 1]], size=size)
    return transformers.ViTImageProcessorPil(size=size)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words that puts special tokens around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *(f"<{number}>" for number in range(5, 20)), *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
    fast.save_pretrained(folder)


def recipe_for(source: Path, data: Path, auto_class: str, **transfer: Any) -> Recipe:
    """Write a recipe of two steps beside the source, and read it."""
    task = TASKS[auto_class]
    sections = {
        "name": "tiny",
        "source": {"model": str(source)},
        "target": {
            "task": task,
            "data": str(data / task),
            "options": {} if task == "image-classification" else {"max_length": 16},
        },
        "transfer": transfer,
        "train": {"steps": 2, "learning_rate": 1e-3, "global_batch_size": 4, "precision": "fp32"},
    }
    path = source.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return load_recipe(path)


def answers(model: Path, data: Path, auto_class: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return what we make of the test split, and what plain transformers does: logits, or each text's loss."""
    trained = load_trained_model(model)
    task = TASKS[auto_class]
    columns = trained.task.prompt_columns(trained.task.options)
    found = open_values(data / task / "test", columns) or open_file(data / task / "test.jsonl")
    examples = rename_columns(found, columns, {})
    ours = predict_examples(trained, examples, batch_size).predictions
    plain = getattr(transformers, auto_class).from_pretrained(model).eval()
    encoded = trained.task.wrap(as_table(trained.task.encode(examples, trained.processor)), trained.processor)
    theirs = []
    for row in range(len(examples)):
        inputs = {name: torch.from_numpy(value) for name, value in encoded.batch(np.array([row])).inputs.items()}
        targets = inputs.pop("target_ids", None)
        if targets is not None:
            inputs["use_cache"] = False
        with torch.no_grad():
            logits = plain(**inputs).logits
        theirs.append(
            logits if targets is None else nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
        )
    if task == "causal-lm":
        return torch.from_numpy(ours["nll"]).float(), torch.stack(theirs)
    return torch.from_numpy(ours["logits"]), torch.cat(theirs)
