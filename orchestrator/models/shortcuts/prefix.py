"""The frozen prefix: the blocks below the freeze boundary, whose stored output can take their place.

What frozen blocks make of an example never changes, so it can be computed once, stored, and fed to the blocks above in
every later epoch and trial. A *boundary* is counted in frozen layers: 0 after the stem, k after layer k, and one more
than there are layers after the tail, where only the head is left.

No architecture is known here. The model's own code runs, with frozen layers that hand on what they are given and the
last of them giving the stored features. Whether that holds for a model is tried out first (`split_model`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models.attempt import calling_model
from orchestrator.models.blocks import Blocks
from orchestrator.models.shortcuts.token_pooling import TokenPooling

FEATURES = "features"  # The argument of the model's forward pass that holds stored features.


class _Reached(Exception):
    """Everything that was to be captured has been; the rest of the forward pass is not needed."""


class NotSeen(Exception):
    """The model's code calls layers so that no hook sees it."""


@dataclass
class _Pass:
    """What one forward pass is to do."""

    fed_at: int | None = None
    """The boundary at which features come in."""
    features: Tensor | None = None
    wanted: frozenset[int] = frozenset()
    """Boundaries at which features are taken out."""
    taken: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What a module returns besides the hidden states: how to wrap them again."""

    others: tuple[Any, ...] | None
    """None where it returns a plain tensor."""

    @classmethod
    def of(cls, output: Any) -> Form:
        return cls(None if isinstance(output, Tensor) else tuple(output[1:]))

    def wrap(self, hidden: Any) -> Any:
        return hidden if self.others is None else (hidden, *self.others)


class Prefix:
    """The frozen lower blocks of a model, made replaceable by their stored output.

    The model then takes one more argument, `features`: the output of the blocks below `boundary`, shape
    [batch, length, width] (or whatever the layers hand on), or [batch, 1, width] above the last layer of a model whose
    head reads one position. Called without it, the model is what it was.
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
        self._pass = _Pass()
        self._forms: dict[nn.Module, Form] = {}
        self.output: Any = None
        """What the body returned on the examples, as a form for feeding at the last boundary."""
        self.needed: str | None = None
        """The part of it that the head reads."""
        self._undo: list[Callable[[], None]] = []
        self._undo.append(model.register_forward_pre_hook(self._take_features, with_kwargs=True).remove)
        for module in stem:
            self._replace(module, self._pass_stem)
        first = blocks.layers[0].elements[0]
        self._undo.append(first.register_forward_pre_hook(self._enter_layers, with_kwargs=True).remove)
        for number, block in enumerate(blocks.layers[:boundary], start=1):
            for element in block.elements:
                self._replace(element, self._layer_function(number, element is block.elements[-1]))
        if boundary > self.num_layers:
            self._replace(body, self._pass_body)

    def compute(
        self, inputs: dict[str, Tensor], boundaries: Sequence[int], start: int | None = None, features: Any = None
    ) -> dict[int, Tensor]:
        """What the frozen blocks make of a batch, at each of these boundaries.

        Args:
            inputs: the model's inputs, padded on the right.
            start: a shallower boundary to go on from, with its `features`; None starts at the inputs.

        Raises:
            NotSeen: the pass ended before all of them were reached.
            CallFailed: the model raised an error.
        """
        this = self._pass = _Pass(fed_at=start, features=features, wanted=frozenset(boundaries))
        self._stay = True
        try:
            with torch.no_grad(), calling_model("computing the frozen blocks"):
                self.model(**inputs)
        except _Reached:
            pass
        finally:
            self._stay = False
            self._pass = _Pass()
        if this.taken.keys() != this.wanted:
            raise NotSeen("its code calls layers in a way that cannot be followed")
        return this.taken

    _stay = False
    """The pass is set from outside, not by the model's arguments."""

    def is_pooled(self, boundary: int) -> bool:
        """Whether the features at a boundary are one vector for each example, whatever its length."""
        return self.pooling is not None and boundary >= self.num_layers

    def _take_features(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features = kwargs.pop(FEATURES, None)
        if not self._stay:
            # It stays until the next pass: gradient checkpointing calls layers again during the backward pass.
            self._pass = _Pass(None if features is None else self.boundary, features)
        if self._pass.features is not None:
            main = kwargs.setdefault(self.body.main_input_name, self._pass.features)
            if self.is_pooled(self._pass.fed_at or 0) and _is_token_ids(main) and self._pass.features.dim() == 3:
                self._pass.features = self._pass.features.expand(-1, main.shape[1], -1)
        return args, kwargs

    def _replace(self, module: nn.Module, function: Callable[..., Any]) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return function(module, original, args, kwargs)

        replaced = vars(module).get("forward")
        module.forward = forward
        # Something else may have been put around it before, such as a last layer that computes one position.
        undo = partial(setattr, module, "forward", replaced) if replaced else partial(delattr, module, "forward")
        self._undo.append(undo)

    def remove(self) -> None:
        """Make the model what it was before."""
        for undo in reversed(self._undo):
            undo()

    def _pass_stem(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Whatever the stem makes of its inputs is not read, when features come in after it.
        if self._pass.features is not None:
            return self._forms.get(module, Form(None)).wrap(self._pass.features)
        output = original(*args, **kwargs)
        self._forms[module] = Form.of(output)
        return output

    def _enter_layers(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        this = self._pass
        if this.fed_at == 0:
            args, kwargs = with_hidden(args, kwargs, this.features)
        self._take(0, hidden_of(args, kwargs))
        return args, kwargs

    def _layer_function(self, number: int, is_last: bool) -> Callable[..., Any]:
        def forward(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            this = self._pass
            if this.fed_at is not None and number <= this.fed_at:
                loaders = number == this.fed_at and is_last
                return self._forms[module].wrap(this.features if loaders else hidden_of(args, kwargs))
            output = original(*args, **kwargs)
            self._forms[module] = Form.of(output)
            if is_last:
                self._take(number, output if isinstance(output, Tensor) else output[0])
            return output

        return forward

    def _pass_body(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        this = self._pass
        if this.fed_at == self.num_layers + 1:
            assert this.features is not None
            return _fill_output(self.output, this.features)
        output = original(*args, **kwargs)
        self.output = output
        if self.needed is not None:
            self._take(self.num_layers + 1, output[self.needed])
        return output

    def _take(self, boundary: int, hidden: Tensor) -> None:
        this = self._pass
        if boundary not in this.wanted:
            return
        if self.pooling is not None and self.is_pooled(boundary) and hidden.dim() == 3:
            hidden = self.pooling.take(hidden)
        this.taken[boundary] = hidden
        if this.taken.keys() == this.wanted:
            raise _Reached


def _fill_output(form: Any, features: Tensor) -> Any:
    """The body's output, made of the features. Parts that are not read are there too, or places would shift."""
    return type(form)(**{name: None if value is None else features for name, value in form.items()})


def hidden_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The hidden states among a layer's arguments: they come first."""
    return args[0] if args else next(iter(kwargs.values()))


def with_hidden(args: Sequence[Any], kwargs: dict[str, Any], hidden: Any) -> tuple[Any, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: hidden}


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
