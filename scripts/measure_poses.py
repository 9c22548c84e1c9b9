#!/usr/bin/env python3
"""How far the poses of closures of drawn drives are from the truth.

    vpr-lite simulate drive --seed 3 --depth
    vpr-lite replay drive --image-topic /camera/image_raw/compressed --output out \
        --depth-topic /camera/depth/image_raw
    scripts/measure_poses.py out drive

A replay does not know where the camera sits on the body: its poses are of the camera, turned as the
body is, and so is the truth here. `... / stated` is the error by the deviation that the closure
states: 0.7 to 0.9 in the median if that is right, less if it is cautious.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.backend.offline import read_closures
from vpr_lite_ros.bags import read_poses
from vpr_lite_ros.relative_pose import PLACE_M, PoseType, rotation_matrix
from vpr_lite_ros.simulation.view import CAMERA_IN_BASE

_ALWAYS = ("metres apart", "rotation, radians off", "... / stated")
COLUMNS = {
    PoseType.NONE: _ALWAYS,
    PoseType.ROTATION: _ALWAYS,
    PoseType.ROTATION_AND_DIRECTION: (*_ALWAYS, "direction, radians off", "... / stated"),
    PoseType.METRIC: (*_ALWAYS, "metres off", "... / stated"),
}


def errors(replay: Path, drive: Path) -> dict[PoseType, list[tuple[float, ...]]]:
    """Of each closure, by its type of pose, what ``COLUMNS`` names."""
    truth = read_poses(drive)
    assert truth.stamps_ns is not None and truth.quaternions is not None
    rows: dict[PoseType, list[tuple[float, ...]]] = {}
    for closure in read_closures(replay / "closures.jsonl"):
        at = [
            int(np.abs(truth.stamps_ns - s).argmin()) for s in (closure.query_ns, closure.match_ns)
        ]
        turns = [rotation_matrix(*truth.quaternions[row]) for row in at]
        query, match = (
            truth.xyz[row] + turn @ CAMERA_IN_BASE for row, turn in zip(at, turns, strict=True)
        )
        way, told = turns[0].T @ (match - query), np.array(closure.translation)
        length = float(np.linalg.norm(way))
        turn = rotation_matrix(*closure.quaternion).T @ turns[0].T @ turns[1]
        of_position, of_turn = closure.covariance[:3, :3], closure.covariance[3:, 3:]
        turned = _angle(float(np.trace(turn) - 1) / 2)
        row: tuple[float, ...] = (length, turned, turned / _deviation(of_turn))
        if closure.pose_type is PoseType.ROTATION_AND_DIRECTION:
            off = _angle(float(told @ way) / max(length, 1e-9))
            aside = np.eye(3) - np.outer(told, told)
            row += (off, off * PLACE_M / _deviation(aside @ of_position @ aside))
        elif closure.pose_type is PoseType.METRIC:
            off = float(np.linalg.norm(told - way))
            row += (off, off / _deviation(of_position))
        rows.setdefault(closure.pose_type, []).append(row)
    return rows


def _deviation(covariance: NDArray[np.float64]) -> float:
    """Of all directions together."""
    return math.sqrt(max(float(np.trace(covariance)), 1e-12))


def _angle(cosine: float) -> float:
    return math.acos(min(1.0, max(-1.0, cosine)))


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
    found: dict[PoseType, list[tuple[float, ...]]] = {}
    for replay, drive in zip(folders[::2], folders[1::2], strict=True):
        for kind, rows in errors(replay, drive).items():
            found.setdefault(kind, []).extend(rows)
    closures = sum(map(len, found.values()))
    for kind, rows in sorted(found.items()):
        print(f"{len(rows)} of {closures} closures are {kind.name}")
        for name, values in zip(COLUMNS[kind], zip(*rows, strict=True), strict=True):
            median, most, worst = np.percentile(values, (50, 90, 100))
            print(f"  {name}: median {median:.3f}, 90% {most:.3f}, largest {worst:.3f}")


if __name__ == "__main__":
    main()
