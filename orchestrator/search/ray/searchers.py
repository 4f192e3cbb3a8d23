"""Where Ray Tune's trials come from: a list that is known beforehand, or Optuna."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from orchestrator.errors import ClusterError
from orchestrator.search.space import MAX_REPEATS, key_of

SCORE = "score"  # What Ray Tune is told: high is good.
TPE_ATTEMPTS = 10
"""Suggestions in a row that were made before, after which points are drawn at random."""


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
    """Hands out trials that Optuna's TPE suggests from what earlier ones scored, each of them once.

    Every suggestion has a random stream of its own, which depends on the seed and on how many came before. A search
    that was killed therefore goes on with the suggestions that it would have made anyway, whatever Optuna keeps in
    memory between them.

    Args:
        define: lets an `optuna.Trial` suggest a point, and returns its parameters.
        limit: how many trials there will be; fewer where the space has no more points.
        recorded: what earlier attempts at the search have handed out, in Optuna's terms (`Trial.params`): this comes
            first again, as it was.
        make_spec: makes a trial of Optuna's terms and the parameters that they stand for.

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
        self._handed_out: list[str] = []
        self._asked: dict[str, Any] = {}
        """The `optuna.Trial` of each trial that has told no score yet, by the id that Ray Tune gives it."""

    @property
    def is_exhausted(self) -> bool:
        return self._left == 0

    def left(self, trial_id: str, result: dict[str, Any]) -> None:
        """Later trials are suggested from what it has scored; what it scores when it is taken up comes too late."""
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
        """The next point and its parameters; None where nothing new is found any more.

        Two trials with equal parameters are the same training: TPE, which comes back to what was good, is asked again,
        and where that does not help, random points are drawn, as in a random search.
        """
        from optuna.trial import TrialState

        number = len(self._handed_out)
        for attempt in range(MAX_REPEATS):
            self._study.sampler = make_sampler(f"{self._seed}/{number}/{attempt}", attempt < TPE_ATTEMPTS)
            trial = self._study.ask()
            parameters = self._define(trial)
            key = key_of(parameters)
            if number < self._num_recorded or key not in self._handed_out:
                self._handed_out.append(key)
                return trial, parameters
            self._study.tell(trial, state=TrialState.FAIL)  # TPE passes over what has failed.
        return None

    def _learn(self, trial_id: str, score: float | None) -> None:
        """Tell Optuna a trial's first score; None where it has none."""
        from optuna.trial import TrialState

        trial = self._asked.pop(trial_id, None)
        if trial is not None and score is None:
            self._study.tell(trial, state=TrialState.FAIL)
        elif trial is not None:
            self._study.tell(trial, score)


def make_study(recorded: Sequence[dict[str, Any]]) -> Any:
    """An `optuna.Study` of high scores whose first suggestions are the recorded ones.

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
    """An Optuna sampler with the random stream of this name."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = Random(stream).getrandbits(32)
    return TPESampler(seed=seed) if is_tpe else RandomSampler(seed=seed)
