"""Every parameter once: default, bounds and a sentence.

The ROS parameters, the shipped ``config/vpr_lite.yaml`` and the options of ``vpr-lite`` are all
made from ``Config``. A dot in a name, as in ``keyframe.min_interval_s``, is a nested group.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Value = bool | int | float | str
NAN = math.nan


class ConfigError(ValueError):
    """An unknown parameter or a value that does not fit; the message names both."""


def _parameter(
    default: Value,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "live": live,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class KeyframeConfig:
    """Which images become keyframes: only keyframes are described, looked up and stored."""

    min_interval_s: float = _parameter(
        0.5,
        "A keyframe comes at least this long after the one before.",
        minimum=0,
        maximum=3600,
        live=True,
    )
    min_translation_m: float = _parameter(
        0.5,
        "With odometry: a keyframe when the robot has moved this far since the last one, ...",
        minimum=0,
        maximum=1000,
        live=True,
    )
    min_rotation_rad: float = _parameter(
        0.3, "... or turned this far.", minimum=0, maximum=math.pi, live=True
    )
    max_similarity: float = _parameter(
        0.9,
        "Without odometry: an image whose descriptor is closer than this (cosine) to the last "
        "keyframe's shows nothing new and is no keyframe. 1 keeps every image.",
        minimum=-1,
        maximum=1,
        live=True,
    )


@dataclass(frozen=True)
class OdometryConfig:
    """How far odometry is believed, where there is odometry."""

    max_drift: float = _parameter(
        0.1,
        "Odometry turns a closure down that puts the robot further from where odometry has it than "
        "this share of the distance driven since, ...",
        minimum=0,
        maximum=1000,
        live=True,
    )
    place_radius_m: float = _parameter(
        15.0,
        "... and these metres, within which two images may show one place.",
        minimum=0,
        maximum=1e6,
        live=True,
    )


@dataclass(frozen=True)
class DatabaseConfig:
    """How large the database may become."""

    max_keyframes: int = _parameter(
        0,
        "Most keyframes to keep. When a new one would exceed this, those that are densest in place "
        "and time are deleted, however old, and every place stays represented as long as there is "
        "room for it. Memory: 2 KB each. 0: no limit.",
        minimum=0,
        maximum=10**7,
    )
    max_bytes: int = _parameter(
        0,
        "Most bytes that the database file may have; its log takes some MB more while the node "
        "runs. A keyframe of the shipped model takes 450 KB. Exceeded: as above. 0: no limit.",
        minimum=0,
        maximum=10**15,
    )


@dataclass(frozen=True)
class QosConfig:
    """Quality of service of the subscriptions."""

    image: str = _parameter(
        "auto",
        "QoS of the image subscription. auto: reliable if every publisher offers it, else "
        "best_effort. best_effort fits every publisher, but loses most large raw images where "
        "the middleware has to cut them into packets; reliable fits reliable publishers only.",
        choices=("auto", "reliable", "best_effort"),
    )


@dataclass(frozen=True)
class Config:
    """All parameters of the detector and its node."""

    bundle: str = _parameter(
        "", "Folder of the model bundle. Empty: the one that ships with the package."
    )
    backend: str = _parameter(
        "auto",
        "What runs the networks. auto: with an NVIDIA GPU TensorRT, or else ONNX Runtime on it, if "
        "installed; without, the faster of the others. While TensorRT's engines are built, which "
        "takes minutes and happens once, the CPU answers.",
        choices=("auto", "tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime"),
    )
    threads: int = _parameter(
        0,
        "CPU threads of the networks and, four at most, of the checks that follow. 0: as many as "
        "there are cores.",
        minimum=0,
        maximum=256,
    )
    database_path: str = _parameter(
        "",
        "SQLite file of keyframes; made if missing, added to if there. Empty: a temporary one "
        "that is gone when the node ends.",
    )
    mode: str = _parameter(
        "mapping",
        "mapping adds keyframes to the database. localization only reads them: the file stays as "
        "it is, and may lie on a read-only medium.",
        choices=("mapping", "localization"),
    )
    robot_id: int = _parameter(
        0, "Number of this robot, stored with its keyframes.", minimum=0, maximum=2**31 - 1
    )
    session_id: str = _parameter(
        "", "Name of this run, stored with its keyframes. Empty: date and time of the start."
    )
    autostart: bool = _parameter(
        True,
        "Configure and activate the node at once. false: a lifecycle manager, or `ros2 lifecycle "
        "set`, does it.",
    )
    image_transport: str = _parameter(
        "raw",
        "raw subscribes to `image` (sensor_msgs/Image), compressed to `image/compressed`.",
        choices=("raw", "compressed"),
    )
    body_frame: str = _parameter(
        "base_link", "Frame of the robot's body: frame_id of closures, frame of relative poses."
    )
    top_k: int = _parameter(
        10, "Candidates that retrieval proposes for re-ranking.", minimum=1, maximum=1000, live=True
    )
    min_time_gap_s: float = _parameter(
        30.0,
        "A place counts as seen before only if it was seen at least this long ago. Keyframes of "
        "earlier sessions always do.",
        minimum=0,
        maximum=1e9,
        live=True,
    )
    similarity_threshold: float = _parameter(
        NAN,
        "Least similarity of the global descriptors, a cosine, -1..1. nan: what the model bundle "
        "recommends.",
        minimum=-1,
        maximum=1,
        live=True,
    )
    match_threshold: float = _parameter(
        NAN,
        "Least match score (transported mass), 0..1. nan: what the model bundle recommends.",
        minimum=0,
        maximum=1,
        live=True,
    )
    min_matches: int = _parameter(
        12, "Least number of mutual patch matches.", minimum=0, maximum=100000, live=True
    )
    min_inliers: int = _parameter(
        -1,
        "Least number of matches that agree with one camera motion. Checked where camera_info "
        "of both images is known. -1: what the model bundle recommends.",
        minimum=-1,
        maximum=100000,
        live=True,
    )
    target_precision: float = _parameter(
        0.98,
        "Where the model bundle is calibrated: accept only what was right at least this often on "
        "the sequences it was calibrated on. Higher is safer and finds less; 0 accepts all.",
        minimum=0,
        maximum=1,
        live=True,
    )
    epipolar_tolerance_px: float = _parameter(
        3.0,
        "How far a match may lie from its epipolar line, in pixels of the network's input. "
        "Matches are found to 3 px in the median, 7 px at 90%.",
        minimum=0.1,
        maximum=100,
        live=True,
    )
    min_agreeing_keyframes: int = _parameter(
        3,
        "How many keyframes in a row must point to the same stretch of the map before a closure "
        "leaves the node. 1 trusts a single one.",
        minimum=1,
        maximum=100,
        live=True,
    )
    min_closure_interval_s: float = _parameter(
        2.0,
        "While the robot goes on along a stretch that it has recognised, closures leave the node "
        "at least this long after each other. 0: every keyframe that is recognised is one.",
        minimum=0,
        maximum=1e9,
        live=True,
    )
    keyframe: KeyframeConfig = field(default_factory=KeyframeConfig)
    odometry: OdometryConfig = field(default_factory=OdometryConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    qos: QosConfig = field(default_factory=QosConfig)


@dataclass(frozen=True)
class Parameter:
    """One parameter, flattened: what a user can set."""

    name: str
    type: type
    default: Value
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    live: bool
    """Whether it may change while the detector runs."""

    def check(self, value: object) -> Value:
        """Return ``value`` in the parameter's type, or raise ``ConfigError``."""
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.type:
            raise ConfigError(
                f"parameter {self.name}: {value!r} is a {type(value).__name__}, "
                f"expected {self.type.__name__}"
            )
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"parameter {self.name}: {value!r} is unknown, choose {' or '.join(self.choices)}"
            )
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            takes_nan = isinstance(self.default, float) and math.isnan(self.default)
            if math.isnan(value) and takes_nan:
                return value
            low = -math.inf if self.minimum is None else self.minimum
            high = math.inf if self.maximum is None else self.maximum
            if not low <= value <= high:
                raise ConfigError(
                    f"parameter {self.name}: {value!r} is out of range, "
                    f"expected {low:g} to {high:g}"
                )
        assert isinstance(value, (bool, int, float, str))
        return value

    def parse(self, text: str) -> Value:
        """``text`` of a command line in the parameter's type."""
        try:
            return self.check(self.type(text) if self.type is not bool else text == "true")
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(
                f"parameter {self.name}: {text!r} is no {self.type.__name__}"
            ) from error


