"""The node as a robot's week treats it: managed, tuned while it runs, overrun, fed with rubbish."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

rclpy = pytest.importorskip("rclpy", reason="rclpy cannot be imported: source a ROS 2")

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.parameter import Parameter
from robot import LATCHED, PERMISSIVE, SIZE, Robot, count_keyframes, to_message
from sensor_msgs.msg import CompressedImage
from sensor_msgs.msg import Image as ImageMessage
from std_msgs.msg import Header
from vpr_lite_ros.msg import Keyframe, LoopClosure

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
MakeRobot = Callable[..., Robot]


def _change(robot: Robot, transition: int) -> bool:
    request = ChangeState.Request(transition=Transition(id=transition))
    return bool(robot.call(ChangeState, "change_state", request).success)


def _set(robot: Robot, values: dict[str, object], atomically: bool = False) -> Any:
    wanted = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
    if atomically:
        request = SetParametersAtomically.Request(parameters=wanted)
        return robot.call(SetParametersAtomically, "set_parameters_atomically", request).result
    answer = robot.call(SetParameters, "set_parameters", SetParameters.Request(parameters=wanted))
    return answer.results


# Managed


def test_a_lifecycle_manager_decides_when(
    make_robot: MakeRobot, make_picture: MakePicture, tiny_bundle: Path, tmp_path: Path
) -> None:
    database = tmp_path / "map.db"
    robot = make_robot(
        autostart=False, wait=False, bundle=tmp_path / "nowhere", database_path=database
    )
    assert robot.diagnostics()["state"] == "not configured"
    state = robot.call(GetState, "get_state", GetState.Request()).current_state.label
    assert state == "unconfigured"
    # What cannot be configured says why, and can be mended in place.
    assert not _change(robot, Transition.TRANSITION_CONFIGURE)
    found = robot.diagnostics()
    assert "no model bundle" in found["text"] and found["state"] == "not configured"
    (result,) = _set(robot, {"bundle": str(tiny_bundle)})
    assert result.successful, result.reason
    assert _change(robot, Transition.TRANSITION_CONFIGURE)
    assert robot.diagnostics()["state"] == "not active"
    assert robot.camera.get_subscription_count() == 0
    assert _change(robot, Transition.TRANSITION_ACTIVATE)
    robot.wait_until_listening()
    robot.show(make_picture(1, SIZE), 1)

    assert _change(robot, Transition.TRANSITION_DEACTIVATE)
    assert count_keyframes(database) == 1
    robot.wait(lambda: robot.camera.get_subscription_count() == 0, "the node to stop listening")
    assert _change(robot, Transition.TRANSITION_ACTIVATE)
    robot.wait_until_listening()
    robot.show(make_picture(2, SIZE), 2)
    assert robot.diagnostics()["keyframes"] == "2"

    assert _change(robot, Transition.TRANSITION_DEACTIVATE)
    assert _change(robot, Transition.TRANSITION_CLEANUP)
    assert robot.diagnostics()["state"] == "not configured"
    assert not database.with_name("map.db-wal").exists()
    assert robot.stop() == 0


def test_cycles_leave_nothing_behind(ros_context: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    """`make soak` does it a thousand times."""
    from vpr_lite_ros.node import LoopClosureNode

    settings = {
        **PERMISSIVE,
        "bundle": str(tiny_bundle),
        "backend": "onnxruntime",
        "threads": 1,
        "database_path": str(tmp_path / "map.db"),
    }
    overrides = [Parameter(name, value=value) for name, value in settings.items()]
    node = LoopClosureNode(context=ros_context, parameter_overrides=overrides)
    process = psutil.Process()

    def cycle() -> None:
        assert node.start()
        for _ in range(2):
            assert node.trigger_deactivate().name == "SUCCESS"
            assert node.trigger_activate().name == "SUCCESS"
        assert node.trigger_deactivate().name == "SUCCESS"
        assert node.trigger_cleanup().name == "SUCCESS"

    def held() -> tuple[int, int, float]:
        gc.collect()
        return threading.active_count(), process.num_fds(), process.memory_info().rss / 2**20

    try:
        for _ in range(5):  # what is loaded once is loaded now
            cycle()
        threads, files, megabytes = held()
        for _ in range(20):
            cycle()
        after = held()
    finally:
        node.destroy_node()
    assert after[:2] == (threads, files)
    # A leaked model alone would be 1 MB a cycle.
    assert after[2] - megabytes < 10


def test_ctrl_c_saves_everything(
    make_robot: MakeRobot, make_picture: MakePicture, tmp_path: Path
) -> None:
    database = tmp_path / "map.db"
    robot = make_robot(database_path=database)
    for second in range(1, 6):
        robot.show(make_picture(second, SIZE), second)
    assert robot.stop(signal.SIGINT) == 0
    assert not database.with_name("map.db-wal").exists()
    assert count_keyframes(database) == 5


# Tuned while it runs


def test_what_may_change_changes_and_the_rest_says_why_not(
    make_robot: MakeRobot, make_picture: MakePicture
) -> None:
    robot = make_robot()
    for second in range(1, 8):
        robot.show(make_picture(second, SIZE), second)
    (result,) = _set(robot, {"top_k": 2})
    assert result.successful
    (first, *_) = robot.show(make_picture(3, SIZE), 20)
    assert first.status == LoopClosure.STATUS_ACCEPTED
    robot.wait(lambda: len(robot.decisions(first.header.stamp)) == 2, "both candidates")

    results = _set(robot, {"backend": "openvino", "match_threshold": 1.5, "min_matches": 400})
    assert [one.successful for one in results] == [False, False, True]
    assert "backend" in results[0].reason and "cleanup" in results[0].reason
    assert "match_threshold" in results[1].reason
    assert robot.show(make_picture(3, SIZE), 30)[0].status == LoopClosure.STATUS_FEW_MATCHES

    # All at once or none.
    result = _set(robot, {"min_matches": 3, "robot_id": 9}, atomically=True)
    assert not result.successful and "robot_id" in result.reason
    assert robot.show(make_picture(3, SIZE), 40)[0].status == LoopClosure.STATUS_FEW_MATCHES
    assert _set(robot, {"min_matches": 3, "top_k": 1}, atomically=True).successful
    decisions = robot.show(make_picture(3, SIZE), 50)
    assert [one.status for one in decisions] == [LoopClosure.STATUS_ACCEPTED]


# Understood


def test_silence_says_what_is_missing(
    make_robot: MakeRobot, make_picture: MakePicture, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    robot = make_robot(log=log)
    robot.show(make_picture(1, SIZE), 1)
    found = robot.diagnostics()
    assert found["camera_info"] == "none" and found["text"] == "running"
    assert float(found["place_ms_p50"]) > 0 and float(found["latency_ms_p95"]) > 0
    assert found["decisions: NO_CANDIDATE"] == "1"
    assert float(found["process_mb_in_ram"]) > 10
    for second in range(2, 32):
        robot.camera.publish(to_message(make_picture(1, SIZE), second))
        if second % 8 == 7:  # before the middleware's queue of ten is full
            found = robot.wait_for_count("images", str(second))
    assert found["rate_hz"] == "1.0"  # by its stamps
    assert "camera_info" in log.read_text()
    robot.wait(lambda: "images: silence" in robot.diagnostics(), "silence with a publisher")
    assert robot.diagnostics()["rate_hz"] == "0.0"
    robot.node.destroy_publisher(robot.camera)
    robot.wait(lambda: "nobody publishes /robot/image" in robot.diagnostics()["text"], "silence")


def test_a_closure_is_heard_by_who_joins_late(
    make_robot: MakeRobot, make_picture: MakePicture
) -> None:
    robot = make_robot()
    for second in range(1, 8):
        robot.show(make_picture(second, SIZE), second)
    robot.show(make_picture(3, SIZE), 20)
    heard: list[LoopClosure] = []
    robot.node.create_subscription(LoopClosure, "loop_closures", heard.append, LATCHED)
    robot.wait(lambda: bool(heard), "a closure that was published before")
    assert heard[0].match_stamp.sec == 3


# Overrun


def test_a_camera_that_is_too_fast_costs_images_and_nothing_else(
    make_robot: MakeRobot, make_picture: MakePicture
) -> None:
    """`make soak` does it for ten minutes."""
    robot = make_robot(**{"keyframe.min_interval_s": 0.0, "threads": 1})
    pictures = [make_picture(seed, SIZE) for seed in range(7)]
    sent, began = 0, time.monotonic()
    while time.monotonic() - began < 6:
        # Faster than any camera: the tiny model takes some milliseconds.
        robot.camera.publish(to_message(pictures[sent % 7], 1 + sent * 0.002))
        sent += 1
        robot.executor.spin_once(timeout_sec=0.001)
    last = to_message(pictures[0], 1000)
    robot.send(last)
    found = robot.diagnostics()
    taken, dropped = int(found["keyframes"]), int(found["dropped: busy"])
    assert dropped > 0 and taken + dropped == int(found["images"]) <= sent + 1
    # The newest image is decided on, and no queue stands before it.
    assert robot.heard["decisions"][-1].header.stamp == last.header.stamp


# Fed with rubbish

ENCODINGS = (
    *("rgb8", "bgr8", "mono8", "mono16", "rgba8", "bgra8", "rgb16", "32FC1", "64FC3", "16UC1"),
    *("bayer_rggb8", "bayer_gbrg16", "yuv422", "uyvy", "nv21", "", "rgb8; jpeg", "\u00e4\u00f6"),
)


def _rubbish(rng: np.random.Generator, number: int) -> ImageMessage:
    """A message that a broken driver might send; some are harmless."""
    width, height = (int(rng.choice([0, 1, 3, 31, 160, 65535])) for _ in range(2))
    step = int(rng.choice([0, 1, width, 3 * width, 2**32 - 1]))
    size = int(min(rng.choice([0, 1, width * height, 3 * width * height]), 200_000))
    data = rng.integers(0, 256, size, dtype=np.uint8)
    if number % 5 == 0 and size >= 4:
        data = np.full(size // 4, rng.choice([np.nan, np.inf, -np.inf]), np.float32).view(np.uint8)
    message = ImageMessage(
        header=Header(frame_id=str(rng.choice(["", "camera", "/"]))),
        height=height,
        width=width,
        step=step,
        encoding=str(rng.choice(ENCODINGS)),
        is_bigendian=int(rng.integers(0, 2)),
        data=data.tobytes(),
    )
    if number % 7:
        message.header.stamp.sec = 100 + number
    return message


def _compressed_rubbish(rng: np.random.Generator, number: int, picture: Image) -> CompressedImage:
    extension = str(rng.choice([".jpg", ".png"]))
    data = bytearray(cv2.imencode(extension, picture)[1].tobytes())
    kind = number % 4
    if kind == 0:
        data = data[: int(rng.integers(0, len(data)))]
    elif kind == 1:
        for place in rng.integers(0, len(data), 20):
            data[place] = int(rng.integers(0, 256))
    elif kind == 2:
        data = bytearray(rng.integers(0, 256, int(rng.integers(0, 5000)), dtype=np.uint8))
    else:  # claims to be huge
        data[16:24] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
    message = CompressedImage(format=str(rng.choice(["jpeg", "png", "", "h264"])))
    message.data = bytes(data)
    if number % 7:
        message.header.stamp.sec = 100 + number
    return message


@pytest.mark.parametrize("kind", [ImageMessage, CompressedImage])
def test_a_thousand_broken_images_and_it_still_closes_loops(
    make_robot: MakeRobot, make_picture: MakePicture, kind: type
) -> None:
    rng = np.random.default_rng(7)
    robot = make_robot(image_type=kind, **{"keyframe.min_interval_s": 0.0})
    for second in range(1, 8):
        robot.show(make_picture(second, SIZE), second)
    before = int(robot.diagnostics()["images"])
    picture = make_picture(1, SIZE)
    for number in range(1000):
        raw = kind is ImageMessage
        message = _rubbish(rng, number) if raw else _compressed_rubbish(rng, number, picture)
        robot.camera.publish(message)
        if number % 5 == 4:  # so that the middleware's queue of ten loses none
            robot.executor.spin_once(timeout_sec=0.02)
    robot.show(make_picture(4, SIZE), 4000)
    found = robot.diagnostics()
    assert int(found["images"]) > before + 500
    assert sum(int(value) for key, value in found.items() if key.startswith("dropped")) > 100
    closure = robot.show(make_picture(3, SIZE), 5000)[0]
    assert (closure.status, closure.match_stamp.sec) == (LoopClosure.STATUS_ACCEPTED, 3)


# Seen badly


def test_a_covered_lens_and_a_clock_that_goes_back_are_said(
    make_robot: MakeRobot, make_picture: MakePicture, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    robot = make_robot(log=log, min_time_gap_s=3.0)
    for second in range(101, 111):
        robot.show(make_picture(second, SIZE), second)
    # A bag that loops: the same images with the same stamps, and no closure between them.
    robot.heard["decisions"].clear()
    for second in range(101, 111):
        decisions = robot.show(make_picture(second, SIZE), second)
        assert all(abs(one.match_stamp.sec - second) >= 3 for one in decisions if one.match_id)
    assert robot.diagnostics()["session"] == "test-2"
    assert "stamps went back to 101.000 s" in log.read_text()
    for second in range(200, 240):
        robot.show(np.zeros((SIZE[1], SIZE[0], 3), np.uint8), second)
    found = robot.diagnostics()
    assert "dark" in found["text"] or "constant" in found["text"], found["text"]


# Not alone


def test_one_robot_recognises_anothers_place(
    make_robot: MakeRobot, make_picture: MakePicture, tmp_path: Path
) -> None:
    map_of_right = tmp_path / "right.db"
    left = make_robot("/left", robot_id=1, remap={"other_keyframes": "/right/keyframes"})
    right = make_robot(
        "/right",
        robot_id=2,
        remap={"other_keyframes": "/left/keyframes"},
        database_path=map_of_right,
    )
    for robot in (left, right):
        topic = f"{robot.namespace}/keyframes"
        robot.wait(lambda r=robot, t=topic: r.node.count_subscribers(t) > 0, topic)  # type: ignore[misc]
    # What is shown before the two have found each other is not shared.
    heard = "other robots' keyframes"
    for second in range(1, 30):
        left.show(make_picture(second, SIZE), second)
        if heard in right.diagnostics():
            break
    before = int(right.diagnostics()[heard])
    left.show(make_picture(50, SIZE), 50)
    right.wait_for_count(heard, str(before + 1))
    closure = right.show(make_picture(50, SIZE), 900.5)[0]
    assert closure.status == LoopClosure.STATUS_ACCEPTED
    assert (closure.robot_id, closure.match_robot_id, closure.match_stamp.sec) == (2, 1, 50)
    assert right.stop() == 0
    assert count_keyframes(map_of_right) == before + 2


def test_a_keyframe_that_cannot_be_compared_is_said_and_left_out(
    make_robot: MakeRobot, make_picture: MakePicture, tmp_path: Path
) -> None:
    robot = make_robot(robot_id=1, log=tmp_path / "log")
    robot.show(make_picture(1, SIZE), 1)
    publisher = robot.node.create_publisher(Keyframe, "other_keyframes", 10)
    robot.wait(lambda: publisher.get_subscription_count() > 0, "the subscription")
    model_id = robot.heard["decisions"][0].model_id
    stranger = Keyframe(robot_id=2, session="x", model_id="another-0123")
    short = Keyframe(robot_id=2, session="x", model_id=model_id, descriptor=[1.0])
    namesake = Keyframe(robot_id=1, session="x", model_id=model_id)
    for number, message in enumerate((stranger, short, namesake)):
        publisher.publish(message)
        if message is not namesake:
            robot.wait_for_count("dropped: other robots' keyframes", str(number + 1))
    robot.wait(lambda: "robot_id of its own" in (tmp_path / "log").read_text(), "the complaint")
    assert "another-0123" in (tmp_path / "log").read_text()
    assert robot.diagnostics()["keyframes"] == "1"
    robot.show(make_picture(2, SIZE), 2)
