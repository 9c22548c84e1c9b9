"""What doctor hears of real publishers, and what view shows of a real node, all over DDS."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

rclpy = pytest.importorskip("rclpy", reason="rclpy cannot be imported: source a ROS 2")

from nav_msgs.msg import Odometry
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy

# Importing robot also takes this process out of the way of a robot's own topics.
from robot import Robot, drive, to_message
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage
from std_msgs.msg import String

from vpr_lite_ros import live
from vpr_lite_ros.config import make_config
from vpr_lite_ros.health import Finding, Severity

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
SIZE = (320, 240)
RELIABLE, BEST_EFFORT = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT


class Camera:
    """Publishes images ten times a second, and what a driver publishes beside them."""

    def __init__(self, ros: Any, make_picture: MakePicture, name: str) -> None:
        # Number 15 is the first with too little detail, which would be found to be blurred.
        self.pictures = [make_picture(number, SIZE) for number in range(15)]
        self.node = rclpy.create_node("camera", namespace=name, context=ros)
        self.executor = SingleThreadedExecutor(context=ros)
        self.executor.add_node(self.node)
        self.topic = f"{name}/image_raw"
        self.number = 0
        self.stamp: Callable[[], float] = time.time
        self.thread = threading.Thread(target=self._spin)
        self._going = True

    def publish(
        self,
        *,
        reliability: ReliabilityPolicy = RELIABLE,
        compressed: bool = False,
        change: Callable[[Image], Image] = lambda image: image,
        info: tuple[int, int] | None = SIZE,
        odometry: bool = True,
    ) -> None:
        kind = CompressedImage if compressed else ImageMessage
        topic = "image_raw/compressed" if compressed else "image_raw"
        camera = self.node.create_publisher(
            kind, topic, QoSProfile(depth=5, reliability=reliability)
        )
        infos = self.node.create_publisher(CameraInfo, "camera_info", 5) if info else None
        poses = self.node.create_publisher(Odometry, "odom", 5) if odometry else None

        def tick() -> None:
            picture = change(self.pictures[self.number % len(self.pictures)])
            self.number += 1
            image = to_message(picture, self.stamp(), compressed)
            image.header.frame_id = "camera"
            camera.publish(image)
            if infos is not None and info is not None:
                matrix = [256.0, 0.0, info[0] / 2, 0.0, 256.0, info[1] / 2, 0.0, 0.0, 1.0]
                infos.publish(
                    CameraInfo(width=info[0], height=info[1], k=matrix, d=[0.0] * 5,
                               distortion_model="plumb_bob")
                )  # fmt: skip
            if poses is not None:
                pose = Odometry(header=image.header)
                pose.pose.pose.orientation.w = 1.0
                poses.publish(pose)

        self.node.create_timer(0.1, tick)
        self.thread.start()

    def _spin(self) -> None:
        while self._going:
            self.executor.spin_once(timeout_sec=0.1)

    def look(
        self, topic: str = "", seconds: float = 2.0, transport: str = "raw", qos: str = "auto"
    ) -> dict[str, Finding]:
        """What doctor finds, by name."""
        found = live.topic(
            topic or self.topic,
            make_config({"image_transport": transport, "qos.image": qos}),
            camera_info_topic=None,
            odom_topic=f"{self.node.get_namespace()}/odom",
            seconds=seconds,
        )
        return {finding.name: finding for finding in found}

    def close(self) -> None:
        self._going = False
        if self.thread.ident is not None:
            self.thread.join()
        self.executor.shutdown()
        self.node.destroy_node()


@pytest.fixture
def camera(
    ros_context: Any,
    make_picture: MakePicture,
    request: pytest.FixtureRequest,
) -> Iterator[Camera]:
    camera = Camera(ros_context, make_picture, f"/camera_{abs(hash(request.node.name))}")
    yield camera
    camera.close()


def bad(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.severity > Severity.OK}


# --- doctor --topic


@pytest.mark.parametrize("reliability", [RELIABLE, BEST_EFFORT])
def test_nothing_is_wrong_with_a_good_topic(camera: Camera, reliability: ReliabilityPolicy) -> None:
    camera.publish(reliability=reliability)
    found = camera.look()
    # The tests' machine may be too busy for ten images a second.
    assert bad(found) - {"gaps"} == {"large images"} & found.keys()
    assert "rgb8 320x240" in found[camera.topic].seen
    assert reliability.name.lower() in found["qos"].seen
    assert "fx 256" in found["camera_info"].seen
    assert "a pose for" in found["odometry"].seen


def test_a_topic_that_nobody_publishes_names_those_that_are(camera: Camera) -> None:
    camera.publish()
    found = camera.look(f"{camera.topic}_typo")
    assert list(found) == [f"{camera.topic}_typo"]
    assert camera.topic in found[f"{camera.topic}_typo"].seen
    assert found[f"{camera.topic}_typo"].severity is Severity.ERROR


def test_a_topic_of_another_type_is_a_problem(camera: Camera) -> None:
    camera.node.create_publisher(String, "image_raw", 1)
    found = camera.look()
    assert "std_msgs/msg/String" in found[camera.topic].seen


def test_qos_that_does_not_fit_is_a_problem(camera: Camera) -> None:
    camera.publish(reliability=BEST_EFFORT)
    found = camera.look(qos="reliable")
    assert found["qos"].severity is Severity.ERROR
    assert "best_effort" in found["qos"].seen and "qos.image: auto" in found["qos"].remedy
    # It is looked at all the same.
    assert "320x240" in found[camera.topic].seen


def test_a_camera_that_is_silent_is_a_problem(camera: Camera) -> None:
    camera.node.create_publisher(ImageMessage, "image_raw", 1)
    found = camera.look(seconds=0.5)
    assert bad(found) == {"silence"}


def test_a_compressed_topic_asks_for_its_transport(camera: Camera) -> None:
    camera.publish(compressed=True)
    topic = f"{camera.topic}/compressed"
    found = camera.look(topic)
    assert bad(found) - {"gaps"} == {"image_transport"}
    assert "png 320x240" in found[topic].seen and "camera_info" in found
    assert "image_transport" not in camera.look(topic, 0.5, transport="compressed")


def test_what_is_wrong_with_a_topic_is_found(camera: Camera) -> None:
    camera.stamp = lambda: time.time() - 3600
    camera.publish(
        change=lambda image: np.asarray(cv2.GaussianBlur(image, (0, 0), 5), np.uint8),
        info=(320, 320),
        odometry=False,
    )
    found = camera.look()
    assert bad(found) - {"gaps"} == {"blurred", "clock", "camera_info", "odometry"}
    assert "3.6e+03 s behind" in found["clock"].seen
    assert found["camera_info"].severity is Severity.ERROR
    assert "a pose for 0 of" in found["odometry"].seen


def test_zero_stamps_and_no_camera_info(camera: Camera) -> None:
    camera.stamp = lambda: 0.0
    camera.publish(info=None)
    found = camera.look()
    assert {"zero stamps", "camera_info"} <= bad(found)
    assert f"nothing came on {camera.node.get_namespace()}/camera_info" in found["camera_info"].seen


def test_two_cameras_on_one_topic(camera: Camera, ros_context: Any) -> None:
    camera.publish()
    other = rclpy.create_node("second", context=ros_context)
    other.create_publisher(ImageMessage, camera.topic, 5)
    try:
        found = camera.look()
        assert "/second" in found["publishers"].seen
    finally:
        other.destroy_node()


def test_the_command_listens(camera: Camera, tiny_bundle: Path) -> None:
    camera.publish()
    command = [sys.executable, "-m", "vpr_lite_ros.cli", "doctor", "--topic", camera.topic]
    command += ["--seconds", "1", "--bundle", str(tiny_bundle), "--odom-topic", ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert f"topic {camera.topic}" in done.stdout
    assert "rgb8 320x240" in done.stdout
    assert "ok      odometry: none" in done.stdout


# --- view


@contextmanager
def viewing(log: Path, *options: str) -> Iterator[Callable[[], int]]:
    """``vpr-lite view`` in a process of its own; call what is yielded for Ctrl-C."""
    command = [sys.executable, "-u", "-m", "vpr_lite_ros.cli", "view", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def stop() -> int:
        process.send_signal(signal.SIGINT)
        return process.wait(30)

    try:
        yield stop
    finally:
        if process.poll() is None:
            stop()


def test_view_shows_what_a_node_finds(
    make_robot: Callable[..., Robot],
    make_picture: MakePicture,
    tmp_path: Path,
) -> None:
    log, pictures = tmp_path / "log", tmp_path / "pairs"
    with viewing(log, "--namespace", "/viewed", "--output", str(pictures)) as stop:
        robot = make_robot("/viewed")

        def said(*words: str) -> Callable[[], bool]:
            return lambda: all(word in log.read_text() for word in words)

        robot.wait(said("watching /viewed/loop_closures"), "view to find the node")
        decisions = "/viewed/loop_closure/decisions"
        robot.wait(lambda: robot.node.count_subscribers(decisions) == 2, "view to listen")
        drive(robot, make_picture)
        robot.show(make_picture(3, (160, 128)), 20.25)
        robot.wait(said("closure 1:", "picture:"), "the closure and its picture")
        assert stop() == 0
        text = log.read_text()
    assert "20.250 s is where 3.000 s was (+17.2 s): similarity 1.00" in text
    assert "ACCEPTED" in text
    last = text.splitlines()[-1]
    assert last.startswith("9 keyframes, 1 closures; candidates turned down: ")
    assert "keyframes without a candidate: 5" in last
    assert "\x1b" not in text, "a log file is no terminal"
    (file,) = pictures.iterdir()
    assert file.name == "20.250_is_3.000.jpg"
    picture = cv2.imread(str(file))
    assert picture is not None and picture.shape[1] == 1280
    assert stop() == 0


def test_view_waits_for_a_node_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with viewing(log, "--namespace", "/nobody") as stop:
        until = time.monotonic() + 60
        while "nobody publishes /nobody/loop_closures yet" not in log.read_text():
            assert time.monotonic() < until
            time.sleep(0.1)
        assert stop() == 0
