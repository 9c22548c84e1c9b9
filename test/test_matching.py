"""Geometry with known answers: points in space seen from two places."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.matching import (
    MIN_SHARE,
    PATCH_SPACING_PX,
    Camera,
    Matches,
    Status,
    count_planar,
    count_rigid,
    epipolar_distance,
    fit_epipolar,
    log_zoom,
    meeting_points,
    mutual_matches,
)
from vpr_lite_ros.models.netvlad import patch_cells
from vpr_lite_ros.models.repvgg import STRIDE

Array = NDArray[np.float64]

WIDTH, HEIGHT, FOCAL = 640, 480, 400.0
MATRIX = (FOCAL, 0.0, 310.0, 0.0, 410.0, 250.0, 0.0, 0.0, 1.0)
PIXEL = 1 / FOCAL


def _rotation(x: float, y: float, z: float) -> Array:
    return np.asarray(cv2.Rodrigues(np.array([x, y, z], np.float64))[0])


def _angle(one: Array, other: Array) -> float:
    """Radians between two rotations."""
    return float(np.linalg.norm(cv2.Rodrigues(one.T @ other)[0]))


def _two_views(
    rotation: Array, translation: Array, count: int = 80, seed: int = 0
) -> tuple[Array, Array]:
    """Rays (M, 2) to the same points from the query and from the candidate.

    A point at p in the candidate's frame is at ``rotation @ p + translation`` in the query's.
    """
    rng = np.random.default_rng(seed)
    depth = rng.uniform(4, 20, (count, 1))
    points = np.hstack([rng.uniform(-0.7, 0.7, (count, 2)) * depth, depth])
    seen = points @ rotation.T + translation
    assert (seen[:, 2] > 0.5).all()
    return seen[:, :2] / seen[:, 2:], points[:, :2] / points[:, 2:]


MOTIONS = {
    "forward": (_rotation(0, 0, 0), np.array([0, 0, 1.0])),
    "back": (_rotation(0, 0, 0), np.array([0, 0, -1.0])),
    "sideways": (_rotation(0, 0.05, 0), np.array([1.0, 0, 0.1])),
    "turned": (_rotation(0.05, 0.35, -0.1), np.array([-0.8, 0.1, 0.5])),
    "rolled": (_rotation(0, 0, 0.8), np.array([0.3, -0.9, 0.2])),
}


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_motion_between_two_views_is_found(motion: str) -> None:
    rotation, translation = MOTIONS[motion]
    fit = fit_epipolar(*_two_views(rotation, translation), tolerance=PIXEL)
    assert fit is not None and fit.inliers.all()
    assert _angle(fit.rotation, rotation) < 1e-3
    # Unit vector to the candidate's camera in the query's frame: where its origin went.
    direction = translation / np.linalg.norm(translation)
    assert fit.direction == pytest.approx(direction, abs=5e-3)


def test_the_direction_points_from_the_query_to_the_candidate() -> None:
    """The candidate was taken 2 m further ahead: what it saw, the query sees 2 m deeper."""
    rng = np.random.default_rng(1)
    points = np.column_stack([rng.uniform(-3, 3, (60, 2)), rng.uniform(5, 15, 60)])
    candidate = points[:, :2] / points[:, 2:]
    points[:, 2] += 2
    query = points[:, :2] / points[:, 2:]
    fit = fit_epipolar(query, candidate, PIXEL)
    assert fit is not None
    assert fit.direction == pytest.approx([0, 0, 1], abs=5e-3)


@pytest.mark.parametrize("motion", ["sideways", "turned"])
def test_outliers_are_rejected_and_noise_is_not(motion: str) -> None:
    rotation, translation = MOTIONS[motion]
    kept, fooled = [], []
    for seed in range(8):
        query, candidate = _two_views(rotation, translation, count=120, seed=seed)
        rng = np.random.default_rng(50 + seed)
        query += rng.normal(0, 2 * PIXEL, query.shape)
        candidate += rng.normal(0, 2 * PIXEL, candidate.shape)
        wrong = np.arange(120) < 40
        candidate[wrong] = rng.uniform(-0.7, 0.7, (40, 2))
        fit = fit_epipolar(query, candidate, tolerance=8 * PIXEL)
        assert fit is not None
        kept.append(fit.inliers[~wrong].mean())
        fooled.append(fit.inliers[wrong].mean())
        assert _angle(fit.rotation, rotation) < 0.06
        assert fit.direction @ translation / np.linalg.norm(translation) > 0.9
    assert np.mean(kept) > 0.985 and np.min(kept) > 0.95
    assert np.max(fooled) < 0.3


def test_points_behind_a_camera_do_not_count() -> None:
    rotation, translation = MOTIONS["sideways"]
    query, candidate = _two_views(rotation, translation)
    # Beyond infinity: the rays would meet behind both cameras, on their epipolar lines.
    rng = np.random.default_rng(4)
    depth = rng.uniform(4, 20, (20, 1))
    points = -np.hstack([rng.uniform(-0.6, 0.6, (20, 2)) * depth, depth])
    seen = points @ rotation.T + translation
    query = np.vstack([query, seen[:, :2] / seen[:, 2:]])
    candidate = np.vstack([candidate, points[:, :2] / points[:, 2:]])
    fit = fit_epipolar(query, candidate, PIXEL)
    assert fit is not None
    assert fit.inliers[:80].all() and not fit.inliers[80:].any()


@pytest.mark.parametrize("noise", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("turn", [(0.0, 0.0, 0.0), (0.05, 0.35, -0.1)])
def test_the_very_same_spot_is_known_again(turn: tuple[float, float, float], noise: float) -> None:
    """Any direction of motion fits as well as any other, and none is said."""
    rotation = _rotation(*turn)
    query, candidate = _two_views(rotation, np.zeros(3), count=120)
    rng = np.random.default_rng(6)
    query += rng.normal(0, noise * PIXEL, query.shape)
    wrong = np.arange(120) < 40
    candidate[wrong] = rng.uniform(-0.7, 0.7, (40, 2))
    fit = fit_epipolar(query, candidate, tolerance=8 * PIXEL)
    assert fit is not None
    # Of identical images no motion is found, and all count; else those in front of one motion.
    assert fit.inliers[~wrong].mean() >= 0.5 and fit.inliers[wrong].mean() < 0.2
    assert _angle(fit.rotation, rotation) < 0.01
    assert not fit.direction.any()


def test_random_matches_find_few_friends() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        rays = rng.uniform(-0.7, 0.7, (2, 60, 2))
        fit = fit_epipolar(rays[0], rays[1], tolerance=2 * PIXEL)
        assert fit is None or fit.inliers.sum() < 30


def test_the_same_matches_give_the_same_fit() -> None:
    query, candidate = _two_views(*MOTIONS["turned"])
    rng = np.random.default_rng(5)
    candidate[:50] = rng.uniform(-0.7, 0.7, (50, 2))
    fits = [fit_epipolar(query, candidate, 4 * PIXEL) for _ in range(3)]
    first = fits[0]
    assert first is not None
    for fit in fits[1:]:
        rng.random(100)
        assert fit is not None and np.array_equal(fit.inliers, first.inliers)
        assert np.array_equal(fit.rotation, first.rotation)
        assert np.array_equal(fit.direction, first.direction)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_matches_give_no_motion(count: int) -> None:
    query, candidate = _two_views(*MOTIONS["turned"])
    assert fit_epipolar(query[:count], candidate[:count], PIXEL) is None


@pytest.mark.parametrize("count", [5, 6, 8, 30])
def test_degenerate_matches_do_no_harm(count: int) -> None:
    rng = np.random.default_rng(count)
    line = np.column_stack([np.linspace(-0.5, 0.5, count), np.zeros(count)])
    grid = np.round(rng.uniform(-0.7, 0.7, (count, 2)) * 4) / 4
    for rays in (np.zeros((count, 2)), np.full((count, 2), 0.3), line, grid):
        for other in (rays, rays[::-1].copy(), rays + 0.1):
            fit = fit_epipolar(rays, other, PIXEL)
            assert fit is None or (
                fit.inliers.shape == (count,)
                and np.isfinite(fit.rotation).all()
                and np.isfinite(fit.direction).all()
            )


def test_epipolar_distance_is_the_distance_to_the_line() -> None:
    """Pure sideways motion: epipolar lines are rows, so the distance is that between rows."""
    essential = np.array([[0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])
    first = np.array([[0.1, 0.2], [0.3, -0.1], [0, 0]])
    second = first + np.array([[0.3, 0.0], [-0.2, 0.02], [0.5, -0.1]])
    # Sampson's distance shares the gap between the two images.
    expected = np.array([0, 0.02, 0.1]) / math.sqrt(2)
    assert np.abs(epipolar_distance(essential, first, second)) == pytest.approx(expected)


# Cameras


def _project(camera: Camera, rays: Array) -> Array:
    """Rays x / z, y / z to fractions of the image, by the distortion models' own formulas."""
    x, y = rays[:, 0], rays[:, 1]
    r2 = x**2 + y**2
    d = [*camera.distortion, *[0.0] * 8]
    if camera.model == "equidistant":
        r = np.sqrt(r2)
        theta = np.arctan(r)
        bent = theta * (1 + d[0] * theta**2 + d[1] * theta**4 + d[2] * theta**6 + d[3] * theta**8)
        x, y = x * bent / r, y * bent / r
    else:
        k1, k2, p1, p2, k3, k4, k5, k6 = d[:8]
        radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
        x, y = (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
            y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y,
        )
    fx, _, cx, _, fy, cy, *_ = camera.matrix
    return np.column_stack([(fx * x + cx) / camera.width, (fy * y + cy) / camera.height])