def parameters() -> dict[str, Parameter]:
    """All parameters by their full name, in the order of ``Config``."""
    return {parameter.name: parameter for parameter in _flatten(Config, "")}


def make_config(values: Mapping[str, object]) -> Config:
    """Defaults, with ``values`` (by full name) put in.

    Raises
    ------
    ConfigError
        For an unknown name, a wrong type or a value out of bounds.
    """
    known = parameters()
    checked: dict[str, Value] = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"parameter {name} is unknown{hint}")
        checked[name] = known[name].check(value)
    return _build(Config, "", checked)


def read_yaml(path: Path) -> dict[str, object]:
    """Values by full name from a ROS parameter file or from the same without its two top lines.

    Raises
    ------
    ConfigError
        If the file cannot be read or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"parameter file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"parameter file {path} is not YAML: {error}") from error
    while isinstance(content, dict) and len(content) == 1:
        key = next(iter(content))
        if key != "ros__parameters" and not str(key).startswith("/"):
            break
        content = content[key]
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"parameter file {path} holds no `name: value` lines")
    return _flatten_mapping(content, "")


def shipped_yaml() -> str:
    """The text of ``config/vpr_lite.yaml``: every parameter at its default, with its sentence."""
    lines = [
        "# Parameters of vpr_lite_ros, at their defaults. Made from vpr_lite_ros/config.py by",
        "# `vpr-lite parameters`; a test holds them equal.",
        "/**:",
        "  ros__parameters:",
    ]
    group = ""
    for name, parameter in parameters().items():
        prefix, _, leaf = name.rpartition(".")
        indent = "    "
        if prefix:
            if prefix != group:
                lines += ["", f"    {prefix}:"]
            indent = "      "
        elif len(lines) > 4:
            lines.append("")
        group = prefix
        lines += [f"{indent}# {line}" for line in _wrap(describe(parameter), 92 - len(indent))]
        value = yaml.safe_dump(parameter.default).removesuffix("...\n").strip()
        lines.append(f"{indent}{leaf}: {value}")
    return "\n".join(lines) + "\n"


def describe(parameter: Parameter) -> str:
    """The parameter's sentence with its bounds or choices."""
    if parameter.choices:
        return f"{parameter.help} One of: {', '.join(parameter.choices)}."
    if parameter.minimum is not None and parameter.maximum is not None:
        return f"{parameter.help} [{parameter.minimum:g} to {parameter.maximum:g}]"
    return parameter.help


def _flatten(group: type, prefix: str) -> list[Parameter]:
    found: list[Parameter] = []
    for item in dataclasses.fields(group):
        if item.default is dataclasses.MISSING:
            assert isinstance(item.default_factory, type)
            found += _flatten(item.default_factory, f"{prefix}{item.name}.")
        else:
            found.append(
                Parameter(
                    name=prefix + item.name, type=type(item.default), default=item.default,
                    **item.metadata,
                )
            )  # fmt: skip
    return found


def _build(group: type, prefix: str, values: Mapping[str, Value]) -> Any:
    chosen: dict[str, Any] = {}
    for item in dataclasses.fields(group):
        if item.default is dataclasses.MISSING:
            assert isinstance(item.default_factory, type)
            chosen[item.name] = _build(item.default_factory, f"{prefix}{item.name}.", values)
        elif prefix + item.name in values:
            chosen[item.name] = values[prefix + item.name]
    return group(**chosen)


def _flatten_mapping(mapping: Mapping[Any, Any], prefix: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flatten_mapping(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _wrap(text: str, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]
