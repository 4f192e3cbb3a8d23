"""Where trials run: what Ray Tune's actors are set up with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from orchestrator.search.bench import Bench
from orchestrator.search.pack import Pack
from orchestrator.search.records import SearchDirectory
from orchestrator.search.trial import Spec, Trial
from orchestrator.search.tuning import RunningTrial
from orchestrator.tasks.base import MainMetric
from orchestrator.training.prepare import Prepared


@dataclass(frozen=True)
class Workplace:
    """Begins trials, and packs of them, in the process that it was made in."""

    bench: Bench
    directory: SearchDirectory

    def begin(self, id: str, parameters: dict[str, Any], members: dict[str, dict[str, Any]] | None) -> RunningTrial:
        if members is not None:
            return Pack(self.bench, [Spec(*member) for member in members.items()], self.directory)
        return Trial(self.bench, Spec(id, parameters), self.directory.trial(id))


def make_workplace(
    prepared: Prepared, root: Path, boundaries: Sequence[int], metric: MainMetric, keep: int, num_threads: int
) -> Workplace:
    """Set up a process for trials.

    Args:
        boundaries: freeze boundaries of the search's trials.
        keep: of how many of the best trials the weights are kept.
        num_threads: for each trial.
    """
    torch.set_num_threads(num_threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory = SearchDirectory(root)
    return Workplace(Bench(prepared, boundaries, directory.rows, metric, keep), directory)
