"""A robot for tests: the real node in a process of its own, its camera and a listener, over DDS."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

rclpy = pytest.importorskip("rclpy", reason="rclpy cannot be imported: source a ROS 2")

# Tests keep to this machine and out of the way of a robot's own topics. Set before rclpy.init.
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_DOMAIN_ID"] = str(os.getpid() % 100 + 1)

from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage
from visualization_msgs.msg import MarkerArray
from vpr_lite_ros.msg import LoopClosure

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
SIZE = (160, 128)
LATCHED = QoSProfile(
    depth=1000,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
PERMISSIVE = {
    "min_time_gap_s": 5.0,
    "keyframe.min_interval_s": 0.5,
    "keyframe.max_similarity": 1.0,
    "similarity_threshold": 0.9,
    "match_threshold": 0.0,
    "min_matches": 3,
    "min_inliers": 0,
    "min_agreeing_keyframes": 1,
    "session_id": "test",
}
"""Without training, the tiny model knows a picture again only if it is the same one."""


class Robot:
    """A node under test, and a camera and a listener in one namespace with it."""

    def __init__(
        self,
        context: Any,
        namespace: str,
        bundle: Path,
        image_type: type = ImageMessage,
        reliability: ReliabilityPolicy = ReliabilityPolicy.RELIABLE,
        log: Path | None = None,
        wait: bool = True,
        remap: dict[str, str] | None = None,
        **parameters: object,
    ) -> None:
        self.namespace, self.log = namespace, log
        self.node = rclpy.create_node("listener", namespace=namespace, context=context)
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        compressed = image_type is CompressedImage
        topic = "image/compressed" if compressed else "image"
        self.camera = self.node.create_publisher(
            image_type, topic, QoSProfile(depth=10, reliability=reliability)
        )
        self.camera_info = self.node.create_publisher(CameraInfo, "camera_info", 10)
        self.odometry = self.node.create_publisher(Odometry, "odom", 10)
        self.heard: dict[str, list[Any]] = {}
        self._listen(LoopClosure, "loop_closures", LATCHED)
        self._listen(LoopClosure, "loop_closure/decisions", LATCHED)
        self._listen(ImageMessage, "loop_closure/match_image", 10)
        self._listen(MarkerArray, "loop_closure/markers", 10)
        self._listen(DiagnosticArray, "/diagnostics", 10)
        settings: dict[str, object] = {**PERMISSIVE, "bundle": str(bundle), **parameters}
        settings["image_transport"] = "compressed" if compressed else "raw"
        self.process = start_node(namespace, settings, log, remap or {})
        if wait:
            self.wait_until_listening()

    def wait_until_listening(self) -> None:
        """Until camera and listener have found the node."""
        self.wait(lambda: self.camera.get_subscription_count() > 0, "the node to subscribe")
        for topic in ("loop_closures", "loop_closure/match_image", "loop_closure/markers"):
            found = partial(self.node.count_publishers, f"{self.namespace}/{topic}")
            self.wait(lambda found=found: found() > 0, topic)  # type: ignore[misc]

    def _listen(self, kind: type, topic: str, qos: Any) -> None:
        heard = self.heard[topic.rsplit("/", 1)[-1]] = []
        self.node.create_subscription(kind, topic, heard.append, qos)

    def wait(self, done: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while not done():
            self.executor.spin_once(timeout_sec=0.05)
            assert time.monotonic() < until, f"waited {timeout_s} s for {what}"

    def show(self, picture: Image, second: float) -> list[LoopClosure]:
        """Publish a picture and wait for what the node decides on it."""
        message = to_message(picture, second, self.camera.msg_type is CompressedImage)
        return self.send(message)

    def send(self, message: Any) -> list[LoopClosure]:
        self.camera.publish(message)
        stamp = message.header.stamp
        self.wait(lambda: bool(self.decisions(stamp)), f"a decision on the image of {stamp}")
        return self.decisions(stamp)

    def decisions(self, stamp: Any) -> list[LoopClosure]:
        return [heard for heard in self.heard["decisions"] if heard.header.stamp == stamp]

    def diagnostics(self) -> dict[str, str]:
        """What the node says of itself from now on."""
        name = f"{self.namespace.lstrip('/')}/loop_closure: detector"
        self.heard["diagnostics"].clear()

        def mine() -> list[Any]:
            arrays = self.heard["diagnostics"]
            return [status for array in arrays for status in array.status if status.name == name]

        self.wait(lambda: bool(mine()), "diagnostics")
        return {pair.key: pair.value for pair in mine()[-1].values} | {"text": mine()[-1].message}

    def wait_for_count(self, key: str, value: str) -> dict[str, str]:
        """Diagnostics, once ``key`` says ``value``."""
        found: dict[str, str] = {}
        until = time.monotonic() + 30
        while found.get(key) != value:
            found = self.diagnostics()
            assert time.monotonic() < until, f"{key} is {found.get(key)}, waited for {value}"
        return found

    def call(self, kind: type, service: str, request: Any) -> Any:
        client = self.node.create_client(kind, f"loop_closure/{service}")
        self.wait(client.service_is_ready, service)
        future = client.call_async(request)
        self.wait(future.done, f"an answer of {service}")
        return future.result()

    def stop(self, signal_number: int = signal.SIGINT) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(30)

    def close(self) -> None:
        # Asked to end, not killed: a killed process leaves the shared memory through which the
        # middleware talks in whatever state it was, to the harm of those who are still in it.
        try:
            if self.process.poll() is None:
                self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.executor.shutdown()
        self.node.destroy_node()


def start_node(
    namespace: str,
    settings: dict[str, object],
    log: Path | None = None,
    remap: dict[str, str] = {},  # noqa: B006
) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "vpr_lite_ros.node"]
    arguments += ["--ros-args", "-r", f"__ns:={namespace}"]
    for name, topic in remap.items():
        arguments += ["-r", f"{name}:={topic}"]
    for name, value in settings.items():
        arguments += ["-p", f"{name}:={value if value != '' else chr(39) * 2}"]
    output = log.open("wb") if log else None
    return subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT if log else None)


def to_message(picture: Image, second: float, compressed: bool = False) -> Any:
    if compressed:
        _, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        message = CompressedImage(format="png", data=data.tobytes())
    else:
        height, width = picture.shape[:2]
        message = ImageMessage(
            height=height, width=width, encoding="rgb8", step=width * 3, data=picture.tobytes()
        )
    message.header.stamp.sec = int(second)
    message.header.stamp.nanosec = round((second % 1) * 1e9)
    return message


def count_keyframes(database: Path) -> int:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        return int(connection.execute("SELECT count(*) FROM keyframes").fetchone()[0])
    finally:
        connection.close()


def drive(robot: Robot, make_picture: MakePicture, seconds: int = 8) -> None:
    """See as many places as seconds pass, one picture a second from second 1 on."""
    for second in range(1, seconds + 1):
        decisions = robot.show(make_picture(second, SIZE), second)
        assert all(decision.status != LoopClosure.STATUS_ACCEPTED for decision in decisions)