@pytest.mark.parametrize(
    ("model", "distortion"),
    [
        ("plumb_bob", ()),
        ("plumb_bob", (-0.25, 0.08, 0.001, -0.002, 0.0)),
        ("rational_polynomial", (0.4, 0.05, 0.001, -0.001, 0.01, 0.6, 0.1, 0.02)),
        ("equidistant", ()),
        ("equidistant", (-0.03, 0.01, -0.004, 0.001)),
    ],
)
def test_rays_undo_the_lens(model: str, distortion: tuple[float, ...]) -> None:
    camera = Camera(WIDTH, HEIGHT, MATRIX, distortion, model)
    reach = 2.0 if model == "equidistant" else 0.5
    rays = np.random.default_rng(0).uniform(-reach, reach, (100, 2))
    fractions = _project(camera, rays).astype(np.float32)
    # OpenCV inverts the polynomial in a few steps: a tenth of a pixel is far within tolerance.
    assert camera.rays(fractions) == pytest.approx(rays, abs=0.1 * PIXEL * (1 + reach))
    assert camera.rays(fractions[:0]).shape == (0, 2)


def test_a_pixel_is_an_angle_at_the_networks_size() -> None:
    camera = Camera(1280, 960, (800.0, 0, 640, 0, 800.0, 480, 0, 0, 1))
    # One pixel of a picture half as wide covers two of the camera's.
    assert camera.radians_per_pixel(640) == pytest.approx(2 / 800)


