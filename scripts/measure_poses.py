#!/usr/bin/env python3
"""How far METRIC closures of drawn drives are from the truth.

    vpr-lite simulate drive --seed 3 --depth
    vpr-lite replay drive --image-topic /camera/image_raw/compressed --output out \
        --depth-topic /camera/depth/image_raw
    scripts/measure_metric.py out drive

A replay does not know where the camera sits on the body: its poses are of the camera, turned as the
body is, and so is the truth here. `off / stated` is the distance by the deviation that the closure
states of its position: 0.7 to 0.9 in the median if that is right, less if it is cautious.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from vpr_lite_ros.backend.offline import read_closures
from vpr_lite_ros.bags import read_poses
from vpr_lite_ros.relative_pose import PoseType, rotation_matrix
from vpr_lite_ros.simulation.view import CAMERA_IN_BASE


def errors(replay: Path, drive: Path) -> tuple[int, list[tuple[float, float, float, float]]]:
    """How many closures there are; of each METRIC one metres off, radians off, metres off by what
    was stated, and metres between the two images."""
    closures = read_closures(replay / "closures.jsonl")
    truth = read_poses(drive)
    assert truth.stamps_ns is not None and truth.quaternions is not None
    rows = []
    for closure in closures:
        if closure.pose_type is not PoseType.METRIC:
            continue
        at = [
            int(np.abs(truth.stamps_ns - s).argmin()) for s in (closure.query_ns, closure.match_ns)
        ]
        turns = [rotation_matrix(*truth.quaternions[row]) for row in at]
        query, match = (
            truth.xyz[row] + turn @ CAMERA_IN_BASE for row, turn in zip(at, turns, strict=True)
        )
        way = turns[0].T @ (match - query)
        error = rotation_matrix(*closure.quaternion).T @ turns[0].T @ turns[1]
        off = float(np.linalg.norm(np.array(closure.translation) - way))
        angle = math.acos(min(1.0, max(-1.0, (float(np.trace(error)) - 1) / 2)))
        stated = math.sqrt(float(np.trace(closure.covariance[:3, :3])))
        rows.append((off, angle, off / stated, float(np.linalg.norm(way))))
    return len(closures), rows


def main() -> None:
    """Print the median, the 90th percentile and the largest of each, all drives together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="REPLAY DRIVE",
        help="what vpr-lite replay has written, and the bag of vpr-lite simulate; or several pairs",
    )
    folders = parser.parse_args().folders
    if len(folders) % 2:
        parser.error("to each replay belongs its drive")
    closures, rows = 0, []
    for replay, drive in zip(folders[::2], folders[1::2], strict=True):
        count, found = errors(replay, drive)
        closures += count
        rows += found
    print(f"{len(rows)} of {closures} closures are METRIC")
    if rows:
        names = "metres off", "radians off", "off / stated", "metres apart"
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            median, most, worst = np.percentile(values, (50, 90, 100))
            print(f"  {name}: median {median:.3f}, 90% {most:.3f}, largest {worst:.3f}")


if __name__ == "__main__":
    main()
