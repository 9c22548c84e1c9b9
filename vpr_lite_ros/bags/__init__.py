"""Recorded data: images to replay, poses to judge by, and the demo drive as a bag.

Everything here works without ROS; `rosbags` reads and writes the bags.
"""

from vpr_lite_ros.bags.errors import SourceError
from vpr_lite_ros.bags.poses import Poses, read_pairs, read_poses
from vpr_lite_ros.bags.recording import write_drive
from vpr_lite_ros.bags.sources import Frame, Source, open_source

__all__ = [
    "Frame",
    "Poses",
    "Source",
    "SourceError",
    "open_source",
    "read_pairs",
    "read_poses",
    "write_drive",
]
