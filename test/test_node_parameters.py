"""Parameters of ``config.py`` as a node has them, and what may change when: a stand-in for it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy cannot be imported: run make test, or source a ROS 2")

from rcl_interfaces.msg import ParameterDescriptor

from vpr_lite_ros import node_parameters
from vpr_lite_ros.config import Config, ConfigError, parameters

OF_RCLPY: dict[str, object] = {
    "use_sim_time": True,
    "start_type_description_service": True,
    "qos_overrides./parameter_events.publisher.depth": 5,
}


class Node:
    """What a parameter file set before the node declares anything."""

    def __init__(self, **overrides: object) -> None:
        self.values: dict[str, object] = {**OF_RCLPY, **overrides}
        self.descriptors: dict[str, ParameterDescriptor] = {}

    def get_parameters_by_prefix(self, _: str) -> dict[str, object]:
        return self.values

    def get_parameter(self, name: str) -> Any:
        return SimpleNamespace(value=self.values[name])

    def has_parameter(self, name: str) -> bool:
        return name in self.values

    def undeclare_parameter(self, name: str) -> None:
        del self.values[name]

    def declare_parameter(
        self, name: str, value: object, descriptor: ParameterDescriptor, ignore_override: bool
    ) -> None:
        assert name not in self.values and ignore_override
        self.values[name], self.descriptors[name] = value, descriptor

    def get_fully_qualified_name(self) -> str:
        return "/robot/loop_closure"

    def declared(self) -> Config:
        return node_parameters.declare(self)  # type: ignore[arg-type]

    def changed(self, wanted: dict[str, object], configured: bool = True) -> Config | None:
        requested: Any = [SimpleNamespace(name=name, value=wanted[name]) for name in wanted]
        return node_parameters.changed(self, requested, configured)  # type: ignore[arg-type]


def test_a_node_declares_what_there_is_with_its_bounds() -> None:
    node = Node(top_k=3, **{"keyframe.min_interval_s": 2, "similarity_threshold": 0.25})
    config = node.declared()
    assert (config.top_k, config.keyframe.min_interval_s) == (3, 2.0)
    assert set(node.values) == {*parameters(), *OF_RCLPY}
    assert (node.values["top_k"], node.values["robot_id"]) == (3, 0)
    assert isinstance(node.values["keyframe.min_interval_s"], float)
    (bounds,) = node.descriptors["top_k"].integer_range
    assert (bounds.from_value, bounds.to_value, bounds.step) == (1, 1000, 1)
    (span,) = node.descriptors["similarity_threshold"].floating_point_range
    assert (span.from_value, span.to_value) == (-1.0, 1.0)
    # nan, which means as recommended, is in no range.
    assert math.isnan(config.match_threshold)
    assert not node.descriptors["match_threshold"].floating_point_range
    for name, descriptor in node.descriptors.items():
        live = parameters()[name].live
        words = "while the node runs" if live else "only while it is not configured"
        assert descriptor.description and words in descriptor.additional_constraints, name


def test_a_node_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="topk"):
        Node(topk=3).declared()
    with pytest.raises(ConfigError, match="top_k"):
        Node(top_k=0).declared()


def test_what_may_change_is_decided_by_what_would_be_another() -> None:
    node = Node(backend="onnxruntime", robot_id=4)
    node.declared()
    changed = node.changed({"top_k": 5, "robot_id": 4, "backend": "onnxruntime"})
    assert changed is not None, "a whole file may be loaded into a node that runs"
    assert (changed.top_k, changed.robot_id) == (5, 4)
    with pytest.raises(ConfigError, match=r"robot_id cannot change.*set /robot/loop_closure"):
        node.changed({"top_k": 5, "robot_id": 5})
    unconfigured = node.changed({"robot_id": 5}, configured=False)
    assert unconfigured is not None and unconfigured.robot_id == 5
    for configured in (False, True):
        with pytest.raises(ConfigError, match="min_matches"):
            node.changed({"top_k": 5, "min_matches": -1}, configured)
    # rclpy's own are rclpy's.
    assert node.changed(OF_RCLPY) is None