@pytest.mark.parametrize(
    "camera",
    [
        Camera(WIDTH, HEIGHT, MATRIX),
        Camera(WIDTH, HEIGHT, MATRIX, (0.1, 0.2, 0.3, 0.4), "equidistant"),
    ],
)
def test_cameras_survive_json(camera: Camera) -> None:
    assert Camera.from_json(camera.to_json()) == camera


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"matrix": (0.0,) * 9}, "not calibrated"),
        ({"matrix": (500.0, 0, 320, 0, 0, 240, 0, 0, 1)}, "not calibrated"),
        ({"matrix": ()}, "not calibrated"),
        ({"matrix": (math.nan, 0, 320, 0, math.nan, 240, 0, 0, 1)}, "not calibrated"),
        ({"model": "thin_prism"}, "thin_prism"),
        ({"model": ""}, "distortion model"),
        ({"width": 0}, "0x480"),
        ({"height": -1}, "640x-1"),
    ],
)
def test_an_uncalibrated_camera_says_so(changes: dict[str, object], complaint: str) -> None:
    arguments = {"width": WIDTH, "height": HEIGHT, "matrix": MATRIX} | changes
    with pytest.raises(ValueError, match=complaint):
        Camera(**arguments)  # type: ignore[arg-type]


# Matches


def test_mutual_matches_of_a_small_assignment() -> None:
    assignment = np.array(
        [
            [0.7, 0.1, 0.0, 0.0],  # 0 and 0 choose each other
            [0.2, 0.1, 0.6, 0.0],  # 1 chooses 2, but 2 prefers 2
            [0.0, 0.0, 0.8, 0.1],  # 2 and 2 choose each other
            [0.0, 0.09, 0.0, 0.05],  # 3 chooses 1, which prefers others
            [0.0, 0.0, 0.0, 0.11],  # 4 and 3 choose each other, just
        ],
        np.float32,
    )
    matches = mutual_matches(assignment)
    assert list(zip(matches.query.tolist(), matches.candidate.tolist(), strict=True)) == [
        (0, 0),
        (2, 2),
        (4, 3),
    ]
    assert matches.shares == pytest.approx([0.7, 0.8, 0.11])
    assert len(matches) == 3
    assert mutual_matches(assignment, min_share=0.5).query.tolist() == [0, 2]
    assert len(mutual_matches(np.full((3, 3), MIN_SHARE / 2, np.float32))) == 0


