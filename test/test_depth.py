"""Depth from message to metres, beside its image, into keyframes and out as a METRIC closure."""

from __future__ import annotations

import json
import runpy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.bags import SourceError, recording, write_drive
from vpr_lite_ros.bags.depth import DepthTrack
from vpr_lite_ros.bags.recording import DEPTH_TOPIC
from vpr_lite_ros.bags.rosbag import Bag
from vpr_lite_ros.candidate import Candidate, Decision
from vpr_lite_ros.config import make_config
from vpr_lite_ros.database import open_database
from vpr_lite_ros.depth import DepthBuffer, decode_depth, sample_depth
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.image import ImageError
from vpr_lite_ros.inference import DEFAULT_BUNDLE, PlaceModel, open_model
from vpr_lite_ros.matching import Camera, fit_epipolar
from vpr_lite_ros.relative_pose import (
    Mount,
    PoseType,
    RelativePose,
    relative_pose_of,
    rotation_matrix,
)
from vpr_lite_ros.replay import replay_recording
from vpr_lite_ros.simulation import Drive, SimulatedFrame, simulate_drive

MS = 1_000_000
METRES = np.array([[0.0, 0.5, 1.25], [2.0, 30.0, 65.0]], np.float32)


def message(pixels: NDArray[Any], encoding: str, /, **changes: Any) -> Any:
    """A depth message of (H, W) pixels, as rclpy and rosbags give it."""
    height, width = pixels.shape
    fields = {
        "header": SimpleNamespace(frame_id="camera_optical"),
        "height": height,
        "width": width,
        "encoding": encoding,
        "is_bigendian": 0,
        "step": width * pixels.itemsize,
        "data": pixels.tobytes(),
    }
    return SimpleNamespace(**(fields | changes))


def decode(one: Any, frame: str = "camera_optical", size: tuple[int, int] = (3, 2)) -> Any:
    return decode_depth(one, frame, size)


def test_encodings_are_metres() -> None:
    millimetres = np.round(METRES * 1000).astype("<u2")
    padded = np.zeros((2, 5), "<u2")
    padded[:, :3] = millimetres
    wild = METRES.copy()
    wild[0] = np.nan, np.inf, -3
    for one, expected in (
        (message(METRES, "32FC1"), METRES),
        (message(millimetres, "16UC1"), METRES),
        (message(millimetres, "mono16"), METRES),
        (message(millimetres.astype(">u2"), "16UC1", is_bigendian=1), METRES),
        (message(padded, "16UC1", width=3), METRES),
        (message(wild, "32FC1"), METRES * [[0], [1]]),
    ):
        np.testing.assert_allclose(decode(one), expected, rtol=1e-6)
    # A smaller depth image of the same view, and frames with a slash before them, will do.
    decode(message(METRES, "32FC1"), "/camera_optical", (1920, 1280))
    decode(message(METRES, "32FC1"), "", (1920, 1280))


@pytest.mark.parametrize(
    ("changes", "cause", "words"),
    [
        ({"encoding": "rgb8"}, "unknown encoding", "16UC1 (millimetres) or 32FC1"),
        ({"data": b""}, "empty image", "3x2"),
        ({"height": 3}, "truncated image", "24 bytes, 3 rows of 12"),
        ({"step": 11}, "truncated image", "2 rows of 12"),
        ({"data": np.full(6, np.nan, "f4").tobytes()}, "nothing measured", "out of range"),
        ({"header": SimpleNamespace(frame_id="depth")}, "not registered", "align_depth"),
    ],
)
def test_what_is_no_depth_of_the_image_says_why(
    changes: dict[str, Any], cause: str, words: str
) -> None:
    with pytest.raises(ImageError) as error:
        decode(message(METRES, "32FC1", **changes))
    assert error.value.cause == cause and words in str(error.value)


def test_another_view_is_refused() -> None:
    with pytest.raises(ImageError, match="3x2, the image 640x480"):
        decode(message(METRES, "32FC1"), size=(640, 480))


def test_a_centre_takes_the_median_around_it() -> None:
    depth = np.full((100, 200), 8.0, np.float32)
    depth[:, 100:] = 20.0
    depth[48:53, 48:51] = 0  # 15 of the window's 25 pixels: not known
    depth[20, 20] = np.nan
    depth[70, 70] = 0.3  # a speck
    depth[90:, :10] = 1e6  # no number that is stored
    points = [(50, 50), (20, 20), (70, 70), (5, 95), (0, 0), (199.9, 99.9), (99, 30), (101, 30)]
    centres = (np.array(points) / (200, 100)).astype(np.float32)
    found = sample_depth(depth, centres)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, [0, 8, 8, 0, 0, 0, 8, 20])
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        sample_depth(depth[None], centres)


