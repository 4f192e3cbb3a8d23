"""The frozen prefix: the blocks below the freeze boundary, whose stored output can replace them.

The output of frozen blocks for an example never changes. So it can be computed once, stored, and passed to the blocks
above in every later epoch and trial. A *boundary* counts frozen layers: 0 is after the stem, k after layer k, and the
number of layers plus one after the tail, where only the head is left.

Nothing here depends on an architecture. The model's own code runs, while frozen layers return their input unchanged and
the last of them returns the stored features. `extract_prefix` first tries whether that works for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models.attempt import calling_model
from orchestrator.models.blocks import Blocks
from orchestrator.models.shortcuts.forward import AroundForward, wrap_forward
from orchestrator.models.shortcuts.token_pooling import TokenPooling

FEATURES = "features"  # The argument of the model's forward pass that holds stored features.


class _AllCaptured(Exception):
    """All boundaries have been captured; the rest of the forward pass is not needed."""


class BoundaryNotReached(Exception):
    """The model's code calls its layers in a way that does not pass a boundary."""


@dataclass
class _ForwardPass:
    """The task of one forward pass: where features enter, and which ones are captured."""

    start: int | None = None
    """The boundary at which features are inserted; None where the pass starts at the inputs."""
    features: Tensor | None = None
    wanted: frozenset[int] = frozenset()
    """The boundaries to capture."""
    captured: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSpec:
    """The rest of a module's output besides hidden states, to return it with other hidden states."""

    others: tuple[Any, ...] | None
    """None where it returns a single tensor."""

    @classmethod
    def of(cls, output: Any) -> OutputSpec:
        return cls(None if isinstance(output, Tensor) else tuple(output[1:]))

    def rebuild(self, hidden: Any) -> Any:
        return hidden if self.others is None else (hidden, *self.others)


