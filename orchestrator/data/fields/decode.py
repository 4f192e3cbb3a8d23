"""Turn the bytes of a picture into pixels, and say what kind of picture it is or why it is none. Needs Pillow."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

LARGEST_PICTURE = 89_478_485  # pixels; a quarter of a gigabyte as RGB, and what Pillow warns of
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow knows more, some of which start other programs."""
EMPTY = "is empty (0 bytes)"
TOO_LARGE = f"has more than {LARGEST_PICTURE:,} pixels"

# What Pillow's decoders raise when they meet bytes that they did not expect.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    struct.error,
    zlib.error,
)
_KINDS = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "with a palette",
    "PA": "with a palette and transparency",
    "RGBA": "with transparency",
    "CMYK": "CMYK",
    "I": "32 bit grey",
}


class BrokenPicture(ValueError):
    """The bytes are no picture that can be used; the text says why, fit to follow `the picture`."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.detail = detail


@dataclass(frozen=True)
class Picture:
    """A decoded picture."""

    image: Image.Image
    """In RGB, turned as its EXIF orientation says."""
    kind: str
    """What it was before: `RGB`, `grey`, `CMYK`, ..."""
    is_animated: bool
    """Whether it had several frames, of which this is the first."""


def decode(data: bytes, small: bool = False) -> Picture:
    """Decode a picture to RGB: 16 bits are cut to 8, transparency is laid on white, the first frame is taken.

    Args:
        small: let JPEG come out at an eighth of its size. All its bytes are read nevertheless, in less time.

    Raises:
        BrokenPicture: no bytes, no known format, too many pixels (told by the header, before anything is decoded), cut
            off or damaged, pixels that are numbers with fractions.
    """
    if not data:
        raise BrokenPicture(EMPTY)
    try:
        with _open(data) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise BrokenPicture(TOO_LARGE, f"{image.width} x {image.height}")
            kind = "16 bit grey" if image.mode.startswith("I;16") else _KINDS.get(image.mode, image.mode)
            # Phones write further pictures of the same scene into one JPEG; that is no animation.
            is_animated = getattr(image, "is_animated", False) and image.format not in ("JPEG", "MPO")
            if small:
                image.draft("RGB", (1, 1))
            image.load()
            return Picture(_to_rgb(ImageOps.exif_transpose(image)), kind, is_animated)
    except BrokenPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenPicture(TOO_LARGE) from error
    except _DECODE_ERRORS as error:
        raise BrokenPicture("is damaged or cut off", str(error) or type(error).__name__) from error


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Suppress Pillow's warnings; for the thread that starts others, since warnings are the process's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _open(data: bytes) -> Image.Image:
    Image.init()  # Without it Pillow knows only the most common formats.
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=known)
    except UnidentifiedImageError as error:
        raise BrokenPicture(f"is in none of the formats that are read ({', '.join(known)}), or damaged") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenPicture("holds numbers with fractions instead of colours")
    if image.mode.startswith("I"):
        # Pillow would cut off whatever is above 255.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
