"""A closure's pose in metres, where one of its two images has depth.

Matches are first refined by correlation of the two pictures; then perspective-n-point finds the
pose, and what the epipolar geometry says of it decides whether it is believed.

All of it is in the frames of the camera; ``relative_pose.py`` turns it to the body's.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.matching import Camera, EpipolarFit, cross
from vpr_lite_ros.refinement import CORRELATED, MIN_POINTS, MIN_SHARE, find_again

LOOSER = 4 / 3
"""A projected point may miss this many times as far as an epipolar line: depth errs, too."""
MAX_TURN = 0.5
"""Radians between the rotation found and that of the epipolar geometry, which is off by a third of
it at most where it is right."""
MAX_SIGMA_M = 2.5
"""A pose that is less sure says no more than that the place is the same."""


@dataclass(frozen=True)
class View:
    """What is known of the matched patches in one of two images."""

    camera: Camera
    picture: bytes
    """The small JPEG that is kept of a keyframe."""
    centres: NDArray[np.floating]
    """(M, 2) fractions of the image's width and height."""
    depth: NDArray[np.float16] | None = None
    """(M,) metres along the optical axis; 0 where not known. None: without depth."""


@dataclass(frozen=True)
class MetricFit:
    """Pose of the candidate's camera in the query's camera frame (optical)."""

    rotation: NDArray[np.float64]
    """(3, 3)."""
    translation: NDArray[np.float64]
    """(3,) metres."""
    covariance: NDArray[np.float64]
    """(6, 6) of x y z, added, and of rotations about x y z, applied last, all in the query's frame;
    metres² and radians². By the errors of the matches that agree."""
    inliers: NDArray[np.bool_]
    """(M,) which matches agree."""

    def inverse(self) -> MetricFit:
        """Pose of the query's camera in the candidate's camera frame."""
        back = self.rotation.T
        change = np.zeros((6, 6))
        change[:3, :3] = change[3:, 3:] = -back
        change[:3, 3:] = -back @ cross(self.translation[None])[0]
        return MetricFit(
            back, -back @ self.translation, change @ self.covariance @ change.T, self.inliers
        )


def measure_way(
    query: View, match: View, epipolar: EpipolarFit, tolerance: float
) -> MetricFit | None:
    """The way between two images in metres, or None if what is known does not tell it surely.

    By the match's depth, or else by the query's.

    Parameters
    ----------
    epipolar
        What the matches alone say.
    tolerance
        Largest distance to an epipolar line, in the unit of rays.
    """
    for seen, other in ((match, query), (query, match)):
        if seen.depth is None:
            continue
        centres, found = find_again(seen.picture, seen.centres, other.picture, other.centres)
        fit = fit_metric_pose(
            other.camera.rays(centres),
            seen.camera.rays(seen.centres),
            np.where(found, seen.depth, 0),
            LOOSER * tolerance,
        )
        if fit is None:
            continue
        fit = fit if seen is match else fit.inverse()
        known = np.count_nonzero(found & (seen.depth > 0))
        turn = cv2.Rodrigues(fit.rotation @ epipolar.rotation.T)[0]
        sigma = np.sqrt(np.trace(fit.covariance[:3, :3]))
        if (
            np.count_nonzero(fit.inliers) >= MIN_SHARE * known
            and np.linalg.norm(turn) <= MAX_TURN
            and sigma <= MAX_SIGMA_M
        ):
            return fit
    return None


def fit_metric_pose(
    query_rays: NDArray[np.float64],
    match_rays: NDArray[np.float64],
    match_depth: NDArray[np.floating],
    tolerance: float,
) -> MetricFit | None:
    """The pose with which most matches agree, or None if too few have depth or agree.

    Parameters
    ----------
    query_rays, match_rays
        (M, 2) matched points as ``Camera.rays`` gives them.
    match_depth
        (M,) metres along the match's optical axis; 0 where not known.
    tolerance
        Largest distance of a projected point, in the unit of rays (radians near the axis).

    Raises
    ------
    ValueError
        If the points are not equally many.
    """
    if not len(query_rays) == len(match_rays) == len(match_depth):
        raise ValueError(
            f"{len(query_rays)} rays of the query must be as many as the match's "
            f"{len(match_rays)} and their {len(match_depth)} depths"
        )
    known = np.flatnonzero(match_depth > 0)
    if len(known) < MIN_POINTS:
        return None
    depth = match_depth[known, None].astype(np.float64)
    points = np.concatenate([match_rays[known], np.ones((len(known), 1))], axis=1) * depth
    seen = np.ascontiguousarray(query_rays[known])
    try:
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
    except cv2.error:  # points on one line, or in one place, have no pose
        return None
    rotation = np.asarray(cv2.Rodrigues(turn)[0], np.float64)
    covariance = _covariance(points[rows] @ rotation.T, shift.ravel(), seen[rows])
    if not np.isfinite(covariance).all():
        return None
    agreeing = np.zeros(len(query_rays), np.bool_)
    agreeing[known[rows]] = True
    return MetricFit(rotation, shift.ravel(), covariance, agreeing)


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
    slopes = np.concatenate([projection, -projection @ cross(turned)], axis=2).reshape(-1, 6)
    errors = points[:, :2] / z[:, None] - seen
    variance = (errors**2).sum() / max(errors.size - 6, 1)
    return np.asarray(np.linalg.pinv(slopes.T @ slopes) * CORRELATED * variance)