# Depth and images come on topics of their own


def test_the_nearest_is_taken_if_it_is_near() -> None:
    buffer = DepthBuffer()
    assert buffer.empty and buffer.nearest(0) is None
    for stamp in range(100, 1100, 100):
        buffer.put(stamp * MS, stamp)
    assert not buffer.empty
    assert buffer.nearest(530 * MS) == 500
    assert buffer.nearest(551 * MS) == 600
    assert buffer.nearest(440 * MS) == 400
    assert buffer.nearest(40 * MS) is None
    # A bag that begins anew: what was there before is another drive's.
    buffer.put(100 * MS, "again")
    assert buffer.nearest(100 * MS) == "again"
    assert buffer.nearest(1000 * MS) is None


def test_depth_that_comes_after_its_image_is_waited_for() -> None:
    buffer = DepthBuffer()
    buffer.put(100 * MS, "before")
    found = []
    waiting = threading.Thread(target=lambda: found.append(buffer.nearest(140 * MS)))
    waiting.start()
    # "before" is near enough, but it is not the image's own.
    buffer.put(139 * MS, "nearer")
    buffer.put(141 * MS, "own")
    waiting.join()
    assert found in (["nearer"], ["own"]), "equally near"
    assert buffer.nearest(150 * MS) == "own", "... and what never comes is not waited for long"


# A drive with depth, to closures in metres


SETTINGS = {
    "keyframe.min_interval_s": 0.0,
    "keyframe.max_similarity": 1.0,
    "min_closure_interval_s": 0.0,
    "session_id": "drive",
}
"""Every image is a keyframe, and every closure leaves."""


@pytest.fixture(scope="module")
def revisit() -> tuple[Drive, list[SimulatedFrame]]:
    """A street, driven along in the morning and again in the evening, in the other lane."""
    drive = simulate_drive(0)
    seen = [*range(18, 36), *range(202, 218, 2)]
    drive = replace(
        drive, stamps_ns=drive.stamps_ns[seen], poses=drive.poses[seen], laps=drive.laps[seen]
    )
    return drive, list(drive.frames())


@pytest.fixture(scope="module")
def shipped() -> PlaceModel:
    return open_model(DEFAULT_BUNDLE, "auto", threads=2)


@pytest.fixture
def detector(shipped: PlaceModel, tmp_path: Path) -> Iterator[LoopDetector]:
    config = make_config({**SETTINGS, "database_path": str(tmp_path / "drive.db")})
    database = open_database(config, shipped.bundle, "drive")
    yield LoopDetector(config, shipped, database)
    database.close()


def run(
    detector: LoopDetector, drive: Drive, frames: list[SimulatedFrame], laps: tuple[int, ...]
) -> list[tuple[SimulatedFrame, Decision]]:
    """What the detector says of each frame; those of ``laps`` have depth."""
    camera = Camera(*drive.image_size, tuple(drive.camera_matrix.ravel().tolist()))
    return [
        (
            frame,
            detector.process(
                frame.image,
                frame.stamp_ns,
                camera=camera,
                depth=frame.depth if frame.lap in laps else None,
            ),
        )
        for frame in frames
    ]


def closures_of(
    seen: list[tuple[SimulatedFrame, Decision]],
) -> Iterator[tuple[Candidate, NDArray[np.float64], float]]:
    """Each closure, the true way to the match in the body's frame at the query, and the turn."""
    truth = {frame.stamp_ns: frame.pose for frame, _ in seen}
    for frame, decision in seen:
        if decision.closure is not None:
            x, y, yaw = frame.pose
            there_x, there_y, there_yaw = truth[decision.closure.keyframe.stamp_ns]
            cos, sin = np.cos(yaw), np.sin(yaw)
            dx, dy = there_x - x, there_y - y
            away = np.array([cos * dx + sin * dy, cos * dy - sin * dx, 0])
            yield decision.closure, away, there_yaw - yaw


def turn_off(known: RelativePose, turned: float) -> float:
    turn = rotation_matrix(*known.quaternion)
    off = np.arctan2(turn[1, 0], turn[0, 0]) - turned
    return float(abs(np.angle(np.exp(1j * off))))


