"""What an active node listens to, with publishers that come and go: a stand-in for the graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy cannot be imported: run make test, or source a ROS 2")

from nav_msgs.msg import Odometry
from rclpy.qos import ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage

from vpr_lite_ros.config import make_config
from vpr_lite_ros.node_inputs import IMAGES_BEFORE_CAMERA_INFO, Inputs
from vpr_lite_ros.odometry import ODOMETRY_TOLERANCE_NS
from vpr_lite_ros.tally import Tally

RELIABLE, BEST_EFFORT = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
SECOND, MS = 10**9, 10**6
CALIBRATED = CameraInfo(width=640, height=480, k=[500.0, 0, 320, 0, 500, 240, 0, 0, 1])


class Graph:
    """As much of a node as ``Inputs`` asks of one."""

    def __init__(self) -> None:
        self.offered: dict[str, list[ReliabilityPolicy]] = {}
        self.subscriptions: list[Any] = []
        self.ever: list[str] = []
        self.timers: list[Callable[[], None]] = []

    def resolve_topic_name(self, name: str) -> str:
        return f"/robot/{name}"

    def create_subscription(self, kind: type, topic: str, take: Any, qos: Any) -> Any:
        one = SimpleNamespace(
            kind=kind, topic=topic.removeprefix("/robot/"), take=take, reliability=qos.reliability
        )
        self.subscriptions.append(one)
        self.ever.append(one.topic)
        return one

    def destroy_subscription(self, subscription: Any) -> None:
        self.subscriptions.remove(subscription)

    def create_timer(self, _: float, look: Callable[[], None], clock: Any) -> Callable[[], None]:
        self.timers.append(look)
        return look

    def destroy_timer(self, timer: Callable[[], None]) -> None:
        self.timers.remove(timer)

    def get_publishers_info_by_topic(self, topic: str) -> list[Any]:
        offers = self.offered.get(topic.removeprefix("/robot/"), [])
        return [SimpleNamespace(qos_profile=SimpleNamespace(reliability=one)) for one in offers]

    def get_logger(self) -> Any:
        return SimpleNamespace(info=lambda text: None)

    def look(self) -> None:
        for look in list(self.timers):
            look()

    def listened(self, topic: str) -> list[ReliabilityPolicy]:
        return [one.reliability for one in self.subscriptions if one.topic == topic]

    def send(self, topic: str, message: Any) -> None:
        (one,) = (one for one in self.subscriptions if one.topic == topic)
        one.take(message)


class Listener:
    """``Inputs`` of a graph, and what they give and say."""

    def __init__(self, **parameters: object) -> None:
        self.graph, self.tally = Graph(), Tally()
        self.given: list[Any] = []
        self.said: list[tuple[str, str]] = []
        node, clock = self.graph, None
        self.inputs = Inputs(
            node,  # type: ignore[arg-type]
            make_config(parameters),
            clock,  # type: ignore[arg-type]
            self.tally,
            self.given.append,
            lambda name, text: self.said.append((name, text)),
        )

    def offer(self, topic: str, *reliabilities: ReliabilityPolicy) -> None:
        self.graph.offered[topic] = list(reliabilities)
        self.graph.look()

    def image(self, stamp_ns: int) -> None:
        self.graph.send("image", stamped(ImageMessage(), stamp_ns))

    def stand_at(self, x: float, stamp_ns: int, frame: str = "odom") -> None:
        message = stamped(Odometry(), stamp_ns)
        message.header.frame_id = frame
        message.pose.pose.position.x = x
        message.pose.pose.orientation.w = 1.0
        self.graph.send("odom", message)

    def x_at(self, stamp_ns: int) -> float:
        pose = self.inputs.pose_at(stamp_ns)
        return math.nan if pose is None else pose.position[0]


def stamped(message: Any, stamp_ns: int) -> Any:
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, SECOND)
    return message


# -- odometry


def test_the_pose_of_an_image_is_the_nearest_in_time() -> None:
    listener = Listener()
    assert math.isnan(listener.x_at(SECOND))
    for number in range(1, 5):
        listener.stand_at(number, number * SECOND // 10)
    for stamp_ms, x in ((100, 1), (149, 1), (151, 2), (249, 2), (251, 3), (390, 4), (410, 4)):
        assert listener.x_at(stamp_ms * MS) == x, stamp_ms
    # Neither before the first nor after the last one is a pose guessed.
    assert listener.x_at(400 * MS + ODOMETRY_TOLERANCE_NS) == 4
    assert math.isnan(listener.x_at(400 * MS + ODOMETRY_TOLERANCE_NS + 1))
    later = Listener()
    later.stand_at(1, SECOND)
    assert later.x_at(SECOND - ODOMETRY_TOLERANCE_NS) == 1
    assert math.isnan(later.x_at(SECOND - ODOMETRY_TOLERANCE_NS - 1))


def test_odometry_that_goes_back_in_time_begins_anew() -> None:
    listener = Listener()
    for number in range(10):
        listener.stand_at(number, (10 + number) * SECOND)
    listener.stand_at(-1, 10 * SECOND, "odom_of_another_run")
    assert listener.x_at(10 * SECOND) == -1
    assert math.isnan(listener.x_at(12 * SECOND)), "what came before was in another frame"
    assert listener.inputs.odometry_frame == "odom_of_another_run"


def test_odometry_without_a_pose_is_said_and_not_used() -> None:
    listener = Listener()
    without = stamped(Odometry(), SECOND)
    without.pose.pose.orientation.w = 0.0  # so that it is no rotation
    listener.graph.send("odom", without)
    listener.stand_at(math.nan, SECOND)
    assert math.isnan(listener.x_at(SECOND))
    assert [name for name, _ in listener.said] == ["odometry", "odometry"]
    assert listener.tally.values()["odometry"] == "0"
    listener.stand_at(3, SECOND, "")
    assert listener.x_at(SECOND) == 3 and listener.inputs.odometry_frame == "odom"


# -- publishers


def test_images_are_listened_to_as_they_are_offered() -> None:
    listener = Listener()
    graph, inputs = listener.graph, listener.inputs
    assert graph.listened("image") == graph.listened("depth") == []
    assert "nobody publishes /robot/image:" in inputs.trouble
    listener.offer("image", RELIABLE)
    assert graph.listened("image") == [RELIABLE]
    assert inputs.trouble == "/robot/image has a publisher, but no image has arrived yet"
    for _ in range(3):
        graph.look()
    assert graph.ever.count("image") == 1, "what fits stays"
    # A second camera that is only best_effort: from now on both are heard, each once.
    listener.offer("image", RELIABLE, BEST_EFFORT)
    assert graph.listened("image") == [BEST_EFFORT]
    listener.image(SECOND)
    assert inputs.trouble == "" and len(listener.given) == 1
    # Depth is asked for as it is offered, whatever is wanted of images.
    listener.offer("depth", RELIABLE)
    assert graph.listened("depth") == [RELIABLE]
    # A driver that dies is not a reason to listen otherwise, but one to say so.
    listener.offer("image")
    assert graph.listened("image") == [BEST_EFFORT] and "nobody publishes" in inputs.trouble
    inputs.close()
    assert not graph.subscriptions and not graph.timers


def test_what_is_asked_for_and_not_offered_is_said() -> None:
    listener = Listener(**{"qos.image": "reliable"})
    assert listener.graph.listened("image") == [RELIABLE], "without waiting for a publisher"
    listener.offer("image", BEST_EFFORT)
    assert "set qos.image to auto" in listener.inputs.trouble.lower()
    listener.offer("depth", BEST_EFFORT)
    assert listener.graph.listened("depth") == [BEST_EFFORT]
    listener.offer("image", RELIABLE)
    assert "no image has arrived yet" in listener.inputs.trouble

    listener = Listener(**{"qos.image": "best_effort"})
    listener.offer("image", RELIABLE, BEST_EFFORT)
    assert listener.graph.listened("image") == [BEST_EFFORT]
    assert "no image has arrived yet" in listener.inputs.trouble

    listener = Listener(image_transport="compressed")
    listener.offer("image/compressed", RELIABLE)
    (images,) = (one for one in listener.graph.subscriptions if "image" in one.topic)
    assert (images.topic, images.kind) == ("image/compressed", CompressedImage)


# -- calibration and rate


def test_calibration_that_does_not_come_is_said_once() -> None:
    listener = Listener()
    listener.offer("image", RELIABLE)
    for number in range(1, IMAGES_BEFORE_CAMERA_INFO):
        listener.image(number * SECOND)
    assert listener.said == []
    for number in range(3):
        listener.image((100 + number) * SECOND)
    ((name, text),) = listener.said
    assert name == "no camera_info" and "/robot/camera_info" in text

    listener = Listener()
    listener.offer("image", RELIABLE)
    listener.graph.send("camera_info", CameraInfo(width=640, height=480))
    assert listener.inputs.camera is None
    assert listener.said.pop()[0] == "camera_info", "not calibrated"
    listener.graph.send("camera_info", CALIBRATED)
    listener.graph.send("camera_info", CameraInfo())  # one that is wrong costs none that is right
    assert listener.inputs.camera is not None and listener.inputs.camera.width == 640
    listener.said.clear()
    for number in range(1, 2 * IMAGES_BEFORE_CAMERA_INFO):
        listener.image(number * SECOND)
    assert listener.said == []


def test_the_rate_is_that_of_stamps() -> None:
    listener = Listener()
    listener.offer("image", RELIABLE)
    assert listener.inputs.rate_hz == 0
    listener.image(SECOND)
    assert listener.inputs.rate_hz == 0
    for number in range(1, 20):
        listener.image(SECOND + number * 50 * MS)
    assert listener.inputs.rate_hz == pytest.approx(20)
    assert listener.tally.images == len(listener.given) == 20
