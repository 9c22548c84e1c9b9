"""Depth images: from a message to metres, and what a keyframe keeps of them.

A depth image is in register with the camera's: the same view, of any size. An RGB-D camera's driver
aligns it, stereo's is in register with the left image.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.image import ImageError

Depth = NDArray[np.float32]
"""(H, W) metres along the optical axis; 0 where not known."""

DEPTH_TOLERANCE_NS = 50_000_000
"""A depth image this far from an image's stamp is not the image's."""
BUFFERED = 10
"""Depth images that may wait for their image: a third of a second of most cameras."""
PATIENCE_S = 0.5
"""How long an image waits for its depth, which comes later where it has to be computed."""
SILENT_S = 1.0
"""Depth that has not come for so long is not waited for."""
WINDOW = 5
"""Pixels of the depth image across, of which a patch's centre takes the median."""
_MOST_DISTORTED = 0.01
"""By which the ratios of width to height may differ: sizes are rounded."""
_ENCODINGS = {"16UC1": ("u2", 1e-3), "mono16": ("u2", 1e-3), "32FC1": ("f4", 1.0)}
"""Type of a pixel and its unit in metres (REP 118)."""


def decode_depth(message: Any, camera_frame: str, size: tuple[int, int]) -> Depth:
    """A ``sensor_msgs`` Image of depth, of ROS 1 or ROS 2, to metres.

    Parameters
    ----------
    camera_frame, size
        ``frame_id`` and width, height of the camera's image.

    Raises
    ------
    ImageError
        ``unknown encoding``, ``empty image``, ``truncated image``, ``not registered`` to the
        camera's image, or ``nothing measured``.
    """
    if message.encoding not in _ENCODINGS:
        raise ImageError(
            "unknown encoding",
            f"{message.encoding!r} is no depth: expected 16UC1 (millimetres) or 32FC1 (metres)",
        )
    if not (message.width and message.height and len(message.data)):
        raise ImageError("empty image", f"size {message.width}x{message.height}")
    kind, metres = _ENCODINGS[message.encoding]
    dtype = np.dtype(kind).newbyteorder(">" if message.is_bigendian else "<")
    used = message.width * dtype.itemsize
    if message.step < used or len(message.data) < message.height * message.step:
        raise ImageError(
            "truncated image",
            f"{len(message.data)} bytes, {message.height} rows of {max(used, message.step)} were "
            "promised",
        )
    _refuse_unregistered(message, camera_frame, size)
    rows = np.frombuffer(message.data, np.uint8)[: message.height * message.step]
    rows = np.ascontiguousarray(rows.reshape(message.height, message.step)[:, :used])
    depth = rows.view(dtype).astype(np.float32) * np.float32(metres)
    depth[~((depth > 0) & np.isfinite(depth))] = 0
    if not depth.any():
        raise ImageError("nothing measured", "no pixel has a depth; is the scene out of range?")
    return depth


def _refuse_unregistered(message: Any, camera_frame: str, size: tuple[int, int]) -> None:
    """A depth camera's own view is another than the colour camera's beside it."""
    way_out = (
        "it is not in register with it. Publish depth that is: align_depth of the camera's "
        "driver, or depth_image_proc's register node"
    )
    frame = message.header.frame_id.strip("/")
    if frame and camera_frame and frame != camera_frame.strip("/"):
        raise ImageError(
            "not registered", f"depth is of {frame!r}, the image of {camera_frame!r}: {way_out}"
        )
    ratio = message.width / message.height / (size[0] / size[1])
    if abs(ratio - 1) > _MOST_DISTORTED:
        raise ImageError(
            "not registered",
            f"depth is {message.width}x{message.height}, the image {size[0]}x{size[1]}: {way_out}",
        )


def sample_depth(depth: Depth, centres: NDArray[np.float32]) -> NDArray[np.float16]:
    """(N,) median depth around each centre, metres; 0 where most of it is not known.

    Parameters
    ----------
    depth
        (H, W) metres; 0, NaN or inf where not known.
    centres
        (N, 2) fractions of width and height.
    """
    if depth.ndim != 2:
        raise ValueError(f"depth {depth.shape} must be (H, W)")
    height, width = depth.shape
    margin = WINDOW // 2
    # Not known counts as infinitely far: the median is then, too, if that is most of the window.
    padded = np.pad(depth, margin, constant_values=np.inf).astype(np.float32)
    padded[~(padded > 0)] = np.inf
    column, row = (centres * (width, height)).astype(int).T
    column, row = column.clip(0, width - 1), row.clip(0, height - 1)
    across = np.arange(WINDOW)
    windows = padded[row[:, None, None] + across[:, None], column[:, None, None] + across]
    middle = np.median(windows.reshape(len(centres), -1), axis=1)
    return np.where(middle < np.finfo(np.float16).max, middle, 0).astype(np.float16)


class DepthBuffer:
    """The latest depth messages, put by one thread and asked for by another."""

    def __init__(self) -> None:
        self._messages: deque[tuple[int, Any]] = deque(maxlen=BUFFERED)
        self._came = threading.Condition()
        self._came_at: float | None = None

    @property
    def empty(self) -> bool:
        """Whether no depth has come yet."""
        return self._came_at is None

    def put(self, stamp_ns: int, message: Any) -> None:
        """Keep a message; stamps that go back begin anew."""
        with self._came:
            if self._messages and stamp_ns <= self._messages[-1][0]:
                self._messages.clear()
            self._messages.append((stamp_ns, message))
            self._came_at = time.monotonic()
            self._came.notify_all()

    def nearest(self, stamp_ns: int) -> Any:
        """The message nearest in time, if one is near enough; waits a little for it."""

        def is_there() -> bool:
            return bool(self._messages) and self._messages[-1][0] >= stamp_ns

        with self._came:
            if self._came_at is None or time.monotonic() - self._came_at > SILENT_S:
                patience = 0.0
            else:
                patience = PATIENCE_S
            self._came.wait_for(is_there, patience)
            near = [
                item for item in self._messages if abs(item[0] - stamp_ns) <= DEPTH_TOLERANCE_NS
            ]
        return min(near, key=lambda item: abs(item[0] - stamp_ns), default=(0, None))[1]
