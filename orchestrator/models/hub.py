"""Look up a model on the Hugging Face Hub, and explain errors in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from orchestrator.errors import ModelError, Problem
from orchestrator.models.folder import ADAPTER_CONFIG_FILE, CONFIG_FILE

HUB_TIMEOUT = 5.0  # seconds
LONGEST_MESSAGE = 300  # characters shown of another library's message
# Errors of the Hub are OSErrors and errors of its HTTP library; failed connections may be only one of them.
CONNECTION_ERRORS: tuple[type[Exception], ...] = tuple(
    kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)
)
LOADING_ERRORS: tuple[type[Exception], ...] = (
    *CONNECTION_ERRORS,
    ValueError,
    RuntimeError,
    StrictDataclassError,
    SafetensorError,
)
"""Raised by transformers if a model, config or tokenizer cannot be loaded."""


@dataclass(frozen=True)
class HubModel:
    """The Hub's (or its local cache's) information about a model."""

    commit: str
    licence: str | None
    is_reachable: bool
    """False if only the local cache was used."""


def find_hub_model(model: str, revision: str | None, where: str) -> HubModel:
    """Return the commit of a revision, so that every worker loads the same; from the cache without a network.

    Raises:
        ModelError: no such model or revision, no safetensors in it, or neither reachable nor cached.
    """
    try:
        info = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT)
    except LOADING_ERRORS as error:
        cached = None if _is_refusal(error) else try_to_load_from_cache(model, CONFIG_FILE, revision=revision)
        if isinstance(cached, str):
            # The cache keeps the files of a commit in a folder named after it.
            return HubModel(Path(cached).parent.name, None, is_reachable=False)
        raise ModelError(explain(error, model, revision, where)) from error
    if problem := _check_files([file.rfilename for file in info.siblings or ()], model, where):
        raise ModelError(problem)
    assert info.sha is not None, "the Hub names a commit for every model"
    licence = info.card_data.get("license") if info.card_data else None
    licence = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
    return HubModel(info.sha, licence, is_reachable=True)


def explain(error: BaseException, model: str, revision: str | None, where: str) -> Problem:
    """Return what an error while loading a model means for the user."""
    unreachable = (
        f"the Hub cannot be reached, and {model!r} is not in the local cache",
        "connect to the internet once, or download the model elsewhere and name its folder (./folder)",
    )
    meanings: dict[type[BaseException], tuple[str, str]] = {
        GatedRepoError: (
            f"the model {model!r} is gated, and you have no access to it",
            f"accept its terms on https://huggingface.co/{model}, then run `hf auth login` or set HF_TOKEN",
        ),
        RevisionNotFoundError: (f"{model!r} has no revision {revision!r}", "set source.revision to one that it has"),
        RepositoryNotFoundError: (
            f"the Hub has no model {model!r}, or it is private",
            "check the id (owner/name); for a folder write ./folder; for a private model set HF_TOKEN",
        ),
        HFValidationError: (f"{model!r} is not a Hub id", "write owner/name, or ./folder for a folder"),
        LocalEntryNotFoundError: unreachable,
        OfflineModeIsEnabled: unreachable,
        EntryNotFoundError: (f"{model!r} lacks a file that it should have on the Hub", "use another model or revision"),
    }
    for cause in _causes(error):
        for kind, (what, remedy) in meanings.items():
            if isinstance(cause, kind):
                return Problem(what, where, remedy)
    if isinstance(error, CONNECTION_ERRORS) and (not isinstance(error, OSError) or isinstance(error, ConnectionError)):
        return Problem(unreachable[0], where, unreachable[1])
    return Problem(f"the model {model!r} cannot be loaded: {_text(error)}", where, "use another model or revision")


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError)


def _check_files(names: Sequence[str], model: str, where: str) -> Problem | None:
    if ADAPTER_CONFIG_FILE in names:
        remedy = "merge it into its model with peft's `merge_and_unload` and name the folder that it is saved to"
        return Problem(f"{model!r} holds an adapter ({ADAPTER_CONFIG_FILE}), not a plain model", where, remedy)
    if names and not any(name.endswith(".safetensors") for name in names):
        remedy = "look for a revision that has them (often refs/pr/1), or convert a copy with `save_pretrained`"
        return Problem(
            f"{model!r} has no weights in the safetensors format, the only one that is loaded", where, remedy
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _text(error: BaseException) -> str:
    return shorten(str(error), LONGEST_MESSAGE) or type(error).__name__
