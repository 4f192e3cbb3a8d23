"""Call a model in a way that its code may not support, to find out whether a shortcut can be used.

A shortcut that is not possible is not used: the run continues without it, and the log says why. Only errors of the
model's forward and backward pass are caught. An error anywhere else is a bug of this package, and is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
# Raised by a model's code for shapes that it does not expect.
_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, NameError)

BODY_OUTPUTS = {"loss", "last_hidden_state", "encoder_last_hidden_state", "pooler_output", "image_hidden_states"}
"""Parts of transformers' outputs that the body computes, not the head."""


class CallFailed(Exception):
    """The model raised an error, which is the cause of this error."""

    @property
    def reason(self) -> str:
        """Return the name of the error."""
        return type(self.__cause__).__name__


@contextmanager
def calling_model(what: str) -> Iterator[None]:
    """Turn errors of a model's code into CallFailed.

    Args:
        what: name of the attempt in the log.

    Raises:
        CallFailed: the call raised an error, which is in the log with its traceback.
    """
    try:
        yield
    except _ERRORS as error:
        logger.info("%s: not possible, because the model raised an error", what, exc_info=True)
        raise CallFailed(f"{type(error).__name__}: {error}") from error


def try_forward(model: Callable[..., Any], inputs: dict[str, Any], what: str) -> Tensor:
    """Call a model, and return the output of its head, as `head_output`.

    Raises:
        CallFailed: as `calling_model`, or the head computes nothing.
    """
    with calling_model(what):
        return head_output(model(**inputs))


def head_output(output: Any) -> Tensor:
    """Return the output of the head: `logits` or `token_losses`; otherwise all of its floating-point numbers in one
    tensor of shape [batch, numbers], such as the start and end logits of question answering.

    Args:
        output: a `ModelOutput` of transformers.

    Raises:
        TypeError: it holds no tensors of floating numbers.
    """
    for name in ("logits", "token_losses"):
        if isinstance(output.get(name), Tensor):
            found: Tensor = output[name]
            return found
    of_head = [value for name, value in output.items() if name not in BODY_OUTPUTS]
    tensors = [each for each in of_head if isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 0]
    if not tensors:
        raise TypeError(f"{type(output).__name__} holds nothing that a head computes")
    return torch.cat([each.flatten(1) for each in tensors], 1)


def try_gradients(logits: Tensor, leaves: Sequence[Tensor], what: str) -> list[Tensor | None]:
    """Return the gradient of the sum of the logits for each leaf; None for those that they do not depend on.

    Raises:
        CallFailed: as `calling_model`.
    """
    if not (leaves and logits.requires_grad):
        return [None] * len(leaves)
    with calling_model(what), torch.enable_grad():
        return list(torch.autograd.grad(logits.sum(), list(leaves), allow_unused=True))
