"""The whole thing at work: a drive is played into the real node, and what it says is judged.

This is a ROS program of its own, a player and a listener: it meets the node on topics only, as
a robot's drivers and its SLAM back end would. Besides ``node.py`` it is the only module that
imports rclpy, and nothing imports it but the command line.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import rclpy
import yaml
from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from numpy.typing import NDArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage

from vpr_lite_ros.bags import Poses, SourceError, read_poses, write_drive
from vpr_lite_ros.config import Config, make_config
from vpr_lite_ros.drawing import draw_trajectory
from vpr_lite_ros.evaluation import RadiusTruth
from vpr_lite_ros.matching import Status
from vpr_lite_ros.messages import stamp_ns
from vpr_lite_ros.msg import LoopClosure
from vpr_lite_ros.playback import CAMERA_INFO, IMAGE, ODOMETRY, Playback
from vpr_lite_ros.progress import progress
from vpr_lite_ros.simulation import simulate_drive
from vpr_lite_ros.summary import Record, describe_evaluation, judge, percentile, write_json

NODE, BACK_END = "loop_closure", "pose_graph"
START_TIMEOUT_S = 60.0
DECISION_TIMEOUT_S = 5.0
FAREWELL_TIMEOUT_S = 20.0
DRIVE_SETTINGS = {"min_time_gap_s": 20.0, "min_closure_interval_s": 0.0}
"""On the demo drive a place comes again after 29 to 38 s; every keyframe that is recognised is
shown."""
DRIVE_SPEED = 3.0
"""Whoever tries it for the first time need not wait for a minute of driving."""
WRITTEN = ("trajectory.png", "map.png", "report.json")
PICTURES = 3
PICTURE_GAP_NS = 6_000_000_000
"""Pictures of found pairs show places at least this far apart in time."""


class DemoError(RuntimeError):
    """The node could not be started or died; the message says how."""


@dataclass
class Heard:
    """What the node said so far."""

    frames_ns: list[int] = field(default_factory=list)
    """Stamps of the images played, in order."""
    latency_ms: dict[int, float] = field(default_factory=dict)
    """By stamp of each keyframe that was decided on, in order."""
    statuses: Counter[str] = field(default_factory=Counter)
    closures: list[LoopClosure] = field(default_factory=list)
    held_back: list[LoopClosure] = field(default_factory=list)
    """Recognised too soon after a closure to be one."""
    path: PathMessage | None = None
    """The newest corrected path, if a back end runs."""
    pictures: list[Path] = field(default_factory=list)
    diagnostics: dict[str, str] = field(default_factory=dict)
    model_id: str = ""
    stopped: str | None = None


def run_demo(
    output: Path,
    settings: dict[str, object],
    *,
    bag: Path | None = None,
    speed: float | None = None,
    image_topic: str | None = None,
    radius_m: float = 10.0,
) -> Record:
    """Play a bag into the node; print closures as they come; write the report.

    Parameters
    ----------
    output
        Folder for ``report.json``, ``trajectory.png``, ``map.png`` and pictures of found pairs.
    settings
        The node's parameters by full name, where they differ from the defaults.
    bag
        None draws the demo drive. Otherwise a rosbag2 or ROS 1 bag; its closures are judged if
        it has a topic of poses or odometry.
    speed
        Times the recorded pace; the player waits where the node needs longer. None: a bag's own
        pace, the drawn drive ``DRIVE_SPEED`` times as fast.
    image_topic
        Where the bag has several.
    radius_m
        A closure is true if its images were taken within this many metres.

    Returns
    -------
    dict
        What ``report.json`` holds.

    Raises
    ------
    SourceError
        If the bag cannot be played.
    DemoError
        If the node does not start, dies or does not end well.
    """
    if bag is None:
        settings = {**DRIVE_SETTINGS, **settings}
    speed = speed or (DRIVE_SPEED if bag is None else 1.0)
    config = make_config(settings)
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob("loop_*.jpg"), *(output / name for name in WRITTEN)):
        old.unlink(missing_ok=True)
    if bag is None:
        bag = _draw_drive(output / "drive")
    _stay_on_this_machine()
    began = time.perf_counter()
    with Playback(bag, image_topic) as playback:
        no_map = _why_no_map(playback)
        # The player's topics exist before the node does, so the node finds them as on a robot.
        with _player(output, playback.compressed, not no_map) as player:
            node_settings = {
                "session_id": "demo",
                **settings,
                "image_transport": "compressed" if playback.compressed else "raw",
            }
            with ExitStack() as nodes:
                nodes_settings = (
                    {NODE: node_settings} if no_map else {NODE: node_settings, BACK_END: {}}
                )
                player.processes = [
                    nodes.enter_context(_node(name, player.namespace, settings, output))
                    for name, settings in nodes_settings.items()
                ]
                try:
                    player.wait_for_node()
                    player.play(playback, speed, config)
                    player.wait_for_last_words()
                except KeyboardInterrupt:
                    player.heard.stopped = "interrupted"
        heard = player.heard
    report = _report(heard, bag, config, radius_m, output)
    report |= _map(heard, bag, output / "map.png", no_map)
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_json(output / "report.json", report)
    return report


def describe_demo(report: Record) -> str:
    """The report in a few lines for people."""
    lines = [
        f"{report['frames']} frames, {report['keyframes']} keyframes, "
        f"{report['closures']} closures; {report['dropped']} frames dropped; "
        f"{report['latency_ms_p50'] or 0:.0f} ms a keyframe (median), "
        f"{report['latency_ms_p95'] or 0:.0f} ms (95 %), "
        f"{report['model_id']} on {report['backend']}",
        describe_evaluation(report["evaluation"])
        if report["evaluation"]
        else f"precision and recall are not known: {report['no_evaluation']}",
    ]
    if report["ate_corrected_m"] is not None:
        lines.append(
            f"map: odometry is {report['ate_odometry_m']:.2f} m off (ATE), corrected by the "
            f"closures {report['ate_corrected_m']:.2f} m"
        )
    else:
        lines.append(f"map: not corrected, or not measured: {report['no_ate']}")
    if report["stopped"]:
        lines.append(f"stopped early: {report['stopped']}")
    return "\n".join([*lines, f"report and pictures: {report['output']}/"])


# -- before ------------------------------------------------------------------------------------


def _draw_drive(path: Path) -> Path:
    """Draw the demo drive anew: that takes seconds, and an old one may be another's."""
    drive = simulate_drive()
    print(f"drawing a drive of {len(drive)} images into {path}", file=sys.stderr)
    # Only a whole bag comes to stand at `path`.
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:
        finished = write_drive(drive, Path(draft) / path.name)
        shutil.rmtree(path, ignore_errors=True)
        finished.replace(path)
    return path


