"""A classification head with extra hidden layers, for any model of transformers.

This file is saved with the weights of a model that has such a head, so that `from_pretrained` with
`trust_remote_code=True` can build it. It needs only torch and transformers.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class DeepHead(nn.Module):
    """Replacement of a model's output layer: hidden layers with GELU and dropout, then the output layer.

    Maps [..., in_features] to [..., out_features].
    """

    def __init__(self, in_features: int, widths: list[int], out_features: int, dropout: float, bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise([in_features, *widths]):
            layers += [nn.Linear(size_in, size_out), nn.GELU(), nn.Dropout(dropout)]
        self.in_features = in_features
        self.widths = list(widths)
        self.out_features = out_features
        self.hidden_layers = nn.Sequential(*layers)
        self.output_layer = nn.Linear(widths[-1], out_features, bias=bias)
        # Has the name of the plain output layer's matrix. A program that does not know this class then stops at the
        # wrong shape, instead of using a head of random numbers.
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.output_layer(self.hidden_layers(features))
        return logits


def put_deep_head(model: Any, path: str, widths: list[int], dropout: float) -> DeepHead:
    """Replace the output layer (an `nn.Linear`) at the dotted `path`, and record that in the config."""
    plain = model.get_submodule(path)
    head = DeepHead(plain.in_features, widths, plain.out_features, dropout, plain.bias is not None)
    model.set_submodule(path, head.to(plain.weight.device, plain.weight.dtype).train(plain.training))
    model.config.deep_head = {"path": path, "layers": list(widths), "dropout": dropout}
    return head


def with_deep_head(base_class: type[Any]) -> type[Any]:
    """Return the model class whose output layer is replaced as `config.deep_head` says."""

    def build(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        base_class.__init__(self, config, *arguments, **options)
        put_deep_head(self, config.deep_head["path"], config.deep_head["layers"], config.deep_head["dropout"])

    members = {"__init__": build, "__module__": __name__, "plain_class": base_class}
    return type(f"DeepHead{base_class.__name__}", (base_class,), members)
