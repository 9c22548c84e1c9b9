"""Between the detector's types and ROS messages, both ways. No node, no topics."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point, PoseWithCovariance, Quaternion, Transform
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from vpr_lite_ros import relative_pose
from vpr_lite_ros.candidate import Candidate, Decision
from vpr_lite_ros.database import Pose
from vpr_lite_ros.image import MOST_ASPECT, THUMBNAIL_WIDTH, ImageError, claimed_size, decompress
from vpr_lite_ros.inference import Bundle, Description
from vpr_lite_ros.matching import Camera, Status
from vpr_lite_ros.msg import Keyframe as KeyframeMessage
from vpr_lite_ros.msg import LoopClosure
from vpr_lite_ros.relative_pose import Mount, RelativePose, relative_pose_of

MAX_PICTURE_BYTES = 200_000
"""Of another robot's keyframe: ten times as many as there are in most."""


def stamp_ns(stamp: Time) -> int:
    """Nanoseconds since the clock's zero."""
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def to_time(nanoseconds: int) -> Time:
    return Time(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)


def to_pose(message: Odometry) -> Pose:
    """Pose of the body in the odometry's frame; ``ValueError`` if it holds no finite pose."""
    position, turn = message.pose.pose.position, message.pose.pose.orientation
    values = (position.x, position.y, position.z, turn.x, turn.y, turn.z, turn.w)
    norm = math.sqrt(sum(value * value for value in values[3:]))
    if not all(math.isfinite(value) for value in values) or norm < 0.5:
        raise ValueError(f"pose {values} is not finite or its quaternion is not of unit length")
    return Pose(
        (position.x, position.y, position.z),
        (turn.x / norm, turn.y / norm, turn.z / norm, turn.w / norm),
    )


def to_camera(message: CameraInfo) -> Camera:
    """Intrinsics; ``ValueError`` if the camera is not calibrated or its model is unknown."""
    return Camera(
        width=message.width,
        height=message.height,
        matrix=tuple(float(value) for value in message.k),
        distortion=tuple(float(value) for value in message.d),
        model=message.distortion_model or "plumb_bob",
    )


def to_messages(
    decision: Decision,
    *,
    frame_id: str,
    session: str,
    robot_id: int,
    model_id: str,
    latency_ms: float,
    mount: Mount,
) -> list[LoopClosure]:
    """One message for each candidate, the closure first; one of NO_CANDIDATE if there is none."""
    common = LoopClosure(
        query_id=decision.keyframe_id or 0,
        query_session=session,
        robot_id=robot_id,
        confidence=math.nan,
        match_score=math.nan,
        model_id=model_id,
        latency_ms=latency_ms,
        relative_pose=_to_pose(RelativePose()),
        status=int(Status.NO_CANDIDATE),
    )
    common.header.stamp = to_time(decision.stamp_ns)
    common.header.frame_id = frame_id
    if not decision.candidates:
        return [common]
    ordered = sorted(decision.candidates, key=lambda one: (one is not decision.closure, one.rank))
    return [_of_candidate(common, candidate, mount) for candidate in ordered]


def _of_candidate(common: LoopClosure, candidate: Candidate, mount: Mount) -> LoopClosure:
    known = relative_pose_of(candidate.motion, candidate.metric, mount)
    return LoopClosure(
        header=common.header,
        match_stamp=to_time(candidate.keyframe.stamp_ns),
        query_id=common.query_id,
        match_id=candidate.keyframe.id,
        query_session=common.query_session,
        match_session=candidate.keyframe.session,
        robot_id=common.robot_id,
        match_robot_id=candidate.keyframe.robot_id,
        similarity=candidate.similarity,
        match_score=candidate.match_score,
        confidence=candidate.confidence,
        num_matches=candidate.num_matches,
        num_inliers=candidate.num_inliers,
        num_correlated=candidate.num_correlated,
        zoom=candidate.zoom,
        rank=candidate.rank,
        pose_type=int(known.pose_type),
        relative_pose=_to_pose(known),
        status=int(candidate.status),
        model_id=common.model_id,
        latency_ms=common.latency_ms,
    )


def _to_pose(known: RelativePose) -> PoseWithCovariance:
    pose = PoseWithCovariance()
    x, y, z = known.translation
    pose.pose.position = Point(x=x, y=y, z=z)
    qx, qy, qz, qw = known.quaternion
    pose.pose.orientation = Quaternion(x=qx, y=qy, z=qz, w=qw)
    pose.covariance = known.covariance.ravel()
    return pose


def to_mount(found: Transform) -> Mount:
    """Of a camera, by the transform from its optical frame to the body's."""
    at = found.translation
    return Mount(rotation_matrix(found.rotation), np.array([at.x, at.y, at.z]))


