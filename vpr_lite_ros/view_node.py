"""What a running node finds: its closures, decisions and pictures; needs ROS."""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image as ImageMessage

from vpr_lite_ros.live import listener
from vpr_lite_ros.matching import Status
from vpr_lite_ros.messages import stamp_ns
from vpr_lite_ros.msg import LoopClosure
from vpr_lite_ros.view import Pair, Tally

WAITING = 100
"""Closures whose picture has not come, and the other way round, that are remembered."""
T = TypeVar("T")


def view_node(namespace: str, name: str, output: Path | None, tally: Tally) -> None:
    """Show what the node ``name`` in ``namespace`` finds, until Ctrl-C or SIGTERM.

    With ``output``, a picture of each pair goes there, named by the two stamps.
    """
    with _until_asked_to_stop() as stop, listener("vpr_lite_view") as (node, executor):
        viewer = _Viewer(node, f"{namespace.rstrip('/')}/{name}", namespace, output, tally)
        viewer.look_for_node()
        node.create_timer(1.0, viewer.look_for_node)
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.2)


@contextmanager
def _until_asked_to_stop() -> Iterator[threading.Event]:
    """An event for Ctrl-C: rclpy cannot be interrupted just anywhere."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Viewer:
    def __init__(
        self, node: Node, full_name: str, namespace: str, output: Path | None, tally: Tally
    ) -> None:
        self._node, self._output, self._tally = node, output, tally
        self._closures_topic = f"{namespace.rstrip('/')}/loop_closures"
        self._node_is_there: bool | None = None
        # Closure and picture of one query come on topics of their own, in either order.
        self._pairs: OrderedDict[int, Pair] = OrderedDict()
        self._pictures: OrderedDict[int, ImageMessage] = OrderedDict()
        # Closures are repeated to those who join late.
        latched = QoSProfile(
            depth=1000,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        node.create_subscription(LoopClosure, self._closures_topic, self._on_closure, latched)
        node.create_subscription(
            LoopClosure,
            f"{full_name}/decisions",
            self._on_decision,
            QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE),
        )
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            node.create_subscription(ImageMessage, f"{full_name}/match_image", self._on_picture, 10)

    def look_for_node(self) -> None:
        """Say when the node is there, comes or goes."""
        is_there = self._node.count_publishers(self._closures_topic) > 0
        if is_there is self._node_is_there:
            return
        if is_there:
            self._tally.say(f"watching {self._closures_topic}")
        elif self._node_is_there is None:
            self._tally.say(
                f"nobody publishes {self._closures_topic} yet; waiting. Is the node in another "
                "namespace (--namespace) or ROS_DOMAIN_ID?"
            )
        else:
            self._tally.say(f"the node is gone: nobody publishes {self._closures_topic} any more")
        self._node_is_there = is_there

    def _on_decision(self, message: LoopClosure) -> None:
        self._tally.count(stamp_ns(message.header.stamp), _status_name(message.status))

    def _on_closure(self, message: LoopClosure) -> None:
        session = message.match_session
        pair = Pair(
            query_ns=stamp_ns(message.header.stamp),
            match_ns=stamp_ns(message.match_stamp),
            status=_status_name(message.status),
            similarity=message.similarity,
            match_score=message.match_score,
            confidence=message.confidence,
            num_matches=message.num_matches,
            num_inliers=message.num_inliers,
            match_session="" if session == message.query_session else session,
        )
        self._tally.closure(pair)
        if self._output is None:
            return
        picture = self._pictures.pop(pair.query_ns, None)
        if picture is None:
            _remember(self._pairs, pair.query_ns, pair)
        else:
            self._save(pair, picture)

    def _on_picture(self, message: ImageMessage) -> None:
        query_ns = stamp_ns(message.header.stamp)
        pair = self._pairs.pop(query_ns, None)
        if pair is None:
            _remember(self._pictures, query_ns, message)
        else:
            self._save(pair, message)

    def _save(self, pair: Pair, message: ImageMessage) -> None:
        assert self._output is not None
        path = self._output / f"{pair.query_ns / 1e9:.3f}_is_{pair.match_ns / 1e9:.3f}.jpg"
        rgb = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
        if cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)):
            self._tally.say(f"  picture: {path}")
        else:
            self._tally.say(f"  picture not written: {path}. Is the disk full or read-only?")


def _status_name(number: int) -> str:
    """A node of another release may know more statuses."""
    known = {int(status): status.name for status in Status}
    return known.get(number, f"STATUS_{number}")


def _remember(waiting: OrderedDict[int, T], key: int, value: T) -> None:
    waiting[key] = value
    while len(waiting) > WAITING:
        waiting.popitem(last=False)
