"""What an active node listens to: images, their calibration and depth, and odometry."""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from nav_msgs.msg import Odometry
from rclpy.clock import Clock
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage
from std_msgs.msg import Header

from vpr_lite_ros import messages
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import Pose
from vpr_lite_ros.depth import (
    DEPTH_TOLERANCE_NS,
    PATIENCE_S,
    Depth,
    DepthBuffer,
    decode_depth,
)
from vpr_lite_ros.health import Finding, StreamHealth
from vpr_lite_ros.image import Image, ImageError
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.odometry import ODOMETRY_TOLERANCE_NS
from vpr_lite_ros.tally import Tally

GRAPH_PERIOD_S = 0.25
"""How often to look whether publishers of images have come, and what QoS they offer."""
IMAGES_BEFORE_CAMERA_INFO = 30
"""Calibration that has not come with so many images is said to be missing."""

AnyImage: TypeAlias = ImageMessage | CompressedImage
Say = Callable[[str, str], None]


@dataclass
class _Stream:
    """Images of one topic, subscribed to as their publishers offer them."""

    topic: str
    kind: Any
    take: Callable[[Any], None]
    subscription: Subscription | None = None
    reliability: ReliabilityPolicy | None = None


class Inputs:
    """The subscriptions of ``node``, from now until ``close``.

    Callbacks run in the executor's thread; ``pose_at`` and ``camera`` are for any, ``depth_of``,
    which waits for one, for any other.

    Parameters
    ----------
    clock
        Of the timer that watches publishers.
    give
        Takes each image.
    say
        Takes what a person should know, with a name under which it is said only once.
    """

    def __init__(
        self,
        node: Node,
        config: Config,
        clock: Clock,
        tally: Tally,
        give: Callable[[AnyImage], None],
        say: Say,
    ) -> None:
        self._node, self._tally, self._give, self._say = node, tally, give, say
        compressed = config.image_transport == "compressed"
        self._wanted = config.qos.image
        self.image_topic: str = node.resolve_topic_name(
            "image/compressed" if compressed else "image"
        )
        self._images = _Stream(
            self.image_topic, CompressedImage if compressed else ImageMessage, self._on_image
        )
        self._depths = _Stream(node.resolve_topic_name("depth"), ImageMessage, self._on_depth)
        self.camera: Camera | None = None
        """Of the last calibration that came."""
        self.odometry_frame = "odom"
        self._poses: deque[tuple[int, Pose]] = deque(maxlen=1000)
        self._lock = threading.Lock()
        self._health, self._health_lock = StreamHealth(), threading.Lock()
        self._depth = DepthBuffer()
        self._any_image = False
        self._publishers_trouble = ""
        # Odometry comes fast and must not be lost while an image is being taken.
        odometry_qos = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
        self._subscriptions = [
            node.create_subscription(
                CameraInfo, "camera_info", self._on_camera_info, qos_profile_sensor_data
            ),
            node.create_subscription(Odometry, "odom", self._on_odometry, odometry_qos),
        ]
        self._timer = node.create_timer(GRAPH_PERIOD_S, self._look_for_publishers, clock=clock)
        self._look_for_publishers()

    def close(self) -> None:
        """Listen no more."""
        self._node.destroy_timer(self._timer)
        for subscription in (
            self._images.subscription,
            self._depths.subscription,
            *self._subscriptions,
        ):
            if subscription is not None:
                self._node.destroy_subscription(subscription)

    def pose_at(self, stamp_ns: int) -> Pose | None:
        """The odometry pose nearest in time, if one is near enough."""
        with self._lock:
            poses = list(self._poses)
        after = bisect.bisect_left(poses, stamp_ns, key=lambda item: item[0])
        near = poses[max(0, after - 1) : after + 1]
        if not near:
            return None
        stamp, pose = min(near, key=lambda item: abs(item[0] - stamp_ns))
        return pose if abs(stamp - stamp_ns) <= ODOMETRY_TOLERANCE_NS else None

    def depth_of(self, header: Header, image: Image) -> Depth | None:
        """The depth image that was taken with an image, if the robot has depth and it fits."""
        if self._depth.empty:
            return None
        message = self._depth.nearest(messages.stamp_ns(header.stamp))
        try:
            if message is None:
                raise ImageError(
                    "none near",
                    f"no depth image came within {DEPTH_TOLERANCE_NS / 1e6:.0f} ms of its stamp, "
                    f"{PATIENCE_S:g} s after it at the latest",
                )
            depth = decode_depth(message, header.frame_id, (image.shape[1], image.shape[0]))
        except ImageError as error:
            self._tally.count(f"no depth: {error.cause}")
            self._say(
                f"depth {error.cause}",
                f"an image without depth, {self._depths.topic}: {error} (said once; further ones "
                "are counted in /diagnostics)",
            )
            return None
        self._tally.count("images with depth")
        return depth

    def look_at(self, image: Image) -> None:
        """Judge the picture of an image that came: RGB, (H, W, 3)."""
        with self._health_lock:
            self._health.see_image(image)

    def findings(self) -> list[Finding]:
        """What is wrong with the latest images and stamps, worst first."""
        with self._health_lock:
            return self._health.findings(time.monotonic_ns())

    @property
    def rate_hz(self) -> float:
        """Images a second, by their stamps, as long as they came; 0 before there are two."""
        with self._health_lock:
            rate = self._health.rate_hz
        return 0.0 if math.isnan(rate) else rate

    @property
    def trouble(self) -> str:
        """Why no image has come, as far as that can be told; empty if one has."""
        if self._publishers_trouble or self._any_image:
            return self._publishers_trouble
        return f"{self.image_topic} has a publisher, but no image has arrived yet"

    def _look_for_publishers(self) -> None:
        """Say what is wrong with those of images; subscribe as they offer it."""
        offered = self._offered(self._images.topic)
        self._publishers_trouble = ""
        if not offered:
            self._publishers_trouble = (
                f"nobody publishes {self.image_topic}: does the camera's driver run, and is that "
                "the topic it uses (image_topic, image_transport)?"
            )
        elif self._wanted == "reliable" and ReliabilityPolicy.BEST_EFFORT in offered:
            self._publishers_trouble = (
                f"{self.image_topic} is offered best_effort and asked for reliable: no image "
                "comes through. Set qos.image to auto"
            )
        self._subscribe(self._images, self._wanted, offered)
        self._subscribe(self._depths, "auto", self._offered(self._depths.topic))

    def _offered(self, topic: str) -> set[ReliabilityPolicy]:
        publishers = self._node.get_publishers_info_by_topic(topic)
        return {publisher.qos_profile.reliability for publisher in publishers}

    def _subscribe(self, stream: _Stream, wanted: str, offered: set[ReliabilityPolicy]) -> None:
        """As ``wanted`` says, and anew when publishers come whose QoS asks for it."""
        if wanted == "auto":
            if not offered:
                return
            wanted = "reliable" if offered == {ReliabilityPolicy.RELIABLE} else "best_effort"
        reliability = ReliabilityPolicy[wanted.upper()]
        if reliability == stream.reliability:
            return
        if stream.subscription is not None:
            self._node.destroy_subscription(stream.subscription)
        # Deep enough that images are dropped, and counted, here and not by the middleware.
        qos = QoSProfile(depth=10, reliability=reliability)
        stream.subscription = self._node.create_subscription(
            stream.kind, stream.topic, stream.take, qos
        )
        stream.reliability = reliability
        self._node.get_logger().info(f"listening to {stream.topic}, {wanted}")

    def _on_image(self, message: AnyImage) -> None:
        self._any_image = True
        self._tally.count("images")
        with self._health_lock:
            self._health.see_stamp(messages.stamp_ns(message.header.stamp), time.monotonic_ns())
        self._give(message)
        if self.camera is None and self._tally.images == IMAGES_BEFORE_CAMERA_INFO:
            self._say(
                "no camera_info",
                f"no calibration on {self._node.resolve_topic_name('camera_info')}: closures are "
                "not checked by epipolar geometry and have no relative pose",
            )

    def _on_depth(self, message: ImageMessage) -> None:
        self._tally.count("depth images")
        self._depth.put(messages.stamp_ns(message.header.stamp), message)

    def _on_camera_info(self, message: CameraInfo) -> None:
        try:
            self.camera = messages.to_camera(message)
        except ValueError as error:
            self._say("camera_info", f"camera_info is not used, no epipolar check: {error}")

    def _on_odometry(self, message: Odometry) -> None:
        try:
            pose = messages.to_pose(message)
        except ValueError as error:
            self._say("odometry", f"an odometry message is not used: {error}")
            return
        stamp = messages.stamp_ns(message.header.stamp)
        self._tally.count("odometry")
        with self._lock:
            if self._poses and stamp <= self._poses[-1][0]:
                self._poses.clear()  # a bag that loops, a clock that was set
            self._poses.append((stamp, pose))
            self.odometry_frame = message.header.frame_id or "odom"
