"""A process that runs one node, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

AnyNode = TypeVar("AnyNode", bound=Node)


def run_node(
    make: Callable[[], AnyNode],
    start: Callable[[AnyNode], bool],
    name: str,
    args: list[str] | None = None,
) -> int:
    """Make a node, start it, and let it work.

    Parameters
    ----------
    make
        May raise ``ValueError``, whose text is logged under ``name``.
    start
        Called once messages can come; False ends the process.
    args
        Of the command line; None takes the process's own.

    Returns
    -------
    int
        The process's exit code: 0, or 1 if the node could not be made or started.
    """
    # Ctrl-C is handled here, not by rclpy: a node's threads may still publish while it ends.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stop = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: stop.set())
    try:
        node = make()
    except ValueError as error:
        rclpy.logging.get_logger(name).fatal(str(error))
        rclpy.shutdown()
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if not start(node):
            return 1
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.2)
    except ExternalShutdownException:
        pass
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0
