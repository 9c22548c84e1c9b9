"""The pose graph: what closures of each kind are worth, and what wrong ones must not do."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gtsam", reason="no GTSAM: pip install -r requirements/backend.txt")

import loops

from vpr_lite_ros.backend.accuracy import compare
from vpr_lite_ros.backend.graph import REJECTED_WEIGHT, Closure, PoseGraph
from vpr_lite_ros.backend.offline import (
    correct,
    correct_recording,
    read_closures,
    read_trajectory,
    write_tum,
)
from vpr_lite_ros.bags import Poses, SourceError, read_poses
from vpr_lite_ros.cli import main
from vpr_lite_ros.database import Pose
from vpr_lite_ros.relative_pose import PoseType

Drive = tuple[Poses, Poses]


@pytest.fixture(scope="module")
def drive() -> Drive:
    return loops.drive()


def error(trajectory: Poses, truth: Poses) -> float:
    return float(compare(trajectory, truth).figures["ate_m"])


def straight(graph: PoseGraph, seconds: range) -> None:
    """Drive along x at a metre a second."""
    for second in seconds:
        graph.add_odometry(second * 10**9, Pose((float(second), 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)))


# -- what closures are worth -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pose_type", "share"),
    [
        (PoseType.METRIC, 0.35),
        (PoseType.ROTATION_AND_DIRECTION, 0.35),
        (PoseType.ROTATION, 0.4),
        (PoseType.NONE, 0.5),
    ],
)
def test_closures_take_the_drift_out(drive: Drive, pose_type: PoseType, share: float) -> None:
    truth, odometry = drive
    found = loops.closures(truth, pose_type)
    corrected = correct(odometry, found)
    assert corrected.graph.counts["used"] == len(found) > 10
    assert corrected.rejected == 0
    assert error(corrected.trajectory, truth) < share * error(odometry, truth)


def test_a_direction_is_believed_as_far_as_its_covariance_says(drive: Drive) -> None:
    truth, odometry = drive
    found = loops.closures(truth, PoseType.ROTATION_AND_DIRECTION)

    def off(sigma_m: float, along: float = 0.0) -> float:
        said = []
        for one in found:
            covariance = np.diag([sigma_m**2] * 3 + [0.01**2] * 3)
            covariance[:3, :3] += along * np.outer(one.translation, one.translation)
            said.append(replace(one, covariance=covariance))
        return error(correct(odometry, said).trajectory, truth)

    # A closure that says nothing of its position (1 km, as of a release before) is of one place.
    assert off(0.3) < off(5.0) < 0.6 * error(odometry, truth)
    assert off(1000.0) == pytest.approx(off(5.0), rel=0.05)
    # Nobody knows how far away it is, and the graph does not need to be told.
    assert off(0.3, along=1e6) == pytest.approx(off(0.3), rel=1e-3)


def test_without_closures_odometry_stays_as_it_is(drive: Drive) -> None:
    _, odometry = drive
    corrected = correct(odometry, []).trajectory
    np.testing.assert_allclose(corrected.xyz, odometry.xyz, atol=1e-9)


def test_a_flat_drive_stays_flat(drive: Drive) -> None:
    truth, odometry = drive
    # A camera's rotation is never quite upright.
    tilted = [
        replace(one, quaternion=(0.03, -0.03, *one.quaternion[2:]))
        for one in loops.closures(truth, PoseType.ROTATION)
    ]
    assert abs(correct(odometry, tilted).trajectory.xyz[:, 2]).max() < 0.1


def test_a_wrong_rotation_is_noticed(drive: Drive) -> None:
    """Convention: the match's pose in the query's frame, not the other way round."""
    truth, odometry = drive
    found = loops.closures(truth, PoseType.METRIC)
    # Turned the other way, a match beside the way would lie on its other side.
    inverted = []
    for one in found:
        x, y, z = one.translation
        inverted.append(replace(one, translation=(-x, -y, -z)))
    right, wrong = (error(correct(odometry, one).trajectory, truth) for one in (found, inverted))
    assert wrong > 2 * right


# -- what is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("pose_type", [PoseType.ROTATION_AND_DIRECTION, PoseType.NONE])
def test_false_closures_do_not_bend_the_map(drive: Drive, pose_type: PoseType) -> None:
    truth, odometry = drive
    found = loops.closures(truth, pose_type)
    clean = error(correct(odometry, found).trajectory, truth)
    assert truth.stamps_ns is not None
    rng = np.random.default_rng(0)
    false: list[Closure] = []
    while len(false) < len(found) / 9:
        query, match = sorted(rng.integers(0, len(truth), 2), reverse=True)
        if np.linalg.norm(truth.xyz[query] - truth.xyz[match]) > 30:
            stamps = int(truth.stamps_ns[query]), int(truth.stamps_ns[match])
            false.append(replace(found[0], query_ns=stamps[0], match_ns=stamps[1]))
    corrected = correct(odometry, found + false)
    assert error(corrected.trajectory, truth) < 1.3 * clean
    rejected = {
        closure.query_ns
        for closure, *_, weight in corrected.graph.closures()
        if weight < REJECTED_WEIGHT
    }
    assert rejected == {one.query_ns for one in false}


def test_late_and_disordered_closures_end_in_the_same_map(drive: Drive) -> None:
    truth, odometry = drive
    found = loops.closures(truth, PoseType.ROTATION)
    in_time = correct(odometry, found)
    graph = correct(odometry, []).graph
    shuffled = np.random.default_rng(0).permutation(len(found))
    assert {graph.add_closure(found[number]) for number in shuffled} == {"used"}
    graph.finish()
    assert graph.counts["out of order"] > 0 and in_time.graph.counts["out of order"] == 0
    stamps, late = graph.trajectory()
    poses = Poses(np.array([pose.translation() for pose in late]), stamps)
    off = poses.xyz - loops.at(in_time.trajectory, poses).xyz
    assert np.linalg.norm(off, axis=1).max() < 0.3


def test_the_covariance_of_a_metric_pose_is_in_the_frame_of_the_query() -> None:
    """A quarter turn lies between query and match: what the query is sure of ahead is sideways to
    the match."""
    graph = PoseGraph()
    second = 10**9
    for i in range(21):  # a quarter of a circle to the left, 20 m of it
        angle = np.pi / 2 * i / 20
        radius = 20 / (np.pi / 2)
        at = (radius * np.sin(angle), radius * (1 - np.cos(angle)), 0.0)
        graph.add_odometry(
            i * second, Pose(at, (0.0, 0.0, float(np.sin(angle / 2)), float(np.cos(angle / 2))))
        )
    # Of the first pose in the last one's frame, by odometry: as far behind as to the left.
    expected = np.array([-radius, radius, 0.0])
    turn = (0.0, 0.0, -float(np.sin(np.pi / 4)), float(np.cos(np.pi / 4)))
    covariance = np.diag([1e-4, 100.0, 1e-4, 1.0, 1.0, 1.0])
    way = (expected + np.array([0.3, 0.3, 0.0])).tolist()
    closure = Closure(20 * second, 0, PoseType.METRIC, (way[0], way[1], way[2]), turn, covariance)
    assert graph.add_closure(closure) == "used"
    graph.finish()
    _, poses = graph.trajectory()
    off = np.asarray(poses[-1].between(poses[0]).translation()) - expected
    assert off[0] == pytest.approx(0.3, abs=0.03), "sure ahead"
    assert abs(off[1]) < 0.1, "not sure sideways"


def test_each_closure_that_is_not_used_has_its_reason() -> None:
    graph = PoseGraph()
    assert graph.add_closure(Closure(3 * 10**9, 10**9)) == "waiting"
    assert graph.add_closure(Closure(3 * 10**9, 10**9)) == "duplicate"
    straight(graph, range(1, 10))
    straight(graph, range(20, 30))
    second = 10**9
    outcomes = [
        (Closure(8 * second, 4 * second), "used"),
        (Closure(8 * second + 1, 4 * second), "used"),
        (Closure(8 * second, 15 * second), "no odometry at the match"),
        (Closure(15 * second, 8 * second), "no odometry at the query"),
        (Closure(8 * second, 0), "no odometry at the match"),
        (Closure(8 * second, 8 * second + 1000), "same moment"),
        (Closure(9 * second, 3 * second, other_session=True), "other session"),
        (Closure(9 * second, 2 * second, PoseType.METRIC, (np.nan, 0, 0)), "not a pose"),
        (Closure(9 * second, 2 * second, PoseType.ROTATION, quaternion=(0, 0, 0, 0)), "not a pose"),
        (Closure(40 * second, 2 * second), "waiting"),
    ]
    for closure, outcome in outcomes:
        assert graph.add_closure(closure) == outcome, closure
    assert graph.waiting == 1
    graph.add_odometry(5 * second, Pose((5.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)))
    graph.finish()
    assert dict(graph.counts) == {
        "used": 3,
        "duplicate": 1,
        "no odometry at the match": 2,
        "no odometry at the query": 1,
        "same moment": 1,
        "other session": 1,
        "not a pose": 2,
        "waited in vain": 1,
        "odometry out of order": 1,
    }


def test_a_long_drive_is_solved_to_its_end() -> None:
    """Tight odometry, wide closures and a thousand poses: Cholesky's factors fail on these."""
    rng = np.random.default_rng(0)
    graph, at, yaw, second = PoseGraph(), np.zeros(2), 0.0, 10**9
    for metre in range(1, 1201):
        at = at + 1.01 * np.array([np.cos(yaw), np.sin(yaw)])
        yaw += rng.normal(2e-4, 0.002) + (np.pi / 2 if metre % 100 == 0 else 0)
        turn = (0.0, 0.0, float(np.sin(yaw / 2)), float(np.cos(yaw / 2)))
        graph.add_odometry(metre * second, Pose((float(at[0]), float(at[1]), 0.0), turn))
        if metre > 400 and metre % 20 == 1:
            graph.add_closure(Closure(metre * second, (metre - 400) * second, PoseType.ROTATION))
    graph.finish()
    assert graph.counts["used"] == 40 and not graph.counts["not solved"]
    _, poses = graph.trajectory()
    # Three times round a square: the end is where the first lap began, which odometry misses.
    ends = np.linalg.norm(poses[-1].translation() - poses[399].translation())
    assert ends < 3 < np.linalg.norm(at - poses[399].translation()[:2])


