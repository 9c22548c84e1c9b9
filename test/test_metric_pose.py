"""PnP from matches with depth, on geometry that is known exactly, and matches refined for it."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import MakePicture
from numpy.typing import NDArray

from vpr_lite_ros.depth import sample_depth
from vpr_lite_ros.image import thumbnail
from vpr_lite_ros.matching import Camera, EpipolarFit, fit_epipolar
from vpr_lite_ros.metric_pose import MetricFit, View, fit_metric_pose, measure_way
from vpr_lite_ros.refinement import (
    CORRELATED,
    ROTATION_FLOOR,
    find_again,
    refine_motion,
)
from vpr_lite_ros.relative_pose import (
    OPTICAL_IN_BODY,
    UNKNOWN_ARM_M,
    Mount,
    PoseType,
    relative_pose_of,
    rotation_matrix,
)

CAMERA = Camera(640, 480, (400.0, 0, 320, 0, 400, 240, 0, 0, 1))
MOUNT = Mount(OPTICAL_IN_BODY, np.array([1.2, -0.3, 0.9]))
CAMERA_IN_BODY = np.eye(4)
CAMERA_IN_BODY[:3, :3] = MOUNT.rotation
CAMERA_IN_BODY[:3, 3] = MOUNT.position
TOLERANCE = 0.02
Points = NDArray[np.float64]
Scene = tuple[Points, NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


def pose(x: float, y: float, z: float, *turn: float) -> NDArray[np.float64]:
    out = np.eye(4)
    out[:3, :3] = cv2.Rodrigues(np.array(turn))[0]
    out[:3, 3] = x, y, z
    return out


# Of the body at the match in the body's frame at the query: beside, behind and turned.
MATCH_IN_QUERY = pose(-1.5, 0.8, 0.1, 0.02, -0.03, 0.3)
# Likewise of the camera.
MOVE = np.linalg.inv(CAMERA_IN_BODY) @ MATCH_IN_QUERY @ CAMERA_IN_BODY


def scene(noise: float = 0.0, wrong: float = 0.0, seed: int = 0) -> Scene:
    """Rays of the query, centres and depth image of the match: a street of boxes, patch by patch.

    And which matches are right.
    """
    rng = np.random.default_rng(seed)
    depth = np.kron(rng.uniform(4, 30, (15, 20)), np.ones((32, 32))).astype(np.float32)
    rows, columns = np.mgrid[0:15, 0:20]
    # In whole pixels, where the depth image has them.
    centres = np.stack([columns.ravel() / 20 + 1 / 40, rows.ravel() / 15 + 1 / 30], axis=1)
    rays = CAMERA.rays(centres.astype(np.float32))
    points = np.concatenate([rays, np.ones((300, 1))], axis=1)
    # As it is stored.
    points *= depth[16::32, 16::32].reshape(-1, 1).astype(np.float16).astype(np.float64)
    seen = points @ MOVE[:3, :3].T + MOVE[:3, 3]
    before = seen[:, 2] > 1
    query = seen[:, :2] / seen[:, 2:] + rng.normal(0, noise, (300, 2))
    bad = rng.random(300) < wrong
    query[bad] = rng.uniform(-0.8, 0.8, (int(bad.sum()), 2))
    return query[before], centres.astype(np.float32)[before], depth, np.flatnonzero(~bad[before])


def fit(
    query: Points,
    centres: NDArray[np.float32],
    depth: NDArray[np.float32],
    tolerance: float = TOLERANCE,
) -> MetricFit | None:
    return fit_metric_pose(query, CAMERA.rays(centres), sample_depth(depth, centres), tolerance)


@pytest.mark.parametrize("backwards", [False, True])
def test_an_exact_scene_gives_the_exact_pose(backwards: bool) -> None:
    query, centres, depth, _ = scene()
    found = fit(query, centres, depth)
    assert found is not None and found.inliers.all()
    known = relative_pose_of(None, found.inverse() if backwards else found, MOUNT)
    expected = np.linalg.inv(MATCH_IN_QUERY) if backwards else MATCH_IN_QUERY
    assert known.pose_type is PoseType.METRIC
    np.testing.assert_allclose(known.translation, expected[:3, 3], atol=1e-5)
    turn = rotation_matrix(*known.quaternion)
    np.testing.assert_allclose(turn, expected[:3, :3], atol=1e-6)


def test_a_third_of_wrong_matches_and_holes_in_the_depth() -> None:
    query, centres, depth, right = scene(noise=0.003, wrong=0.33)
    depth = depth.copy()
    depth[:160] = 0
    depth[160:200] = np.nan
    found = fit(query, centres, depth)
    assert found is not None
    known = relative_pose_of(None, found, MOUNT)
    np.testing.assert_allclose(known.translation, MATCH_IN_QUERY[:3, 3], atol=0.1)
    # Matches without depth are none, wrong ones at most by chance.
    assert not found.inliers[centres[:, 1] * 480 < 195].any()
    assert np.isin(np.flatnonzero(found.inliers), right).mean() > 0.97


@pytest.mark.parametrize("backwards", [False, True])
def test_the_covariance_is_what_repeated_measurement_shows(backwards: bool) -> None:
    expected = np.linalg.inv(MATCH_IN_QUERY) if backwards else MATCH_IN_QUERY
    errors, stated = [], []
    for seed in range(60):
        query, centres, depth, _ = scene(noise=0.004, seed=seed)
        found = fit(query, centres, depth, 0.05)
        assert found is not None
        known = relative_pose_of(None, found.inverse() if backwards else found, MOUNT)
        turn = rotation_matrix(*known.quaternion) @ expected[:3, :3].T
        off = np.array(known.translation) - expected[:3, 3]
        error = np.concatenate([off, cv2.Rodrigues(turn)[0].ravel()])
        errors.append(error)
        stated.append(error @ np.linalg.solve(known.covariance, error))
    # Six numbers, each of variance one: a mean of 6, and 60 draws of it. Here points err each on
    # its own, which in pictures they do not.
    assert 4.5 < np.mean(stated) * CORRELATED < 7.5
    assert np.abs(np.mean(errors, axis=0)).max() < 0.02


def test_an_inverse_is_as_sure_as_what_it_is_the_inverse_of() -> None:
    rng = np.random.default_rng(0)
    sigma = np.array([0.02, 0.05, 0.1, 0.01, 0.02, 0.005])
    turn, shift = pose(0, 0, 0, 0.2, -0.5, 0.3)[:3, :3], np.array([4.0, -3.0, 8.0])
    found = MetricFit(turn, shift, np.diag(sigma**2), np.ones(9, np.bool_)).inverse()
    errors = []
    for error in rng.normal(0, sigma, (4000, 6)):
        off = cv2.Rodrigues(error[3:])[0] @ turn
        turned = cv2.Rodrigues(off.T @ found.rotation.T)[0].ravel()
        errors.append(np.concatenate([-off.T @ (shift + error[:3]) - found.translation, turned]))
    scale = np.sqrt(np.diag(found.covariance))
    seen = np.cov(np.array(errors).T) / np.outer(scale, scale)
    np.testing.assert_allclose(seen, found.covariance / np.outer(scale, scale), atol=0.1)


def test_where_the_camera_sits_matters_only_in_a_turn() -> None:
    query, centres, depth, _ = scene(noise=0.004)
    found = fit(query, centres, depth)
    assert found is not None
    known, unknown = (relative_pose_of(None, found, one) for one in (MOUNT, None))
    wider = np.sqrt(np.diag(unknown.covariance))
    # Turned by 0.3 rad about z: an arm of a metre ends a third of a metre off, in the plane.
    assert (wider[:2] > 0.9 * 2 * np.sin(0.15) * UNKNOWN_ARM_M).all()
    np.testing.assert_allclose(np.abs(wider[2]), 0, atol=0.1)
    straight = relative_pose_of(None, replace(found, rotation=np.eye(3)), None)
    assert np.sqrt(np.diag(straight.covariance))[:3].max() < 0.1
    assert known.quaternion == unknown.quaternion


def test_too_little_is_nothing() -> None:
    query, centres, depth, _ = scene()
    assert fit(query, centres, np.zeros_like(depth)) is None
    assert fit(query[:11], centres[:11], depth) is None
    noise = np.random.default_rng(0).uniform(-0.8, 0.8, query.shape)
    assert fit(noise, centres, depth, 0.002) is None
    with pytest.raises(ValueError, match="as many"):
        fit(query[1:], centres, depth)


def test_points_that_have_no_pose_give_none() -> None:
    line = np.stack([np.linspace(-0.5, 0.5, 30), np.zeros(30)], axis=1)
    two_places = np.repeat([[0.1, 0.2], [-0.3, 0.4]], 15, axis=0)
    for rays, depth in ((line, np.full(30, 5.0)), (two_places, np.ones(30))):
        for tolerance in (TOLERANCE, 10.0):
            assert fit_metric_pose(rays, rays, depth, tolerance) is None


# Refinement


def test_points_are_found_again_to_a_fraction_of_a_pixel(make_picture: MakePicture) -> None:
    picture = make_picture(3, (640, 480))
    # What the second camera sees lies 7.0 px further right and 4.6 higher, and is darker.
    shift = np.array([[1.0, 0, 7.0], [0, 1.0, -4.6]])
    moved = cv2.warpAffine(picture, shift, (640, 480), borderMode=cv2.BORDER_REFLECT)
    moved = (moved * 0.6).astype(np.uint8)
    rng = np.random.default_rng(0)
    points = rng.uniform(0.15, 0.85, (200, 2)).astype(np.float32)
    # Patches are matched to 16 px or so.
    near = (points + rng.uniform(-8, 8, (200, 2)) / (640, 480)).astype(np.float32)
    centres, found = find_again(thumbnail(picture), points, thumbnail(moved), near)
    assert found.mean() > 0.7
    off = (centres - points)[found] * (640, 480) - (7.0, -4.6)
    assert np.median(np.linalg.norm(off, axis=1)) < 0.7
    np.testing.assert_array_equal(centres[~found], near[~found])
    # Of another place less is found; against a grey wall, or without a picture, nothing.
    other = thumbnail(make_picture(4, (640, 480)))
    assert find_again(thumbnail(picture), points, other, near)[1].mean() < found.mean() / 1.5
    wall = thumbnail(np.full((480, 640, 3), 90, np.uint8))
    # A picture of another robot that claims 65,535 pixels squared, which OpenCV refuses to decode.
    start = other.index(b"\xff\xc0") + 5
    huge = other[:start] + b"\xff\xff\xff\xff" + other[start + 4 :]
    for one, another in ((wall, other), (other, wall), (b"", other), (other, b""), (huge, other)):
        assert not find_again(one, points, another, near)[1].any()


def refined_by_pictures(query: View, match: View, tolerance: float) -> EpipolarFit | None:
    centres, found = find_again(query.picture, query.centres, match.picture, match.centres)
    return refine_motion(
        query.camera.rays(query.centres[found]), match.camera.rays(centres[found]), tolerance
    )


def test_a_turn_is_refined_by_the_pictures(make_picture: MakePicture) -> None:
    turn, matrix = pose(0, 0, 0, 0.03, 0.1, -0.05)[:3, :3], np.reshape(CAMERA.matrix, (3, 3))
    picture = make_picture(6, (640, 480))
    homography = matrix @ turn @ np.linalg.inv(matrix)  # from the match's pixels to the query's
    turned = cv2.warpPerspective(picture, homography, (640, 480))
    rng = np.random.default_rng(0)
    centres = rng.uniform(0.2, 0.8, (200, 2))
    seen = cv2.perspectiveTransform(centres[None] * (640, 480), homography)[0] / (640, 480)
    # Neighbouring patches are off alike, as on a grid: here all of them.
    match = View(CAMERA, thumbnail(picture), centres)
    query = View(CAMERA, thumbnail(turned), seen + np.array([6 / 640, -5 / 480]))

    def off(found: EpipolarFit | None) -> float:
        assert found is not None
        return float(np.linalg.norm(cv2.Rodrigues(found.rotation @ turn.T)[0]))

    by_patches = fit_epipolar(CAMERA.rays(query.centres), CAMERA.rays(centres), TOLERANCE)
    # What lies at the query's points is looked for around the match's.
    refined = refined_by_pictures(query, match, TOLERANCE / 2)
    assert off(by_patches) > 0.008 and off(refined) < 0.003
    known = relative_pose_of(refined)
    assert known.pose_type is PoseType.ROTATION
    np.testing.assert_allclose(np.diag(known.covariance), [1e6] * 3 + [ROTATION_FLOOR**2] * 3)
    # What is not found plays no part.
    few = replace(
        match,
        picture=thumbnail(
            np.where(np.mgrid[:480, :640][1, ..., None] < 320, picture, 90).astype(np.uint8)
        ),
    )
    half = refined_by_pictures(query, few, TOLERANCE / 2)
    assert half is not None and len(half.inliers) < (centres[:, 0] < 0.56).sum()
    # By another place, a grey wall or without a picture nothing is refined.
    for other in (make_picture(7, (640, 480)), np.full((480, 640, 3), 90, np.uint8)):
        there = replace(match, picture=thumbnail(other))
        assert refined_by_pictures(query, there, TOLERANCE / 2) is None
    assert refined_by_pictures(replace(query, picture=b""), match, TOLERANCE) is None


def _street(make_picture: MakePicture, seed: int) -> tuple[View, View]:
    """Three walls, 5, 10 and 20 m ahead, seen a second time from 0.5 m further left; what is known
    of the points is up to 6 pixels off, for neighbours alike."""
    picture, rng = make_picture(seed, (640, 480)), np.random.default_rng(seed)
    moved = np.zeros_like(picture)
    centres = rng.uniform([0.1, 0.05], [0.8, 0.95], (200, 2))
    band = (centres[:, 1] * 12).astype(int) % 3
    for row in range(12):
        shift = 0.5 / (5, 10, 20)[row % 3] * CAMERA.matrix[0]
        moved[row * 40 : row * 40 + 40] = np.roll(
            picture[row * 40 : row * 40 + 40], round(shift), 1
        )
    aside = 0.5 / np.array([5.0, 10.0, 20.0])[band] * CAMERA.matrix[0] / 640
    near = centres + np.stack([aside, 0 * aside], axis=1)
    off = rng.uniform(-6, 6, (4, 4, 2)) / (640, 480)
    cell = (centres * 4).astype(int)
    query = View(CAMERA, thumbnail(picture), centres)
    return query, View(CAMERA, thumbnail(moved), near + off[cell[:, 1], cell[:, 0]])


def test_a_refined_direction_is_as_sure_as_it_says(
    make_picture: MakePicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    off, stated, rough = [], [], []
    # Here the intrinsics are exact.
    monkeypatch.setattr("vpr_lite_ros.refinement.DIRECTION_FLOOR", 0.0)
    for seed in range(12):
        query, match = _street(make_picture, seed)
        rays = CAMERA.rays(query.centres), CAMERA.rays(match.centres)
        by_patches = fit_epipolar(*rays, 0.0075)
        refined = refined_by_pictures(query, match, 0.0075)
        assert by_patches is not None and refined is not None and refined.covariance is not None
        # The match's camera stands at the query's left: its points lie further right in its image.
        off.append(np.linalg.norm(refined.direction - (-1, 0, 0)))
        rough.append(np.linalg.norm(by_patches.direction - (-1, 0, 0)))
        stated.append(np.sqrt(np.trace(refined.covariance[:3, :3])))
        known = relative_pose_of(refined)
        assert known.pose_type is PoseType.ROTATION_AND_DIRECTION
        np.testing.assert_allclose(known.translation, (0, 1, 0), atol=0.15)
        # To the left the way is of any length; across it is known, as far as a place reaches.
        assert known.covariance[1, 1] > 1e5
        aside = np.eye(3) - np.outer(known.translation, known.translation)
        across = np.trace(aside @ known.covariance[:3, :3] @ aside)
        assert across == pytest.approx(25 * np.trace(refined.covariance[:3, :3]), rel=0.05)
        assert np.linalg.eigvalsh(known.covariance).min() > 0
    assert np.median(off) < 0.03 and np.median(off) < np.median(rough) / 3
    assert 0.1 < np.median(np.array(off) / stated) < 1.2


@pytest.mark.parametrize("seed", [5, 6, 7, 8])
def test_of_a_plane_two_motions_are_held_possible(make_picture: MakePicture, seed: int) -> None:
    """The camera moved sideways before a wall; RANSAC is sure that it moved towards it."""
    picture = make_picture(seed, (640, 480))
    shift = 1.5 / 10 * CAMERA.matrix[0]
    moved = cv2.warpAffine(picture, np.array([[1.0, 0, shift], [0, 1.0, 0]]), (640, 480))
    points = np.random.default_rng(0).uniform(0.2, 0.7, (150, 2))
    query = View(CAMERA, thumbnail(moved), points + np.array([shift / 640, 0]))
    refined = refined_by_pictures(query, View(CAMERA, thumbnail(picture), points), 0.0075)
    assert refined is not None and refined.covariance is not None
    stated = np.sqrt(np.trace(refined.covariance[:3, :3]))
    assert not refined.direction.any() or stated > 0.3


def _views(make_picture: MakePicture) -> tuple[View, View, EpipolarFit]:
    """A wall 10 m ahead, seen a second time from 1.5 m further left."""
    picture = make_picture(5, (640, 480))
    shift = 1.5 / 10 * CAMERA.matrix[0]
    moved = cv2.warpAffine(picture, np.array([[1.0, 0, shift], [0, 1.0, 0]]), (640, 480))
    points = np.random.default_rng(0).uniform(0.2, 0.7, (150, 2)).astype(np.float32)
    depth = np.full(150, 10, np.float16)
    match = View(CAMERA, thumbnail(picture), points, depth)
    query = View(CAMERA, thumbnail(moved), points + np.array([shift / 640, 0], np.float32), depth)
    return query, match, EpipolarFit(np.ones(150, np.bool_), np.eye(3), np.array([1.0, 0, 0]))


def test_either_image_may_have_the_depth(make_picture: MakePicture) -> None:
    query, match, epipolar = _views(make_picture)
    without = [replace(view, depth=None) for view in (query, match)]
    for views in ((query, match), (without[0], match), (query, without[1])):
        found = measure_way(*views, epipolar, TOLERANCE)
        assert found is not None
        np.testing.assert_allclose(found.translation, (1.5, 0, 0), atol=0.15)
    # A match whose depth says nothing leaves it to the query's.
    blind = replace(match, depth=np.zeros(150, np.float16))
    assert measure_way(query, blind, epipolar, TOLERANCE) is not None
    assert measure_way(without[0], without[1], epipolar, TOLERANCE) is None


def test_what_disagrees_is_not_believed(make_picture: MakePicture) -> None:
    query, match, epipolar = _views(make_picture)
    turned = replace(epipolar, rotation=pose(0, 0, 0, 0, 0.6, 0)[:3, :3])
    assert measure_way(query, match, turned, TOLERANCE) is None
    # Bands that moved to and fro: one pose explains no half of the points.
    band = (match.centres[:, 1] * 12).astype(int) % 2 * 2 - 1
    picture, moved = make_picture(5, (640, 480)), np.zeros((480, 640, 3), np.uint8)
    for row in range(0, 480, 40):
        moved[row : row + 40] = np.roll(picture[row : row + 40], 30 * (row // 40 % 2 * 2 - 1), 1)
    centres = match.centres + np.stack([band * 30 / 640, 0 * band], axis=1).astype(np.float32)
    torn = replace(query, picture=thumbnail(moved), centres=centres)
    assert measure_way(torn, match, epipolar, TOLERANCE) is None
    # So far away that metres are a matter of luck.
    far = [replace(view, depth=np.full(150, 4000, np.float16)) for view in (query, match)]
    assert measure_way(far[0], far[1], epipolar, TOLERANCE) is None