class Prefix:
    """The frozen lower blocks of a model, which their stored output can replace.

    The model accepts one more argument, `features`: the output of the blocks below `boundary`, of shape
    [batch, length, width] (or whatever the layers return), or [batch, 1, width] above the last layer of a model whose
    head reads one token. Calls without `features` are unchanged.
    """

    def __init__(
        self,
        model: Any,
        body: Any,
        blocks: Blocks,
        boundary: int,
        pooling: TokenPooling | None,
        stem: Iterable[nn.Module],
    ) -> None:
        self.model = model
        self.body = body
        self.num_layers = len(blocks.layers)
        self.boundary = boundary
        self.pooling = pooling
        self.body_output: Any = None
        """The body's output in the last pass without features; it gives the output built from features its form."""
        self.head_input: str | None = None
        """The name of the part of it that the head reads."""
        self._pass = _ForwardPass()
        self._pass_is_set = False
        """Whether `compute` has set the pass, so that the arguments of the call do not."""
        self._output_specs: dict[nn.Module, OutputSpec] = {}
        self._undo: list[Callable[[], None]] = []
        self._undo.append(model.register_forward_pre_hook(self._start_pass, with_kwargs=True).remove)
        for module in stem:
            self._undo.append(wrap_forward(module, self._run_stem))
        first = blocks.layers[0].elements[0]
        self._undo.append(first.register_forward_pre_hook(self._enter_layers, with_kwargs=True).remove)
        for number, block in enumerate(blocks.layers[:boundary], start=1):
            for element in block.elements:
                around = self._layer_function(number, element is block.elements[-1])
                self._undo.append(wrap_forward(element, around))
        if boundary > self.num_layers:
            self._undo.append(wrap_forward(body, self._run_body))

    def compute(
        self, inputs: dict[str, Tensor], boundaries: Sequence[int], start: int | None = None, features: Any = None
    ) -> dict[int, Tensor]:
        """Return the output of the frozen blocks for a batch, at each of these boundaries.

        Args:
            inputs: the model's inputs, padded on the right.
            start: a lower boundary to start at, with its `features`; None starts at the inputs.

        Raises:
            BoundaryNotReached: the pass ended before all boundaries were reached.
            CallFailed: the model raised an error.
        """
        this = self._pass = _ForwardPass(start, features, frozenset(boundaries))
        self._pass_is_set = True
        try:
            with torch.no_grad(), calling_model("computing the frozen blocks"):
                self.model(**inputs)
        except _AllCaptured:
            pass
        finally:
            self._pass_is_set = False
            self._pass = _ForwardPass()
        if this.captured.keys() != this.wanted:
            raise BoundaryNotReached("its code calls layers in a way that cannot be followed")
        return this.captured

    def remove(self) -> None:
        """Restore the model."""
        for undo in reversed(self._undo):
            undo()

    def is_pooled(self, boundary: int) -> bool:
        """Whether the features at a boundary are one vector per example, whatever the example's length."""
        return self.pooling is not None and boundary >= self.num_layers

    def _start_pass(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features = kwargs.pop(FEATURES, None)
        if not self._pass_is_set:
            # Kept until the next pass: gradient checkpointing calls layers again during the backward pass.
            self._pass = _ForwardPass(None if features is None else self.boundary, features)
        if self._pass.features is not None:
            main = kwargs.setdefault(self.body.main_input_name, self._pass.features)
            if self.is_pooled(self._pass.start or 0) and _is_token_ids(main) and self._pass.features.dim() == 3:
                self._pass.features = self._pass.features.expand(-1, main.shape[1], -1)
        return args, kwargs

    def _run_stem(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Nothing reads the stem's output where features are inserted after it.
        if self._pass.features is not None:
            return self._output_specs.get(module, OutputSpec(None)).rebuild(self._pass.features)
        output = original(*args, **kwargs)
        self._output_specs[module] = OutputSpec.of(output)
        return output

    def _enter_layers(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._pass.start == 0:
            args, kwargs = with_hidden(args, kwargs, self._pass.features)
        self._capture(0, hidden_of(args, kwargs))
        return args, kwargs

    def _layer_function(self, number: int, is_last: bool) -> AroundForward:
        """Return the function around one element of layer `number`; `is_last` marks the layer's last element."""

        def run_layer(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            this = self._pass
            if this.start is not None and number <= this.start:
                inserts_features = number == this.start and is_last
                hidden = this.features if inserts_features else hidden_of(args, kwargs)
                return self._output_specs[module].rebuild(hidden)
            output = original(*args, **kwargs)
            self._output_specs[module] = OutputSpec.of(output)
            if is_last:
                self._capture(number, output if isinstance(output, Tensor) else output[0])
            return output

        return run_layer

    def _run_body(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        this = self._pass
        if this.start == self.num_layers + 1:
            assert this.features is not None
            return _output_from_features(self.body_output, this.features)
        output = original(*args, **kwargs)
        self.body_output = output
        if self.head_input is not None:
            self._capture(self.num_layers + 1, output[self.head_input])
        return output

    def _capture(self, boundary: int, hidden: Tensor) -> None:
        this = self._pass
        if boundary not in this.wanted:
            return
        if self.pooling is not None and self.is_pooled(boundary) and hidden.dim() == 3:
            hidden = self.pooling.select(hidden)
        this.captured[boundary] = hidden
        if this.captured.keys() == this.wanted:
            raise _AllCaptured


def _output_from_features(form: Any, features: Tensor) -> Any:
    """Return the features as an output of the body like `form`.

    All parts of it are set, also those that nothing reads: the head may take a part by its index.
    """
    return type(form)(**{name: None if value is None else features for name, value in form.items()})


def hidden_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the hidden states among a layer's arguments: the first one."""
    return args[0] if args else next(iter(kwargs.values()))


def with_hidden(args: Sequence[Any], kwargs: dict[str, Any], hidden: Any) -> tuple[Any, dict[str, Any]]:
    """Return a layer's arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: hidden}


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