def test_correction_places_odom_in_map(drive: Drive) -> None:
    truth, odometry = drive
    graph = correct(odometry, loops.closures(truth, PoseType.METRIC)).graph
    _, poses = graph.trajectory()
    assert odometry.quaternions is not None
    last = Pose(tuple(odometry.xyz[-1]), tuple(odometry.quaternions[-1]))
    found = graph.correction().transformFrom(np.array(last.position))
    np.testing.assert_allclose(found, poses[-1].translation(), atol=1e-6)
    # It began where odometry does, and ends with the drift in it.
    start = np.linalg.norm(poses[0].translation() - odometry.xyz[0])
    assert start < 0.01 < np.linalg.norm(graph.correction().translation())


# -- on files ----------------------------------------------------------------------------------


def write_closures(path: Path, found: list[Closure]) -> Path:
    with path.open("w") as file:
        for one in found:
            fields: dict[str, Any] = {
                "query_stamp_ns": one.query_ns,
                "match_stamp_ns": one.match_ns,
                "match_frame": 0,
                "pose_type": one.pose_type.name,
            }
            if one.pose_type is not PoseType.NONE:
                fields |= zip("xyz", one.translation, strict=True)
                fields |= zip(("qx", "qy", "qz", "qw"), one.quaternion, strict=True)
            print(json.dumps(fields), file=file)
    return path


