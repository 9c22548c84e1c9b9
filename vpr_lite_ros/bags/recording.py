"""Write the simulated drive as a rosbag2, as a robot would have recorded it."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vpr_lite_ros.bags.errors import SourceError
from vpr_lite_ros.simulation import Drive, OdometrySample, SimulatedFrame

CAMERA_FRAME = "camera"
BASE_FRAME = "base_link"
DEPTH_TOPIC = "/camera/depth/image_raw"

_STORE = get_typestore(Stores.ROS2_JAZZY)
_STORAGES = {"sqlite3": StoragePlugin.SQLITE3, "mcap": StoragePlugin.MCAP}


def write_drive(
    drive: Drive,
    path: str | Path,
    *,
    compressed: bool = True,
    depth: bool = False,
    storage: str = "sqlite3",
    jpeg_quality: int = 90,
) -> Path:
    """Draw a drive and record it.

    Topics: `/camera/image_raw/compressed` (or `/camera/image_raw`), `/camera/camera_info`,
    `/odom` (drifting, odom to base_link) and `/ground_truth` (true, map to base_link); with depth
    `/camera/depth/image_raw` (16UC1, exact, in register with the images), too.

    Parameters
    ----------
    drive
        What to draw.
    path
        Folder to create.
    compressed
        JPEG images, or raw rgb8 ones.
    depth
        Record depth, too: 0.6 MB an image.
    storage
        `sqlite3` or `mcap`.
    jpeg_quality
        0..100.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    SourceError
        If the folder exists already or the storage is unknown.
    """
    path = Path(path)
    if path.exists():
        raise SourceError(f"{path} exists already; remove it or choose another folder")
    if storage not in _STORAGES:
        raise SourceError(f"storage must be one of {', '.join(_STORAGES)}, not {storage!r}")
    image_topic = "/camera/image_raw/compressed" if compressed else "/camera/image_raw"

    # Version 8 of the format is what Humble and all later distributions can read.
    with Writer(path, version=8, storage_plugin=_STORAGES[storage]) as writer:
        connections: dict[str, Any] = {}
        stream = merge(
            _camera(drive, image_topic, jpeg_quality if compressed else None, depth),
            _poses("/odom", "odom", drive.odometry()),
            _poses("/ground_truth", "map", drive.ground_truth()),
            key=lambda item: item[0],
        )
        for stamp_ns, topic, message in stream:
            msgtype = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, msgtype, typestore=_STORE)
            writer.write(connections[topic], stamp_ns, _STORE.serialize_cdr(message, msgtype))
    return path


Item = tuple[int, str, Any]


def _camera(drive: Drive, topic: str, jpeg_quality: int | None, depth: bool) -> Iterator[Item]:
    for frame in drive.frames():
        header = _header(frame.stamp_ns, CAMERA_FRAME)
        yield frame.stamp_ns, "/camera/camera_info", _camera_info(drive, header)
        if depth:
            millimetres = np.where(frame.depth < 65.5, np.round(frame.depth * 1000), 0)
            message = _raw_image(header, millimetres.astype(np.uint16), "16UC1")
            yield frame.stamp_ns, DEPTH_TOPIC, message
        yield frame.stamp_ns, topic, _image(frame, header, jpeg_quality)


def _image(frame: SimulatedFrame, header: Any, jpeg_quality: int | None) -> Any:
    if jpeg_quality is None:
        return _raw_image(header, frame.image, "rgb8")
    bgr = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
    return _STORE.types["sensor_msgs/msg/CompressedImage"](
        header=header, format="jpeg", data=data.reshape(-1)
    )


def _raw_image(header: Any, pixels: NDArray[Any], encoding: str) -> Any:
    height, width = pixels.shape[:2]
    return _STORE.types["sensor_msgs/msg/Image"](
        header=header,
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=pixels[0].nbytes,
        data=pixels.reshape(-1).view(np.uint8),
    )


def _camera_info(drive: Drive, header: Any) -> Any:
    width, height = drive.image_size
    matrix = drive.camera_matrix
    projection = np.hstack([matrix, np.zeros((3, 1))])
    return _STORE.types["sensor_msgs/msg/CameraInfo"](
        header=header,
        height=height,
        width=width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=matrix.reshape(-1),
        r=np.eye(3).reshape(-1),
        p=projection.reshape(-1),
        binning_x=0,
        binning_y=0,
        roi=_STORE.types["sensor_msgs/msg/RegionOfInterest"](
            x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
        ),
    )


def _poses(topic: str, frame: str, samples: list[OdometrySample]) -> Iterator[Item]:
    types = _STORE.types
    vector = types["geometry_msgs/msg/Vector3"]
    for sample in samples:
        x, y, yaw = sample.pose
        forward, turn = sample.twist
        yield (
            sample.stamp_ns,
            topic,
            types["nav_msgs/msg/Odometry"](
                header=_header(sample.stamp_ns, frame),
                child_frame_id=BASE_FRAME,
                pose=types["geometry_msgs/msg/PoseWithCovariance"](
                    pose=types["geometry_msgs/msg/Pose"](
                        position=types["geometry_msgs/msg/Point"](x=x, y=y, z=0.0),
                        orientation=types["geometry_msgs/msg/Quaternion"](
                            x=0.0, y=0.0, z=float(np.sin(yaw / 2)), w=float(np.cos(yaw / 2))
                        ),
                    ),
                    covariance=np.zeros(36),
                ),
                twist=types["geometry_msgs/msg/TwistWithCovariance"](
                    twist=types["geometry_msgs/msg/Twist"](
                        linear=vector(x=forward, y=0.0, z=0.0),
                        angular=vector(x=0.0, y=0.0, z=turn),
                    ),
                    covariance=np.zeros(36),
                ),
            ),
        )


def _header(stamp_ns: int, frame: str) -> Any:
    return _STORE.types["std_msgs/msg/Header"](
        stamp=_STORE.types["builtin_interfaces/msg/Time"](
            sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9
        ),
        frame_id=frame,
    )
