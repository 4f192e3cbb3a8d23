"""Searchers for Ray Tune: a list of trials that is known beforehand, or Optuna's suggestions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from orchestrator.errors import ClusterError
from orchestrator.search.space import MAX_REPEATS, key_of

SCORE = "score"
"""Name of the metric in the results for Ray Tune; higher is better."""
TPE_ATTEMPTS = 10
"""Repeated suggestions in a row after which points are drawn at random."""


class NotSaved:
    """Pickles as nothing into Ray Tune's snapshots, which are not read again."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ListSearcher(NotSaved, Searcher):  # type: ignore[misc]
    """Suggests trials that are known beforehand, in their order.

    Args:
        specs: id and parameters of each trial.
        mutations: parameters that population-based training changes; it looks for them next to the trial.
    """

    def __init__(self, specs: Iterator[dict[str, Any]], mutations: Iterable[str] = ()) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._specs = specs
        self._next = next(specs, None)
        self.has_room: Callable[[], bool] = lambda: True
        self.is_over: Callable[[], bool] = lambda: True
        """Whether no trial will be resumed. Until then Ray Tune must not see the end, or it releases actors."""
        self._mutations = tuple(mutations)

    @property
    def is_exhausted(self) -> bool:
        """Whether all trials have been suggested."""
        return self._next is None

    def on_trial_pause(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the list does not depend on scores."""

    def suggest(self, trial_id: str) -> Any:
        if self.is_exhausted:
            return Searcher.FINISHED if self.is_over() else None
        if not self.has_room():
            return None
        assert self._next is not None
        spec, self._next = self._next, next(self._specs, None)
        return {"spec": spec, **{path: spec["parameters"][path] for path in self._mutations}}

    def as_space(self) -> dict[str, Any]:
        """Return all trials as a grid: population-based training does not take searchers."""
        own = {path: tune.sample_from(partial(parameter_of, path)) for path in self._mutations}
        return {"spec": tune.grid_search([] if self._next is None else [self._next, *self._specs]), **own}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: the list does not depend on scores."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trials' directories hold all that is needed."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: nothing was saved."""


def parameter_of(path: str, config: dict[str, Any]) -> Any:
    """Return the initial value of a trial's parameter."""
    return config["spec"]["parameters"][path]


class OptunaSearcher(ListSearcher):
    """Suggests trials with Optuna's TPE, from the scores of earlier ones; each point of the space once.

    Every suggestion has a random stream of its own, which depends on the seed and on the number of suggestions before
    it. A search that was killed therefore continues with the suggestions that it would have made anyway, whatever
    Optuna keeps in memory between them.

    Args:
        define: lets an `optuna.Trial` suggest a point, and returns its parameters.
        limit: number of trials; fewer where the space has no more points.
        recorded: suggestions of earlier attempts at the search (`optuna.Trial.params`); these are repeated first.
        make_spec: returns the trial for Optuna's parameters of a point and those of the recipe.

    Raises:
        ClusterError: Optuna is not installed.
    """

    def __init__(
        self,
        define: Callable[[Any], dict[str, Any]],
        seed: int,
        limit: int,
        recorded: Sequence[dict[str, Any]],
        make_spec: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    ) -> None:
        super().__init__(iter(()))
        self._study = make_study(recorded)
        self._num_recorded = len(recorded)
        self._define = define
        self._seed = seed
        self._left = limit
        self._make_spec = make_spec
        self._suggested: list[str] = []
        self._asked: dict[str, Any] = {}
        """The `optuna.Trial` of each trial without a score so far, by Ray Tune's id of it."""

    @property
    def is_exhausted(self) -> bool:
        return self._left == 0

    def on_trial_pause(self, trial_id: str, result: dict[str, Any]) -> None:
        """Learn the score of a trial that may not be resumed; scores after it was resumed come too late."""
        self._learn(trial_id, result.get(SCORE))

    def suggest(self, trial_id: str) -> Any:
        if not self.is_exhausted and not self.has_room():
            return None
        found = None if self.is_exhausted else self._ask()
        if found is None:
            self._left = 0
            return Searcher.FINISHED if self.is_over() else None
        self._left -= 1
        trial, parameters = found
        self._asked[trial_id] = trial
        return {"spec": self._make_spec(trial.params, parameters)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self._learn(trial_id, None if error or result is None else result.get(SCORE))

    def _ask(self) -> tuple[Any, dict[str, Any]] | None:
        """Return the next point and its parameters; None where no new point is found.

        Two trials with equal parameters are the same training. TPE, which returns to good points, is asked again; after
        some attempts random points are drawn, as in a random search.
        """
        from optuna.trial import TrialState

        number = len(self._suggested)
        for attempt in range(MAX_REPEATS):
            self._study.sampler = make_sampler(f"{self._seed}/{number}/{attempt}", attempt < TPE_ATTEMPTS)
            trial = self._study.ask()
            parameters = self._define(trial)
            key = key_of(parameters)
            if number < self._num_recorded or key not in self._suggested:
                self._suggested.append(key)
                return trial, parameters
            self._study.tell(trial, state=TrialState.FAIL)  # TPE ignores failed trials.
        return None

    def _learn(self, trial_id: str, score: float | None) -> None:
        """Report a trial's first score to Optuna.

        Args:
            score: None where the trial has failed.
        """
        from optuna.trial import TrialState

        trial = self._asked.pop(trial_id, None)
        if trial is not None and score is None:
            self._study.tell(trial, state=TrialState.FAIL)
        elif trial is not None:
            self._study.tell(trial, score)


def make_study(recorded: Sequence[dict[str, Any]]) -> Any:
    """Return an `optuna.Study` that maximizes and first suggests the recorded points.

    Raises:
        ClusterError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ClusterError("search.algorithm is tpe, which needs Optuna\n    -> pip install optuna") from error
    study = optuna.create_study(direction="maximize")
    for point in recorded:
        study.enqueue_trial(point)
    return study


def make_sampler(stream: str, is_tpe: bool) -> Any:
    """Return an Optuna sampler (TPE or random) with the random stream of this name."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = Random(stream).getrandbits(32)
    return TPESampler(seed=seed) if is_tpe else RandomSampler(seed=seed)