def test_no_patch_is_matched_twice() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assignment = np.round(rng.random((12, 9)), 1).astype(np.float32)  # many ties
        matches = mutual_matches(assignment, 0)
        assert len(set(matches.query.tolist())) == len(matches)
        assert len(set(matches.candidate.tolist())) == len(matches) > 0


def _grid(columns: int, rows: int) -> NDArray[np.float32]:
    """Centres of patches, 16 px apart, of an image of 16 × ``columns`` by 16 × ``rows`` pixels."""
    x, y = np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)


def test_points_are_found_between_patches() -> None:
    size = (192, 128)
    centres = _grid(12, 8)[np.random.default_rng(0).permutation(96)]  # in order of salience
    pixels = centres * size
    for shift in ((5.0, -3.0), (0.0, 0.0), (-7.5, 6.0), (16.0, 2.0)):
        # Shares fall off with the distance to where a patch really is.
        apart = np.linalg.norm(pixels[:, None] + shift - pixels[None], axis=2)
        assignment = np.exp(-((apart / 8) ** 2)).astype(np.float32)
        assignment[apart > 45] = 0.3  # what is far away says nothing
        inner = ((pixels > 40) & (pixels < np.array(size) - 40)).all(axis=1).nonzero()[0]
        index = apart[inner].argmin(axis=1)
        matches = Matches(inner, index, assignment[inner, index])
        points = meeting_points(assignment, matches, centres, centres, size)
        off = points * size - pixels[inner] - shift
        by_grid = pixels[index] - pixels[inner] - shift
        assert np.abs(off).max() < 0.2 + 0.3 * np.abs(by_grid).max(), shift


def test_points_are_the_same_seen_from_either_image() -> None:
    size = (192, 128)
    centres = _grid(12, 8)
    assignment = np.random.default_rng(0).random((96, 96), np.float32)
    index, shares = np.arange(96), np.ones(96, np.float32)
    there = meeting_points(assignment, Matches(index, index[::-1], shares), centres, centres, size)
    back = meeting_points(assignment.T, Matches(index[::-1], index, shares), centres, centres, size)
    np.testing.assert_allclose(there - centres, centres[::-1] - back, atol=1e-6)


def test_a_patch_alone_stays_where_it_is() -> None:
    size = (192, 128)
    centres, others = _grid(12, 8)[[0, 40, 95]], _grid(12, 8)[[95, 0, 70]]  # corners among them
    assignment = np.array([[0, 0.5, 0], [0, 0, 0.6], [0.7, 0, 0]], np.float32)
    matches = mutual_matches(assignment)
    points = meeting_points(assignment, matches, centres, others, size)
    np.testing.assert_allclose(points, others[[1, 2, 0]], atol=1e-6)
    nothing = mutual_matches(np.zeros((3, 3), np.float32))
    assert meeting_points(assignment, nothing, centres, others, size).shape == (0, 2)


def test_patches_are_as_far_apart_as_the_network_has_them() -> None:
    assert PATCH_SPACING_PX == STRIDE
    centres = patch_cells(30, 40)[1].numpy()
    np.testing.assert_allclose(centres[:39], _grid(40, 30)[:39])


def test_status_numbers_are_those_of_the_message(repository: Path) -> None:
    text = (repository / "msg" / "LoopClosure.msg").read_text()
    for line in text.splitlines():
        if line.startswith("uint8 STATUS_"):
            name, _, number = line.removeprefix("uint8 STATUS_").split("#")[0].partition("=")
            assert Status[name.strip()] == int(number)
    assert text.count("uint8 STATUS_") >= len(Status) - 1  # NOT_BEST may stay inside


# Without a camera


