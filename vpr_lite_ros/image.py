"""From what a camera sends to what the network takes: RGB, uint8, the network's size."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""RGB, (H, W, 3)."""

MOST_ASPECT = 20
"""A picture is at most so many times as long as broad; panoramas are 8."""
THUMBNAIL_WIDTH = 320
"""Pixels; a keyframe's picture for people takes some 15 kB."""


class ImageError(ValueError):
    """An image that cannot be used. ``cause`` is short and the same for the same fault."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


def decode_message(message: Any) -> Image:
    """A ``sensor_msgs`` Image or CompressedImage to RGB, through cv_bridge.

    Raises
    ------
    ImageError
        ``empty image``, ``unknown encoding``, ``truncated image``, ``broken compression``, ``too
        many pixels`` or ``not a picture``.
    """
    from cv_bridge import CvBridge

    if len(message.data) == 0:
        raise ImageError("empty image", "the message has no data; is the camera delivering?")
    if hasattr(message, "format"):
        data = bytes(message.data)
        image = decompress(data) if _is_whole(data) else None
        if image is None:
            raise ImageError(
                "broken compression",
                f"{len(data)} bytes of format {message.format!r} do not decode to an "
                "image; is the link losing packets?",
            )
        return checked(image)
    if message.height == 0 or message.width == 0:
        raise ImageError("empty image", f"size {message.width}x{message.height}")
    if len(message.data) < message.height * message.step:
        raise ImageError(
            "truncated image",
            f"{len(message.data)} bytes, {message.height} rows of {message.step} were promised",
        )
    try:
        bridge = CvBridge()
        picture = bridge.imgmsg_to_cv2(_packed(message, bridge), "passthrough")
        image = to_rgb(np.asarray(picture), message.encoding)
    except Exception as error:  # cv_bridge's own, cv2's, KeyError, TypeError: all mean this
        raise ImageError(
            "unknown encoding", f"{message.encoding!r} cannot be converted to RGB: {error}"
        ) from error
    return checked(image)


def decompress(data: bytes) -> Image | None:
    """The bytes of an image file (JPEG, PNG, …) to RGB; None if they are none.

    Raises
    ------
    ImageError
        ``too many pixels``, see ``claimed_size``.
    """
    if claimed_size(data) is None:
        return None
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # no side may be longer than 2²⁰ pixels
        return None
    if picture is None:
        return None
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header of an image file; None if it is none, or a damaged PNG.

    Numbers that were damaged on their way, the size or how long a PNG's parts are, may claim
    gigabytes, which OpenCV would take before it sees that there is nothing behind them. Pillow
    reads no pixels for this.

    Raises
    ------
    ImageError
        ``too many pixels``: more than Pillow believes, 179 million.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as file:
            size = file.size
            file.verify()
    except PIL.Image.DecompressionBombError as error:
        raise ImageError("too many pixels", f"{error} Is the link damaging data?") from error
    except Exception:  # each of its formats has its own for what makes no sense
        return None
    return size


def _packed(message: Any, bridge: Any) -> Any:
    """The message as every release of cv_bridge understands it.

    Some read the pixels as if no row were padded; and ``uyvy`` and ``yuyv``, the names of the
    newer ones, are ``yuv422`` and ``yuv422_yuy2`` to all.
    """
    rows = np.frombuffer(message.data, np.uint8)[: message.height * message.step]
    rows = rows.reshape(message.height, message.step)
    encoding = {"uyvy": "yuv422", "yuyv": "yuv422_yuy2"}.get(message.encoding, message.encoding)
    dtype, channels = bridge.encoding_to_dtype_with_channels(encoding)
    used = message.width * channels * np.dtype(dtype).itemsize
    return type(message)(
        header=message.header,
        height=message.height,
        width=message.width,
        encoding=encoding,
        is_bigendian=message.is_bigendian,
        step=used,
        data=rows[:, :used].tobytes(),
    )


def to_rgb(picture: NDArray[Any], encoding: str) -> Image:
    """Pixels in a ROS ``encoding`` to 8-bit RGB."""
    if picture.dtype != np.uint8:
        # 16-bit and float pictures (thermal, depth) have no fixed white: stretch to their range.
        finite = np.nan_to_num(picture.astype(np.float32), posinf=0, neginf=0)
        low, high = float(finite.min()), float(finite.max())
        picture = ((finite - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    code = _CONVERSIONS[encoding.lower()]
    if code is None:
        return np.ascontiguousarray(picture, np.uint8)
    return np.asarray(cv2.cvtColor(picture, code), np.uint8)


_CONVERSIONS: dict[str, int | None] = {
    "rgb8": None,
    "8uc3": cv2.COLOR_BGR2RGB,
    "bgr8": cv2.COLOR_BGR2RGB,
    "rgba8": cv2.COLOR_RGBA2RGB,
    "bgra8": cv2.COLOR_BGRA2RGB,
    "8uc4": cv2.COLOR_BGRA2RGB,
    "mono8": cv2.COLOR_GRAY2RGB,
    "8uc1": cv2.COLOR_GRAY2RGB,
    "mono16": cv2.COLOR_GRAY2RGB,
    "16uc1": cv2.COLOR_GRAY2RGB,
    "32fc1": cv2.COLOR_GRAY2RGB,
    "rgb16": None,
    "bgr16": cv2.COLOR_BGR2RGB,
    "yuv422": cv2.COLOR_YUV2RGB_UYVY,
    "uyvy": cv2.COLOR_YUV2RGB_UYVY,
    "yuv422_yuy2": cv2.COLOR_YUV2RGB_YUY2,
    "yuyv": cv2.COLOR_YUV2RGB_YUY2,
    # OpenCV names Bayer patterns by the second row's second and third pixel.
    "bayer_rggb8": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr8": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg8": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg8": cv2.COLOR_BayerGB2RGB,
}


def fit(image: Image, size: tuple[int, int]) -> Image:
    """``image`` scaled to ``size`` (width, height), contiguous, as the network wants it.

    Raises
    ------
    ImageError
        ``empty image``, ``not RGB`` or ``not a picture``.
    """
    checked(image)
    if (image.shape[1], image.shape[0]) == size:
        return np.ascontiguousarray(image)
    shrinks = image.shape[0] * image.shape[1] > size[0] * size[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)


def checked(image: Image) -> Image:
    """``image``, if it is one that the rest of the package can use; else ``ImageError``."""
    if image.size == 0:
        raise ImageError("empty image", f"array of shape {image.shape}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(
            "not RGB", f"array of shape {image.shape}, {image.dtype}; expected (H, W, 3), uint8"
        )
    height, width = image.shape[:2]
    if max(height, width) > MOST_ASPECT * min(height, width):
        # A stripe of a few pixels' breadth would be blown up to gigabytes as a thumbnail.
        raise ImageError(
            "not a picture",
            f"size {width}x{height}: one side is more than {MOST_ASPECT} times the other",
        )
    return image


def thumbnail(image: Image) -> bytes:
    """A small JPEG of an RGB image: to compare it with others, and to show what a keyframe saw."""
    height = max(1, round(THUMBNAIL_WIDTH * image.shape[0] / image.shape[1]))
    small = cv2.resize(image, (THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), quality)
    return data.tobytes()


def draw_matches(
    query: Image,
    keyframe: bytes,
    query_points: NDArray[np.floating],
    keyframe_points: NDArray[np.floating],
    inliers: NDArray[np.bool_] | None,
) -> Image:
    """The query at the left, the keyframe's thumbnail at the right, a line for each match.

    Points are (M, 2) fractions of width and height. Matches that agree with the camera's motion
    are green, the others red; all are yellow where that was not checked.
    """
    height = max(1, round(2 * THUMBNAIL_WIDTH * query.shape[0] / query.shape[1]))
    size = (2 * THUMBNAIL_WIDTH, height)
    left = cv2.resize(query, size, interpolation=cv2.INTER_AREA)
    right = np.zeros_like(left)
    if keyframe:
        picture = cv2.imdecode(np.frombuffer(keyframe, np.uint8), cv2.IMREAD_COLOR)
        right = cv2.cvtColor(cv2.resize(picture, size), cv2.COLOR_BGR2RGB)
    canvas = np.hstack([left, right]).astype(np.uint8)
    start = (query_points * size).astype(int)
    end = (keyframe_points * size).astype(int)
    end[:, 0] += size[0]
    for index, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        colour = (240, 210, 40)
        if inliers is not None:
            colour = (60, 220, 60) if inliers[index] else (230, 60, 60)
        cv2.line(canvas, a, b, colour, 1, cv2.LINE_AA)
        cv2.circle(canvas, a, 3, colour, -1, cv2.LINE_AA)
        cv2.circle(canvas, b, 3, colour, -1, cv2.LINE_AA)
    return canvas


def _is_whole(data: bytes) -> bool:
    """False for a JPEG that ends early; decoders fill the missing part with grey."""
    if not data.startswith(b"\xff\xd8"):
        return True
    # Some drivers send their whole buffer: zeros after the end are no harm.
    return b"\xff\xd9" in data.rstrip(b"\0")[-64:]
