"""A camera's calibration from a file, for recordings that do not carry it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vpr_lite_ros.bags import SourceError
from vpr_lite_ros.matching import Camera

ACCEPTED = (
    "width and height (or image_width, image_height), and one of: fx, fy, cx, cy; "
    "camera_matrix or K (9 numbers); P (12 numbers, of rectified images)"
)

BESIDE = ("calib.json", "camera.json", "camera.yaml")
"""Names that a calibration may have beside images."""


def camera_beside(folder: Path) -> Path | None:
    """The calibration that lies with a folder of images, or beside its ``images``, if any."""
    folders = [folder, folder.parent] if folder.name == "images" else [folder]
    files = [one / name for one in folders for name in BESIDE]
    return next((file for file in files if file.is_file()), None)


def read_camera(path: Path) -> Camera:
    """Read intrinsics, in pixels, from JSON or YAML.

    Understood are ROS's ``camera_info`` YAML, a ``CameraInfo`` message as ``ros2 topic echo``
    prints it, and plain ``fx fy cx cy`` or ``P`` tables. An unrectified camera's ``K`` goes
    before ``P``, because it belongs to the distortion that stands beside it.

    Raises
    ------
    SourceError
        If the file cannot be read or lacks something.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # YAML's flow style is nearly JSON, but not where tabs indent. `ros2 topic echo` ends
        # each message with a line of dashes: the first one is enough.
        fields = json.loads(text) if path.suffix == ".json" else next(yaml.safe_load_all(text), {})
    except OSError as error:
        raise SourceError(f"camera file {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise SourceError(f"camera file {path} is neither JSON nor YAML: {error}") from error
    if not isinstance(fields, dict) or not fields:
        raise SourceError(f"camera file {path} holds no fields; expected {ACCEPTED}")
    try:
        return _to_camera(fields)
    except KeyError as error:
        raise SourceError(
            f"camera file {path} lacks {error.args[0]}; it has {', '.join(map(str, fields))}. "
            f"Expected {ACCEPTED}"
        ) from error
    except (TypeError, ValueError) as error:
        raise SourceError(f"camera file {path}: {error}") from error


def _to_camera(fields: dict[str, Any]) -> Camera:
    width = int(_first(fields, "width", "image_width"))
    height = int(_first(fields, "height", "image_height"))
    if "fx" in fields:
        fx, fy, cx, cy = (float(_first(fields, name)) for name in ("fx", "fy", "cx", "cy"))
        matrix = (fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0)
        rectified = False
    else:
        name, values = _matrix(fields)
        if values.size not in (9, 12):
            raise ValueError(f"{name} has {values.size} numbers, expected 9 or 12")
        matrix = tuple(values.reshape(3, -1)[:, :3].ravel().tolist())
        rectified = values.size == 12
    distortion = _numbers(fields.get("distortion_coefficients", fields.get("D", fields.get("d"))))
    return Camera(
        width,
        height,
        matrix,
        () if rectified else tuple(distortion.tolist()),
        str(fields.get("distortion_model") or "plumb_bob"),
    )


def _matrix(fields: dict[str, Any]) -> tuple[str, np.ndarray]:
    names = ("camera_matrix", "K", "k", "P", "p", "P0", "projection_matrix")
    for name in names:
        if name in fields:
            values = _numbers(fields[name])
            if values.any():  # An uncalibrated camera's message is full of zeros.
                return name, values
    raise KeyError("fx, fy, cx, cy, camera_matrix, K or P")


def _numbers(value: Any) -> np.ndarray:
    """A list, a list of lists, or ``{rows, cols, data}``, as a flat float64 array."""
    if isinstance(value, dict):
        value = value["data"]
    return np.asarray([] if value is None else value, np.float64).ravel()


def _first(fields: dict[str, Any], *names: str) -> Any:
    for name in names:
        if name in fields:
            return fields[name]
    raise KeyError(names[0])