def test_matches_on_one_plane_are_counted() -> None:
    rng = np.random.default_rng(3)
    points = rng.uniform([0, 0], [640, 480], (60, 2))
    lifted = np.pad(points, ((0, 0), (0, 1)), constant_values=1.0)
    moved = lifted @ np.array([[1.1, 0.05, 20], [-0.04, 1.05, -15], [1e-4, 5e-5, 1]]).T
    seen = moved[:, :2] / moved[:, 2:] + rng.normal(0, 3, (60, 2))
    seen[40:] = rng.uniform([0, 0], [640, 480], (20, 2))
    found = count_planar(seen, points, 24.0)
    assert 40 <= found <= 43
    assert found == count_planar(seen, points, 24.0), "the same input, the same result"
    assert count_planar(rng.uniform(0, 640, (60, 2)), points, 24.0) < 15
    assert count_planar(seen[:4], points[:4], 24.0) == 0
    assert count_planar(np.zeros((9, 2)), np.zeros((9, 2)), 24.0) <= 9


# Without any camera at all


def _two_cameras(rng: np.random.Generator, count: int) -> tuple[NDArray[np.float64], ...]:
    """Pixels (count, 2) of points 5 to 25 m away, and as seen from 1.5 m ahead, half a metre aside
    and turned a little, by another camera."""
    seen = rng.uniform([-0.6, -0.45, 1], [0.6, 0.45, 1], (count, 3))
    points = seen * rng.uniform(5, 25, (count, 1))
    turn = cv2.Rodrigues(np.array([0.02, 0.05, -0.03]))[0]
    ahead = (points - (0.5, 0, 1.5)) @ turn
    one, other = (known[:, :2] / known[:, 2:] for known in (points, ahead))
    return one * 400 + (320, 240), other * 450 + (330, 250)


def test_matches_of_what_stands_still_are_counted() -> None:
    rng = np.random.default_rng(1)
    one, other = _two_cameras(rng, 120)
    one += rng.normal(0, 0.1, one.shape)
    other[80:] = rng.uniform([0, 0], [640, 480], (40, 2))
    found = count_rigid(one, other, 0.5)
    assert 75 <= found <= 85
    assert found == count_rigid(one, other, 0.5), "the same input, the same result"
    assert count_planar(one[:80], other[:80], 1.0) < 40, "it is no plane"
    assert count_rigid(rng.uniform(0, 640, (120, 2)), other, 0.5) < 30
    assert count_rigid(one[:7], other[:7], 0.5) == 0
    assert count_rigid(one + rng.normal(0, 4, one.shape), other, 0.5) < 40, "to half a pixel"
    for degenerate in (np.zeros((9, 2)), np.outer(np.arange(30.0), (1, 2))):
        assert 0 <= count_rigid(degenerate, degenerate, 0.5) <= len(degenerate)


def test_matches_that_opencv_cannot_bear_count_for_nothing() -> None:
    """Nine false ones, as they came; findFundamentalMat raises an assertion of its own."""
    query = [
        (264, 216), (280, 296), (264, 184), (440, 280), (232, 56), (216, 56), (312, 200),
        (216, 72), (232, 40),
    ]  # fmt: skip
    candidate = [
        (449.0, 351.3), (485.3, 417.8), (446.0, 313.2), (211.7, 125.4), (380.1, 198.5),
        (364.8, 205.9), (500.6, 313.9), (366.2, 226.4), (379.0, 176.1),
    ]  # fmt: skip
    assert count_rigid(np.array(query, float), np.array(candidate), 0.5) <= 9


@pytest.mark.parametrize("zoom", [0.7, 0.95, 1.0, 1.3])
def test_a_zoom_is_told_from_matches_a_fifth_of_which_are_wrong(zoom: float) -> None:
    rng = np.random.default_rng(2)
    there = rng.uniform([0, 0], [640, 480], (80, 2))
    angle = np.array([[0.98, -0.2], [0.2, 0.98]]) / np.hypot(0.98, 0.2)
    here = (there - (320, 240)) @ angle * zoom + (300, 260) + rng.normal(0, 2, there.shape)
    here[::5] = rng.uniform([0, 0], [640, 480], (16, 2))
    assert log_zoom(here, there, 60.0) == pytest.approx(math.log(zoom), abs=0.03)
    assert log_zoom(there, here, 60.0) == pytest.approx(-log_zoom(here, there, 60.0))


def test_of_few_or_near_matches_no_zoom_is_told() -> None:
    rng = np.random.default_rng(2)
    there = rng.uniform([0, 0], [640, 480], (80, 2))
    assert log_zoom(there[:7] * 2, there[:7], 60.0) == 0.0
    assert log_zoom(there / 20, there / 10, 60.0) == 0.0
    assert log_zoom(there[:0], there[:0], 60.0) == 0.0
