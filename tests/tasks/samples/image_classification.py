"""Pictures of three colours, and a tiny vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from task_sample import SPLITS, Sample


def make(folder: Path, fixture: Callable[[str], Path]) -> Sample:
    broken = folder / "broken"
    for name in (f"{split}/{label}/1.png" for split in SPLITS for label in "ab"):
        (broken / name).parent.mkdir(parents=True)
        (broken / name).write_bytes(b"not a picture")
    empty = folder / "empty"
    (empty / "a").mkdir(parents=True)
    return Sample(
        model=fixture("tiny_vit"),
        data=fixture("small_pictures"),
        bad=[(broken, "is in none of the formats"), (empty, "holds")],
        shown="a picture of 32 x 32 pixels",
    )
