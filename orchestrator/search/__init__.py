"""Search: the space, trials in Ray Tune's actors, the winner.

`orchestrator.search` is also a function of the Python API. Importing a package binds its name in the parent, over the
function; so the package itself can be called, and does what the function does.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A package that can be called."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from orchestrator.search.run import search

        return search(*arguments, **named)


sys.modules[__name__].__class__ = _Room
