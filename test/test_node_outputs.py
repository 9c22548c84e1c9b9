"""What a configured node publishes, and to whom: a stand-in for the graph, and one for tf."""

from __future__ import annotations

import math
import sys
import threading
from array import array
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("rclpy", reason="rclpy cannot be imported: run make test, or source a ROS 2")

from geometry_msgs.msg import Transform
from std_msgs.msg import Header

from vpr_lite_ros import messages
from vpr_lite_ros.candidate import Decision
from vpr_lite_ros.database import DatabaseError, Pose
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.image import draw_matches
from vpr_lite_ros.matching import Camera, Status
from vpr_lite_ros.node_outputs import Outputs
from vpr_lite_ros.tally import Tally

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
MakeDetector = Callable[..., LoopDetector]
SECOND = 10**9
SIZE = (160, 128)
CAMERA = Camera(160, 128, (120.0, 0, 80, 0, 120, 64, 0, 0, 1))


class Graph:
    """As much of a node as ``Outputs`` asks of one."""

    def __init__(self) -> None:
        self.sent: dict[str, list[Any]] = {}
        self.order: list[str] = []
        """Topics, in the order in which they were published on."""
        self.listeners: dict[str, int] = {}
        self.qos: dict[str, Any] = {}

    def create_publisher(self, _: type, topic: str, qos: Any) -> Any:
        sent = self.sent[topic] = []
        self.qos[topic] = qos

        def publish(message: Any) -> None:
            sent.append(message)
            self.order.append(topic)

        return SimpleNamespace(
            topic=topic,
            publish=publish,
            get_subscription_count=lambda: self.listeners.get(topic, 0),
        )

    def destroy_publisher(self, publisher: Any) -> None:
        del self.sent[publisher.topic]


