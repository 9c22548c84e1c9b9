"""The pose graph's node in a process of its own, spoken to over DDS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="rclpy cannot be imported: source a ROS 2")
pytest.importorskip("gtsam", reason="no GTSAM: pip install -r requirements/backend.txt")

# Tests keep to this machine and out of the way of a robot's own topics. Set before rclpy.init.
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_DOMAIN_ID"] = str(os.getpid() % 100 + 1)

import loops
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TransformStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from visualization_msgs.msg import MarkerArray
from vpr_lite_ros.msg import LoopClosure

from vpr_lite_ros.backend.accuracy import compare
from vpr_lite_ros.backend.graph import Closure
from vpr_lite_ros.bags import Poses
from vpr_lite_ros.messages import stamp_ns, to_time
from vpr_lite_ros.relative_pose import PoseType

BETTER = 3.0
"""Closures make the demo drive's map at least this many times better, here with a margin."""


class Robot:
    """Wheels, a detector and a listener in one namespace with the node under test."""

    def __init__(self, context: Any, namespace: str, log: Path) -> None:
        self.namespace, self.log = namespace, log
        self.node = rclpy.create_node("robot", namespace=namespace, context=context)
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        latched = QoSProfile(
            depth=1000,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        self.wheels = self.node.create_publisher(Odometry, "odom", 1000)
        self.detector = self.node.create_publisher(LoopClosure, "loop_closures", latched)
        self.heard: dict[str, list[Any]] = {}
        for kind, topic in (
            (PathMessage, "path"),
            (TransformStamped, "pose_graph/map_to_odom"),
            (MarkerArray, "pose_graph/markers"),
            (DiagnosticArray, "/diagnostics"),
        ):
            heard = self.heard[topic.rsplit("/", 1)[-1]] = []
            self.node.create_subscription(kind, topic, heard.append, 10)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *parameters: str) -> None:
        command = [sys.executable, "-m", "vpr_lite_ros.backend.node", "--ros-args"]
        command += ["-r", f"__ns:={self.namespace}", *parameters]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.wait(lambda: self.wheels.get_subscription_count() == 1, "the node to listen")
        self.wait(lambda: self.node.count_publishers("path") == 1, "the node to speak")
        # Its timers run by then, and it has found our topics as we have found its own.
        self.wait(lambda: bool(self.heard["diagnostics"]), "the node's first diagnostics")

    def wait(self, done: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while not done():
            self.executor.spin_once(timeout_sec=0.05)
            assert time.monotonic() < until, f"waited {timeout_s} s for {what}"

    def drive(self, odometry: Poses, rows: range) -> None:
        assert odometry.stamps_ns is not None and odometry.quaternions is not None
        for row in rows[: len(odometry) - rows.start]:
            message = Odometry(child_frame_id="base_link")
            message.header.frame_id = "odom"
            message.header.stamp = to_time(int(odometry.stamps_ns[row]))
            at, turn = message.pose.pose.position, message.pose.pose.orientation
            at.x, at.y, at.z = odometry.xyz[row].tolist()
            turn.x, turn.y, turn.z, turn.w = odometry.quaternions[row].tolist()
            self.wheels.publish(message)
            self.executor.spin_once(timeout_sec=0.0)

    def recognise(self, closure: Closure, **fields: Any) -> None:
        message = LoopClosure(pose_type=int(closure.pose_type), **fields)
        message.header.frame_id = "base_link"
        message.header.stamp = to_time(closure.query_ns)
        message.match_stamp = to_time(closure.match_ns)
        pose = message.relative_pose.pose
        pose.position.x, pose.position.y, pose.position.z = map(float, closure.translation)
        turn = pose.orientation
        turn.x, turn.y, turn.z, turn.w = map(float, closure.quaternion)
        message.relative_pose.covariance = closure.covariance.ravel()
        self.detector.publish(message)

    def counts(self) -> dict[str, str]:
        """What the node says of itself in its newest diagnostics."""
        name = f"{self.namespace.lstrip('/')}/pose_graph: pose graph"
        for array in reversed(self.heard["diagnostics"]):
            for status in array.status:
                if status.name == name:
                    return {pair.key: pair.value for pair in status.values}
        return {}

    def path(self, last_ns: int) -> Poses:
        """The path, once it reaches to ``last_ns`` and holds all that the node has heard."""
        self.heard["diagnostics"].clear()

        def arrived() -> bool:
            heard = self.heard["path"]
            # Between two diagnostics the node puts out a path, if there is a new one.
            return (
                len(self.heard["diagnostics"]) >= 2
                and bool(heard)
                and stamp_ns(heard[-1].header.stamp) == last_ns
            )

        self.wait(arrived, "the whole path")
        poses = [one.pose for one in self.heard["path"][-1].poses]
        return Poses(
            np.array([[one.position.x, one.position.y, one.position.z] for one in poses]),
            np.array([stamp_ns(one.header.stamp) for one in self.heard["path"][-1].poses]),
            None,
            np.array([[getattr(one.orientation, axis) for axis in "xyzw"] for one in poses]),
        )

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
        self.executor.shutdown()
        self.node.destroy_node()


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    context = rclpy.Context()
    rclpy.init(context=context)
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def robot(context: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Robot]:
    robot = Robot(context, f"/{request.node.name}", tmp_path / "log.txt")
    yield robot
    robot.close()


def test_the_map_is_nearer_to_the_truth_than_odometry(robot: Robot) -> None:
    truth, odometry = loops.drive()
    assert odometry.stamps_ns is not None
    robot.start()
    found = loops.closures(truth, PoseType.ROTATION_AND_DIRECTION)
    row = 0
    for closure in found:
        # A detector takes its time: the robot is half a second further on by then.
        here = int(np.searchsorted(odometry.stamps_ns, closure.query_ns)) + 3
        robot.drive(odometry, range(row, here))
        robot.recognise(closure)
        robot.recognise(closure)
        row = here
    robot.wait(lambda: robot.counts().get("used") == str(len(found)), "all closures to be used")
    robot.drive(odometry, range(row, len(odometry)))
    path = robot.path(int(odometry.stamps_ns[-1]))

    driven = loops.at(odometry, path)
    assert len(driven) == len(path) > 100
    before, after = compare(driven, truth), compare(path, truth)
    assert before.figures["ate_m"] > BETTER * after.figures["ate_m"]
    assert before.figures["ate_start_m"] > BETTER * after.figures["ate_start_m"]
    ends = [np.linalg.norm(one.xyz[-1] - truth.xyz[-1]) for one in (before, after)]
    assert ends[0] > BETTER * ends[1]

    counts = robot.counts()
    assert counts["duplicate"] == str(len(found)) and counts["taken for false"] == "0"
    # map to odom takes the odometry's last pose to the path's.
    robot.heard["map_to_odom"].clear()
    robot.wait(lambda: bool(robot.heard["map_to_odom"]), "map to odom")
    message = robot.heard["map_to_odom"][-1]
    assert (message.header.frame_id, message.child_frame_id) == ("map", "odom")
    shift, turn = message.transform.translation, message.transform.rotation
    yaw = 2 * np.arctan2(turn.z, turn.w)
    x, y, _ = odometry.xyz[-1]
    at = (np.cos(yaw) * x - np.sin(yaw) * y + shift.x, np.sin(yaw) * x + np.cos(yaw) * y + shift.y)
    np.testing.assert_allclose(at, path.xyz[-1, :2], atol=1e-6)
    lines = next(one for one in robot.heard["markers"][-1].markers if one.ns == "closures")
    assert len(lines.points) == 2 * len(found)
    assert robot.stop() == 0


def test_joining_late_breaks_nothing(robot: Robot) -> None:
    truth, odometry = loops.drive()
    assert odometry.stamps_ns is not None
    found = loops.closures(truth, PoseType.ROTATION)
    middle = int(np.searchsorted(odometry.stamps_ns, found[4].query_ns)) + 1
    for closure in found[:5]:
        robot.recognise(closure)
    robot.start()
    # What was said before it came is told to it; it waits for odometry.
    robot.wait(lambda: robot.counts().get("waiting") == "5", "closures from before its time")
    robot.drive(odometry, range(middle, len(odometry)))
    robot.wait(lambda: robot.counts().get("no odometry at the query") == "5", "a verdict on them")
    robot.recognise(found[-1])
    robot.wait(lambda: robot.counts().get("no odometry at the match") == "1", "a verdict")
    now = found[-1].query_ns
    robot.recognise(Closure(now, now - 2 * 10**9, PoseType.NONE))
    robot.wait(lambda: robot.counts().get("used") == "1", "a closure within what it has seen")
    # Another robot's place, or one of another day: this trajectory has no pose of it.
    for other in ({"match_robot_id": 1}, {"match_session": "monday"}):
        robot.recognise(Closure(now, now - 3 * 10**9, PoseType.NONE), **other)
    robot.wait(lambda: robot.counts().get("other session") == "2", "a verdict on both")
    assert robot.counts()["used"] == "1"
    path = robot.path(int(odometry.stamps_ns[-1]))
    off = path.xyz - loops.at(odometry, path).xyz
    assert np.linalg.norm(off, axis=1).max() < 5
    log = robot.log.read_text()
    assert log.count("not used: no odometry at the match") == 1

    # The bag is played again: the clock jumps back, and a new drive begins.
    robot.drive(odometry, range(50))
    path = robot.path(int(odometry.stamps_ns[49]))
    assert path.stamps_ns is not None and path.stamps_ns[0] == odometry.stamps_ns[0]
    assert "a new drive" in robot.log.read_text()
    assert robot.stop() == 0


def test_a_parameter_that_cannot_be_is_refused(robot: Robot) -> None:
    command = [sys.executable, "-m", "vpr_lite_ros.backend.node"]
    command += ["--ros-args", "-p", "place_m:=-1.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "parameter place_m: -1.0 is not above 0" in done.stderr + done.stdout
