"""Recorded bytes to RGB pixels, or the reason why not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.image import ImageError, message_to_cvimage
from rosbags.image.image import to_cvtype

from vpr_lite_ros.image import ImageError as UnfitError
from vpr_lite_ros.image import checked, decompress

# OpenCV's names for plain pixels say nothing about colour; drivers that use them mean these.
_UNNAMED_COLOURS = {"8UC1": "mono8", "8UC3": "bgr8", "8UC4": "bgra8"}


class UnusableImage(Exception):
    """One frame cannot be used. The text is the cause, the same for every frame like it."""


def decode_file(data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode the bytes of an image file (JPEG, PNG, …).

    Parameters
    ----------
    data : bytes or (N,) uint8 array
        The whole file.

    Returns
    -------
    (H, W, 3) uint8 array
        RGB; grey is repeated, 16 bits are reduced to 8.

    Raises
    ------
    UnusableImage
        If the data is empty, cut short or no image, or claims to be huge.
    """
    raw = bytes(data)
    if not raw:
        raise UnusableImage("empty image")
    # OpenCV fills what is missing of a cut file with grey and reports success, so look for the
    # end marker. A JPEG's header may hold a whole thumbnail: only an end after the last
    # start of scan is the picture's own.
    if raw.startswith(b"\xff\xd8") and raw.rfind(b"\xff\xd9") <= raw.rfind(b"\xff\xda"):
        raise UnusableImage("truncated JPEG")
    if raw.startswith(b"\x89PNG") and b"IEND" not in raw[-64:]:
        raise UnusableImage("truncated PNG")
    try:
        image = decompress(raw)
    except UnfitError as error:
        raise UnusableImage(error.cause) from error
    if image is None:
        raise UnusableImage("undecodable image data")
    return _as_uint8(image)


def decode_message(message: Any) -> NDArray[np.uint8]:
    """Decode a sensor_msgs Image or CompressedImage of ROS 1 or ROS 2.

    Parameters
    ----------
    message
        Any object with the message's fields; one with `format` counts as compressed.

    Returns
    -------
    (H, W, 3) uint8 array
        RGB.

    Raises
    ------
    UnusableImage
        If the data is empty, cut short, or in an encoding that has no colours.
    """
    if hasattr(message, "format"):
        return decode_file(message.data)

    if message.width == 0 or message.height == 0 or len(message.data) == 0:
        raise UnusableImage("empty image")
    encoding = _UNNAMED_COLOURS.get(message.encoding, message.encoding)
    unknown = f"encoding {message.encoding!r} is not a colour or grey image"
    try:
        _, _, dtype, channels = to_cvtype(encoding)
    except ImageError as error:
        raise UnusableImage(unknown) from error

    row_bytes = message.width * channels * np.dtype(dtype).itemsize
    step = max(int(message.step), row_bytes)
    if len(message.data) < (message.height - 1) * step + row_bytes:
        raise UnusableImage("truncated image")
    data = np.frombuffer(message.data, np.uint8)
    if step > row_bytes:  # The decoder below knows no padding at the ends of rows.
        padded = np.zeros(message.height * step, np.uint8)
        padded[: min(len(data), len(padded))] = data[: len(padded)]
        data = np.ascontiguousarray(padded.reshape(message.height, step)[:, :row_bytes])
    plain: Any = SimpleNamespace(
        encoding=encoding,
        height=message.height,
        width=message.width,
        is_bigendian=message.is_bigendian,
        data=data,
    )
    try:
        return _as_uint8(message_to_cvimage(plain, "rgb8"))
    except ImageError as error:
        raise UnusableImage(unknown) from error
    except (TypeError, ValueError, cv2.error) as error:
        raise UnusableImage(f"undecodable {message.encoding!r} image") from error


def _as_uint8(image: Any) -> NDArray[np.uint8]:
    try:
        return checked(np.ascontiguousarray(image, dtype=np.uint8))
    except UnfitError as error:
        raise UnusableImage(error.cause) from error
