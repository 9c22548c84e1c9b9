"""A bag as a stream of serialized messages: what a robot's drivers would have published."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from vpr_lite_ros.bags import SourceError
from vpr_lite_ros.bags.rosbag import Bag
from vpr_lite_ros.bags.sources import CAMERA_INFO_TYPE, IMAGE_TYPES
from vpr_lite_ros.odometry import odometry_topics

IMAGE, CAMERA_INFO, ODOMETRY = "image", "camera_info", "odom"


@dataclass(frozen=True)
class Recorded:
    """One message of a bag."""

    time_ns: int
    """When it was recorded."""
    role: str
    """``image``, ``camera_info`` or ``odom``."""
    cdr: bytes
    """The message as ROS 2 sends it."""

    @property
    def stamp_ns(self) -> int:
        """The header's stamp."""
        # Every message played begins with a header, and a header with its stamp. Four bytes
        # of encapsulation go before it; the second says which end of a number comes first.
        order = "<" if self.cdr[1] & 1 else ">"
        seconds, nanoseconds = struct.unpack_from(f"{order}iI", self.cdr, 4)
        return int(seconds) * 10**9 + int(nanoseconds)


class Playback:
    """The images of one camera, with its calibration and the robot's odometry if recorded.

    Parameters
    ----------
    path
        rosbag2 or ROS 1 bag.
    image_topic
        Needed where the bag has several.

    Raises
    ------
    SourceError
        If the bag cannot be read or it is not clear which images to play.
    """

    def __init__(self, path: Path, image_topic: str | None = None) -> None:
        self.path = path
        bag = Bag(path)
        try:
            image = bag.choose_topic(IMAGE_TYPES, image_topic, "image", "--image-topic")
            self.frames = bag.count(image)
            self.roles = {image: IMAGE}
            if info := _beside(image, bag.topics(CAMERA_INFO_TYPE)):
                self.roles[info] = CAMERA_INFO
            odometry = odometry_topics(bag)
            if len(odometry) == 1:
                self.roles[odometry[0]] = ODOMETRY
            self.compressed = image in bag.topics("sensor_msgs/msg/CompressedImage")
        finally:
            bag.close()
        self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))

    @property
    def start_ns(self) -> int:
        """When recording began; known while open."""
        return self._reader.start_time

    def __enter__(self) -> Playback:
        self._reader.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._reader.close()

    def messages(self) -> Iterator[Recorded]:
        """Yield the messages in the order of recording.

        Raises
        ------
        SourceError
            If the bag is damaged.
        """
        reader = self._reader
        connections = [one for one in reader.connections if one.topic in self.roles]
        try:
            for connection, time_ns, raw in reader.messages(connections):
                if not reader.is2:
                    raw = bytes(reader.typestore.ros1_to_cdr(raw, connection.msgtype))
                yield Recorded(time_ns, self.roles[connection.topic], bytes(raw))
        except GeneratorExit:
            raise
        except Exception as error:  # Storage libraries raise whatever they like.
            raise SourceError(f"{self.path} is damaged: {error}") from error


def _beside(image_topic: str, camera_infos: list[str]) -> str | None:
    """The calibration that is published beside the images, or the only one there is."""
    base = re.sub(r"/(compressed|theora|ffmpeg)$", "", image_topic)
    beside = base.rsplit("/", 1)[0] + "/camera_info"
    if beside in camera_infos:
        return beside
    return camera_infos[0] if len(camera_infos) == 1 else None
