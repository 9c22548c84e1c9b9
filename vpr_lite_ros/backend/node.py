"""The pose graph as a ROS 2 node: ``odom`` and ``loop_closures`` in, corrected ``path`` out.

An example of a back end that lives on what ``LoopClosure`` says, and small enough to copy: the
callbacks convert, ``graph.py`` does the work.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import gtsam
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Point, PoseStamped, Quaternion, TransformStamped
from nav_msgs.msg import Odometry, Path
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

from vpr_lite_ros import messages
from vpr_lite_ros.backend.graph import REJECTED_WEIGHT, Closure, Noise, PoseGraph, to_pose
from vpr_lite_ros.msg import LoopClosure
from vpr_lite_ros.node_process import run_node
from vpr_lite_ros.relative_pose import PoseType

TF_PERIOD_S, PATH_PERIOD_S = 0.1, 0.5
NEW_DRIVE_NS = 1_000_000_000
"""Odometry that jumps back by more than this begins a new drive: a bag was played again."""
NOISE_HELP = {
    "odometry_rotation": "Drift of the odometry's rotation, radians per square root of a metre.",
    "odometry_bias": "Turn of the odometry that is always the same, radians per metre.",
    "odometry_translation": "Drift of the odometry's position, metres per square root of a metre.",
    "odometry_turning": "Error of a turn on the spot, as a share of its angle.",
    "place_m": "Metres between two images of one place, where a closure does not say.",
    "kernel": "Standard deviations from which a closure counts less and less.",
}
"""Parameters of the node; standard deviations."""


class PoseGraphNode(Node):
    """Odometry and loop closures in, corrected path out."""

    def __init__(self, **node_options: Any) -> None:
        super().__init__("pose_graph", **node_options)
        self._map_frame = self._declare("map_frame", "map", "Frame of the corrected path.")
        self._noise = Noise(
            **{
                one.name: self._declare(one.name, one.default, NOISE_HELP[one.name])
                for one in fields(Noise)
            }
        )
        self._graph = PoseGraph(self._noise)
        self._odometry_frame, self._body_frame = "odom", ""
        self._newest_ns = 0
        self._changed = False
        self._said: set[str] = set()

        latched = QoSProfile(
            depth=1000,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        # Closures found before this node started come, too: the topic is transient local.
        self.create_subscription(LoopClosure, "loop_closures", self._on_closure, latched)
        self.create_subscription(
            Odometry,
            "odom",
            self._on_odometry,
            QoSProfile(depth=1000, reliability=ReliabilityPolicy.BEST_EFFORT),
        )
        newest = QoSProfile(
            depth=1,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        self._path_topic = self.create_publisher(Path, "path", newest)
        self._marker_topic = self.create_publisher(MarkerArray, "~/markers", newest)
        self._transform_topic = self.create_publisher(TransformStamped, "~/map_to_odom", newest)
        self._diagnostics_topic = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._tf_topic = self._make_tf_topic()
        # With use_sim_time, ROS time stands still when a bag ends; the last path must still go out.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(TF_PERIOD_S, self._publish_transform, clock=steady)
        self.create_timer(PATH_PERIOD_S, self._publish_path, clock=steady)
        self.create_timer(1.0, self._publish_diagnostics, clock=steady)

    def _declare(self, name: str, default: Any, description: str) -> Any:
        descriptor = ParameterDescriptor(description=description, read_only=True)
        value = self.declare_parameter(name, default, descriptor).value
        if isinstance(default, float) and not value > 0:
            raise ValueError(f"parameter {name}: {value} is not above 0")
        return value

    def _make_tf_topic(self) -> Any:
        # tf2_ros' broadcaster does no more than this; its message is all that is needed.
        try:
            from tf2_msgs.msg import TFMessage
        except ImportError:
            self.get_logger().warning(
                "tf2_msgs is not installed: map to odom goes out on ~/map_to_odom, not on /tf"
            )
            return None
        self._tf_message = TFMessage
        return self.create_publisher(TFMessage, "/tf", 100)

    # -- what comes in -------------------------------------------------------------------------

    def _on_odometry(self, message: Odometry) -> None:
        stamp = messages.stamp_ns(message.header.stamp)
        try:
            pose = messages.to_pose(message)
        except ValueError as error:
            self._say_once("odometry", f"an odometry message is not used: {error}")
            return
        if stamp < self._newest_ns - NEW_DRIVE_NS:
            self.get_logger().warning(
                f"odometry jumps back by {(self._newest_ns - stamp) / 1e9:.1f} s: a new drive"
            )
            self._graph = PoseGraph(self._noise)
            self._newest_ns = 0
        self._odometry_frame = message.header.frame_id or "odom"
        self._body_frame = message.child_frame_id
        self._graph.add_odometry(stamp, pose)
        self._newest_ns = max(stamp, self._newest_ns)
        self._changed = True

    def _on_closure(self, message: LoopClosure) -> None:
        frame = message.header.frame_id
        if self._body_frame and frame != self._body_frame:
            self._say_once(
                "frame",
                f"closures are of {frame!r}, odometry is of {self._body_frame!r}: set the "
                "detector's body_frame to the odometry's child_frame_id",
            )
        closure = to_closure(message)
        outcome = self._graph.add_closure(closure)
        if outcome not in ("used", "waiting"):
            self._say_once(
                outcome,
                f"closure of {closure.query_ns} with {closure.match_ns} ns not used: {outcome} "
                "(said once; further ones are counted in /diagnostics)",
            )
        self._changed = True

    # -- what goes out -------------------------------------------------------------------------

    def _publish_transform(self) -> None:
        if not self._newest_ns:
            return
        found = self._graph.correction()
        transform = TransformStamped(child_frame_id=self._odometry_frame)
        transform.header.frame_id = self._map_frame
        transform.header.stamp = messages.to_time(self._newest_ns)
        at = _point(found)
        translation = transform.transform.translation
        translation.x, translation.y, translation.z = at.x, at.y, at.z
        transform.transform.rotation = _turn(found)
        self._transform_topic.publish(transform)
        if self._tf_topic is not None:
            self._tf_topic.publish(self._tf_message(transforms=[transform]))

    def _publish_path(self) -> None:
        if not self._changed or not self._newest_ns:
            return
        self._changed = False
        stamps, poses = self._graph.trajectory()
        path = Path()
        path.header.frame_id = self._map_frame
        path.header.stamp = messages.to_time(self._newest_ns)
        for stamp, pose in zip(stamps.tolist(), poses, strict=True):
            one = PoseStamped()
            one.header.frame_id = self._map_frame
            one.header.stamp = messages.to_time(stamp)
            one.pose.position, one.pose.orientation = _point(pose), _turn(pose)
            path.poses.append(one)
        self._path_topic.publish(path)
        if self._marker_topic.get_subscription_count():
            self._marker_topic.publish(self._markers([_point(pose) for pose in poses]))

    def _markers(self, points: list[Point]) -> MarkerArray:
        """The graph: its poses, the closures it believes and those it takes for false."""
        nodes = Marker(ns="poses", id=0, type=Marker.POINTS, points=points)
        nodes.color = ColorRGBA(r=0.3, g=0.5, b=0.9, a=1.0)
        believed = Marker(ns="closures", id=1, type=Marker.LINE_LIST)
        believed.color = ColorRGBA(r=0.2, g=0.85, b=0.2, a=1.0)
        rejected = Marker(ns="rejected", id=2, type=Marker.LINE_LIST)
        rejected.color = ColorRGBA(r=1.0, g=0.5, b=0.0, a=0.6)
        for _, query, match, weight in self._graph.closures():
            lines = rejected if weight < REJECTED_WEIGHT else believed
            lines.points += [_point(query), _point(match)]
        for marker in (nodes, believed, rejected):
            marker.header.frame_id = self._map_frame
            marker.pose.orientation.w = 1.0
            marker.scale.x = marker.scale.y = 0.15
        return MarkerArray(markers=[nodes, believed, rejected])

    def _publish_diagnostics(self) -> None:
        level, text = DiagnosticStatus.OK, "running"
        if not self._newest_ns:
            level, text = DiagnosticStatus.WARN, "no odometry has arrived yet"
        array = messages.to_diagnostics(
            self.get_clock().now().to_msg(),
            self.get_fully_qualified_name().lstrip("/"),
            int.from_bytes(level, "little"),
            text,
            {
                "used": 0,
                **dict(sorted(self._graph.counts.items())),
                "waiting": self._graph.waiting,
                "taken for false": sum(
                    weight < REJECTED_WEIGHT for *_, weight in self._graph.closures()
                ),
            },
        )
        array.status[0].name = f"{self.get_fully_qualified_name().lstrip('/')}: pose graph"
        self._diagnostics_topic.publish(array)

    def _say_once(self, cause: str, text: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            self.get_logger().warning(text)


def to_closure(message: LoopClosure) -> Closure:
    """What the graph needs of the message."""
    pose = message.relative_pose.pose
    at, turn = pose.position, pose.orientation
    return Closure(
        messages.stamp_ns(message.header.stamp),
        messages.stamp_ns(message.match_stamp),
        PoseType(message.pose_type),
        (at.x, at.y, at.z),
        (turn.x, turn.y, turn.z, turn.w),
        np.array(message.relative_pose.covariance, np.float64).reshape(6, 6),
        # A session's name may be given; two robots may then both have a "monday".
        other_session=(message.robot_id, message.query_session)
        != (message.match_robot_id, message.match_session),
    )


def _point(pose: gtsam.Pose3) -> Point:
    x, y, z = to_pose(pose).position
    return Point(x=x, y=y, z=z)


def _turn(pose: gtsam.Pose3) -> Quaternion:
    x, y, z, w = to_pose(pose).quaternion
    return Quaternion(x=x, y=y, z=z, w=w)


def main(args: list[str] | None = None) -> int:
    """Run the node until Ctrl-C or SIGTERM. Returns the process's exit code."""
    return run_node(PoseGraphNode, lambda _: True, "pose_graph", args)


if __name__ == "__main__":
    sys.exit(main())
