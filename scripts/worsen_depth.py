#!/usr/bin/env python3
"""A copy of a bag whose depth is as bad as that of a real camera.

    vpr-lite simulate drive --seed 1 --depth
    scripts/worsen_depth.py drive drive_stereo --camera stereo
    vpr-lite replay drive_stereo --image-topic /camera/image_raw/compressed --output out \\
        --depth-topic /camera/depth/image_raw --min_time_gap_s 20 --min_closure_interval_s 0
    scripts/measure_poses.py out drive_stereo

What is further than 20 m is unknown (--farthest); of an RGB-D camera, what is further than 8 m. A
stereo camera has 12 cm between its lenses, and its disparity is off by 0.3 px. It looks for whole
windows, so that pixels of one block of 8 x 8 are off alike. The same seed gives the same bag.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import Writer
from rosbags.typesys import Stores, get_typestore

from vpr_lite_ros.bags.recording import DEPTH_TOPIC
from vpr_lite_ros.bags.rosbag import Bag
from vpr_lite_ros.depth import Depth, decode_depth
from vpr_lite_ros.image import ImageError

CAMERAS = {"exact": 20.0, "stereo": 20.0, "rgbd": 8.0}
"""How far each one sees, in metres."""
BASELINE_M = 0.12
DISPARITY_SIGMA_PX = 0.3
WINDOW = 8
"""Pixels across of which a stereo camera's disparity is off alike."""
INFO_TYPE = "sensor_msgs/msg/CameraInfo"


def of_stereo(depth: Depth, focal_px: float, rng: np.random.Generator) -> Depth:
    """What a stereo camera would measure of (H, W) true metres; 0 stays unknown.

    Parameters
    ----------
    focal_px
        In pixels of the depth image.
    """
    height, width = depth.shape
    blocks = -(-height // WINDOW), -(-width // WINDOW)
    off = rng.normal(0.0, DISPARITY_SIGMA_PX, blocks)
    off = np.kron(off, np.ones((WINDOW, WINDOW)))[:height, :width]
    known = depth > 0
    disparity = focal_px * BASELINE_M / np.where(known, depth, 1.0) + off
    seen = known & (disparity > 0)
    metres = focal_px * BASELINE_M / np.where(seen, disparity, 1.0)
    return np.where(seen, metres, 0.0).astype(np.float32)


def worsened(message: Any, camera: str, farthest_m: float, focal: float, seed: int) -> Any:
    """A depth message as ``camera`` would have sent it: 16UC1.

    Parameters
    ----------
    focal
        Focal length by the width of the image.
    """
    try:
        depth = decode_depth(message, "", (message.width, message.height))
    except ImageError:  # nothing measured: that cannot get worse
        return message
    if camera == "stereo":
        stamp = message.header.stamp
        rng = np.random.default_rng([seed, stamp.sec, stamp.nanosec])
        depth = of_stereo(depth, focal * message.width, rng)
    millimetres = np.where(depth <= min(farthest_m, 65.5), np.round(depth * 1000), 0)
    pixels: NDArray[np.uint8] = millimetres.astype("<u2").view(np.uint8)
    return dataclasses.replace(
        message, encoding="16UC1", is_bigendian=0, step=2 * message.width, data=pixels.reshape(-1)
    )


def focal_by_width(path: Path) -> float:
    """Of the first calibration in a bag."""
    bag = Bag(path)
    try:
        topic = bag.choose_topic((INFO_TYPE,), None, "calibration", "a bag of one camera")
        info = next(bag.messages(topic))[1]
    finally:
        bag.close()
    return float(info.k[0]) / int(info.width)


def worsen(
    source: Path, output: Path, camera: str, farthest_m: float, topic: str, seed: int
) -> int:
    """Write ``output``; return how many depth images it has."""
    focal = focal_by_width(source) if camera == "stereo" else 0.0
    store = get_typestore(Stores.ROS2_JAZZY)
    connections: dict[int, Any] = {}
    count = 0
    with (
        AnyReader([source], default_typestore=store) as reader,
        Writer(output, version=8) as writer,
    ):
        for connection, time_ns, data in reader.messages():
            kind = connection.msgtype
            if connection.id not in connections:
                connections[connection.id] = writer.add_connection(
                    connection.topic, kind, typestore=store
                )
            if connection.topic == topic:
                message = reader.deserialize(data, kind)
                message = worsened(message, camera, farthest_m, focal, seed)
                data = bytes(store.serialize_cdr(message, kind))
                count += 1
            writer.write(connections[connection.id], time_ns, data)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="rosbag2 with depth, as vpr-lite simulate writes")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--camera", choices=sorted(CAMERAS), required=True)
    parser.add_argument("--farthest", type=float, help="metres that it sees")
    parser.add_argument("--topic", default=DEPTH_TOPIC, help=f"of depth (default: {DEPTH_TOPIC})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    farthest_m = CAMERAS[args.camera] if args.farthest is None else args.farthest
    count = worsen(args.source, args.output, args.camera, farthest_m, args.topic, args.seed)
    print(f"{args.output}: {count} depth images, {args.camera}, up to {farthest_m:g} m")


if __name__ == "__main__":
    main()
