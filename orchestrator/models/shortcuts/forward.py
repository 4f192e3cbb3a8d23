"""Put functions around the forward functions of modules. Nothing else in this package replaces a forward function.

Hooks would not do: peft calls the model that it wraps without its hooks, and some models call `layer.forward(...)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

AroundForward = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with a module, its forward function as it was, and the positional and keyword arguments of the call."""


def wrap_forward(module: nn.Module, around: AroundForward) -> Callable[[], None]:
    """Put a function around a module's forward function, and return a function that removes it.

    The new forward function is a method of the module and has the signature of the old one. So a copy of the module,
    such as peft makes of modules that are trained whole, passes the copy to `around`, and computes with its weights.

    A module can be wrapped several times. The functions are then removed in the reverse order.
    """
    replaced = vars(module).get("forward")
    function = _unbound(module)

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, MethodType(function, self), args, kwargs)

    module.forward = MethodType(forward, module)

    def remove() -> None:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced

    return remove


def _unbound(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward function with the module as its first argument."""
    bound = module.forward
    if isinstance(bound, MethodType) and bound.__self__ is module:
        return bound.__func__
    return lambda _, *args, **kwargs: bound(*args, **kwargs)