def test_files_to_a_map(drive: Drive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, odometry = drive
    write_tum(truth, tmp_path / "truth.tum")
    write_tum(odometry, tmp_path / "odometry.tum")
    write_closures(
        tmp_path / "closures.jsonl", loops.closures(truth, PoseType.ROTATION_AND_DIRECTION)
    )
    command = ["pose-graph", tmp_path, "--odometry", tmp_path / "odometry.tum"]
    command += ["--poses", tmp_path / "truth.tum", "--output", tmp_path / "out"]
    assert main([str(one) for one in command]) == 0
    assert "before: ATE" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "pose_graph.json").read_text())
    assert report["after"]["ate_m"] < 0.6 * report["before"]["ate_m"]
    corrected = read_trajectory(tmp_path / "out" / "corrected.tum")
    # Stamps go through as they came, to the nanosecond.
    assert corrected.stamps_ns is not None and truth.stamps_ns is not None
    np.testing.assert_array_equal(corrected.stamps_ns, truth.stamps_ns)
    assert error(corrected, truth) == pytest.approx(report["after"]["ate_m"], abs=0.002)
    assert (tmp_path / "out" / "map.png").stat().st_size > 10_000


def test_files_that_do_not_fit_are_named(drive: Drive, tmp_path: Path) -> None:
    truth, odometry = drive
    closures = write_closures(tmp_path / "closures.jsonl", loops.closures(truth, PoseType.NONE))
    write_tum(odometry, tmp_path / "odometry.tum")
    (tmp_path / "flat.csv").write_text("stamp_s,x,y\n0,0,0\n1,1,0\n")
    (tmp_path / "other.csv").write_text("stamp_s,x,y\n0,0,0\n1,1,0\n2,2,0\n")
    (tmp_path / "old.jsonl").write_text('{"query_stamp_ns": 1}\n')
    (tmp_path / "none.jsonl").write_text("closure\n")
    with pytest.raises(SourceError, match="no orientations"):
        correct_recording(closures, tmp_path / "flat.csv", tmp_path / "out")
    with pytest.raises(SourceError, match="do not belong together"):
        correct_recording(
            closures, tmp_path / "odometry.tum", tmp_path / "out", truth=tmp_path / "other.csv"
        )
    with pytest.raises(SourceError, match="line 1 lacks 'pose_type': replay"):
        read_closures(tmp_path / "old.jsonl")
    with pytest.raises(SourceError, match="line 1 is no closure"):
        read_closures(tmp_path / "none.jsonl")
    with pytest.raises(SourceError, match="nowhere does not exist"):
        read_closures(tmp_path / "nowhere")


