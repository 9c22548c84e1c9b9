"""A closure's pose in metres, where one of its two images has depth: perspective-n-point."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.matching import Camera
from vpr_lite_ros.relative_pose import PoseType, RelativePose, quaternion

MIN_POINTS = 8
"""Fewer points that agree could agree by chance."""
DEPTH_WINDOW = 5
"""Pixels of the depth image across, of which a patch's centre takes the median."""


@dataclass(frozen=True)
class MetricPose:
    """Pose of the body at the match in the body's frame at the query, in metres."""

    pose: RelativePose
    covariance: NDArray[np.float64]
    """(6, 6) as in ``LoopClosure.msg``: x y z, then rotations about x y z, of the query's body
    frame; metres² and radians². By the errors of the matches that agree."""
    inliers: NDArray[np.bool_]
    """(M,) which matches agree."""


def fit_metric_pose(
    query_rays: NDArray[np.float64],
    match_centres: NDArray[np.float32],
    match_depth: NDArray[np.float32],
    match_camera: Camera,
    tolerance: float,
    camera_in_body: NDArray[np.float64],
) -> MetricPose | None:
    """The pose with which most matches agree, or None if too few have depth or agree.

    Parameters
    ----------
    query_rays
        (M, 2) of the query's matched points, as ``Camera.rays`` gives them.
    match_centres
        (M, 2) the same points in the match's image, as fractions of it.
    match_depth
        (H, W) metres along the optical axis, in register with the match's image, of any size; 0,
        NaN or inf where not known.
    match_camera
        Intrinsics of the match's image.
    tolerance
        Largest distance of a projected point, in the unit of rays (radians near the axis).
    camera_in_body
        (4, 4) pose of the optical frame in the body's, metres: the same camera for both images.

    Raises
    ------
    ValueError
        If the matched points are not equally many, or the depth is no image.
    """
    if match_depth.ndim != 2 or len(query_rays) != len(match_centres):
        raise ValueError(
            f"depth {match_depth.shape} must be (H, W); {len(query_rays)} rays must be as many as "
            f"the {len(match_centres)} centres"
        )
    depth = _sample(match_depth, match_centres)
    known = np.flatnonzero(depth > 0)
    if len(known) < MIN_POINTS:
        return None
    rays = match_camera.rays(match_centres[known])
    points = np.concatenate([rays, np.ones((len(rays), 1))], axis=1) * depth[known, None]
    seen = np.ascontiguousarray(query_rays[known])
    found, turn, shift, inliers = cv2.solvePnPRansac(
        points,
        seen,
        np.eye(3),
        None,
        None,
        None,
        False,
        1000,
        tolerance,
        0.999,
        None,
        cv2.SOLVEPNP_SQPNP,
    )
    if not found or inliers is None or len(inliers) < MIN_POINTS:
        return None
    rows = inliers.ravel()
    turn, shift = cv2.solvePnPRefineLM(points[rows], seen[rows], np.eye(3), None, turn, shift)
    rotation = np.asarray(cv2.Rodrigues(turn)[0], np.float64)
    covariance = _covariance(points[rows] @ rotation.T, shift.ravel(), seen[rows])
    agreeing = np.zeros(len(query_rays), np.bool_)
    agreeing[known[rows]] = True
    return _in_body(rotation, shift.ravel(), covariance, camera_in_body, agreeing)


def _sample(depth: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float64]:
    """(M,) median depth around each centre, metres; 0 where most of it is not known."""
    height, width = depth.shape
    margin = DEPTH_WINDOW // 2
    # Not known counts as infinitely far: the median is then, too, if that is most of the window.
    padded = np.pad(depth, margin, constant_values=np.inf).astype(np.float64)
    padded[~(padded > 0)] = np.inf
    column, row = (centres * (width, height)).astype(int).T
    column, row = column.clip(0, width - 1), row.clip(0, height - 1)
    across = np.arange(DEPTH_WINDOW)
    windows = padded[row[:, None, None] + across[:, None], column[:, None, None] + across]
    middle = np.median(windows.reshape(len(centres), -1), axis=1)
    return np.where(np.isfinite(middle), middle, 0.0)


def _covariance(
    turned: NDArray[np.float64], shift: NDArray[np.float64], seen: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(6, 6) of translation and rotation, in the query's camera frame, by what does not fit."""
    points = turned + shift
    x, y, z = points.T
    zero = np.zeros_like(x)
    projection = np.stack(
        [np.stack([1 / z, zero, -x / z**2], axis=1), np.stack([zero, 1 / z, -y / z**2], axis=1)],
        axis=1,
    )
    slopes = np.concatenate([projection, -projection @ _cross(turned)], axis=2).reshape(-1, 6)
    errors = points[:, :2] / z[:, None] - seen
    variance = (errors**2).sum() / max(errors.size - 6, 1)
    return np.asarray(np.linalg.pinv(slopes.T @ slopes) * variance)


def _in_body(
    rotation: NDArray[np.float64],
    shift: NDArray[np.float64],
    covariance: NDArray[np.float64],
    camera_in_body: NDArray[np.float64],
    inliers: NDArray[np.bool_],
) -> MetricPose:
    """From the camera's frames to the body's, the lever arm between them included."""
    mounted, lever = camera_in_body[:3, :3], camera_in_body[:3, 3]
    turned = mounted @ rotation @ mounted.T
    arm = turned @ lever
    x, y, z = (mounted @ shift + lever - arm).tolist()
    change = np.zeros((6, 6))
    change[:3, :3] = change[3:, 3:] = mounted
    change[:3, 3:] = _cross(arm[None])[0] @ mounted
    pose = RelativePose(PoseType.METRIC, (x, y, z), quaternion(turned))
    return MetricPose(pose, change @ covariance @ change.T, inliers)


def _cross(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3, 3) matrices that multiply by vectors (N, 3) as the cross product does."""
    x, y, z = vectors.T
    zero = np.zeros_like(x)
    return np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
