"""Conversions between the detector's types and ROS messages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("rclpy", reason="ROS messages cannot be imported: run make test, or source ROS")

from geometry_msgs.msg import Quaternion, Transform
from nav_msgs.msg import Odometry
from sensor_msgs.msg import CameraInfo
from vpr_lite_ros.msg import LoopClosure

from vpr_lite_ros import messages
from vpr_lite_ros.candidate import Candidate, Decision
from vpr_lite_ros.database import Keyframe, Pose
from vpr_lite_ros.matching import EpipolarFit, Matches, Status
from vpr_lite_ros.metric_pose import MetricFit
from vpr_lite_ros.relative_pose import Mount, PoseType, quaternion


def rotation_about(axis: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    out: NDArray[np.float64] = np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k
    return out


def test_status_numbers_are_the_messages() -> None:
    constants = {
        name.removeprefix("STATUS_"): getattr(LoopClosure, name)
        for name in dir(LoopClosure)
        if name.startswith("STATUS_")
    }
    assert constants == {status.name: status.value for status in Status}


def test_pose_type_numbers_are_the_messages() -> None:
    for kind in PoseType:
        assert getattr(LoopClosure, f"POSE_{kind.name}") == kind.value


@pytest.mark.parametrize("angle", [0.0, 0.3, 2.0, 3.14159, -1.0])
@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -2, 0.5)])
def test_quaternion_and_matrix_are_inverse(axis: tuple[float, ...], angle: float) -> None:
    rotation = rotation_about(np.array(axis, float), angle)
    x, y, z, w = quaternion(rotation)
    assert w >= 0
    assert math.isclose(x * x + y * y + z * z + w * w, 1, rel_tol=1e-9)
    again = messages.rotation_matrix(Quaternion(x=x, y=y, z=z, w=w))
    np.testing.assert_allclose(again, rotation, atol=1e-9)


def test_stamps_pass_through_untouched() -> None:
    nanoseconds = 1_700_000_000_123_456_789
    assert messages.stamp_ns(messages.to_time(nanoseconds)) == nanoseconds


def make_candidate(keyframe_id: int, fit: EpipolarFit | None, status: Status) -> Candidate:
    centres = np.zeros((4, 2), np.float32)
    keyframe = Keyframe(keyframe_id, 0, "monday", 5_000_000_001, None, None, centres)
    index = np.arange(3)
    matches = Matches(index, index, np.ones(3, np.float32))
    return Candidate(
        keyframe, 0.9, keyframe_id, 0.7, matches, fit=fit, num_correlated=1, zoom=0.25,
        confidence=0.8, agreeing=1, status=status,
    )  # fmt: skip


def convert(decision: Decision, mount: Mount | None = None) -> list[LoopClosure]:
    return messages.to_messages(
        decision,
        frame_id="base_link",
        session="tuesday",
        robot_id=3,
        model_id="m",
        latency_ms=12.5,
        mount=mount or Mount(),
    )


def test_a_turn_to_the_left_is_positive_about_z_of_the_body() -> None:
    # The match was taken 0.4 rad further left: in the query's optical frame a turn about -y.
    # It stood to the right of the query: +x of the optical frame, -y of the body's.
    rotation = rotation_about(np.array([0.0, -1.0, 0.0]), 0.4)
    fit = EpipolarFit(np.array([True, True, False]), rotation, np.array([1.0, 0.0, 0.0]))
    best = make_candidate(2, fit, Status.ACCEPTED)
    worse = make_candidate(1, None, Status.LOW_SCORE)
    decision = Decision(9_000_000_002, 7, [worse, best], best)
    first, second = convert(decision)
    assert (first.status, first.match_id, first.num_inliers) == (Status.ACCEPTED, 2, 2)
    assert (first.num_correlated, first.zoom) == (1, 0.25)
    assert first.pose_type == LoopClosure.POSE_ROTATION_AND_DIRECTION
    turn, position = first.relative_pose.pose.orientation, first.relative_pose.pose.position
    assert 2 * math.atan2(turn.z, turn.w) == pytest.approx(0.4)
    assert (turn.x, turn.y) == pytest.approx((0, 0), abs=1e-9)
    assert (position.x, position.y, position.z) == pytest.approx((0, -1, 0), abs=1e-9)
    covariance = np.array(first.relative_pose.covariance).reshape(6, 6)
    assert covariance[1, 1] >= 1e6, "the length of the translation is not known"
    # Across it, what a direction from patches is worth: 0.7 rad, 5 m away.
    assert covariance[[0, 2], [0, 2]] == pytest.approx(3.5**2)
    assert covariance[5, 5] < 1
    assert (second.status, second.match_id, second.pose_type) == (Status.LOW_SCORE, 1, 0)
    assert np.array(second.relative_pose.covariance).reshape(6, 6)[5, 5] >= 1e6
    assert messages.stamp_ns(first.header.stamp) == 9_000_000_002
    assert messages.stamp_ns(first.match_stamp) == 5_000_000_001
    assert (first.query_session, first.match_session, first.robot_id) == ("tuesday", "monday", 3)
    assert first.confidence == pytest.approx(0.8)


def test_the_very_same_spot_has_no_direction() -> None:
    fit = EpipolarFit(
        np.array([True]), rotation_about(np.array([0.0, -1.0, 0.0]), 0.4), np.zeros(3)
    )
    candidate = make_candidate(2, fit, Status.ACCEPTED)
    (message,) = convert(Decision(1, 7, [candidate], candidate))
    assert message.pose_type == LoopClosure.POSE_ROTATION
    turn, position = message.relative_pose.pose.orientation, message.relative_pose.pose.position
    assert 2 * math.atan2(turn.z, turn.w) == pytest.approx(0.4)
    assert (position.x, position.y, position.z) == (0, 0, 0)


def test_a_metric_pose_is_of_the_body_not_of_the_camera() -> None:
    # The camera sits 2 m before the body's origin, and turned half round about it: the body
    # did not move, the camera went 4 m. Its axes: x right, y down, z forward.
    half_turn = rotation_about(np.array([0.0, -1.0, 0.0]), math.pi)
    metric = MetricFit(half_turn, np.array([0.0, 0.0, -4.0]), np.eye(6) * 0.01, np.ones(3, bool))
    candidate = make_candidate(2, EpipolarFit(np.ones(3, bool), half_turn, np.zeros(3)), Status(0))
    candidate.metric = metric
    arm = Transform(rotation=Quaternion(x=-0.5, y=0.5, z=-0.5, w=0.5))  # of an optical frame
    arm.translation.x = 2.0
    (message,) = convert(Decision(1, 7, [candidate], candidate), messages.to_mount(arm))
    assert message.pose_type == LoopClosure.POSE_METRIC
    position = message.relative_pose.pose.position
    assert (position.x, position.y, position.z) == pytest.approx((0, 0, 0), abs=1e-9)
    covariance = np.array(message.relative_pose.covariance).reshape(6, 6)
    # An error of 0.1 rad about z moves the origin, 2 m behind the camera, by 0.2 m.
    assert covariance[1, 1] == pytest.approx(0.01 + 4 * 0.01)
    assert covariance[0, 0] == pytest.approx(0.01)
    assert covariance[1, 5] != 0


def test_no_candidate_is_said() -> None:
    (message,) = convert(Decision(1, 1))
    assert math.isnan(message.confidence)
    assert message.status == LoopClosure.STATUS_NO_CANDIDATE
    assert (message.match_session, message.match_id) == ("", 0)


def test_odometry_without_a_pose_is_refused() -> None:
    message = Odometry()
    message.pose.pose.orientation.w = 0.0
    with pytest.raises(ValueError, match="quaternion"):
        messages.to_pose(message)
    message.pose.pose.orientation.w = 2.0
    message.pose.pose.position.x = 1.5
    assert messages.to_pose(message) == Pose((1.5, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    message.pose.pose.position.y = math.nan
    with pytest.raises(ValueError, match="nan"):
        messages.to_pose(message)


def test_camera_info() -> None:
    message = CameraInfo(width=640, height=480, k=[500.0, 0, 320, 0, 500, 240, 0, 0, 1])
    camera = messages.to_camera(message)
    assert (camera.width, camera.matrix[0], camera.distortion) == (640, 500.0, ())
    with pytest.raises(ValueError, match="not calibrated"):
        messages.to_camera(CameraInfo(width=640, height=480))


def test_markers_join_the_keyframes_of_closures() -> None:
    def pose(x: float) -> Pose:
        return Pose((x, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))

    closure = LoopClosure(query_id=3, match_id=1)
    elsewhere = LoopClosure(query_id=3, match_id=99)
    keyframes = [(1, "today", pose(1)), (2, "monday", pose(2)), (3, "today", pose(3))]
    path, lines = messages.to_markers("odom", keyframes, "today", [closure, elsewhere]).markers
    assert [point.x for point in path.points] == [1, 3]
    assert [point.x for point in lines.points] == [3, 1]
