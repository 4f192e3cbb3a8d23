"""Searches a space of recipes with Ray Tune and keeps the best trial's model.

`orchestrator.search` is also a function of the Python API. Importing a package binds its name in the parent, over the
function; so the package itself can be called as the function.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A package that can be called."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from orchestrator.search.run import search

        return search(*arguments, **named)


sys.modules[__name__].__class__ = _CallablePackage
