"""What a configured node publishes: decisions, closures, pictures, markers, keyframes."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import rclpy
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image as ImageMessage
from std_msgs.msg import Header
from visualization_msgs.msg import MarkerArray

from vpr_lite_ros import messages
from vpr_lite_ros.candidate import Decision
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.image import Image, draw_matches
from vpr_lite_ros.inference import Bundle
from vpr_lite_ros.matching import Camera, Status
from vpr_lite_ros.msg import Keyframe as KeyframeMessage
from vpr_lite_ros.msg import LoopClosure
from vpr_lite_ros.node_inputs import Say
from vpr_lite_ros.relative_pose import Mount
from vpr_lite_ros.tally import Tally

CLOSURES_KEPT = 10_000
"""Closures that ``~/get_loop_closures`` remembers."""


class Outputs:
    """The publishers of ``node``, from now until ``close``.

    Parameters
    ----------
    lock
        Guards ``database``.
    say
        Takes what a person should know, with a name under which it is said only once.
    """

    def __init__(
        self,
        node: Node,
        config: Config,
        bundle: Bundle,
        database: KeyframeDatabase,
        lock: threading.Lock,
        tally: Tally,
        say: Say,
    ) -> None:
        self._node, self._config, self._bundle = node, config, bundle
        self._database, self._lock, self._tally, self._say = database, lock, tally, say
        self.closures: deque[LoopClosure] = deque(maxlen=CLOSURES_KEPT)
        """The latest, oldest first."""
        self._mounts: dict[str, Mount] = {}
        # A back end that joins late still gets what was found before, if it asks for it.
        latched = QoSProfile(
            depth=1000,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        self._closure_topic = node.create_publisher(LoopClosure, "loop_closures", latched)
        self._decision_topic = node.create_publisher(LoopClosure, "~/decisions", latched)
        self._match_image_topic = node.create_publisher(ImageMessage, "~/match_image", 10)
        self._marker_topic = node.create_publisher(MarkerArray, "~/markers", 1)
        self._keyframe_topic = node.create_publisher(KeyframeMessage, "keyframes", 10)
        self._tf_buffer: Any = None
        try:
            import tf2_ros
        except ImportError:
            return
        self._tf_buffer = tf2_ros.Buffer()
        self._tf_listener = tf2_ros.TransformListener(self._tf_buffer, node)

    def close(self) -> None:
        """Publish no more."""
        for topic in (
            self._closure_topic,
            self._decision_topic,
            self._match_image_topic,
            self._marker_topic,
            self._keyframe_topic,
        ):
            self._node.destroy_publisher(topic)
        if self._tf_buffer is not None:
            self._tf_listener.unregister()

    def publish(
        self,
        decision: Decision,
        header: Header,
        image: Image,
        *,
        camera: Camera | None,
        odometry_frame: str,
        latency_ms: float,
    ) -> None:
        """Say what was decided on the image of ``header``, and show it to those who listen.

        What is large goes first. All that a process publishes shares a small buffer (of Fast DDS's
        shared memory, half a megabyte), in which a picture overwrites messages that were not taken
        out yet: they are sent again, but up to three seconds later.
        """
        outgoing = self.to_messages(decision, header.frame_id, latency_ms)
        if decision.closure is not None:
            self.closures.append(outgoing[0])
        try:
            if self._keyframe_topic.get_subscription_count():
                self._share(decision, header, camera)
            if decision.closure is not None and self._match_image_topic.get_subscription_count():
                self._publish_match_image(decision, image)
            if self._marker_topic.get_subscription_count():
                with self._lock:
                    poses = self._database.poses()
                closures = list(self.closures)
                self._marker_topic.publish(
                    messages.to_markers(odometry_frame, poses, self._database.session, closures)
                )
        finally:  # a picture that cannot be drawn costs no closure
            for message in outgoing:
                self._tally.count(f"decisions: {Status(message.status).name}")
                self._decision_topic.publish(message)
            if decision.closure is not None:
                self._closure_topic.publish(outgoing[0])

    def to_messages(
        self, decision: Decision, camera_frame: str, latency_ms: float
    ) -> list[LoopClosure]:
        """One message for each candidate, the closure first."""
        return messages.to_messages(
            decision,
            frame_id=self._config.body_frame,
            session=self._database.session,
            robot_id=self._config.robot_id,
            model_id=self._bundle.model_id,
            latency_ms=latency_ms,
            mount=self._mount(camera_frame),
        )

    def _share(self, decision: Decision, header: Header, camera: Camera | None) -> None:
        """Let other robots recognise this place."""
        if decision.keyframe_id is None or decision.description is None:
            return
        self._keyframe_topic.publish(
            messages.to_keyframe(
                header,
                robot_id=self._config.robot_id,
                session=self._database.session,
                model_id=self._bundle.model_id,
                description=decision.description,
                camera=camera,
            )
        )

    def _publish_match_image(self, decision: Decision, image: Image) -> None:
        closure = decision.closure
        assert closure is not None and closure.matches is not None
        assert closure.points is not None and decision.description is not None
        with self._lock:
            keyframe = self._database.thumbnail(closure.keyframe.id)
        picture = draw_matches(
            image,
            keyframe,
            decision.description.centres[closure.matches.query],
            closure.points,
            closure.fit.inliers if closure.fit else None,
        )
        message = ImageMessage(
            height=picture.shape[0],
            width=picture.shape[1],
            encoding="rgb8",
            step=picture.shape[1] * 3,
            data=picture.tobytes(),
        )
        message.header.stamp = messages.to_time(decision.stamp_ns)
        self._match_image_topic.publish(message)

    def _mount(self, camera_frame: str) -> Mount:
        """Where the camera is on the body, from tf if it is there."""
        if camera_frame in self._mounts:
            return self._mounts[camera_frame]
        if self._tf_buffer is not None:
            try:
                found = self._tf_buffer.lookup_transform(
                    self._config.body_frame, camera_frame, rclpy.time.Time()
                )
                mount = messages.to_mount(found.transform)
                self._mounts[camera_frame] = mount
                return mount
            except Exception:  # tf2's exceptions share no base class with a public name
                pass
        self._say(
            "tf",
            f"no transform from {self._config.body_frame} to {camera_frame!r} on tf: relative "
            "poses take the camera to look forward, upright, and to be a metre or so from there",
        )
        return Mount()