def rotation_matrix(turn: Quaternion) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) of a unit quaternion."""
    return relative_pose.rotation_matrix(turn.x, turn.y, turn.z, turn.w)


def to_keyframe(
    header: Header,
    *,
    robot_id: int,
    session: str,
    model_id: str,
    description: Description,
    camera: Camera | None,
) -> KeyframeMessage:
    """What another robot needs to recognise the place of an image with this header."""
    message = KeyframeMessage(
        header=header,
        robot_id=robot_id,
        session=session,
        model_id=model_id,
        descriptor=array("f", description.descriptor.astype(np.float32).tobytes()),
        tokens=array("B", description.tokens.astype("<f2").tobytes()),
        centres=array("f", description.centres.astype(np.float32).tobytes()),
        thumbnail=array("B", description.picture),
    )
    if description.depth is not None:
        message.depth = array("f", description.depth.astype(np.float32).tobytes())
    if camera is not None:
        message.camera_info = CameraInfo(
            width=camera.width,
            height=camera.height,
            k=camera.matrix,
            d=camera.distortion,
            distortion_model=camera.model,
        )
    return message


def from_keyframe(message: KeyframeMessage, bundle: Bundle) -> tuple[Description, Camera | None]:
    """Another robot's keyframe; ``ValueError`` if this robot's model cannot compare it."""
    model_id, dimension, max_patches = bundle.model_id, bundle.dimension, bundle.max_patches
    who = f"a keyframe of robot {message.robot_id}"
    if message.model_id != model_id:
        raise ValueError(
            f"{who} was described by model {message.model_id}, this robot runs {model_id}: give "
            "both the same bundle"
        )
    tokens = np.frombuffer(bytes(message.tokens), "<f2").astype(np.float16)
    descriptor = np.array(message.descriptor, np.float32)
    centres = np.array(message.centres, np.float32)
    sizes = len(descriptor), len(tokens), len(centres)
    if sizes != (bundle.parts * dimension, max_patches * dimension, 2 * max_patches):
        raise ValueError(f"{who} has {sizes} numbers, not those of model {model_id}")
    finite = all(np.isfinite(numbers).all() for numbers in (descriptor, tokens, centres))
    descriptor = descriptor.reshape(-1, dimension)
    if not finite or (abs(np.linalg.norm(descriptor, axis=1) - 1) > 0.01).any():
        raise ValueError(f"{who} has a descriptor that is no unit vector, or is not finite")
    if not ((centres >= 0) & (centres <= 1)).all():
        raise ValueError(f"{who} has centres of patches outside of its image, not within 0 to 1")
    depth = np.array(message.depth, np.float32).astype(np.float16)
    if len(depth) not in (0, max_patches) or not (np.isfinite(depth) & (depth >= 0)).all():
        raise ValueError(f"{who} has {len(depth)} depths, not {max_patches} of 0 m or more")
    picture = bytes(message.thumbnail)
    if len(picture) > MAX_PICTURE_BYTES:
        raise ValueError(
            f"{who} has a picture of {len(picture)} bytes, not a small one of {MAX_PICTURE_BYTES}"
        )
    if picture:
        _check_picture(picture, who)
    camera = to_camera(message.camera_info) if any(message.camera_info.k) else None
    tokens = tokens.reshape(max_patches, dimension)
    known = depth if len(depth) else None
    return Description(descriptor, tokens, centres.reshape(-1, 2), known, picture), camera


def _check_picture(picture: bytes, who: str) -> None:
    """It is stored, and decoded for each image that it is a candidate of."""
    try:
        width, height = claimed_size(picture) or (0, 0)
        problem = f"has {width}x{height} pixels"
        if width <= THUMBNAIL_WIDTH and height <= MOST_ASPECT * width:
            if decompress(picture) is not None:
                return
            problem = "cannot be decoded"
    except ImageError as error:
        problem = f"has {error}"
    raise ValueError(
        f"{who} has a picture that {problem}; a JPEG {THUMBNAIL_WIDTH} wide is expected"
    )


def to_markers(
    frame_id: str,
    keyframes: list[tuple[int, str, Pose]],
    session: str,
    closures: list[LoopClosure],
) -> MarkerArray:
    """This session's keyframes as a path and its closures as lines, in the odometry's frame."""
    points = {
        keyframe_id: Point(x=pose.position[0], y=pose.position[1], z=pose.position[2])
        for keyframe_id, of_session, pose in keyframes
        if of_session == session
    }
    path = Marker(ns="keyframes", id=0, type=Marker.LINE_STRIP, action=Marker.ADD)
    path.points = list(points.values())
    path.color = ColorRGBA(r=0.3, g=0.5, b=0.9, a=1.0)
    path.scale.x = 0.1
    lines = Marker(ns="closures", id=1, type=Marker.LINE_LIST, action=Marker.ADD)
    for closure in closures:
        if closure.query_id in points and closure.match_id in points:
            lines.points += [points[closure.query_id], points[closure.match_id]]
    lines.color = ColorRGBA(r=0.2, g=0.85, b=0.2, a=1.0)
    lines.scale.x = 0.15
    for marker in (path, lines):
        marker.header.frame_id = frame_id
        marker.pose.orientation.w = 1.0
    return MarkerArray(markers=[path, lines])


def to_diagnostics(
    stamp: Time, node_name: str, level: int, message: str, values: Mapping[str, object]
) -> DiagnosticArray:
    """One status named after the node; ``level`` is OK, WARN or ERROR of DiagnosticStatus."""
    status = DiagnosticStatus(
        level=bytes([level]),
        name=f"{node_name}: detector",
        message=message,
        hardware_id="",
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
    )
    array = DiagnosticArray(status=[status])
    array.header.stamp = stamp
    return array
