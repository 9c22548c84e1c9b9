"""Tuned parameters as a ROS parameter file, for ``params_file`` of the launch file."""

from __future__ import annotations

from typing import Any

import yaml

from vpr_lite_ros.config import Config, parameters
from vpr_lite_ros.reporting.tuning import Share, Tuning

OF_A_RUN = ("session_id", "database_path", "robot_id")
"""Parameters of one run, which say nothing about a place."""


def parameter_file(config: Config, tuning: Tuning, source: str) -> str:
    """What differs from the defaults, and below it what was tuned, with what to expect."""
    values = {
        name: value
        for name in parameters()
        if (value := _value(config, name)) != parameters()[name].default
        and value == value
        and name not in OF_A_RUN
    }
    values |= tuning.parameters
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    lines = [
        f"Tuned for a precision of {tuning.target:g} on {' '.join(source.split())}",
        f"Expected precision: {said(tuning.precision)}",
        f"Expected recall: {said(tuning.recall)}",
        f"Measured on {tuning.blocks} blocks of the trajectory, each with what the others chose.",
        *filter(None, [caution(tuning)]),
    ]
    body = yaml.safe_dump({"/**": {"ros__parameters": nested}}, sort_keys=False)
    return "".join(f"# {line}\n" for line in lines) + body


def said(share: Share) -> str:
    """A share and its interval, for people."""
    if not share.of:
        return "unknown: there was nothing to count"
    return f"{share.value:.3f}, 95% interval {share.low:.3f} to {share.high:.3f}, of {share.of}"


def caution(tuning: Tuning) -> str:
    """Why the target cannot be promised on another drive, a sentence; empty if it can."""
    if tuning.promised:
        return ""
    if not tuning.needed:
        return "No recording can promise that no closure will ever be false."
    return (
        f"Too few closures to promise a precision of {tuning.target:g} on other drives: that "
        f"takes some {tuning.needed}, none of them false."
    )


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
