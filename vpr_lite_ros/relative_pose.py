"""What a closure knows of the way between its two images, in the frame of the robot's body."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.matching import DIRECTION_SIGMA, ROTATION_SIGMA, EpipolarFit, cross
from vpr_lite_ros.metric_pose import MetricFit

UNKNOWN_VARIANCE = 1e6
"""Metres² and radians²: says nothing."""
PLACE_M = 5.0
"""Metres that two images of one place may lie apart: a direction that is off by an angle puts the
match this many times that to the side."""
UNKNOWN_ARM_M = 1.0
"""How far the camera may sit from the body's origin, along each axis, where nobody says."""

OPTICAL_IN_BODY: NDArray[np.float64] = np.array(
    [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
)
"""Rotation of a forward-looking optical frame (x right, y down, z forward) in the body's frame."""


class PoseType(enum.IntEnum):
    """How much of a relative pose is known; the numbers are those of ``LoopClosure.msg``."""

    NONE = 0
    ROTATION_AND_DIRECTION = 1
    METRIC = 2
    ROTATION = 3


@dataclass(frozen=True)
class Mount:
    """Where the camera is on the body."""

    rotation: NDArray[np.float64] = field(default_factory=lambda: OPTICAL_IN_BODY)
    """(3, 3) of the optical frame in the body's."""
    position: NDArray[np.float64] | None = None
    """(3,) metres; None if not known."""


@dataclass(frozen=True)
class RelativePose:
    """Pose of the body at the match, in the body's frame at the query."""

    pose_type: PoseType = PoseType.NONE
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Metres if METRIC; a unit vector if ROTATION_AND_DIRECTION; else zeros."""
    quaternion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)
    """x y z w; says nothing if NONE."""
    covariance: NDArray[np.float64] = field(default_factory=lambda: np.eye(6) * UNKNOWN_VARIANCE)
    """(6, 6) of x y z, then rotations about x y z, of the query's body frame; metres², radians²."""


def relative_pose_of(
    fit: EpipolarFit | None, metric: MetricFit | None = None, mount: Mount | None = None
) -> RelativePose:
    """The relative pose that a candidate's geometry gives.

    ``mount`` is that of both images' camera; None takes one that looks forward.
    """
    mount = mount or Mount()
    if metric is not None:
        return _metric_pose(metric, mount)
    if fit is None:
        return RelativePose()
    x, y, z = (float(value) for value in mount.rotation @ fit.direction)
    if fit.covariance is None:
        covariance = np.diag([DIRECTION_SIGMA**2] * 3 + [ROTATION_SIGMA**2] * 3)
    else:
        change = np.kron(np.eye(2), mount.rotation)
        covariance = change @ fit.covariance @ change.T
    covariance[:3] *= PLACE_M
    covariance[:, :3] *= PLACE_M
    # The way's length is not known; without a direction, nothing of the way is.
    unknown = np.outer((x, y, z), (x, y, z)) if fit.direction.any() else np.eye(3)
    covariance[:3, :3] += UNKNOWN_VARIANCE * unknown
    return RelativePose(
        PoseType.ROTATION_AND_DIRECTION if fit.direction.any() else PoseType.ROTATION,
        (x, y, z),
        quaternion(mount.rotation @ fit.rotation @ mount.rotation.T),
        covariance,
    )


def _metric_pose(metric: MetricFit, mount: Mount) -> RelativePose:
    """From the camera's frames to the body's, the lever arm between them included."""
    turned = mount.rotation @ metric.rotation @ mount.rotation.T
    lever = np.zeros(3) if mount.position is None else mount.position
    arm = turned @ lever
    x, y, z = (mount.rotation @ metric.translation + lever - arm).tolist()
    change = np.zeros((6, 6))
    change[:3, :3] = change[3:, 3:] = mount.rotation
    change[:3, 3:] = cross(arm[None])[0] @ mount.rotation
    covariance = change @ metric.covariance @ change.T
    if mount.position is None:
        swung = (np.eye(3) - turned) * UNKNOWN_ARM_M
        covariance[:3, :3] += swung @ swung.T
    return RelativePose(PoseType.METRIC, (x, y, z), quaternion(turned), covariance)


def quaternion(rotation: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Unit quaternion (x, y, z, w), w ≥ 0, of a rotation matrix (3, 3)."""
    r = rotation
    # The largest eigenvector of this symmetric matrix is the quaternion, for any rotation.
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
            [r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
            [r[2, 0] + r[0, 2], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1], 0],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
        ]
    )
    x, y, z, w = np.linalg.eigh(k)[1][:, 3] * 1.0
    sign = -1.0 if w < 0 else 1.0
    return float(sign * x), float(sign * y), float(sign * z), float(sign * w)


def rotation_matrix(x: float, y: float, z: float, w: float) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) of a unit quaternion."""
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
