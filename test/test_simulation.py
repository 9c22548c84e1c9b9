"""The simulated drive: the same for everyone, true to the pinhole, and recognisable."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.simulation import Drive, simulate_drive
from vpr_lite_ros.simulation.view import Canvas, Pinhole, Texture, camera_pose, rectangle

SMALL = (160, 120)
CAMERA = Pinhole(focal=100.0, cx=79.5, cy=59.5, width=160, height=120)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour: tuple[int, int, int]) -> Texture:
    return Texture(np.full((16, 16, 3), colour, np.uint8))


def wall(x: float, y: float, width: float, top: float, bottom: float) -> NDArray[np.float64]:
    """A wall that faces west, its left end at (x, y + width / 2) as seen from there."""
    corner = np.array([x, y + width / 2, top])
    return rectangle(corner, np.array([0, -width, 0]), np.array([0, 0, bottom - top]))


def canvas_at(x: float, y: float, yaw: float) -> Canvas:
    return Canvas(CAMERA, *camera_pose(x, y, yaw))


def draw(canvas: Canvas, *panels: tuple[NDArray[np.float64], Texture]) -> None:
    corners = np.stack([corners for corners, _ in panels])
    canvas.draw_rectangles(corners, lambda index: panels[index][1])


def centre_of(image: NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[float, float]:
    rows, columns = np.nonzero((image == colour).all(axis=2))
    return float(columns.mean()), float(rows.mean())


# --- geometry


@pytest.mark.parametrize("pose", [(0.0, 0.0, 0.0), (-2.0, 1.0, 0.15), (1.0, -0.5, -0.2)])
def test_a_world_point_is_seen_where_the_pinhole_says(pose: tuple[float, float, float]) -> None:
    canvas = canvas_at(*pose)
    draw(canvas, (wall(12.0, 0.7, 0.5, 2.25, 1.75), plain(RED)))

    # Worked out from the definitions alone: base_link x forward, y left; camera 0.3 m ahead
    # of it and 1.5 m up; the mark's middle is at (12, 0.7, 2).
    x, y, yaw = pose
    east, north = 12.0 - x, 0.7 - y
    forward = np.cos(yaw) * east + np.sin(yaw) * north - 0.3
    left = -np.sin(yaw) * east + np.cos(yaw) * north
    expected = (79.5 - 100.0 * left / forward, 59.5 - 100.0 * (2.0 - 1.5) / forward)
    assert centre_of(canvas.image, RED) == pytest.approx(expected, abs=0.6)
    row, column = round(expected[1]), round(expected[0])
    assert canvas.inverse_depth[row, column] == pytest.approx(1 / forward, rel=0.01)


def test_texture_is_upright_and_not_mirrored() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10, :10] = RED  # top left
    pixels[10:, 10:] = GREEN  # bottom right
    canvas = canvas_at(0, 0, 0)
    draw(canvas, (wall(6.0, 0.0, 3.0, 3.0, 0.0), Texture(pixels)))
    (red_x, red_y), (green_x, green_y) = (
        centre_of(canvas.image, RED),
        centre_of(canvas.image, GREEN),
    )
    assert red_x < 79.5 < green_x
    assert red_y < 59.5 < green_y


def test_near_things_hide_far_ones_whatever_the_order() -> None:
    near, far = wall(5.0, 0.0, 1.0, 2.0, 1.0), wall(9.0, 0.0, 6.0, 4.0, 0.0)
    images: list[NDArray[np.uint8]] = []
    two = ((near, plain(RED)), (far, plain(BLUE)))
    for panels in (two, two[::-1]):
        canvas = canvas_at(0, 0, 0)
        draw(canvas, *panels)
        assert tuple(canvas.image[60, 80]) == RED
        assert tuple(canvas.image[60, 60]) == BLUE
        images.append(canvas.image)
    np.testing.assert_array_equal(images[0], images[1])


def test_hidden_and_averted_rectangles_are_never_painted() -> None:
    def refuse(index: int) -> Texture:
        assert index == 0, "only the first rectangle is seen"
        return plain(RED)

    front = wall(5.0, 0.0, 30.0, 30.0, -30.0)
    behind_it, behind_me = wall(8.0, 0.0, 2.0, 2.0, 1.0), wall(-5.0, 0.0, 2.0, 2.0, 1.0)
    averted = wall(3.0, 0.0, 1.0, 2.0, 1.0)[[1, 0, 3, 2]]
    canvas = canvas_at(0, 0, 0)
    canvas.draw_rectangles(np.stack([front, behind_it, behind_me, averted]), refuse)
    assert (canvas.image == RED).all()


def test_a_wall_that_passes_the_camera_is_cut_at_the_near_plane() -> None:
    beside = rectangle(np.array([-20.0, 2.0, 3.0]), np.array([40.0, 0, 0]), np.array([0, 0, -3.0]))
    canvas = canvas_at(0, 0, 0)
    draw(canvas, (beside, plain(GREEN)))
    assert tuple(canvas.image[60, 2]) == GREEN
    assert not canvas.image[:, 82:].any()


def test_holes_in_a_texture_show_what_is_behind() -> None:
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[8:24, 8:24, 3] = 0
    canvas = canvas_at(0, 0, 0)
    far = wall(9.0, 0.0, 20.0, 9.0, -9.0)
    draw(canvas, (wall(4.0, 0.0, 2.0, 2.5, 0.5), Texture(pixels)), (far, plain(BLUE)))
    assert tuple(canvas.image[60, 80]) == BLUE
    assert tuple(canvas.image[60, 59]) == (255, 255, 255)


def test_the_ground_lies_where_the_map_says() -> None:
    pixels = np.zeros((400, 400, 3), np.uint8)  # 40 m x 40 m around the world's origin
    pixels[200 - 25 : 200 - 15, 200 + 75 : 200 + 85] = RED  # 1 m square at x = 8, y = 2
    canvas = canvas_at(0, 0, 0)
    flat = np.full((8, 8), 128, np.uint8)
    canvas.draw_ground(Texture(pixels), (-20.0, 20.0), 0.1, flat)
    reds = canvas.image[..., 0] > 128
    rows, columns = np.nonzero(reds)
    forward = 8.0 - 0.3
    assert columns.mean() == pytest.approx(79.5 - 100 * 2.0 / forward, abs=1.0)
    assert rows.mean() == pytest.approx(59.5 + 100 * 1.5 / forward, abs=1.0)
    assert canvas.depth()[reds] == pytest.approx(forward, abs=0.7)


def test_depth_is_of_what_is_seen_and_the_sky_has_none() -> None:
    canvas = canvas_at(0, 0, 0)
    draw(canvas, (wall(12.0, 0.0, 20, 2.5, 0), plain(BLUE)), (wall(6.0, 0.0, 2, 2, 1), plain(RED)))
    canvas.draw_ground(plain(GREEN), (-50.0, 50.0), 100 / 16, np.full((8, 8), 128, np.uint8))
    depth = canvas.depth()
    # base_link is 0.3 m behind the camera, whose optical axis meets both walls squarely.
    np.testing.assert_allclose(depth[(canvas.image == RED).all(axis=2)], 5.7, rtol=1e-3)
    np.testing.assert_allclose(depth[(canvas.image == BLUE).all(axis=2)], 11.7, rtol=1e-3)
    below = np.arange(80, 120)
    np.testing.assert_allclose(depth[below, 0], 150 / (below - 59.5), rtol=1e-3)
    assert (depth[:30] == 0).all()


def test_what_one_image_sees_lies_where_the_next_one_sees_it(drive: Drive) -> None:
    """Depth, poses and pictures are of one world: a frame is drawn anew from the one before."""
    first, second = (drive.part(n, n + 1) for n in (30, 31))
    one, other = next(first.frames()), next(second.frames())
    rotation0, position0 = camera_pose(*one.pose)
    rotation1, position1 = camera_pose(*other.pose)
    rows, columns = np.mgrid[10:110:3, 10:150:3]
    known = one.depth[rows, columns] > 0
    rows, columns = rows[known], columns[known]
    pixels = np.stack([columns, rows, np.ones_like(rows)]).astype(float)
    points = drive.camera.inverse @ pixels * one.depth[rows, columns]
    seen = rotation1 @ ((rotation0.T @ points).T + position0 - position1).T
    u, v, _ = np.round(drive.camera.matrix @ (seen / seen[2])).astype(int)
    inside = (seen[2] > 1) & (u >= 0) & (u < 160) & (v >= 0) & (v < 120)
    agree = np.abs(other.depth[v[inside], u[inside]] / seen[2][inside] - 1) < 0.05
    assert inside.sum() > 500 and agree.mean() > 0.85, "but for edges and what they hide"


# --- the drive


@pytest.fixture(scope="module")
def drive() -> Drive:
    return simulate_drive(0, image_size=SMALL)


def test_two_drives_of_one_seed_are_the_same_to_the_bit() -> None:
    first, second = (simulate_drive(5, image_size=SMALL).part(178, 183) for _ in range(2))
    for one, other in zip(first.frames(), second.frames(), strict=True):
        assert (one.stamp_ns, one.pose, one.lap) == (other.stamp_ns, other.pose, other.lap)
        np.testing.assert_array_equal(one.image, other.image)
    assert first.odometry() == second.odometry()


def test_a_part_of_a_drive_shows_what_the_whole_shows(drive: Drive) -> None:
    later = next(drive.part(3, 4).frames())
    for index, frame in enumerate(drive.part(0, 4).frames()):
        if index == 3:
            np.testing.assert_array_equal(frame.image, later.image)
    with pytest.raises(ValueError, match="1000:1001"):
        drive.part(1000, 1001)


def test_another_seed_is_another_town() -> None:
    images = [
        next(simulate_drive(seed, image_size=SMALL).part(0, 1).frames()).image for seed in (0, 1)
    ]
    assert np.abs(images[0].astype(int) - images[1]).mean() > 15


def test_frames_are_photographs_in_shape_and_tone(drive: Drive) -> None:
    by_day, evening = (next(drive.part(at, at + 1).frames()) for at in (20, 200))
    for frame in (by_day, evening):
        assert frame.image.shape == (120, 160, 3)
        assert frame.image.dtype == np.uint8
        assert frame.image.std() > 30
    assert (by_day.lap, evening.lap) == (1, 2)
    assert evening.image.mean() < 0.85 * by_day.image.mean()
    red, _, blue = evening.image.reshape(-1, 3).mean(axis=0)
    assert red > blue, "evening light is warm"


def test_laps_and_stamps(drive: Drive) -> None:
    assert 250 <= len(drive) <= 350
    np.testing.assert_array_equal(np.diff(drive.stamps_ns), 200_000_000)
    np.testing.assert_array_equal(np.unique(drive.laps), [1, 2])
    steps = np.linalg.norm(np.diff(drive.poses[:, :2], axis=0), axis=1)
    assert steps.max() < 2.5
    assert 500 < steps.sum() < 700


def test_lap_two_is_later_in_another_lane_and_leaves_the_route_once(drive: Drive) -> None:
    first, second = drive.laps == 1, drive.laps == 2
    apart = np.linalg.norm(drive.poses[second, None, :2] - drive.poses[None, first, :2], axis=2)
    nearest = apart.min(axis=1)
    gap_s = (drive.stamps_ns[second] - drive.stamps_ns[first][apart.argmin(axis=1)]) / 1e9
    revisits = (nearest < 4) & (gap_s > 5)
    assert revisits.mean() > 0.8
    assert gap_s[revisits].min() > 25
    assert 0.8 < np.median(nearest[revisits]) < 3.5
    elsewhere = np.flatnonzero(nearest > 8)
    assert len(elsewhere) >= 10
    assert (np.diff(elsewhere) == 1).all(), "the new street is one stretch"


def test_odometry_drifts_slowly(drive: Drive) -> None:
    truth, odometry = drive.ground_truth(), drive.odometry()
    assert [s.stamp_ns for s in truth] == [s.stamp_ns for s in odometry]
    assert odometry[0].pose == (0.0, 0.0, 0.0)
    true = np.array([sample.pose for sample in truth])
    drifting = np.array([sample.pose for sample in odometry])
    cos, sin = np.cos(true[0, 2]), np.sin(true[0, 2])
    placed = drifting[:, :2] @ np.array([[cos, sin], [-sin, cos]]) + true[0, :2]
    error = np.linalg.norm(placed - true[:, :2], axis=1)
    assert error[: len(error) // 20].max() < 1.5
    assert 1.0 < error.max() < 0.05 * 600
    # Integrated, the velocities give the poses.
    dt = np.diff([sample.stamp_ns for sample in odometry]) / 1e9
    turned = np.sum(np.array([sample.twist[1] for sample in odometry[1:]]) * dt)
    difference = (turned - drifting[-1, 2] + np.pi) % (2 * np.pi) - np.pi
    assert difference == pytest.approx(0.0, abs=1e-6)


def test_camera_matrix_and_errors() -> None:
    drive = simulate_drive(image_size=(640, 480))
    assert drive.image_size == (640, 480)
    assert drive.camera_matrix[0, 0] == pytest.approx(320 / np.tan(np.radians(37.5)))
    np.testing.assert_allclose(drive.camera_matrix[:2, 2], [319.5, 239.5])
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        simulate_drive(image_size=(8, 8))


def test_a_place_resembles_itself_more_than_others() -> None:
    """Without a network: SIFT and epipolar geometry find lap two's views again in lap one."""
    drive = simulate_drive(0, image_size=(320, 240))
    lap_one, lap_two = drive.part(100, 180, 8), drive.part(262, 322, 14)
    sift = cv2.SIFT_create(500)  # type: ignore[attr-defined,unused-ignore]
    matcher = cv2.BFMatcher()

    def describe(part: Drive) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        described = []
        for frame in part.frames():
            points, found = sift.detectAndCompute(
                cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY), None
            )
            described.append((np.array([p.pt for p in points], np.float32), np.asarray(found)))
        return described

    places = describe(lap_one)
    found, asked = 0, 0
    for pose, (points, seen) in zip(lap_two.poses, describe(lap_two), strict=True):
        away = np.linalg.norm(lap_one.poses[:, :2] - pose[:2], axis=1)
        if away.min() > 8:
            continue  # the street of lap two alone
        scores = []
        for there, place in places:
            pairs = matcher.knnMatch(seen, place, k=2)
            good = [best for best, second in pairs if best.distance < 0.8 * second.distance]
            inliers = None
            if len(good) >= 12:
                mine = points[[match.queryIdx for match in good]]
                theirs = there[[match.trainIdx for match in good]]
                _, inliers = cv2.findFundamentalMat(mine, theirs, cv2.FM_RANSAC, 1.5, 0.99)
            scores.append(0 if inliers is None else int(inliers.sum()))
        asked += 1
        found += bool(away[np.argmax(scores)] < 20)
    assert asked >= 4
    assert found >= 0.75 * asked