def test_error_after_alignment_is_the_least_there_is(drive: Drive) -> None:
    """evo's figure against the closed form."""
    truth, odometry = drive
    offset = odometry.xyz - odometry.xyz.mean(axis=0)
    wanted = truth.xyz - truth.xyz.mean(axis=0)
    left, _, right = np.linalg.svd(wanted.T @ offset)
    turn = left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right
    rest = np.sqrt(((offset @ turn.T - wanted) ** 2).sum(axis=1).mean())
    assert error(odometry, truth) == pytest.approx(rest, abs=0.001)


# -- real closures -----------------------------------------------------------------------------


def test_odometry_of_a_street_is_corrected(repository: Path, data_dir: Path) -> None:
    """KITTI 00 as measured in docs/backends.md, one seed, with perfect closures."""
    measured = runpy.run_path(str(repository / "scripts" / "measure_backend.py"))
    poses = data_dir / "eval" / "kitti00" / "poses.csv"
    if not poses.is_file():
        pytest.skip(f"no {poses}")
    truth = measured["to_body"](read_poses(poses))
    odometry = measured["drifted"](truth, 0)
    pairs = [(790, 66), (799, 75), (808, 87), (817, 99)]
    stamps = [(int(truth.stamps_ns[query]), int(truth.stamps_ns[match])) for query, match in pairs]
    found = measured["perfect"]([Closure(*one) for one in stamps], truth)
    assert error(correct(odometry, found).trajectory, truth) < 0.5 * error(odometry, truth)