class Tf:
    """tf2_ros; knows the transforms of ``known`` by target and source."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Transform] = {}
        self.asked = 0
        self.listening = False

    def Buffer(self) -> Tf:
        return self

    def TransformListener(self, buffer: Tf, _: Any) -> Tf:
        assert buffer is self
        self.listening = True
        return self

    def unregister(self) -> None:
        self.listening = False

    def lookup_transform(self, target: str, source: str, _: Any) -> Any:
        self.asked += 1
        return SimpleNamespace(transform=self.known[target, source])


class Publisher:
    """``Outputs`` of a detector that looks at pictures."""

    def __init__(self, detector: LoopDetector) -> None:
        self.detector, self.graph, self.tally = detector, Graph(), Tally()
        self.said: list[str] = []
        node: Any = self.graph
        self.outputs = Outputs(
            node,
            detector.config,
            detector.model.bundle,
            detector.database,
            threading.Lock(),
            self.tally,
            lambda name, _: self.said.append(name),
        )

    def show(self, image: Image, second: int) -> Decision:
        pose = Pose((float(second), 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        decision = self.detector.process(image, second * SECOND, pose, CAMERA)
        header = Header(frame_id="eye")
        header.stamp.sec = second
        self.outputs.publish(
            decision, header, image, camera=CAMERA, odometry_frame="odom", latency_ms=12.5
        )
        return decision


@pytest.fixture
def tf(monkeypatch: pytest.MonkeyPatch) -> Tf:
    stand_in = Tf()
    monkeypatch.setitem(sys.modules, "tf2_ros", stand_in)
    return stand_in


def test_who_does_not_listen_is_sent_nothing_and_who_does_gets_everything(
    make_detector: MakeDetector, make_picture: MakePicture, tf: Tf
) -> None:
    detector = make_detector(top_k=2, min_time_gap_s=3.0, similarity_threshold=0.9, robot_id=5)
    detector.configure(replace(detector.config, robot_id=5))
    publisher = Publisher(detector)
    graph, sent = publisher.graph, publisher.graph.sent
    seen = [publisher.show(make_picture(1 + i % 7, SIZE), 1 + i) for i in range(8)]
    assert [one.closure is not None for one in seen] == [False] * 7 + [True]
    assert len(sent["loop_closures"]) == 1
    assert len(sent["~/decisions"]) == sum(max(1, len(one.candidates)) for one in seen)
    assert not (sent["~/match_image"] or sent["~/markers"] or sent["keyframes"])

    graph.listeners |= {"~/match_image": 1, "~/markers": 1, "keyframes": 1}
    graph.order.clear()
    picture = make_picture(2, SIZE)
    decision = publisher.show(picture, 9)
    closure = decision.closure
    assert closure is not None and decision.description is not None
    assert closure.matches is not None and closure.points is not None
    said = sent["loop_closures"][-1]
    assert (said.match_id, said.status, said.robot_id) == (2, Status.ACCEPTED, 5)
    assert (said.header.frame_id, said.latency_ms) == ("base_link", 12.5)
    assert list(publisher.outputs.closures) == sent["loop_closures"]
    large = ["keyframes", "~/match_image", "~/markers"]
    assert graph.order == [*large, *["~/decisions"] * 2, "loop_closures"], "large ones go first"
    counts = publisher.tally.values()
    assert (counts["decisions: ACCEPTED"], counts["decisions: NO_CANDIDATE"]) == ("2", "3")

    (shown,) = sent["~/match_image"]
    expected = draw_matches(
        picture,
        detector.database.thumbnail(2),
        decision.description.centres[closure.matches.query],
        closure.points,
        closure.fit.inliers if closure.fit else None,
    )
    assert (shown.height, shown.width, shown.step) == (*expected.shape[:2], 3 * expected.shape[1])
    assert bytes(shown.data) == expected.tobytes() and shown.header.stamp.sec == 9

    (markers,) = sent["~/markers"]
    path, lines = markers.markers
    assert [point.x for point in path.points] == list(range(1, 10))
    assert [point.x for point in lines.points] == [8, 1, 9, 2]

    (keyframe,) = sent["keyframes"]
    assert (keyframe.robot_id, keyframe.session) == (5, "one")
    assert (keyframe.header.stamp.sec, keyframe.header.frame_id) == (9, "eye")
    bundle = detector.model.bundle
    description, camera = messages.from_keyframe(keyframe, bundle)
    assert camera == CAMERA
    np.testing.assert_array_equal(description.tokens, decision.description.tokens)
    np.testing.assert_array_equal(description.descriptor, decision.description.descriptor)
    assert description.descriptor.shape == (3, bundle.dimension)
    assert bytes(keyframe.thumbnail) == detector.database.thumbnail(9) == description.picture
    assert description.picture
    keyframe.thumbnail = array("B", bytes(200_001))
    with pytest.raises(ValueError, match="a picture of 200001 bytes"):
        messages.from_keyframe(keyframe, bundle)
    small = description.picture
    start = small.index(b"\xff\xc0") + 5
    wide = cv2.imencode(".jpg", np.zeros((240, 400, 3), np.uint8))[1].tobytes()
    for thumbnail, words in (
        (small[:start] + b"\x75\x30" * 2 + small[start + 4 :], "too many pixels"),
        (small[:start] + b"\x75\x30" + small[start + 2 :], "has 320x30000 pixels"),
        (small[: len(small) // 60], "cannot be decoded"),
        (b"no picture", "cannot be decoded"),
        (wide, "has 400x240 pixels"),
    ):
        keyframe.thumbnail = array("B", thumbnail)
        with pytest.raises(ValueError, match=f"robot 5 has a picture .*{words}"):
            messages.from_keyframe(keyframe, bundle)
    keyframe.thumbnail = array("B")
    for where in (-0.1, 1e9, math.inf):
        keyframe.centres[3] = where
        with pytest.raises(ValueError, match="robot 5 has"):
            messages.from_keyframe(keyframe, bundle)
    keyframe.centres[3] = 0.5
    sent_numbers = keyframe.descriptor.tolist()
    for numbers in (
        sent_numbers[: bundle.dimension],
        sent_numbers[:-1],
        [*sent_numbers[:-1], 9.0],
        [*sent_numbers[:-1], math.nan],
    ):
        keyframe.descriptor = array("f", numbers)
        with pytest.raises(ValueError, match="robot 5 has"):
            messages.from_keyframe(keyframe, bundle)


def test_a_picture_that_cannot_be_drawn_costs_no_closure(
    make_detector: MakeDetector,
    make_picture: MakePicture,
    tf: Tf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector = make_detector(top_k=2, min_time_gap_s=3.0, similarity_threshold=0.9)
    publisher = Publisher(detector)
    graph = publisher.graph
    for i in range(7):
        publisher.show(make_picture(1 + i, SIZE), 1 + i)
    graph.listeners["~/match_image"] = 1

    def damaged(_: int) -> bytes:
        raise DatabaseError("picture 1 is damaged")

    monkeypatch.setattr(detector, "_picture", lambda _: b"")
    monkeypatch.setattr(detector.database, "thumbnail", damaged)
    with pytest.raises(DatabaseError, match="is damaged"):
        publisher.show(make_picture(1, SIZE), 8)
    assert [one.match_id for one in graph.sent["loop_closures"]] == [1]
    assert graph.sent["~/decisions"][-2].status == Status.ACCEPTED
    assert not graph.sent["~/match_image"]


def test_where_the_camera_is_is_asked_until_tf_knows(
    make_detector: MakeDetector, make_picture: MakePicture, tf: Tf
) -> None:
    publisher = Publisher(make_detector(body_frame="robot"))
    assert tf.listening
    publisher.show(make_picture(1, SIZE), 1)
    assert (publisher.said, tf.asked) == (["tf"], 1)
    assert publisher.outputs._mount("eye").position is None
    upright = Transform()
    upright.translation.x, upright.rotation.z, upright.rotation.w = 1.5, math.sqrt(0.5), 0.5**0.5
    tf.known["robot", "eye"] = upright
    publisher.said.clear()
    asked = tf.asked
    for _ in range(3):
        mount = publisher.outputs._mount("eye")
        assert mount.position is not None and mount.position.tolist() == [1.5, 0, 0]
        # What lies along the camera's x lies along the robot's y.
        np.testing.assert_allclose(mount.rotation @ (1, 0, 0), (0, 1, 0), atol=1e-12)
    assert tf.asked == asked + 1 and not publisher.said, "what tf knows is asked once"
    publisher.outputs._mount("another_eye")
    assert publisher.said == ["tf"]
    publisher.outputs.close()
    assert not publisher.graph.sent and not tf.listening


def test_without_tf_a_camera_looks_forward(
    make_detector: MakeDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tf2_ros", None)
    publisher = Publisher(make_detector())
    mount = publisher.outputs._mount("eye")
    assert mount.position is None and publisher.said == ["tf"]
    np.testing.assert_allclose(mount.rotation @ (0, 0, 1), (1, 0, 0), atol=1e-12)
    publisher.outputs.close()
    assert not publisher.graph.sent
