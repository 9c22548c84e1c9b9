"""Does this topic fit? What ``vpr-lite doctor --topic`` hears of it; needs ROS."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import rclpy
from nav_msgs.msg import Odometry
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage

from vpr_lite_ros.config import Config
from vpr_lite_ros.doctor import ok, problem, warning
from vpr_lite_ros.health import Finding, StreamHealth
from vpr_lite_ros.inspection import (
    NO_ODOMETRY,
    Stream,
    camera_info_beside,
    judge_camera,
    judge_odometry,
    no_camera_info,
    with_a_pose,
)
from vpr_lite_ros.messages import stamp_ns

DISCOVERY_S = 5.0
"""How long to wait for publishers."""
LOOK_EVERY_S = 0.1
"""Decoding each image of a fast camera would make this listener late, and the camera seem so."""
CLOCK_TOLERANCE_S = 5.0
LARGE_BYTES = 200_000
IMAGES = {
    "sensor_msgs/msg/Image": ImageMessage,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
}


@contextmanager
def listener(name: str) -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    """A node that only listens, and what spins it. Ctrl-C stays with the caller."""
    context = rclpy.Context()
    rclpy.init(args=[], context=context, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = rclpy.create_node(name, context=context, start_parameter_services=False)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        try:
            yield node, executor
        finally:
            executor.shutdown()
            node.destroy_node()
    finally:
        rclpy.try_shutdown(context=context)


def topic(
    name: str,
    settings: Config,
    *,
    camera_info_topic: str | None,
    odom_topic: str | None,
    seconds: float,
) -> Iterator[Finding]:
    """Listen to the images on topic ``name`` for ``seconds``, as the node would.

    An empty ``odom_topic`` does without odometry; None takes the only one there is.
    """
    with listener("vpr_lite_doctor") as (node, executor):

        def spin(done: Callable[[], bool], timeout_s: float) -> bool:
            until = time.monotonic() + timeout_s
            while not done() and time.monotonic() < until:
                executor.spin_once(timeout_sec=0.05)
            return done()

        name = node.resolve_topic_name(name)
        if not spin(lambda: node.count_publishers(name) > 0, DISCOVERY_S):
            yield _nobody(node, name)
            return
        # Others of the same topic show up a little later than the first.
        spin(lambda: False, 0.5)
        publishers = node.get_publishers_info_by_topic(name)
        kinds = sorted({publisher.topic_type for publisher in publishers})
        kind = next((IMAGES[one] for one in kinds if one in IMAGES), None)
        if kind is None or len(kinds) > 1:
            yield problem(
                name,
                f"its type is {', '.join(kinds)}",
                f"Pass a topic of {' or '.join(IMAGES)} alone.",
            )
            return
        yield from _publishers(publishers)
        yield from _transport(name, kind, settings)
        judged, reliability = judge_qos(publishers, settings.qos.image)
        yield judged

        ears = _Ears(node, name, kind, reliability)
        info_topic = node.resolve_topic_name(camera_info_topic or camera_info_beside(name))
        ears.listen_to_camera_info(info_topic)
        found = ears.listen_to_odometry(odom_topic)
        spin(lambda: False, seconds)
        yield from ears.findings(info_topic, found)


class _Ears:
    """What was heard of images, calibration and odometry."""

    def __init__(self, node: Node, name: str, kind: type, reliability: ReliabilityPolicy) -> None:
        self.node, self.name = node, name
        self.stream = Stream(StreamHealth(), "images")
        self.info: CameraInfo | None = None
        self.odometry_ns: list[int] = []
        self.odometry_topics: list[str] = []
        self.behind_s: list[float] = []
        self.bytes = 0
        self._looked = 0.0
        self._reliability = reliability
        node.create_subscription(
            kind, name, self._on_image, QoSProfile(depth=10, reliability=reliability)
        )

    def listen_to_camera_info(self, name: str) -> None:
        def keep(message: CameraInfo) -> None:
            self.info = message

        self.node.create_subscription(CameraInfo, name, keep, qos_profile_sensor_data)

    def listen_to_odometry(self, wanted: str | None) -> list[str]:
        """Listen to ``wanted``, or to the only odometry there is; return what there is."""
        if wanted == "":
            return []
        there = [
            name
            for name, kinds in self.node.get_topic_names_and_types()
            if "nav_msgs/msg/Odometry" in kinds and self.node.count_publishers(name)
        ]
        topics = there if wanted is None else [self.node.resolve_topic_name(wanted)]
        if len(topics) == 1:
            self.node.create_subscription(
                Odometry,
                topics[0],
                self._on_odometry,
                QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT),
            )
        return topics

    def _on_image(self, message: Any) -> None:
        now = time.monotonic()
        stamp = stamp_ns(message.header.stamp)
        self.stream.note_message(message, stamp, round(now * 1e9))
        self.bytes = max(self.bytes, len(message.data))
        if stamp:
            self.behind_s.append(time.time() - stamp / 1e9)
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self.stream.look_at(message)

    def _on_odometry(self, message: Odometry) -> None:
        self.odometry_ns.append(stamp_ns(message.header.stamp))

    def findings(self, info_topic: str, odometry: list[str]) -> Iterator[Finding]:
        stream = self.stream
        if not stream.count:
            yield problem(
                "silence",
                f"{self.name} has a publisher, but no image came",
                "Look whether its driver delivers (ros2 topic hz), whether a firewall or "
                "ROS_DOMAIN_ID stands between, and for large images on a network the kernel's "
                "net.core.rmem_max.",
            )
            return
        yield from stream.findings(self.name)
        if self._reliability is ReliabilityPolicy.BEST_EFFORT and self.bytes > LARGE_BYTES:
            yield warning(
                "large images",
                f"{self.bytes / 1e6:.1f} MB each, best effort: the middleware loses most that it "
                "has to cut into packets",
                "Let the driver publish reliably, or use image_transport: compressed; raise "
                "net.core.rmem_max.",
            )
        yield from self._judge_clock()
        if self.info is None:
            yield no_camera_info(f"nothing came on {info_topic}")
        else:
            size = next((size for size, _ in stream.sizes.most_common(1)), None)
            info = self.info
            yield judge_camera(
                info_topic, (info.width, info.height), info.k, info.d, info.distortion_model, size
            )
        yield self._judge_odometry(odometry)

    def _judge_clock(self) -> Iterator[Finding]:
        if self.node.count_publishers("/clock"):
            yield ok("clock", "simulated (/clock): run the node with use_sim_time:=true")
        elif self.behind_s and abs(behind := float(np.median(self.behind_s))) > CLOCK_TOLERANCE_S:
            yield warning(
                "clock",
                f"stamps are {abs(behind):.3g} s {'behind' if behind > 0 else 'ahead of'} this "
                "machine's clock",
                "Let camera, odometry and tf bear stamps of one clock. A bag that plays looks "
                "the same: play it with --clock, and set use_sim_time.",
            )

    def _judge_odometry(self, topics: list[str]) -> Finding:
        if not topics:
            return NO_ODOMETRY
        if len(topics) > 1:
            return warning(
                "odometry",
                f"{len(topics)} topics: {', '.join(topics)}",
                "Remap the one to use to odom (odom_topic of the launch file).",
            )
        stamps_ns = self.stream.stamps_ns
        return judge_odometry(topics[0], with_a_pose(stamps_ns, self.odometry_ns), len(stamps_ns))


def _nobody(node: Node, name: str) -> Finding:
    there = [
        other
        for other, kinds in node.get_topic_names_and_types()
        if IMAGES.keys() & set(kinds) and node.count_publishers(other)
    ]
    return problem(
        name,
        f"nobody publishes it; image topics: {', '.join(sorted(there)) or 'none'}",
        "Pass one of these (image_topic of the launch file)."
        if there
        else "Start the camera's driver; look at ROS_DOMAIN_ID and the network if it runs.",
    )


def _publishers(publishers: list[Any]) -> Iterator[Finding]:
    names = sorted(f"{one.node_namespace.rstrip('/')}/{one.node_name}" for one in publishers)
    if len(names) > 1:
        yield warning(
            "publishers",
            f"{len(names)}: {', '.join(names)}",
            "Let one camera alone publish the topic: mixed images recognise nothing.",
        )
    else:
        yield ok("publisher", names[0])


def _transport(name: str, kind: type, settings: Config) -> Iterator[Finding]:
    transport = "compressed" if kind is CompressedImage else "raw"
    if transport != settings.image_transport:
        yield warning(
            "image_transport",
            f"{name} is {transport}, the parameter says {settings.image_transport}",
            f"Set image_transport: {transport}"
            + (
                ", and pass the topic without /compressed as image_topic."
                if transport == "compressed"
                else "."
            ),
        )


def judge_qos(publishers: list[Any], asked: str) -> tuple[Finding, ReliabilityPolicy]:
    """What publishers offer against ``qos.image``, and what to subscribe with to hear them."""
    profiles = [publisher.qos_profile for publisher in publishers]
    offered = sorted({profile.reliability.name.lower() for profile in profiles})
    durable = sorted({profile.durability.name.lower() for profile in profiles})
    seen = f"offered: {', '.join(offered)}, {', '.join(durable)}; asked for (qos.image): {asked}"
    everyone = offered == ["reliable"]
    if asked == "reliable" and not everyone:
        # Listen all the same, to see what the images are like.
        return (
            problem(
                "qos",
                f"{seen}: a reliable subscription does not hear a best_effort publisher",
                "Set qos.image: auto (or best_effort), or let the driver publish reliably.",
            ),
            ReliabilityPolicy.BEST_EFFORT,
        )
    reliable = everyone and asked != "best_effort"
    policy = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
    return ok("qos", f"{seen}; fits, as {policy.name.lower()}"), policy
