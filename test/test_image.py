"""From what a camera sends to RGB, for every encoding, against a picture made by hand."""

from __future__ import annotations

import resource
import struct
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.image import (
    _CONVERSIONS,
    ImageError,
    claimed_size,
    decode_message,
    draw_matches,
    fit,
    thumbnail,
    to_rgb,
)

Image = NDArray[np.uint8]

WIDTH, HEIGHT = 48, 32
COLOURS = ((200, 40, 20), (30, 180, 60), (20, 50, 220), (240, 240, 240))
"""Top left, top right, bottom left, bottom right, as R, G, B."""


@pytest.fixture
def picture() -> Image:
    """Four flat quarters: no conversion can hide a swapped channel, row or column."""
    out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    h, w = HEIGHT // 2, WIDTH // 2
    out[:h, :w], out[:h, w:], out[h:, :w], out[h:, w:] = COLOURS
    return out


def _grey(picture: Image) -> NDArray[np.float64]:
    return picture @ np.array([0.299, 0.587, 0.114])


def _mosaic(picture: Image, pattern: str) -> Image:
    """What a Bayer sensor records: ``pattern`` names the cells of a 2×2 square, row by row."""
    out = np.zeros(picture.shape[:2], np.uint8)
    for index, colour in enumerate(pattern):
        row, column = divmod(index, 2)
        out[row::2, column::2] = picture[row::2, column::2, "rgb".index(colour)]
    return out


def _yuv422(picture: Image, order: str) -> Image:
    """Two bytes a pixel (ITU-R BT.601, studio range); ``order`` of four bytes: uyvy or yuyv."""
    r, g, b = (picture[:, :, i].astype(float) for i in range(3))
    planes = {
        "y": 16 + 0.257 * r + 0.504 * g + 0.098 * b,
        "u": 128 - 0.148 * r - 0.291 * g + 0.439 * b,
        "v": 128 + 0.439 * r - 0.368 * g - 0.071 * b,
    }
    raw = np.zeros((HEIGHT, WIDTH * 2), np.uint8)
    seen_y = 0
    for place, name in enumerate(order):
        start = 0
        if name == "y":
            start, seen_y = seen_y, seen_y + 1
        raw[:, place::4] = np.round(planes[name][:, start::2]).astype(np.uint8)
    return raw.reshape(HEIGHT, WIDTH, 2)


def _alpha(picture: Image) -> Image:
    return np.dstack([picture, np.full(picture.shape[:2], 7, np.uint8)])


ENCODERS: dict[str, tuple[Callable[[Image], NDArray[Any]], str]] = {
    "rgb8": (lambda p: p, "colour"),
    "bgr8": (lambda p: p[:, :, ::-1], "colour"),
    "8UC3": (lambda p: p[:, :, ::-1], "colour"),
    "rgba8": (_alpha, "colour"),
    "bgra8": (lambda p: _alpha(p[:, :, ::-1]), "colour"),
    "8UC4": (lambda p: _alpha(p[:, :, ::-1]), "colour"),
    "mono8": (lambda p: np.round(_grey(p)).astype(np.uint8), "grey"),
    "8UC1": (lambda p: np.round(_grey(p)).astype(np.uint8), "grey"),
    "mono16": (lambda p: (_grey(p) * 200 + 900).astype(np.uint16), "stretched"),
    "16UC1": (lambda p: (_grey(p) * 3).astype(np.uint16), "stretched"),
    "32FC1": (lambda p: (_grey(p) / 1000 - 3).astype(np.float32), "stretched"),
    "rgb16": (lambda p: p.astype(np.uint16) * 256, "stretched colour"),
    "bgr16": (lambda p: p[:, :, ::-1].astype(np.uint16) * 256, "stretched colour"),
    "yuv422": (lambda p: _yuv422(p, "uyvy"), "colour"),
    "uyvy": (lambda p: _yuv422(p, "uyvy"), "colour"),
    "yuv422_yuy2": (lambda p: _yuv422(p, "yuyv"), "colour"),
    "yuyv": (lambda p: _yuv422(p, "yuyv"), "colour"),
    "bayer_rggb8": (lambda p: _mosaic(p, "rggb"), "colour"),
    "bayer_bggr8": (lambda p: _mosaic(p, "bggr"), "colour"),
    "bayer_gbrg8": (lambda p: _mosaic(p, "gbrg"), "colour"),
    "bayer_grbg8": (lambda p: _mosaic(p, "grbg"), "colour"),
}