def test_without_depth_pictures_tell_direction_and_turn(
    detector: LoopDetector, revisit: tuple[Drive, list[SimulatedFrame]]
) -> None:
    """To some hundredths of a radian, where patches are off by some tenths."""
    errors, seen = [], run(detector, *revisit, laps=())
    described = {one.closure.keyframe.id: one.description for _, one in seen if one.closure}
    for closure, away, turned in closures_of(seen):
        assert closure.refined is not None and closure.metric is None
        # What is counted are points between the keyframe's patches.
        assert closure.matches is not None and closure.points is not None
        apart = closure.points - closure.keyframe.centres[closure.matches.candidate]
        assert 1 < np.median(np.linalg.norm(apart * (640, 480), axis=1)) < 8
        description, camera = described[closure.keyframe.id], closure.keyframe.camera
        assert description is not None and camera is not None
        near = 3.0 * camera.radians_per_pixel(640)
        again = fit_epipolar(
            camera.rays(description.centres[closure.matches.query]),
            camera.rays(closure.points),
            near,
        )
        assert again is not None and closure.num_inliers == np.count_nonzero(again.inliers)
        off = []
        for motion in (closure.refined, closure.fit):
            known = relative_pose_of(motion)
            assert known.pose_type is PoseType.ROTATION_AND_DIRECTION
            cosine = np.dot(known.translation, away) / np.linalg.norm(away)
            off += [float(np.arccos(min(1.0, cosine))), turn_off(known, turned)]
        errors.append(off)
    direction, turn, rough_direction, rough_turn = np.median(errors, axis=0)
    assert len(errors) >= 4
    assert direction < 0.1 and direction < rough_direction / 3
    assert turn < 0.02 and turn < rough_turn


@pytest.mark.parametrize("laps", [(1,), (2,)], ids=["of the match", "of the query"])
def test_closures_of_a_drive_with_depth_are_metric(
    detector: LoopDetector, revisit: tuple[Drive, list[SimulatedFrame]], laps: tuple[int, ...]
) -> None:
    drive, frames = revisit
    mount = Mount(position=np.array(drive.camera_in_base))
    errors = []
    for closure, away, turned in closures_of(run(detector, drive, frames, laps)):
        known = relative_pose_of(closure.motion, closure.metric, mount)
        assert known.pose_type is PoseType.METRIC
        off = np.linalg.norm(known.translation - away)
        errors.append((off, turn_off(known, turned), np.linalg.norm(away)))
    metres, radians, away_m = np.array(errors).T
    assert len(metres) >= 4 and np.median(away_m) > 2, "too few, or too easy"
    assert np.median(metres) < 0.3 and metres.max() < 1.0
    assert np.median(radians) < 0.02


def test_depth_outlives_the_process_and_is_what_was_measured(
    detector: LoopDetector, revisit: tuple[Drive, list[SimulatedFrame]]
) -> None:
    drive, frames = revisit
    ((frame, decision),) = run(detector, drive, frames[:1], (1,))
    ((_, without),) = run(detector, drive, frames[1:2], ())
    assert decision.keyframe_id is not None and without.keyframe_id is not None
    database = detector.database
    assert database.keyframe(without.keyframe_id).depth is None
    keyframe = database.keyframe(decision.keyframe_id)
    assert keyframe.depth is not None and keyframe.depth.nbytes == 2 * len(keyframe.centres)
    column, row = (keyframe.centres * drive.image_size).astype(int).T
    at = frame.depth[row, column]
    near = np.abs(keyframe.depth - at) <= 0.1 * at
    assert near.mean() > 0.9, "but for edges, a centre's own depth"


# The same without a robot: a bag