def _why_no_map(playback: Playback) -> str | None:
    """Why no back end can run beside the node; None if one can."""
    if importlib.util.find_spec("gtsam") is None or importlib.util.find_spec("evo") is None:
        return "GTSAM or evo is not installed: pip install -r requirements/backend.txt"
    if ODOMETRY not in playback.roles.values():
        return "the bag has no odometry, or several"
    return None


def _stay_on_this_machine() -> None:
    """Keep the demo off the network, unless the user has said what they want."""
    chosen = ("ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS")
    if any(name in os.environ for name in chosen):
        return
    if os.environ.get("ROS_DISTRO") == "humble":
        os.environ["ROS_LOCALHOST_ONLY"] = "1"
    else:
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"


@contextmanager
def _node(
    name: str, namespace: str, settings: dict[str, object], output: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A real node as a process of its own; asked to end as by Ctrl-C, it must end well."""
    parameters_file = output / ("parameters.yaml" if name == NODE else f"{name}.yaml")
    parameters = {"/**": {"ros__parameters": settings}}
    parameters_file.write_text(yaml.safe_dump(parameters), encoding="utf-8")
    try:
        executable = Path(get_package_prefix("vpr_lite_ros")) / f"lib/vpr_lite_ros/{name}_node"
    except PackageNotFoundError as error:
        raise DemoError(
            "the package vpr_lite_ros is not in the ROS environment: build it with colcon and "
            "source install/setup.bash, or use `make demo`"
        ) from error
    command = [sys.executable, str(executable), "--ros-args", "-r", f"__ns:={namespace}"]
    # Other nodes' diagnostics are none of ours.
    command += ["-r", "/diagnostics:=diagnostics", "-r", "/tf:=tf"]
    command += ["--params-file", str(parameters_file)]
    # In a session of its own, Ctrl-C in the terminal reaches the player alone.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        code = process.wait(FAREWELL_TIMEOUT_S)
        if code != 0:
            raise DemoError(f"{name} ended with exit code {code}; its messages are above")
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{name} did not end within {FAREWELL_TIMEOUT_S:g} s") from error
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _player(output: Path, compressed: bool, mapping: bool) -> Iterator[Player]:
    # rclpy's own handler would end the context at Ctrl-C, before the node is asked to end.
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        # A namespace of its own keeps apart two demos on one machine.
        player = Player(f"/vpr_lite_demo_{os.getpid()}", output, compressed, mapping)
        before = signal.signal(signal.SIGINT, player.interrupt)
        try:
            yield player
        finally:
            signal.signal(signal.SIGINT, before)
            player.close()
    finally:
        rclpy.try_shutdown()


# -- meanwhile ---------------------------------------------------------------------------------


class Player:
    """Publishes what a bag holds and listens to what the node makes of it."""

    def __init__(self, namespace: str, output: Path, compressed: bool, mapping: bool) -> None:
        self.namespace = namespace
        self.heard = Heard()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._output = output
        self._say: Callable[[str], object] = print
        self._diagnostics_heard: Counter[str] = Counter()
        self._expected: deque[int] = deque()
        self._patient = True
        self._interrupted = False
        self._next_picture_ns = 0
        self._node = Node("player", namespace=namespace)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)

        reliable = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        # What is said before this listener has been noticed is repeated to it.
        latched = QoSProfile(
            depth=1000,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        image_type, image_topic = (
            (CompressedImage, "image/compressed") if compressed else (ImageMessage, "image")
        )
        # The back end listens to odometry beside the detector.
        self._listeners = {ODOMETRY: 2 if mapping else 1}
        self._publishers = {
            IMAGE: self._node.create_publisher(image_type, image_topic, reliable),
            CAMERA_INFO: self._node.create_publisher(CameraInfo, "camera_info", reliable),
            ODOMETRY: self._node.create_publisher(Odometry, "odom", reliable),
        }
        self._subscriptions = [
            self._node.create_subscription(LoopClosure, "loop_closures", self._on_closure, latched),
            self._node.create_subscription(
                LoopClosure, f"{NODE}/decisions", self._on_decision, latched
            ),
            self._node.create_subscription(
                ImageMessage, f"{NODE}/match_image", self._on_picture, reliable
            ),
            self._node.create_subscription(
                DiagnosticArray, "diagnostics", self._on_diagnostics, reliable
            ),
        ]
        if mapping:
            newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
            self._subscriptions.append(
                self._node.create_subscription(PathMessage, "path", self._on_path, newest)
            )

    # -- playing

    def interrupt(self, *_: object) -> None:
        """Ctrl-C: stop at the next safe place; rclpy cannot be interrupted just anywhere.

        A second one interrupts at once.
        """
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait_for_node(self) -> None:
        """Wait until every topic has found its other end."""

        def connected() -> bool:
            return all(
                publisher.get_subscription_count() >= self._listeners.get(role, 1)
                for role, publisher in self._publishers.items()
            ) and all(
                self._node.count_publishers(subscription.topic_name)
                for subscription in self._subscriptions
            )

        if not self._spin_until(connected, START_TIMEOUT_S):
            raise DemoError(
                f"the node's topics did not show up within {START_TIMEOUT_S:g} s. Can processes "
                "on this machine reach each other (ROS_DOMAIN_ID, firewall, loopback multicast)?"
            )

    def play(self, playback: Playback, speed: float, config: Config) -> None:
        """Publish at the recorded pace times ``speed``, but no faster than the node can follow."""
        interval_ns = round(config.keyframe.min_interval_s * 1e9)
        began = time.monotonic()
        with progress(None, playback.frames, "frame", "playing") as bar:
            self._say = bar.write
            try:
                for message in playback.messages():
                    due = began + (message.time_ns - playback.start_ns) / 1e9 / speed
                    self._spin_until(lambda: time.monotonic() >= due)  # noqa: B023
                    if message.role == IMAGE:
                        self._let_node_follow()
                        self._expect(message.stamp_ns, interval_ns)
                        self.heard.frames_ns.append(message.stamp_ns)
                        bar.update()
                    self._publishers[message.role].publish(message.cdr)
                    # Time lost is lost: a burst to catch up would be no robot's pace.
                    began += max(0.0, time.monotonic() - due)
                    if len(self.heard.frames_ns) == playback.frames:
                        break
            except SourceError as error:
                self.heard.stopped = str(error)
            finally:
                self._say = print

    def _expect(self, stamp: int, interval_ns: int) -> None:
        """Note down that the image of ``stamp`` may become a keyframe, if that can be."""
        last = next(reversed(self._expected or self.heard.latency_ms), None)
        if self._patient and (last is None or abs(stamp - last) >= interval_ns):
            self._expected.append(stamp)

    def _let_node_follow(self, ahead: int = 1) -> None:
        """Wait until the player is at most ``ahead`` images ahead of what the node works on.

        The node takes the newest image and drops those it has no time for. A robot must live
        with that; the demo shows each place to the node, however slow the machine.
        """
        decided, frames = self.heard.latency_ms, self.heard.frames_ns
        while self._expected and self._expected[0] not in frames[len(frames) - ahead :]:
            expected = self._expected.popleft()
            # While the robot stands, no image becomes a keyframe: waiting once for that is
            # enough, until a decision shows that it moves again.
            self._patient = self._spin_until(
                lambda: next(reversed(decided), -1) >= expected,  # noqa: B023
                DECISION_TIMEOUT_S,
            )
            if not self._patient:
                self._expected.clear()

    def wait_for_last_words(self) -> None:
        """Wait for the last decision and closure, and for diagnostics that count the last image."""
        self._let_node_follow(ahead=0)
        # Topics overtake each other: a closure may come seconds after the decision for it.
        heard = self.heard
        accepted = Status.ACCEPTED.name
        self._spin_until(
            lambda: len(heard.closures) >= heard.statuses[accepted], DECISION_TIMEOUT_S
        )
        before = self._diagnostics_heard.copy()
        # The first one after the last image may have been on its way already. A back end puts
        # out its path between two of its diagnostics.
        self._spin_until(
            lambda: all(self._diagnostics_heard[name] >= before[name] + 2 for name in before), 5.0
        )

    def _spin_until(self, done: Callable[[], bool], timeout_s: float = math.inf) -> bool:
        """Take messages until ``done``; False if ``timeout_s`` passed before."""
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() >= deadline:
                return False
            for process in self.processes:
                if process.poll() is not None:
                    raise DemoError(
                        f"the node ended with exit code {process.returncode}; its messages "
                        "are above"
                    )
            if self._interrupted:
                raise KeyboardInterrupt
            self._executor.spin_once(timeout_sec=0.01)
        return True

    def close(self) -> None:
        """Leave the ROS graph."""
        self._executor.shutdown()
        self._node.destroy_node()

    # -- listening

    def _on_decision(self, message: LoopClosure) -> None:
        self.heard.latency_ms[stamp_ns(message.header.stamp)] = message.latency_ms
        self.heard.statuses[Status(message.status).name] += 1
        self.heard.model_id = message.model_id
        if message.status == Status.TOO_SOON:
            self.heard.held_back.append(message)
        self._patient = True

    def _on_closure(self, message: LoopClosure) -> None:
        self.heard.closures.append(message)
        query, match = stamp_ns(message.header.stamp), stamp_ns(message.match_stamp)
        self._say(
            f"closure {len(self.heard.closures):3}: {query / 1e9:.3f} s is where "
            f"{match / 1e9:.3f} s was, {(query - match) / 1e9:.1f} s before: similarity "
            f"{message.similarity:.2f}, match score {message.match_score:.2f}, "
            f"{message.num_matches} matches, {message.num_inliers} inliers"
        )

    def _on_picture(self, message: ImageMessage) -> None:
        stamp = stamp_ns(message.header.stamp)
        if len(self.heard.pictures) == PICTURES or stamp < self._next_picture_ns:
            return
        self._next_picture_ns = stamp + PICTURE_GAP_NS
        path = self._output / f"loop_{len(self.heard.pictures) + 1}.jpg"
        rgb = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
        cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        self.heard.pictures.append(path)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            name = status.name.split(":")[0].rsplit("/", 1)[-1]
            if name == NODE:
                self.heard.diagnostics = {item.key: item.value for item in status.values}
            self._diagnostics_heard[name] += 1

    def _on_path(self, message: PathMessage) -> None:
        self.heard.path = message


# -- after -------------------------------------------------------------------------------------


def _report(heard: Heard, bag: Path, config: Config, radius_m: float, output: Path) -> Record:
    """Figures and the picture of the trajectory."""
    evaluation, reason = None, None
    try:
        xyz = read_poses(bag).positions_for(heard.frames_ns)
        evaluation = _judge(heard, xyz, config, radius_m, output / "trajectory.png")
    except SourceError as error:
        reason = str(error)
    latencies = list(heard.latency_ms.values())
    drops = {
        key.removeprefix("dropped: "): int(value)
        for key, value in heard.diagnostics.items()
        if key.startswith("dropped: ")
    }
    return {
        "bag": str(bag),
        "output": str(output),
        "stopped": heard.stopped,
        "frames": len(heard.frames_ns),
        "keyframes": len(heard.latency_ms),
        "closures": len(heard.closures),
        "true_closures": evaluation["true_closures"] if evaluation else None,
        "precision": evaluation["precision"] if evaluation else None,
        "recall": evaluation["recall"] if evaluation else None,
        "evaluation": evaluation,
        "no_evaluation": reason,
        "backend": heard.diagnostics.get("backend"),
        "model_id": heard.model_id or heard.diagnostics.get("model_id"),
        "latency_ms_p50": percentile(latencies, 50),
        "latency_ms_p95": percentile(latencies, 95),
        "dropped": sum(drops.values()),
        "drops": drops,
        "candidates": dict(sorted(heard.statuses.items())),
        "pictures": [path.name for path in heard.pictures],
    }


def _map(heard: Heard, bag: Path, picture: Path, no_map: str | None) -> Record:
    """How far the odometry and the back end's path are from the truth; draws both."""
    nothing: Record = {
        "ate_odometry_m": None,
        "ate_corrected_m": None,
        "no_ate": no_map,
        "map": None,
    }
    if no_map:
        return nothing
    # Imported here: the node and the rest of the demo need no GTSAM.
    from vpr_lite_ros.backend.offline import measure_path

    if heard.path is None:
        return nothing | {"no_ate": "the back end has published no path"}
    poses = [one.pose for one in heard.path.poses]
    path = Poses(
        np.array([[one.position.x, one.position.y, one.position.z] for one in poses]),
        np.array([stamp_ns(one.header.stamp) for one in heard.path.poses]),
        None,
        np.array([[getattr(one.orientation, axis) for axis in "xyzw"] for one in poses]),
    )
    closures = [(stamp_ns(one.header.stamp), stamp_ns(one.match_stamp)) for one in heard.closures]
    try:
        before, after = measure_path(bag, path, closures, picture)
    except SourceError as error:
        return nothing | {"no_ate": str(error)}
    return {
        "ate_odometry_m": before["ate_m"],
        "ate_corrected_m": after["ate_m"],
        "no_ate": None,
        "map": {"before": before, "after": after},
    }


def _judge(
    heard: Heard, xyz: NDArray[np.float64], config: Config, radius_m: float, picture: Path
) -> Record:
    """Precision and recall by true poses (N, 3) of the frames; draws them, too."""
    frame_of = {stamp: number for number, stamp in enumerate(heard.frames_ns)}
    closures, held_back = (
        [
            (frame_of[stamp_ns(one.header.stamp)], frame_of.get(stamp_ns(one.match_stamp), -1))
            for one in messages
        ]
        for messages in (heard.closures, heard.held_back)
    )
    truth = RadiusTruth(xyz, radius_m)
    queries = [frame_of[stamp] for stamp in heard.latency_ms]
    gap_s = config.min_time_gap_s
    evaluation = judge(truth, closures, queries, heard.frames_ns, gap_s, held_back)
    lines = [
        (query, match, bool(truth.same_place(query, np.array([match]))[0]))
        for query, match in closures
        if match >= 0 and truth.known(np.array([query, match])).all()
    ]
    title = describe_evaluation(evaluation).replace("; ", "\n").replace("), ", ")\n")
    draw_trajectory(picture, xyz, lines, title)
    return evaluation
