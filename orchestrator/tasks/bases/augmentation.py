"""Pictures changed at random for training: the same change for the same example of the same epoch, on any worker."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Augmentation = Literal["none", "flip", "flip-crop"]
Pictures = npt.NDArray[np.uint8]

SHARE_PADDED = 8  # Each side's length divided by this is padded on either end: 4 of CIFAR's 32 pixels (He et al. 2016).


def augment(pictures: Pictures, how: Augmentation, stream: tuple[int, ...], rows: npt.NDArray[np.int64]) -> Pictures:
    """Return each picture mirrored or not, and with `flip-crop` moved by up to an eighth of its size.

    The border that a move uncovers is filled with the mirror image of the pixels next to it.

    Args:
        pictures: [n, height, width, 3].
        stream: seed and epoch.
        rows: the example of each picture; draws depend on this and the stream alone.
    """
    if how == "none":
        return pictures
    height, width = pictures.shape[1:3]
    most = (height // SHARE_PADDED, width // SHARE_PADDED)
    changed = np.empty_like(pictures)
    for place, row in enumerate(rows):
        generator = np.random.default_rng([*stream, int(row)])
        is_flipped = generator.random() < 0.5
        moves = [int(generator.integers(-far, far + 1)) if how == "flip-crop" else 0 for far in most]
        down, across = (_reflect(size, move) for size, move in zip((height, width), moves, strict=True))
        across = across[::-1] if is_flipped else across
        changed[place] = pictures[place].take(down, axis=0).take(across, axis=1)
    return changed


def _reflect(size: int, move: int) -> npt.NDArray[np.int64]:
    """Return indices of a row of pixels after a move, as in `numpy.pad` with the mode `reflect`."""
    indices = np.abs(np.arange(size) + move)
    return np.where(indices >= size, 2 * (size - 1) - indices, indices)
