"""The frozen prefix: the blocks below the freeze boundary, whose stored output can take their place.

What frozen blocks make of an example never changes, so it can be computed once, stored, and fed to the blocks above in
every later epoch and trial. A *boundary* is counted in frozen layers: 0 after the stem, k after layer k, and one more
than there are layers after the tail, where only the head is left.

No architecture is known here. The model's own code runs, with frozen layers that hand on what they are given and the
last of them giving the stored features. Whether that holds for a model is tried out on real examples, with the whole
model beside it (`find_boundaries`); where it does not (layers that hand on more than hidden states), nothing is fed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models.blocks import Block, Blocks
from orchestrator.models.pick import FAILURES, Pick, evaluating, is_close

FEATURES = "features"  # The argument of the model's forward pass that holds stored features.
HANDS_ON_MORE = "its layers hand on more than hidden states"


class _Reached(Exception):
    """Everything that was to be captured has been; the rest of the forward pass is not needed."""


class _NotSeen(Exception):
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
class _Form:
    """What a module returns besides the hidden states: how to wrap them again."""

    others: tuple[Any, ...] | None
    """None where it returns a plain tensor."""

    @classmethod
    def of(cls, output: Any) -> _Form:
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
        self, model: Any, body: Any, blocks: Blocks, boundary: int, pick: Pick | None, stem: Iterable[nn.Module]
    ) -> None:
        self.model = model
        self.body = body
        self.num_layers = len(blocks.layers)
        self.boundary = boundary
        self.pick = pick
        self._pass = _Pass()
        self._forms: dict[nn.Module, _Form] = {}
        self._output: Any = None
        """What the body returned on the examples, as a form for feeding at the last boundary."""
        self._needed: str | None = None
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

    @property
    def is_pooled(self) -> bool:
        """Whether the features are one vector an example, whatever its length."""
        return self._is_pooled(self.boundary)

    def compute(
        self, inputs: dict[str, Tensor], boundaries: Sequence[int], start: int | None = None, features: Any = None
    ) -> dict[int, Tensor]:
        """What the frozen blocks make of a batch, at each of these boundaries.

        Args:
            inputs: the model's inputs, padded on the right.
            start: a shallower boundary to go on from, with its `features`; None starts at the inputs.
        """
        this = self._pass = _Pass(fed_at=start, features=features, wanted=frozenset(boundaries))
        self._stay = True
        try:
            with torch.no_grad():
                self.model(**inputs)
        except _Reached:
            pass
        finally:
            self._stay = False
            self._pass = _Pass()
        if this.taken.keys() != this.wanted:
            raise _NotSeen
        return this.taken

    _stay = False
    """The pass is set from outside, not by the model's arguments."""

    def _is_pooled(self, boundary: int) -> bool:
        return self.pick is not None and boundary >= self.num_layers

    def _take_features(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features = kwargs.pop(FEATURES, None)
        if not self._stay:
            # It stays until the next pass: gradient checkpointing calls layers again during the backward pass.
            self._pass = _Pass(None if features is None else self.boundary, features)
        if self._pass.features is not None:
            main = kwargs.setdefault(self.body.main_input_name, self._pass.features)
            if self._is_pooled(self._pass.fed_at or 0) and _is_token_ids(main) and self._pass.features.dim() == 3:
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
            return self._forms.get(module, _Form(None)).wrap(self._pass.features)
        output = original(*args, **kwargs)
        self._forms[module] = _Form.of(output)
        return output

    def _enter_layers(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        this = self._pass
        if this.fed_at == 0:
            args, kwargs = _with_hidden(args, kwargs, this.features)
        self._take(0, _hidden_of(args, kwargs))
        return args, kwargs

    def _layer_function(self, number: int, is_last: bool) -> Callable[..., Any]:
        def forward(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            this = self._pass
            if this.fed_at is not None and number <= this.fed_at:
                feeds = number == this.fed_at and is_last
                return self._forms[module].wrap(this.features if feeds else _hidden_of(args, kwargs))
            output = original(*args, **kwargs)
            self._forms[module] = _Form.of(output)
            if is_last:
                self._take(number, output if isinstance(output, Tensor) else output[0])
            return output

        return forward

    def _pass_body(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        this = self._pass
        if this.fed_at == self.num_layers + 1:
            assert this.features is not None
            return _fill_output(self._output, this.features)
        output = original(*args, **kwargs)
        self._output = output
        if self._needed is not None:
            self._take(self.num_layers + 1, output[self._needed])
        return output

    def _take(self, boundary: int, hidden: Tensor) -> None:
        this = self._pass
        if boundary not in this.wanted:
            return
        if self.pick is not None and self._is_pooled(boundary) and hidden.dim() == 3:
            hidden = self.pick.take(hidden)
        this.taken[boundary] = hidden
        if this.taken.keys() == this.wanted:
            raise _Reached


@dataclass(frozen=True)
class Unsplit:
    """Why the frozen blocks of a model cannot be replaced by their output."""

    reason: str


def split_model(
    model: Any,
    body: Any,
    blocks: Blocks,
    boundary: int,
    inputs: dict[str, Tensor],
    beside: dict[str, Tensor],
    pick: Pick | None,
) -> Prefix | Unsplit:
    """Make the blocks below a boundary replaceable by what they make of an example.

    It is tried out on the inputs: the model fed with features must give the same outputs as the whole model.

    Args:
        model: what is called: the model, or a wrapper of adapters around it.
        body: the model's `base_model`, without its head.
        boundary: number of frozen layers; one more than there are where the tail is frozen too.
        inputs: a few real examples of uneven length; what the model's forward pass takes.
        beside: what of them goes along with features.
        pick: the position that the head reads, if it is only one.
    """
    try:
        stem = _find_replaceable(model, blocks, inputs)
    except FAILURES as error:
        return Unsplit(f"{HANDS_ON_MORE} ({type(error).__name__})")
    prefix = Prefix(model, body, blocks, boundary, pick, stem)
    reason = _try_out(prefix, inputs, beside)
    if reason is None:
        return prefix
    prefix.remove()
    return Unsplit(reason)


def _find_replaceable(model: Any, blocks: Blocks, inputs: dict[str, Tensor]) -> list[nn.Module]:
    """The parts of the stem that matter to the first layer's hidden states alone.

    The others (a norm of the relative positions that all layers read) have to compute in every pass.
    """
    parts = [
        module
        for module in _outermost(blocks.stem)
        if any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList)
    ]
    outputs: list[tuple[nn.Module, Tensor]] = []

    def cut_output(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        outputs.append((module, hidden.detach().requires_grad_()))
        return _Form.of(output).wrap(outputs[-1][1].clone())

    def cut_hidden(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return _with_hidden(args, kwargs, _hidden_of(args, kwargs).detach())

    hooks = [module.register_forward_hook(cut_output) for module in parts]
    hooks.append(blocks.layers[0].elements[0].register_forward_pre_hook(cut_hidden, with_kwargs=True))
    try:
        with torch.enable_grad(), evaluating(model):
            logits = model(**inputs).logits
            starts = [start for _, start in outputs]
            gradients = torch.autograd.grad(logits.sum(), starts, allow_unused=True) if starts else ()
    finally:
        for hook in hooks:
            hook.remove()
    read = {module for (module, _), gradient in zip(outputs, gradients, strict=True) if gradient is not None}
    return [module for module in parts if module not in read]


def _try_out(prefix: Prefix, inputs: dict[str, Tensor], beside: dict[str, Tensor]) -> str | None:
    """Why feeding features does not give what the whole model gives; None when it does."""
    model, boundary = prefix.model, prefix.boundary
    with evaluating(model), torch.no_grad():
        try:
            with torch.enable_grad():
                whole = model(**inputs).logits
            if boundary > prefix.num_layers:
                prefix._needed = _find_needed(model, prefix, inputs)
                if prefix._needed is None:
                    return "its head reads more than one output of its body"
            features = prefix.compute(inputs, [boundary])[boundary]
            # Not all of the examples: what a layer hands on of a batch besides hidden states fits no other batch.
            some = max(1, len(features) - 1)
            given = {name: value[:some] for name, value in beside.items()}
            with torch.enable_grad():
                fed = model(**given, **{FEATURES: features[:some]}).logits
        except FAILURES as error:
            return f"{HANDS_ON_MORE} ({type(error).__name__})"
        except _NotSeen:
            return "its code calls layers in a way that cannot be followed"
    if _reached_by(fed, model) != _reached_by(whole, model):
        return "something is trained that its frozen blocks depend on"
    return None if is_close(fed, whole[:some]) else HANDS_ON_MORE


def _reached_by(logits: Tensor, model: nn.Module) -> list[bool]:
    """Which trained parameters have a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not logits.requires_grad:
        return [False] * len(trained)
    gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _find_needed(model: Any, prefix: Prefix, inputs: dict[str, Tensor]) -> str | None:
    """The one part of the body's output that the logits depend on; None where there are several."""
    model(**inputs)
    output = prefix._output
    parts = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    leaves = {name: value.detach().requires_grad_() for name, value in parts.items()}
    original = prefix.body.forward
    prefix.body.forward = lambda *args, **kwargs: type(output)(**{**output, **leaves})
    try:
        with torch.enable_grad():
            logits = model(**inputs).logits
            gradients = torch.autograd.grad(logits.sum(), list(leaves.values()), allow_unused=True)
    finally:
        prefix.body.forward = original
    needed = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None]
    return needed[0] if len(needed) == 1 else None


def _fill_output(form: Any, features: Tensor) -> Any:
    """The body's output, made of the features. Parts that are not read are there too, or places would shift."""
    return type(form)(**{name: None if value is None else features for name, value in form.items()})


def _hidden_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The hidden states among a layer's arguments: they come first."""
    return args[0] if args else next(iter(kwargs.values()))


def _with_hidden(args: Sequence[Any], kwargs: dict[str, Any], hidden: Any) -> tuple[Any, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: hidden}


def _outermost(block: Block) -> Iterator[nn.Module]:
    inside = {part for module in block.modules for part in module.modules() if part is not module}
    yield from (module for module in block.modules if module not in inside)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
