"""The node for a long time: many lifecycle cycles, and a camera that is faster than the networks.

``python scripts/soak_node.py [--cycles 1000] [--minutes 10]`` prints one JSON object: what the
process held (threads, files, MB) after the first cycles and after the last, and what became of
images that came 30 times a second, with their latency and the memory held, minute by minute.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image as ImageMessage

from vpr_lite_ros.node import LoopClosureNode
from vpr_lite_ros.progress import progress
from vpr_lite_ros.simulation import simulate_drive

WARM_UP = 20
"""Cycles after which all that is loaded once is loaded."""
CAMERA_HZ = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    rclpy.init()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "backend": "onnxruntime",  # the slower one
            "database_path": str(Path(folder) / "map.db"),
            "keyframe.min_interval_s": 0.0,
            "keyframe.max_similarity": 1.0,
        }
        overrides = [Parameter(name, value=value) for name, value in settings.items()]
        node = LoopClosureNode(parameter_overrides=overrides)
        report = {"cycles": cycle(node, args.cycles), "camera": overrun(node, args.minutes)}
        node.trigger_shutdown()
        node.destroy_node()
    rclpy.shutdown()
    print(json.dumps(report, indent=2))
    return 0


def held() -> dict[str, float]:
    gc.collect()
    process = psutil.Process()
    return {
        "threads": threading.active_count(),
        "files": process.num_fds(),
        "megabytes": round(process.memory_info().rss / 2**20, 1),
    }


def cycle(node: LoopClosureNode, count: int) -> dict[str, Any]:
    """Configure, activate, deactivate and clean up, ``count`` times."""
    before = held()
    for number in progress(range(count), count, "cycle", "lifecycle"):
        assert node.start(), "see the error above"
        node.trigger_deactivate()
        node.trigger_cleanup()
        if number + 1 == min(WARM_UP, count):
            before = held()
    return {"count": count, f"after the first {WARM_UP}": before, "after the last": held()}


def overrun(node: LoopClosureNode, minutes: float) -> dict[str, Any]:
    """Images of a drive, 30 a second, whatever the node makes of them."""
    camera = rclpy.create_node("camera")
    publisher = camera.create_publisher(
        ImageMessage, "image", QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
    )
    assert node.start(), "see the error above"
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    pictures = [frame.image for frame in simulate_drive().part(0, 320, 8).frames()]
    before, megabytes = held(), list[float]()
    began, sent = time.monotonic(), 0
    with progress(None, round(minutes * 60 * CAMERA_HZ), "image", "camera") as bar:
        while time.monotonic() - began < minutes * 60:
            picture = np.ascontiguousarray(pictures[sent // CAMERA_HZ % len(pictures)])
            height, width = picture.shape[:2]
            message = ImageMessage(
                height=height, width=width, encoding="rgb8", step=3 * width, data=picture.tobytes()
            )
            # Stamps ten times as fast: places come again after their time gap.
            stamp_ns = round(1e18) + sent * 10**10 // CAMERA_HZ
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
            publisher.publish(message)
            sent += 1
            bar.update()
            while time.monotonic() - began < sent / CAMERA_HZ:
                left = began + sent / CAMERA_HZ - time.monotonic()
                executor.spin_once(timeout_sec=max(0.0, left))
            if sent % (60 * CAMERA_HZ) == 0:
                megabytes.append(held()["megabytes"])
    found = {
        name: value
        for name, value in node.tally.values().items()
        if name.startswith(("images", "dropped", "latency", "decisions"))
    }
    executor.shutdown()
    camera.destroy_node()
    return {"sent": sent, "before": before, "megabytes by minute": megabytes, **found}


if __name__ == "__main__":
    sys.exit(main())
