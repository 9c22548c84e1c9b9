"""Depth images of a bag, each beside the camera's image of its time."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpr_lite_ros.bags.rosbag import Bag
from vpr_lite_ros.depth import DEPTH_TOLERANCE_NS, Depth, decode_depth
from vpr_lite_ros.image import ImageError

logger = logging.getLogger(__name__)

IMAGE_TYPE = "sensor_msgs/msg/Image"


class DepthTrack:
    """Depth of one topic of a bag, asked for in the order of time; use it as a context manager.

    Attributes
    ----------
    topic : str
        Of the depth images.
    missing : dict of str to int
        Images without depth so far, counted by cause.

    Raises
    ------
    SourceError
        If ``path`` is no bag or the topic is not in it.
    """

    def __init__(self, path: Path, topic: str) -> None:
        self._bag = Bag(path)
        self.missing: dict[str, int] = {}
        try:
            self.topic = self._bag.choose_topic((IMAGE_TYPE,), topic, "depth", "--depth-topic")
        except BaseException:
            self._bag.close()
            raise
        self._coming = self._stamped()
        self._near: deque[tuple[int, Any]] = deque()

    def at(self, stamp_ns: int, camera_frame: str, size: tuple[int, int]) -> Depth | None:
        """Metres (H, W) in register with the image of ``stamp_ns``, if the bag has them.

        Parameters
        ----------
        stamp_ns
            Not before the last one that was asked for, or nothing is found.
        camera_frame, size
            Of the image: ``frame_id``, width and height.

        Raises
        ------
        SourceError
            If the bag is damaged.
        """
        while self._near and self._near[0][0] < stamp_ns - DEPTH_TOLERANCE_NS:
            self._near.popleft()
        while not self._near or self._near[-1][0] < stamp_ns:
            try:
                self._near.append(next(self._coming))
            except StopIteration:
                break
            if self._near[0][0] < stamp_ns - DEPTH_TOLERANCE_NS:
                self._near.popleft()
        try:
            if not self._near:
                raise ImageError("none near", "the topic ends before it")
            nearest, message = min(self._near, key=lambda item: abs(item[0] - stamp_ns))
            if abs(nearest - stamp_ns) > DEPTH_TOLERANCE_NS:
                raise ImageError(
                    "none near", f"the nearest is {(nearest - stamp_ns) / 1e9:.3f} s off"
                )
            return decode_depth(message, camera_frame, size)
        except ImageError as error:
            if error.cause not in self.missing:
                where = f"{self.topic} at {stamp_ns / 1e9:.3f} s"
                logger.warning("an image without depth, %s: %s; so may others be", where, error)
            self.missing[error.cause] = self.missing.get(error.cause, 0) + 1
            return None

    def close(self) -> None:
        """Release files."""
        self._bag.close()

    def __enter__(self) -> DepthTrack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stamped(self) -> Iterator[tuple[int, Any]]:
        for _, message in self._bag.messages(self.topic):
            stamp = message.header.stamp
            yield stamp.sec * 10**9 + stamp.nanosec, message
