"""The node with depth over DDS: closures in metres, and whatever is wrong with depth is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robot import SIZE, MakePicture, Robot, to_message
from sensor_msgs.msg import CameraInfo
from sensor_msgs.msg import Image as ImageMessage
from vpr_lite_ros.msg import LoopClosure

from vpr_lite_ros.inference import DEFAULT_BUNDLE
from vpr_lite_ros.messages import to_time
from vpr_lite_ros.simulation import SimulatedFrame, simulate_drive

MakeRobot = Callable[..., Robot]


def depth_message(depth: Any, stamp: Any, encoding: str = "32FC1", frame: str = "") -> ImageMessage:
    """A depth image (H, W) of a stamp."""
    height, width = depth.shape
    message = ImageMessage(
        height=height,
        width=width,
        encoding=encoding,
        step=depth[0].nbytes,
        data=depth.tobytes(),
    )
    message.header.stamp = stamp
    message.header.frame_id = frame
    return message


def with_depth(robot: Robot) -> Any:
    """A publisher of depth that the node has found."""
    topic = robot.node.create_publisher(ImageMessage, "depth", 10)
    robot.wait(lambda: topic.get_subscription_count() > 0, "the node to listen to depth")
    return topic


def test_closures_of_a_robot_with_depth_are_metric(make_robot: MakeRobot, tmp_path: Path) -> None:
    drive = simulate_drive(0)
    robot = make_robot(
        bundle=DEFAULT_BUNDLE,
        log=tmp_path / "log",
        similarity_threshold=".nan",
        min_closure_interval_s=0.0,
        **{"keyframe.min_interval_s": 0.0, "match_threshold": ".nan", "min_inliers": -1},
    )
    topic = with_depth(robot)
    width, height = drive.image_size
    matrix = drive.camera_matrix.ravel().tolist()
    robot.wait(lambda: robot.camera_info.get_subscription_count() > 0, "camera_info")
    robot.camera_info.publish(CameraInfo(width=width, height=height, k=matrix))
    while robot.diagnostics().get("camera_info") != "known":
        pass

    def show(frames: list[SimulatedFrame], count: int) -> list[LoopClosure]:
        """All depth first: the node keeps as many."""
        for frame in frames:
            # In millimetres, as RGB-D cameras send it.
            millimetres = np.where(frame.depth < 65, frame.depth * 1000, 0).astype(np.uint16)
            topic.publish(depth_message(millimetres, to_time(frame.stamp_ns), "16UC1"))
        robot.wait_for_count("depth images", str(count))
        decisions = []
        for frame in frames:
            message = to_message(frame.image, 0)
            message.header.stamp = to_time(frame.stamp_ns)
            decisions.append(robot.send(message)[0])
        return decisions

    before, evening = (
        list(part.frames()) for part in (drive.part(25, 33), drive.part(207, 212, 2))
    )
    morning = {frame.stamp_ns: frame for frame in before}
    show(before, len(before))
    found = list(zip(evening, show(evening, len(before) + len(evening)), strict=True))
    # Without agreement of keyframes in a row, a match may be one whose depth is not enough.
    metric = [(frame, one) for frame, one in found if one.pose_type == LoopClosure.POSE_METRIC]
    assert metric
    for frame, closure in metric:
        assert closure.status == LoopClosure.STATUS_ACCEPTED
        stamp = closure.match_stamp
        match = morning[stamp.sec * 10**9 + stamp.nanosec]
        (x, y, yaw), (there_x, there_y, _) = frame.pose, match.pose
        ahead = np.cos(yaw) * (there_x - x) + np.sin(yaw) * (there_y - y)
        left = np.cos(yaw) * (there_y - y) - np.sin(yaw) * (there_x - x)
        at = closure.relative_pose.pose.position
        assert (at.x, at.y, at.z) == pytest.approx((ahead, left, 0), abs=0.7)
        assert 0 < closure.relative_pose.covariance[0] < 1
    assert robot.diagnostics()["images with depth"] == str(len(morning) + len(evening))
    # Nobody said where the camera is.
    assert (tmp_path / "log").read_text().count("relative poses take the camera to look") == 1


def test_whatever_is_wrong_with_depth_costs_no_image_and_is_said_once(
    make_robot: MakeRobot, make_picture: MakePicture, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    robot = make_robot(log=log)
    robot.show(make_picture(1, SIZE), 1)
    assert not any("depth" in key and "ms" not in key for key in robot.diagnostics())
    topic = with_depth(robot)
    width, height = SIZE
    good = np.full((height, width), 3.0, np.float32)
    sent = 0

    def show(second: int, depth: Any, late_s: float = 0, **how: str) -> None:
        nonlocal sent
        message = to_message(make_picture(second, SIZE), second)
        stamp = to_time(round((second + late_s) * 1e9))
        topic.publish(depth_message(depth, stamp, **how))
        sent += 1
        robot.wait_for_count("depth images", str(sent))
        robot.send(message)

    show(2, good)
    wrong: dict[str, tuple[Any, dict[str, Any]]] = {
        "unknown encoding": (good, {"encoding": "rgb8"}),
        "not registered": (good[:, : width // 2], {}),
        "nothing measured": (np.full_like(good, np.nan), {}),
        "none near": (good, {"late_s": 0.3}),
    }
    for second, (depth, how) in enumerate(wrong.values(), start=3):
        show(second, depth, **how)
    for second, (depth, how) in enumerate(wrong.values(), start=13):
        show(second, depth, **how)
    show(20, good)
    found = robot.diagnostics()
    assert found["images with depth"] == "2" and found["keyframes"] == "11"
    for cause in wrong:
        assert found[f"no depth: {cause}"] == "2", cause
    text = log.read_text()
    assert text.count("an image without depth") == len(wrong)
    assert "Traceback" not in text


def test_another_robots_keyframe_brings_its_depth(
    make_robot: MakeRobot, make_picture: MakePicture, tmp_path: Path
) -> None:
    from vpr_lite_ros.storage import KeyframeFile

    one = make_robot("/one", robot_id=1)
    database = tmp_path / "two.db"
    two = make_robot(
        "/two", robot_id=2, database_path=database, remap={"other_keyframes": "/one/keyframes"}
    )
    topic = with_depth(one)
    width, height = SIZE
    depth = np.full((height, width), 7.25, np.float32)
    heard = "other robots' keyframes"
    # What is shown before the two have found each other is not shared.
    for second in range(1, 30):
        picture = to_message(make_picture(second, SIZE), second)
        topic.publish(depth_message(depth, picture.header.stamp))
        one.wait_for_count("depth images", str(second))
        one.send(picture)
        if heard in two.diagnostics():
            break
    model_id = two.diagnostics()["model_id"]
    assert two.stop() == 0
    file = KeyframeFile(
        str(database), model_id=model_id, dimension=64, max_patches=20, read_only=True
    )
    stored = file.keyframe(list(file.heads())[-1].id)
    file.close()
    assert stored.robot_id == 1 and stored.depth is not None
    np.testing.assert_array_equal(stored.depth, np.full(20, 7.25, np.float16))
