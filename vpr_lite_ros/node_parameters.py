"""The parameters of ``config.py`` as parameters of a ROS node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter

from vpr_lite_ros.config import Config, ConfigError, describe, make_config, parameters

RCLPY_PARAMETERS = ("use_sim_time", "start_type_description_service")
"""Every node has these; rclpy declares them itself."""
FIXED = (
    "parameter {name} cannot change while the node is configured: clean it up first (`ros2 "
    "lifecycle set {node} deactivate`, then cleanup, configure, activate), or start it anew"
)


def declare(node: Node) -> Config:
    """Declare what ``config.py`` lists, with descriptions and bounds; refuse anything else.

    The node must declare its overrides by itself, so that unknown names are seen here.

    Raises
    ------
    ConfigError
        If a parameter file or the command line sets an unknown one, or one out of bounds.
    """
    overrides: dict[str, Any] = {
        name: node.get_parameter(name).value
        for name in node.get_parameters_by_prefix("")
        if _is_ours(name)
    }
    config = make_config(overrides)
    for name, parameter in parameters().items():
        value = parameter.check(overrides.get(name, parameter.default))
        changes = "while the node runs" if parameter.live else "only while it is not configured"
        descriptor = ParameterDescriptor(
            description=describe(parameter), additional_constraints=f"Changes {changes}."
        )
        if parameter.minimum is not None and parameter.maximum is not None:
            low, high = parameter.minimum, parameter.maximum
            if parameter.type is int:
                descriptor.integer_range = [
                    IntegerRange(from_value=int(low), to_value=int(high), step=1)
                ]
            elif value == value:  # a range cannot hold nan, which means: as recommended
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)
                ]
        if node.has_parameter(name):
            node.undeclare_parameter(name)
        node.declare_parameter(name, value, descriptor, ignore_override=True)
    return config


def changed(node: Node, requested: Sequence[RosParameter], configured: bool) -> Config | None:
    """The configuration that ``requested`` asks for: all of it or an error.

    Returns
    -------
    Config, or None if nothing of ours is to change.

    Raises
    ------
    ConfigError
        If a value does not fit, or may not change while the node is ``configured``.
    """
    wanted = {one.name: one.value for one in requested if _is_ours(one.name)}
    if not wanted:
        return None
    known = parameters()
    now: dict[str, Any] = {name: node.get_parameter(name).value for name in known}
    config = make_config({**now, **wanted})  # names and bounds first
    for name in wanted:
        if configured and not known[name].live and wanted[name] != now[name]:
            raise ConfigError(FIXED.format(name=name, node=node.get_fully_qualified_name()))
    return config


def _is_ours(name: str) -> bool:
    return name not in RCLPY_PARAMETERS and not name.startswith("qos_overrides.")