def _expected(picture: Image, kind: str) -> NDArray[np.float64]:
    values = _grey(picture)[:, :, None].repeat(3, 2) if "colour" not in kind else picture * 1.0
    if kind.startswith("stretched"):
        values = (values - values.min()) / (values.max() - values.min()) * 255
    return values


def _assert_like(found: Image, expected: NDArray[np.float64]) -> None:
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert found.flags.c_contiguous
    # Interpolation smears where the quarters meet; elsewhere only rounding is allowed.
    rows = [r for r in range(2, HEIGHT - 2) if abs(r - HEIGHT // 2) > 3]
    columns = [c for c in range(2, WIDTH - 2) if abs(c - WIDTH // 2) > 3]
    difference = np.abs(found.astype(float) - expected)[np.ix_(rows, columns)]
    assert difference.max() <= 3


def test_every_encoding_has_its_test() -> None:
    assert {name.lower() for name in ENCODERS} == set(_CONVERSIONS)


@pytest.mark.parametrize("encoding", ENCODERS)
def test_pixels_become_rgb(picture: Image, encoding: str) -> None:
    encode, kind = ENCODERS[encoding]
    pixels = np.ascontiguousarray(encode(picture))
    _assert_like(to_rgb(pixels, encoding), _expected(picture, kind))


def test_a_flat_or_broken_16_bit_picture_is_no_division_by_zero() -> None:
    assert to_rgb(np.full((4, 4), 700, np.uint16), "mono16").max() == 0
    depth = np.array([[1, 2], [np.nan, np.inf]], np.float32)
    assert to_rgb(depth, "32FC1")[:, :, 0].tolist() == [[127, 255], [0, 0]]


# Size


@pytest.mark.parametrize("shape", [(64, 96), (16, 24), (31, 77), (1, 1), (480, 640)])
def test_any_size_is_fitted(picture: Image, shape: tuple[int, int]) -> None:
    image = cv2.resize(picture, shape[::-1], interpolation=cv2.INTER_NEAREST).astype(np.uint8)
    fitted = fit(image, (WIDTH, HEIGHT))
    assert fitted.shape == (HEIGHT, WIDTH, 3) and fitted.dtype == np.uint8
    assert fitted.flags.c_contiguous
    if shape != (1, 1):
        assert np.abs(fitted.astype(int) - picture)[2:12, 2:20].max() <= 1


def test_shrinking_averages() -> None:
    """Fine texture turns grey; picking single pixels would make it black or white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    fitted = fit(np.dstack([board] * 3), (16, 16))
    assert np.abs(fitted.astype(int) - 127).max() <= 1


def test_a_fitting_image_is_left_as_it_is(picture: Image) -> None:
    assert np.array_equal(fit(picture, (WIDTH, HEIGHT)), picture)
    window = picture[:, ::2]
    fitted = fit(window, (WIDTH // 2, HEIGHT))
    assert np.array_equal(fitted, window) and fitted.flags.c_contiguous


@pytest.mark.parametrize(
    ("shape", "dtype", "cause"),
    [
        ((0, 0, 3), np.uint8, "empty image"),
        ((10, 0, 3), np.uint8, "empty image"),
        ((10, 10), np.uint8, "not RGB"),
        ((10, 10, 4), np.uint8, "not RGB"),
        ((10, 10, 1), np.uint8, "not RGB"),
        ((10, 10, 3), np.float32, "not RGB"),
        ((10, 10, 3), np.uint16, "not RGB"),
        ((2, 10, 10, 3), np.uint8, "not RGB"),
    ],
)
def test_arrays_that_are_no_rgb_are_named(shape: tuple[int, ...], dtype: Any, cause: str) -> None:
    with pytest.raises(ImageError) as caught:
        fit(np.zeros(shape, dtype), (16, 16))
    assert caught.value.cause == cause and str(shape) in str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(1, 65535), (640, 10)])
def test_a_stripe_is_no_picture(width: int, height: int) -> None:
    with pytest.raises(ImageError, match=f"{width}x{height}") as caught:
        fit(np.zeros((height, width, 3), np.uint8), (16, 16))
    assert caught.value.cause == "not a picture"


# Messages


@pytest.fixture
def cv_bridge() -> Any:
    return pytest.importorskip("cv_bridge", reason="cv_bridge needs sensor_msgs of ROS: make test")


def _image_message(pixels: NDArray[Any], encoding: str, padding: int = 0) -> SimpleNamespace:
    """The fields of sensor_msgs/Image; ``padding`` bytes follow each row."""
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)
    data = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    return SimpleNamespace(
        header=SimpleNamespace(),
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=data.shape[1],
        data=data.tobytes(),
    )


def _compressed_message(picture: Image, extension: str) -> SimpleNamespace:
    _, data = cv2.imencode(extension, picture[:, :, ::-1])
    return SimpleNamespace(format=extension[1:], data=data.tobytes())


@pytest.mark.parametrize("encoding", ENCODERS)
def test_messages_become_rgb(cv_bridge: Any, picture: Image, encoding: str) -> None:
    encode, kind = ENCODERS[encoding]
    message = _image_message(encode(picture), encoding)
    _assert_like(decode_message(message), _expected(picture, kind))


def test_big_endian_pixels_are_understood(cv_bridge: Any, picture: Image) -> None:
    encode, kind = ENCODERS["mono16"]
    message = _image_message(encode(picture).byteswap(), "mono16")
    message.is_bigendian = 1
    _assert_like(decode_message(message), _expected(picture, kind))


@pytest.mark.parametrize("encoding", ["rgb8", "mono8", "bgra8", "mono16", "yuv422"])
def test_padded_rows_are_understood(cv_bridge: Any, picture: Image, encoding: str) -> None:
    encode, kind = ENCODERS[encoding]
    message = _image_message(encode(picture), encoding, padding=12)
    _assert_like(decode_message(message), _expected(picture, kind))


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_compressed_messages_become_rgb(cv_bridge: Any, picture: Image, extension: str) -> None:
    found = decode_message(_compressed_message(picture, extension))
    assert np.abs(found.astype(int) - picture)[2:12, 2:20].max() <= 6


def _cause(message: SimpleNamespace) -> str:
    with pytest.raises(ImageError) as caught:
        decode_message(message)
    assert str(caught.value).startswith(caught.value.cause)
    return caught.value.cause


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(cv_bridge: Any, extension: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    message = _compressed_message(noise, extension)
    assert decode_message(message).shape == noise.shape
    message.data = message.data[: int(len(message.data) * share)]
    assert _cause(message) == "broken compression"


def test_bytes_that_are_no_picture_are_refused(cv_bridge: Any) -> None:
    for data in (b"hello", bytes(1000), b"\xff\xd8" + bytes(500) + b"\xff\xd9"):
        assert _cause(SimpleNamespace(format="jpeg", data=data)) == "broken compression"


def claiming(file: bytes, width: int, height: int) -> bytes:
    """A JPEG, PNG or BMP whose header, alone, says another size."""
    data = bytearray(file)
    if file.startswith(b"\x89PNG"):
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif file.startswith(b"BM"):
        data[18:26] = struct.pack("<ii", width, height)
    else:
        start = file.index(b"\xff\xc0")
        data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("extension", [".jpg", ".png", ".bmp"])
@pytest.mark.parametrize("size", [(30_000, 30_000), (65_000, 65_000)])
def test_a_picture_that_claims_to_be_huge_is_refused(
    cv_bridge: Any, picture: Image, extension: str, size: tuple[int, int]
) -> None:
    """A damaged header must not end in another exception, nor fill the memory."""
    message = _compressed_message(picture, extension)
    assert claimed_size(message.data) == (picture.shape[1], picture.shape[0])
    message.data = claiming(message.data, *size)
    assert _cause(message) == "too many pixels"


def test_a_picture_with_too_long_a_side_is_refused(cv_bridge: Any, picture: Image) -> None:
    """With few enough pixels for Pillow; OpenCV has a limit to each side."""
    message = _compressed_message(picture, ".bmp")
    message.data = claiming(message.data, 2_000_000, 50)
    assert _cause(message) == "broken compression"


def test_a_png_whose_parts_claim_to_be_long_is_refused(cv_bridge: Any, picture: Image) -> None:
    """OpenCV 4.11 would make room for two gigabytes of pixels that are not there."""
    message = _compressed_message(picture, ".png")
    data = bytearray(message.data)
    length = data.index(b"IDAT") - 4
    data[length] = 0x7F
    message.data = bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _cause(message) == "broken compression"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_whole_jpeg_may_be_followed_by_padding(cv_bridge: Any, picture: Image) -> None:
    message = _compressed_message(picture, ".jpg")
    message.data += bytes(500)  # as drivers do that send their whole buffer
    assert decode_message(message).shape == picture.shape


def test_empty_messages_are_refused(cv_bridge: Any, picture: Image) -> None:
    assert _cause(SimpleNamespace(format="jpeg", data=b"")) == "empty image"
    message = _image_message(picture, "rgb8")
    for changes in ({"data": b""}, {"height": 0}, {"width": 0}):
        assert _cause(SimpleNamespace(**vars(message) | changes)) == "empty image"


def test_a_message_with_too_few_bytes_is_refused(cv_bridge: Any, picture: Image) -> None:
    message = _image_message(picture, "rgb8")
    message.data = message.data[:-1]
    assert _cause(message) == "truncated image"


@pytest.mark.parametrize("encoding", ["rgb8", "mono8"])
def test_a_message_that_is_a_stripe_is_refused(cv_bridge: Any, encoding: str) -> None:
    # As a broken driver sent it; its thumbnail would take gigabytes.
    picture = np.zeros((65535, 1, 3) if encoding == "rgb8" else (65535, 1), np.uint8)
    assert _cause(_image_message(picture, encoding)) == "not a picture"


@pytest.mark.parametrize("encoding", ["", "h264", "bayer_xyz8", "rgb8; jpeg", "64FC9"])
def test_an_unknown_encoding_is_named(cv_bridge: Any, picture: Image, encoding: str) -> None:
    message = _image_message(picture, encoding)
    with pytest.raises(ImageError) as caught:
        decode_message(message)
    assert caught.value.cause == "unknown encoding" and repr(encoding) in str(caught.value)


# Pictures for people


def test_a_thumbnail_is_a_small_jpeg(picture: Image) -> None:
    data = np.frombuffer(thumbnail(cv2.resize(picture, (640, 480)).astype(np.uint8)), np.uint8)
    small = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert small.shape[1] * 3 == small.shape[0] * 4 and small.shape[1] <= 320
    assert len(data) < 20_000
    quarter = small[small.shape[0] // 4, small.shape[1] // 4].astype(int)
    assert np.abs(quarter - COLOURS[0]).max() <= 6


def test_drawn_matches_join_what_matched(picture: Image) -> None:
    big = cv2.resize(picture, (640, 480)).astype(np.uint8) // 4
    points = np.array([[0.25, 0.5]], np.float32)
    drawn = {}
    for name, inliers in (("green", [True]), ("red", [False]), ("yellow", None)):
        flags = None if inliers is None else np.array(inliers)
        canvas = draw_matches(big, thumbnail(big), points, points, flags)
        height, width = canvas.shape[:2]
        assert width * 3 == height * 8
        drawn[name] = canvas[height // 2, width // 8 + 20].astype(int)  # on the line
    assert drawn["green"][1] > drawn["green"][0] + 80
    assert drawn["red"][0] > drawn["red"][1] + 80
    assert min(drawn["yellow"][:2]) > drawn["yellow"][2] + 80
    nothing = np.zeros((0, 2), np.float32)
    assert draw_matches(big, b"", nothing, nothing, None)[:, -10:].max() == 0
