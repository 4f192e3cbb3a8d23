"""Pictures of every kind become RGB as one would see them; what is none is told apart by why."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.fields.decode import BrokenPicture, decode, quiet_decoding

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def save(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def pixels_of(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(decode(data).image)


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_formats_without_loss_give_the_pixels(format_: str) -> None:
    options = {"lossless": True} if format_ == "WEBP" else {}
    picture = decode(save(Image.fromarray(PIXELS), format_, **options))
    np.testing.assert_array_equal(np.asarray(picture.image), PIXELS)
    assert (picture.kind, picture.is_animated) == ("RGB", False)


def test_grey_becomes_three_equal_colours() -> None:
    picture = decode(save(Image.fromarray(PIXELS[..., 0])))
    assert picture.kind == "grey"
    for colour in range(3):
        np.testing.assert_array_equal(np.asarray(picture.image)[..., colour], PIXELS[..., 0])


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    values = np.array([[0, 255, 256], [1000, 32_768, 65_535]], dtype=np.uint16)
    data = save(Image.fromarray(values))
    assert decode(data).kind == "16 bit grey"
    np.testing.assert_array_equal(pixels_of(data)[..., 1], [[0, 0, 1], [3, 128, 255]])


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 3] = [0, 255, 128]
    np.testing.assert_array_equal(pixels_of(save(Image.fromarray(pixels)))[0, :, 0], [255, 0, 127])
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels_of(save(palette, transparency=0)), [[[255, 255, 255], [0, 0, 255]]])


def test_cmyk_becomes_the_colours_that_it_prints() -> None:
    picture = decode(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert picture.kind == "CMYK"
    red = np.asarray(picture.image).mean((0, 1))
    assert red[0] > 230 and red[1:].max() < 25


def test_pictures_are_turned_as_the_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned to the right: what was up is on the left.
    np.testing.assert_array_equal(pixels_of(save(Image.fromarray(PIXELS), exif=exif)), np.rot90(PIXELS, -1))


def test_of_several_frames_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    picture = decode(save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert picture.is_animated
    np.testing.assert_array_equal(np.asarray(picture.image)[0, 0], [255, 0, 0])


def test_a_small_picture_is_judged_like_the_whole_one() -> None:
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 160, 3), dtype=np.uint8))
    data = save(large, "JPEG")
    assert decode(data, small=True).image.width < 160
    assert decode(data, small=True).kind == decode(data).kind
    for size in range(len(data) // 2, len(data) - 200, 997):
        for small in (False, True):
            with pytest.raises(BrokenPicture, match="damaged"):
                decode(data[:size], small)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "in none of the formats"),
        (b"<html>", "in none of the formats"),
        (save(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "numbers with fractions"),
    ],
    ids=["empty", "a program", "text", "fractions"],
)
def test_what_is_no_picture_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BrokenPicture, match=why):
        decode(data)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"])
def test_damaged_bytes_raise_nothing_but_that_the_picture_is_broken(format_: str) -> None:
    data = save(Image.fromarray(PIXELS), format_)
    generator = random.Random(0)
    num_broken = 0
    with quiet_decoding():
        for number in range(200):
            damaged = bytearray(data[: generator.randrange(1, len(data))] if number % 2 else data)
            for _ in range(3):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            try:
                decode(bytes(damaged))
            except BrokenPicture as error:
                num_broken += 1
                assert error.why
    assert num_broken > 20
