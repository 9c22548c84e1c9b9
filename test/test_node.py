"""The real node in a process of its own, spoken to over DDS."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy cannot be imported: source a ROS 2")

from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rclpy.qos import ReliabilityPolicy
from robot import SIZE, Robot, count_keyframes, drive, start_node, to_message
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage
from std_srvs.srv import SetBool, Trigger
from vpr_lite_ros.msg import LoopClosure
from vpr_lite_ros.srv import GetLoopClosures, QueryImage

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]


def test_a_place_seen_again_is_a_closure(
    make_robot: Callable[..., Robot], make_picture: MakePicture, tiny_bundle: Path
) -> None:
    robot = make_robot()
    robot.camera_info.publish(
        CameraInfo(width=160, height=128, k=[120.0, 0, 80, 0, 120, 64, 0, 0, 1],
                   distortion_model="plumb_bob", d=[0.0] * 5)
    )  # fmt: skip
    first = robot.show(make_picture(1, SIZE), 1)
    assert [decision.status for decision in first] == [LoopClosure.STATUS_NO_CANDIDATE]
    for second in range(2, 9):
        robot.show(make_picture(second, SIZE), second)
    closure = robot.show(make_picture(3, SIZE), 20.25)[0]
    assert closure.status == LoopClosure.STATUS_ACCEPTED
    assert (closure.header.stamp.sec, closure.header.stamp.nanosec) == (20, 250_000_000)
    assert closure.header.frame_id == "base_link"
    assert (closure.match_stamp.sec, closure.match_stamp.nanosec) == (3, 0)
    assert (closure.query_id, closure.match_id, closure.rank) == (9, 3, 0)
    assert closure.query_session == closure.match_session == "test"
    assert closure.similarity > 0.99
    assert 0 < closure.match_score <= 1
    assert np.isnan(closure.confidence)
    assert closure.num_matches >= 3
    assert closure.model_id.startswith("tiny-")
    robot.wait(lambda: len(robot.heard["loop_closures"]) == 1, "the closure")
    assert outline(robot.heard["loop_closures"][0]) == outline(closure)

    robot.wait(lambda: bool(robot.heard["match_image"]), "the match image")
    picture = robot.heard["match_image"][0]
    assert picture.header.stamp == closure.header.stamp
    assert (picture.width, picture.encoding) == (1280, "rgb8")

    answer = robot.call(GetLoopClosures, "get_loop_closures", GetLoopClosures.Request())
    assert answer.success and [outline(one) for one in answer.closures] == [outline(closure)]
    late = GetLoopClosures.Request()
    late.since.sec = 21
    assert not robot.call(GetLoopClosures, "get_loop_closures", late).closures


def test_services(
    make_robot: Callable[..., Robot], make_picture: MakePicture, tmp_path: Path
) -> None:
    database = tmp_path / "map.db"
    robot = make_robot(database_path=database)
    drive(robot, make_picture)

    answer = robot.call(Trigger, "save", Trigger.Request())
    assert answer.success and str(database) in answer.message
    assert count_keyframes(database) == 8

    request = QueryImage.Request(image=to_message(make_picture(4, SIZE), 0), top_k=3)
    answer = robot.call(QueryImage, "query_image", request)
    assert answer.success and len(answer.candidates) == 3
    assert answer.candidates[0].match_stamp.sec == 4
    assert answer.candidates[0].status == LoopClosure.STATUS_ACCEPTED
    assert answer.candidates[1].status != LoopClosure.STATUS_ACCEPTED
    answer = robot.call(QueryImage, "query_image", QueryImage.Request())
    assert not answer.success and "empty image" in answer.message

    assert robot.call(SetBool, "pause", SetBool.Request(data=True)).success
    robot.camera.publish(to_message(make_picture(3, SIZE), 30))
    assert robot.wait_for_count("dropped: paused", "1")["text"] == "paused"
    assert robot.call(SetBool, "pause", SetBool.Request(data=False)).success

    answer = robot.call(Trigger, "reset", Trigger.Request())
    assert answer.success and "8 keyframes" in answer.message
    assert robot.show(make_picture(3, SIZE), 40)[0].status == LoopClosure.STATUS_NO_CANDIDATE


def test_a_second_run_knows_the_first_ones_places(
    make_robot: Callable[..., Robot], make_picture: MakePicture, tmp_path: Path
) -> None:
    database = tmp_path / "map.db"
    first = make_robot(database_path=database, session_id="monday")
    drive(first, make_picture)
    assert first.stop(signal.SIGINT) == 0
    first.close()
    assert count_keyframes(database) == 8
    second = make_robot("/robot2", database_path=database, session_id="tuesday")
    # One second after its start, yet a closure: the gap is for the running session only.
    closure = second.show(make_picture(5, SIZE), 1)[0]
    assert closure.status == LoopClosure.STATUS_ACCEPTED
    assert (closure.query_session, closure.match_session) == ("tuesday", "monday")
    assert closure.match_stamp.sec == 5
    assert second.stop(signal.SIGTERM) == 0


def test_two_robots_see_only_their_own_camera(
    make_robot: Callable[..., Robot], make_picture: MakePicture
) -> None:
    left, right = make_robot("/left"), make_robot("/right", robot_id=2)
    for second in range(1, 8):
        left.show(make_picture(second, SIZE), second)
        right.show(make_picture(100 + second, SIZE), second)
    # Each recognises its own place, and does not know the other's.
    assert left.show(make_picture(2, SIZE), 20)[0].status == LoopClosure.STATUS_ACCEPTED
    strange = right.show(make_picture(2, SIZE), 20)
    assert all(decision.status != LoopClosure.STATUS_ACCEPTED for decision in strange)
    mine = right.show(make_picture(103, SIZE), 21)[0]
    assert (mine.status, mine.match_stamp.sec, mine.robot_id) == (0, 3, 2)
    left.wait(lambda: len(left.heard["loop_closures"]) == 1, "the left closure")
    right.wait(lambda: len(right.heard["loop_closures"]) == 1, "the right closure")
    assert left.diagnostics()["images"] == "8"
    assert right.diagnostics()["images"] == "9"


@pytest.mark.parametrize("kind", [ImageMessage, CompressedImage])
@pytest.mark.parametrize("reliability", ["RELIABLE", "BEST_EFFORT"])
def test_any_transport_and_reliability(
    make_robot: Callable[..., Robot], make_picture: MakePicture, kind: type, reliability: str
) -> None:
    robot = make_robot(image_type=kind, reliability=ReliabilityPolicy[reliability])
    drive(robot, make_picture, 7)
    assert robot.show(make_picture(1, SIZE), 20)[0].status == LoopClosure.STATUS_ACCEPTED


def test_simulated_time_that_stands_still_stops_nothing(
    make_robot: Callable[..., Robot], make_picture: MakePicture
) -> None:
    """Before a bag plays there is no /clock; the node must be listening when it starts."""
    robot = make_robot(use_sim_time="true")
    robot.show(make_picture(1, SIZE), 1)
    assert robot.diagnostics()["keyframes"] == "1"


def test_images_that_cannot_be_used_are_said_once_counted_and_dropped(
    make_robot: Callable[..., Robot], make_picture: MakePicture, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    robot = make_robot(log=log)
    strange = to_message(make_picture(1, SIZE), 1)
    strange.encoding = "secret12"
    short = to_message(make_picture(1, SIZE), 2)
    short.data = short.data[:100]
    timeless = to_message(make_picture(1, SIZE), 0)
    for index, message in enumerate([strange, short, ImageMessage(), timeless, strange]):
        if message is not timeless:
            message.header.stamp.sec = index + 1
        robot.camera.publish(message)
        robot.wait_for_count("images", str(index + 1))
    found = robot.wait_for_count("dropped: unknown encoding", "2")
    for cause in ("truncated image", "empty image", "zero stamp"):
        assert found[f"dropped: {cause}"] == "1", cause
    assert "secret12" in found["last_error"]
    # It lives on, and what it said it said once.
    assert robot.show(make_picture(1, SIZE), 10)[0].status == LoopClosure.STATUS_NO_CANDIDATE
    assert len([line for line in log.read_text().splitlines() if "secret12" in line]) == 1


def test_a_truncated_jpeg_is_dropped(
    make_robot: Callable[..., Robot], make_picture: MakePicture
) -> None:
    robot = make_robot(image_type=CompressedImage)
    _, data = cv2.imencode(".jpg", make_picture(1, SIZE))
    message = CompressedImage(format="jpeg", data=data.tobytes()[: len(data) // 2])
    message.header.stamp.sec = 1
    robot.camera.publish(message)
    robot.wait_for_count("dropped: broken compression", "1")
    robot.show(make_picture(1, SIZE), 2)


def test_when_images_come_too_fast_the_newest_wins(
    make_robot: Callable[..., Robot], make_picture: MakePicture
) -> None:
    robot = make_robot(**{"keyframe.min_interval_s": 0.0})
    for index in range(60):
        robot.camera.publish(to_message(make_picture(index % 7, SIZE), 1 + index * 0.01))
    last = to_message(make_picture(9, SIZE), 100)
    robot.send(last)
    found = robot.diagnostics()
    # What the middleware's queue let go of never reached the node; all else is accounted for.
    taken, dropped = int(found["keyframes"]), int(found["dropped: busy"])
    assert taken + dropped == int(found["images"])
    assert dropped > 0
    assert robot.heard["decisions"][-1].header.stamp == last.header.stamp


def test_odometry_chooses_keyframes_and_draws_markers(
    make_robot: Callable[..., Robot], make_picture: MakePicture
) -> None:
    robot = make_robot(**{"keyframe.min_translation_m": 1.0})

    def stand_at(x: float, second: int) -> None:
        message = Odometry()
        message.header.stamp.sec = second
        message.header.frame_id = "odom"
        message.pose.pose.position.x = x
        message.pose.pose.orientation.w = 1.0
        robot.odometry.publish(message)

    robot.wait(lambda: robot.odometry.get_subscription_count() > 0, "odometry's subscription")
    # Odometry and images come on topics of their own: the image waits until the pose is there.
    stand_at(0.0, 1)
    robot.wait_for_count("odometry", "1")
    robot.show(make_picture(1, SIZE), 1)
    for second in range(2, 6):  # standing still, though the picture changes
        stand_at(0.1, second)
    stand_at(5.0, 6)
    robot.wait_for_count("odometry", "6")
    for second in range(2, 6):
        robot.camera.publish(to_message(make_picture(second, SIZE), second))
        robot.wait_for_count("images", str(second))
    robot.show(make_picture(6, SIZE), 6)
    assert robot.diagnostics()["keyframes"] == "2"
    robot.wait(lambda: bool(robot.heard["markers"]), "markers")
    markers = robot.heard["markers"][-1].markers
    assert [round(point.x) for point in markers[0].points] == [0, 5]
    assert markers[0].header.frame_id == "odom"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("topk", "3", ["topk is unknown", "top_k"]),
        ("top_k", "0", ["top_k", "out of range"]),
        ("backend", "quantum", ["backend", "quantum", "openvino"]),
        ("bundle", "/nowhere", ["/nowhere", "no model bundle"]),
        ("database_path", "/nowhere/map.db", ["/nowhere/map.db"]),
    ],
)
def test_what_cannot_start_says_why(
    tiny_bundle: Path, tmp_path: Path, name: str, value: str, words: list[str]
) -> None:
    log = tmp_path / "log"
    settings: dict[str, object] = {"bundle": tiny_bundle, name: value}
    assert start_node("/broken", settings, log).wait(60) == 1
    text = log.read_text()
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_parameters_are_declared_with_descriptions(
    make_robot: Callable[..., Robot],
) -> None:
    from rcl_interfaces.srv import DescribeParameters

    robot = make_robot()
    names = ["top_k", "keyframe.min_interval_s", "match_threshold"]
    request = DescribeParameters.Request(names=names)
    found = robot.call(DescribeParameters, "describe_parameters", request).descriptors
    assert [descriptor.name for descriptor in found] == names
    assert all(descriptor.description for descriptor in found)
    assert found[0].integer_range[0].to_value == 1000


def outline(closure: LoopClosure) -> tuple[object, ...]:
    """What tells closures apart; whole messages are never equal, as nan is not."""
    return closure.header.stamp.sec, closure.query_id, closure.match_id, closure.match_score
