"""Odometry that was recorded beside the images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.bags import SourceError
from vpr_lite_ros.bags.rosbag import Bag, is_bag
from vpr_lite_ros.database import Pose

ODOMETRY_TYPE = "nav_msgs/msg/Odometry"
ODOMETRY_TOLERANCE_NS = 200_000_000
"""An odometry pose this far from an image's stamp is not the image's; the node says the same."""


class Odometry:
    """Poses of one odometry topic of a bag, kept in the order of time.

    Parameters
    ----------
    topic
        Name, for messages.
    stamps_ns
        (N,) nanoseconds, in any order.
    poses
        (N, 7) x y z in metres, qx qy qz qw.
    """

    def __init__(
        self, topic: str, stamps_ns: NDArray[np.int64], poses: NDArray[np.float64]
    ) -> None:
        order = np.argsort(stamps_ns, kind="stable")
        self.topic, self.stamps_ns, self.poses = topic, stamps_ns[order], poses[order]

    def at(self, stamp_ns: int) -> Pose | None:
        """The pose nearest in time, if one is near enough."""
        after = int(np.searchsorted(self.stamps_ns, stamp_ns))
        near = range(max(0, after - 1), min(after + 1, len(self.stamps_ns)))
        if not near:
            return None
        nearest = min(near, key=lambda row: abs(int(self.stamps_ns[row]) - stamp_ns))
        if abs(int(self.stamps_ns[nearest]) - stamp_ns) > ODOMETRY_TOLERANCE_NS:
            return None
        x, y, z, qx, qy, qz, qw = (float(value) for value in self.poses[nearest])
        return Pose((x, y, z), (qx, qy, qz, qw))


def read_odometry(recording: Path, topic: str | None = None) -> Odometry | None:
    """The odometry of a bag: of ``topic``, or of its only odometry topic; else None.

    Topics with ``ground_truth`` in their name are none: using them would be cheating.

    Raises
    ------
    SourceError
        If ``topic`` is not in the bag, or ``recording`` is no bag.
    """
    if topic == "":
        return None
    if not is_bag(recording):
        if topic is not None:
            raise SourceError(f"{recording} is no bag: it has no odometry topic {topic!r}")
        return None
    bag = Bag(recording)
    try:
        if topic is None:
            found = odometry_topics(bag)
            if len(found) != 1:
                return None
            topic = found[0]
        topic = bag.choose_topic((ODOMETRY_TYPE,), topic, "odometry", "--odom-topic")
        stamps, poses = [], []
        for _, message in bag.messages(topic):
            at, turn = message.pose.pose.position, message.pose.pose.orientation
            pose = (at.x, at.y, at.z, turn.x, turn.y, turn.z, turn.w)
            norm = math.hypot(*pose[3:])
            if all(math.isfinite(value) for value in pose) and norm > 0.5:
                stamps.append(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)
                poses.append((*pose[:3], *(value / norm for value in pose[3:])))
    finally:
        bag.close()
    return Odometry(topic, np.array(stamps, np.int64), np.array(poses, np.float64).reshape(-1, 7))


def odometry_topics(bag: Bag) -> list[str]:
    """Topics that could be a robot's odometry."""
    return [name for name in bag.topics(ODOMETRY_TYPE) if "ground_truth" not in name]
