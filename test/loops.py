"""The demo drive without its images: true poses, drifting odometry, and closures made from both."""

from __future__ import annotations

import numpy as np

from vpr_lite_ros.backend.graph import Closure
from vpr_lite_ros.bags import Poses
from vpr_lite_ros.relative_pose import PoseType
from vpr_lite_ros.simulation import OdometrySample, simulate_drive

GAP_NS = 20 * 10**9


def drive(seed: int = 0) -> tuple[Poses, Poses]:
    """True poses and odometry of one drive, five times a second."""
    simulated = simulate_drive(seed)
    return _poses(simulated.ground_truth()[::4]), _poses(simulated.odometry()[::4])


def closures(truth: Poses, pose_type: PoseType, every: int = 8) -> list[Closure]:
    """What a perfect detector says of ``truth``, in order; the same place is within 4 m."""
    assert truth.stamps_ns is not None
    found = []
    for query in range(0, len(truth), every):
        old = np.flatnonzero(truth.stamps_ns <= truth.stamps_ns[query] - GAP_NS)
        if not len(old):
            continue
        away = np.linalg.norm(truth.xyz[old] - truth.xyz[query], axis=1)
        match = int(old[away.argmin()])
        turn = 2 * (_half_yaw(truth, match) - _half_yaw(truth, query))
        if away.min() < 4 and np.cos(turn) > 0.9:
            found.append(closure(truth, query, match, pose_type))
    return found


def at(poses: Poses, path: Poses) -> Poses:
    """The poses of the stamps that ``path`` has."""
    assert poses.stamps_ns is not None and poses.quaternions is not None
    assert path.stamps_ns is not None
    rows = np.flatnonzero(np.isin(poses.stamps_ns, path.stamps_ns))
    return Poses(poses.xyz[rows], poses.stamps_ns[rows], None, poses.quaternions[rows])


def closure(truth: Poses, query: int, match: int, pose_type: PoseType) -> Closure:
    """The closure between two rows of ``truth``, with what ``pose_type`` lets it know."""
    assert truth.stamps_ns is not None
    half = _half_yaw(truth, query)
    yaw, turn = 2 * half, _half_yaw(truth, match) - half
    forward, left, up = truth.xyz[match] - truth.xyz[query]
    way = np.array(
        [
            np.cos(yaw) * forward + np.sin(yaw) * left,
            np.cos(yaw) * left - np.sin(yaw) * forward,
            up,
        ]
    )
    if pose_type is PoseType.ROTATION_AND_DIRECTION:
        way /= np.linalg.norm(way)
    elif pose_type is not PoseType.METRIC:
        way[:] = 0
    stamps = int(truth.stamps_ns[query]), int(truth.stamps_ns[match])
    if pose_type is PoseType.NONE:
        return Closure(*stamps)
    x, y, z = way.tolist()
    quaternion = (0.0, 0.0, float(np.sin(turn)), float(np.cos(turn)))
    covariance = np.diag([0.1**2] * 3 + [0.05**2] * 3)
    return Closure(*stamps, pose_type, (x, y, z), quaternion, covariance)


def _half_yaw(poses: Poses, row: int) -> float:
    assert poses.quaternions is not None
    return float(np.arctan2(poses.quaternions[row, 2], poses.quaternions[row, 3]))


def _poses(samples: list[OdometrySample]) -> Poses:
    stamps = np.array([sample.stamp_ns for sample in samples])
    x, y, yaw = np.array([sample.pose for sample in samples]).T
    zero = np.zeros_like(x)
    return Poses(
        np.stack([x, y, zero], axis=1),
        stamps,
        None,
        np.stack([zero, zero, np.sin(yaw / 2), np.cos(yaw / 2)], axis=1),
    )