@pytest.fixture(scope="module")
def bag(
    revisit: tuple[Drive, list[SimulatedFrame]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_drive(revisit[0], tmp_path_factory.mktemp("bags") / "revisit", depth=True)


def test_a_bag_with_depth_is_replayed_in_metres(bag: Path, tmp_path: Path) -> None:
    topics: dict[str, Any] = {"image_topic": "/camera/image_raw/compressed", "odom_topic": ""}
    config = make_config(SETTINGS)
    summary = replay_recording(bag, tmp_path, config, depth_topic=DEPTH_TOPIC, **topics)
    assert (summary["depth"], summary["without_depth"]) == (DEPTH_TOPIC, {})
    closures = [json.loads(line) for line in (tmp_path / "closures.jsonl").read_text().splitlines()]
    assert {closure["pose_type"] for closure in closures} == {"METRIC"}
    for closure in closures:
        covariance = np.array(closure["covariance"]).reshape(6, 6)
        assert (np.linalg.eigvalsh(covariance) > 0).all()
        # The other lane is to the right of this one.
        assert -4 < closure["y"] < -1 and np.hypot(closure["x"], closure["y"]) < 8
    assert "covariance" not in (tmp_path / "closures.csv").read_text().splitlines()[0]
    with pytest.raises(SourceError, match="no depth topic '/far'"):
        replay_recording(bag, tmp_path / "wrong", config, depth_topic="/far", **topics)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match="is no bag"):
        replay_recording(folder, tmp_path / "wrong", config, depth_topic="/far")


def test_depth_of_a_bag_is_that_of_its_images(
    bag: Path, revisit: tuple[Drive, list[SimulatedFrame]], caplog: pytest.LogCaptureFixture
) -> None:
    drive, frames = revisit
    with DepthTrack(bag, DEPTH_TOPIC) as track:
        for frame in frames[2::5]:
            depth = track.at(frame.stamp_ns + 40 * MS, "camera", drive.image_size)
            assert depth is not None
            near = frame.depth < 65
            np.testing.assert_allclose(depth[near], frame.depth[near], atol=6e-4)
        assert track.at(frames[-1].stamp_ns + 51 * MS, "camera", drive.image_size) is None
        assert track.at(frames[-1].stamp_ns + 60 * MS, "camera", drive.image_size) is None
        assert track.missing == {"none near": 2}
    assert caplog.text.count("an image without depth") == 1
    with DepthTrack(bag, DEPTH_TOPIC) as track:
        assert track.at(frames[0].stamp_ns, "another_camera", drive.image_size) is None
        assert track.missing == {"not registered": 1}


def test_of_a_fast_depth_camera_the_nearest_image_is_taken(tmp_path: Path) -> None:
    from rosbags.rosbag2 import Writer

    store = recording._STORE
    with Writer(tmp_path / "fast", version=8) as writer:
        kind = "sensor_msgs/msg/Image"
        connection = writer.add_connection("/depth", kind, typestore=store)
        for number in range(1, 30):
            stamp = 33 * number * MS
            pixels = np.full((2, 3), number, np.uint16)
            one = recording._raw_image(recording._header(stamp, "camera"), pixels, "16UC1")
            writer.write(connection, stamp, store.serialize_cdr(one, kind))
    with DepthTrack(tmp_path / "fast", "/depth") as track:
        for wanted, expected in ((100, 3), (118, 4), (340, 10), (347, 11), (980, 29)):
            depth = track.at(wanted * MS, "camera", (3, 2))
            assert depth is not None and round(float(depth[0, 0] * 1000)) == expected


def test_depth_that_is_made_worse_is_as_bad_as_said(
    bag: Path, revisit: tuple[Drive, list[SimulatedFrame]], repository: Path, tmp_path: Path
) -> None:
    script = runpy.run_path(str(repository / "scripts" / "worsen_depth.py"))
    drive, frames = revisit
    seen: dict[str, list[NDArray[np.float32]]] = {}
    for name, camera, farthest_m in (
        ("near", "exact", 20.0),
        ("stereo", "stereo", 20.0),
        ("again", "stereo", 20.0),
        ("rgbd", "rgbd", 8.0),
    ):
        copied = script["worsen"](bag, tmp_path / name, camera, farthest_m, DEPTH_TOPIC, 3)
        assert copied == len(frames)
        with DepthTrack(tmp_path / name, DEPTH_TOPIC) as track:
            of_all = [track.at(one.stamp_ns, "camera", drive.image_size) for one in frames]
        empty = np.zeros(frames[0].depth.shape, np.float32)
        seen[name] = [empty if depth is None else depth for depth in of_all]
    truth, near, stereo, again, rgbd = (
        np.stack(images) for images in ([one.depth for one in frames], *seen.values())
    )
    np.testing.assert_array_equal(stereo, again)
    for depth, farthest_m in ((near, 20), (rgbd, 8)):
        assert ((depth > 0) == ((truth > 0) & (truth < farthest_m))).mean() > 0.9999
        np.testing.assert_allclose(depth[depth > 0], truth[depth > 0], atol=6e-4)
    assert 0 < stereo.max() <= 20
    # Where nothing is cut away, the disparity is off as it should be, alike within a block.
    focal = drive.camera_matrix[0, 0]
    close = (truth > 0) & (truth < 10)
    assert (stereo > 0)[close].all()
    off = np.full(truth.shape, np.nan)
    off[close] = focal * 0.12 * (1 / stereo[close] - 1 / truth[close])
    assert np.nanstd(off) == pytest.approx(0.3, rel=0.1) and abs(np.nanmean(off)) < 0.05
    assert np.nanmax(np.ptp(off[:, 472:480, 320:328], axis=(1, 2))) < 0.05
    for topic in ("/ground_truth", "/odom", "/camera/camera_info"):
        before, after = Bag(bag), Bag(tmp_path / "near")
        assert before.count(topic) == after.count(topic) > 0
        before.close()
        after.close()
