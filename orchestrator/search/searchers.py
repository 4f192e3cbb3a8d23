"""Where Ray Tune's trials come from: a list that is known beforehand, or Optuna."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from orchestrator.errors import ClusterError

SCORE = "score"  # What Ray Tune is told: high is good.


class Unsaved:
    """Of which Ray Tune's snapshots hold nothing: they are not read again."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Listed(Unsaved, Searcher):  # type: ignore[misc]
    """Hands out trials that are known beforehand."""

    def __init__(self, specs: Iterator[dict[str, Any]], changing: Iterable[str] = ()) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._specs = specs
        self._next = next(specs, None)
        self.has_room: Callable[[], bool] = lambda: True
        self.is_over: Callable[[], bool] = lambda: True
        """Whether nothing will be taken up again. Until then Ray Tune must not know the end, or it lets actors go."""
        self._changing = tuple(changing)
        """Parameters that population-based training looks for, and changes, beside the trial."""

    @property
    def is_exhausted(self) -> bool:
        """Whether all have been handed out."""
        return self._next is None

    def left(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial may have come to its end; nothing is learned."""

    def suggest(self, trial_id: str) -> Any:
        if self.is_exhausted:
            return Searcher.FINISHED if self.is_over() else None
        if not self.has_room():
            return None
        assert self._next is not None
        spec, self._next = self._next, next(self._specs, None)
        return {"spec": spec, **{path: spec["parameters"][path] for path in self._changing}}

    def as_space(self) -> dict[str, Any]:
        """All that would be handed out, as a grid: population-based training does not take searchers."""
        own = {path: tune.sample_from(partial(parameter_of, path)) for path in self._changing}
        return {"spec": tune.grid_search([] if self._next is None else [self._next, *self._specs]), **own}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing is learned."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept: the trials' directories are."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


def parameter_of(path: str, config: dict[str, Any]) -> Any:
    """The value that a trial begins with."""
    return config["spec"]["parameters"][path]


class Suggested(Listed):
    """Hands out trials that another searcher suggests from what earlier ones scored."""

    def __init__(self, inner: Searcher, limit: int, make_spec: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__(iter(()))
        self._inner = inner
        self._left = limit
        self._make_spec = make_spec
        self._learned: set[str] = set()

    @property
    def is_exhausted(self) -> bool:
        return self._left == 0

    def left(self, trial_id: str, result: dict[str, Any]) -> None:
        """Later trials are suggested from what it has scored; what it scores when it is taken up comes too late."""
        if trial_id not in self._learned:
            self._learned.add(trial_id)
            self._inner.on_trial_complete(trial_id, result=result)

    def suggest(self, trial_id: str) -> Any:
        if self.is_exhausted:
            return Searcher.FINISHED if self.is_over() else None
        if not self.has_room():
            return None
        found = self._inner.suggest(trial_id)
        if not isinstance(found, dict):
            return found
        self._left -= 1
        return {"spec": self._make_spec(found)}

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        if trial_id not in self._learned:
            self._inner.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        if trial_id not in self._learned:
            self._inner.on_trial_complete(trial_id, result=result, error=error)


def optuna_searcher(define: Callable[[Any], dict[str, Any]], seed: int, points: Sequence[dict[str, Any]]) -> Searcher:
    """TPE, through Ray Tune's wrapper of Optuna.

    Args:
        define: as Optuna's define-by-run objective, for `OptunaSearch(space=...)`.
        points: what to suggest first: the trials of a search that goes on.
    """
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(space=define, metric=SCORE, mode="max", seed=seed, points_to_evaluate=list(points) or None)
    except (ImportError, AssertionError) as error:
        raise ClusterError("search.algorithm is tpe, which needs Optuna\n    -> pip install optuna") from error
