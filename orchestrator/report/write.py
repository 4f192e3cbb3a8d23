"""Write the page of a run or search directory."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.errors import InputError, Problem
from orchestrator.report.records import read_run, read_search
from orchestrator.report.run_page import run_page
from orchestrator.report.search_page import search_page


def write_report(directory: Path) -> Path:
    """Write `report.html` into a search or run directory, and return its path. The same input gives the same bytes.

    It may be called at any time, even during the search or run. An earlier page is replaced atomically.

    Raises:
        InputError: it is neither a search nor a run directory, or its main record is damaged.
    """
    if (directory / "search.json").is_file():
        text = search_page(read_search(directory))
    elif (directory / "run.json").is_file():
        text = run_page(read_run(directory))
    else:
        what = "there is no such directory" if not directory.is_dir() else "there is neither a search nor a run in it"
        raise InputError(Problem(what, str(directory), "give the directory that `search` or `train` wrote into"))
    path = directory / "report.html"
    temporary = directory / f".report.html.{os.getpid()}.partial"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
