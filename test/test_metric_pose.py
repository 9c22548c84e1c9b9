"""PnP from matches with depth, on geometry that is known exactly."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.matching import Camera
from vpr_lite_ros.metric_pose import fit_metric_pose
from vpr_lite_ros.relative_pose import OPTICAL_IN_BODY, PoseType, rotation_matrix

CAMERA = Camera(640, 480, (400.0, 0, 320, 0, 400, 240, 0, 0, 1))
CAMERA_IN_BODY = np.eye(4)
CAMERA_IN_BODY[:3, :3] = OPTICAL_IN_BODY
CAMERA_IN_BODY[:3, 3] = (1.2, -0.3, 0.9)
TOLERANCE = 0.02
Scene = tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


def pose(x: float, y: float, z: float, *turn: float) -> NDArray[np.float64]:
    out = np.eye(4)
    out[:3, :3] = cv2.Rodrigues(np.array(turn))[0]
    out[:3, 3] = x, y, z
    return out


# Of the body at the match in the body's frame at the query: beside, behind and turned.
MATCH_IN_QUERY = pose(-1.5, 0.8, 0.1, 0.02, -0.03, 0.3)


def scene(noise: float = 0.0, wrong: float = 0.0, seed: int = 0) -> Scene:
    """Rays of the query, centres and depth of the match: a street of boxes, patch by patch."""
    rng = np.random.default_rng(seed)
    depth = np.kron(rng.uniform(4, 30, (15, 20)), np.ones((32, 32))).astype(np.float32)
    rows, columns = np.mgrid[0:15, 0:20]
    # In whole pixels, where the depth image has them.
    centres = np.stack([columns.ravel() / 20 + 1 / 40, rows.ravel() / 15 + 1 / 30], axis=1)
    rays = CAMERA.rays(centres.astype(np.float32))
    points = np.concatenate([rays, np.ones((300, 1))], axis=1)
    points *= depth[16::32, 16::32].reshape(-1, 1)
    move = np.linalg.inv(CAMERA_IN_BODY) @ MATCH_IN_QUERY @ CAMERA_IN_BODY
    seen = points @ move[:3, :3].T + move[:3, 3]
    before = seen[:, 2] > 1
    query = seen[:, :2] / seen[:, 2:] + rng.normal(0, noise, (300, 2))
    bad = rng.random(300) < wrong
    query[bad] = rng.uniform(-0.8, 0.8, (int(bad.sum()), 2))
    return query[before], centres.astype(np.float32)[before], depth, np.flatnonzero(~bad[before])


def test_an_exact_scene_gives_the_exact_pose() -> None:
    query, centres, depth, _ = scene()
    found = fit_metric_pose(query, centres, depth, CAMERA, TOLERANCE, CAMERA_IN_BODY)
    assert found is not None and found.inliers.all()
    assert found.pose.pose_type is PoseType.METRIC
    np.testing.assert_allclose(found.pose.translation, MATCH_IN_QUERY[:3, 3], atol=1e-5)
    turn = rotation_matrix(*found.pose.quaternion)
    np.testing.assert_allclose(turn, MATCH_IN_QUERY[:3, :3], atol=1e-6)


def test_a_third_of_wrong_matches_and_holes_in_the_depth() -> None:
    query, centres, depth, right = scene(noise=0.003, wrong=0.33)
    depth = depth.copy()
    depth[:160] = 0
    depth[160:200] = np.nan
    found = fit_metric_pose(query, centres, depth, CAMERA, TOLERANCE, CAMERA_IN_BODY)
    assert found is not None
    np.testing.assert_allclose(found.pose.translation, MATCH_IN_QUERY[:3, 3], atol=0.1)
    # Matches without depth are none, wrong ones at most by chance.
    assert not found.inliers[centres[:, 1] * 480 < 195].any()
    assert np.isin(np.flatnonzero(found.inliers), right).mean() > 0.97


def test_the_covariance_is_what_repeated_measurement_shows() -> None:
    errors, stated = [], []
    for seed in range(60):
        query, centres, depth, _ = scene(noise=0.004, seed=seed)
        found = fit_metric_pose(query, centres, depth, CAMERA, 0.05, CAMERA_IN_BODY)
        assert found is not None
        turn = rotation_matrix(*found.pose.quaternion) @ MATCH_IN_QUERY[:3, :3].T
        off = np.array(found.pose.translation) - MATCH_IN_QUERY[:3, 3]
        error = np.concatenate([off, cv2.Rodrigues(turn)[0].ravel()])
        errors.append(error)
        stated.append(error @ np.linalg.solve(found.covariance, error))
    # Six numbers, each of variance one: a mean of 6, and 60 draws of it.
    assert 4.5 < np.mean(stated) < 7.5
    assert np.abs(np.mean(errors, axis=0)).max() < 0.02


def test_too_little_is_nothing() -> None:
    query, centres, depth, _ = scene()
    none = np.zeros_like(depth)
    assert fit_metric_pose(query, centres, none, CAMERA, TOLERANCE, CAMERA_IN_BODY) is None
    few = fit_metric_pose(query[:7], centres[:7], depth, CAMERA, TOLERANCE, CAMERA_IN_BODY)
    assert few is None
    noise = np.random.default_rng(0).uniform(-0.8, 0.8, query.shape)
    assert fit_metric_pose(noise, centres, depth, CAMERA, 0.002, CAMERA_IN_BODY) is None
    with pytest.raises(ValueError, match="as many"):
        fit_metric_pose(query[1:], centres, depth, CAMERA, TOLERANCE, CAMERA_IN_BODY)
