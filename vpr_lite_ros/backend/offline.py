"""The pose graph on files: what `replay` wrote and the odometry of the drive, to a better map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.backend.accuracy import compare
from vpr_lite_ros.backend.graph import REJECTED_WEIGHT, Closure, Noise, PoseGraph, to_pose
from vpr_lite_ros.bags import Poses, SourceError, read_poses
from vpr_lite_ros.bags.rosbag import is_bag
from vpr_lite_ros.database import Pose
from vpr_lite_ros.drawing import draw_map
from vpr_lite_ros.odometry import read_odometry
from vpr_lite_ros.relative_pose import OPTICAL_IN_BODY, PoseType, quaternion, rotation_matrix
from vpr_lite_ros.summary import Record, write_json


@dataclass(frozen=True)
class Corrected:
    """What a pose graph made of a drive."""

    trajectory: Poses
    """One pose for each of the odometry's."""
    graph: PoseGraph

    @property
    def rejected(self) -> int:
        """Closures that the graph took for false."""
        return sum(weight < REJECTED_WEIGHT for *_, weight in self.graph.closures())


def correct_recording(
    closures: Path,
    odometry: Path,
    output: Path,
    *,
    odom_topic: str | None = None,
    truth: Path | None = None,
    truth_topic: str | None = None,
    of_camera: bool = False,
) -> Record:
    """Correct the odometry of a drive by the closures of a replay; write all to ``output``.

    Parameters
    ----------
    closures
        Folder that ``vpr-lite replay`` wrote, or its ``closures.jsonl``.
    odometry, odom_topic
        Poses of the drive: bag, TUM trajectory, or CSV with x, y, z, qx, qy, qz, qw and stamps.
    truth, truth_topic
        True poses, to measure by; None measures nothing.
    of_camera
        The poses of both files are of a camera (x right, y down, z forward), as KITTI's are.

    Returns
    -------
    dict
        What ``pose_graph.json`` holds. Beside it lie ``corrected.tum`` (poses of the body, stamps
        in seconds) and ``map.png``.

    Raises
    ------
    SourceError
        If something cannot be read or does not fit together.
    """
    file = closures / "closures.jsonl" if closures.is_dir() else closures
    found = read_closures(file)
    driven = read_trajectory(odometry, odom_topic, of_camera=of_camera)
    known = None
    if truth is not None:
        known = read_poses(truth, topic=truth_topic)
        if known.stamps_ns is None:
            raise SourceError(f"{truth} has no stamps: add a column stamp_s (seconds)")
        if of_camera and known.quaternions is not None:
            known = to_body(known)
    corrected = correct(driven, found)
    report: Record = {
        "closures": str(file),
        "odometry": str(odometry),
        "output": str(output),
        "poses": len(driven),
        "counts": dict(sorted(corrected.graph.counts.items())),
        "rejected": corrected.rejected,
        "before": None,
        "after": None,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_tum(corrected.trajectory, output / "corrected.tum")
    lines = [
        (closure.query_ns, closure.match_ns, weight >= REJECTED_WEIGHT)
        for closure, *_, weight in corrected.graph.closures()
    ]
    report["before"], report["after"] = draw_and_measure(
        output / "map.png", driven, corrected.trajectory, known, lines
    )
    write_json(output / "pose_graph.json", report)
    return report


def correct(odometry: Poses, closures: Sequence[Closure], noise: Noise | None = None) -> Corrected:
    """Feed a drive to the graph as it came about: closures with the odometry of their images."""
    assert odometry.stamps_ns is not None and odometry.quaternions is not None
    graph = PoseGraph(noise)
    driven = [
        (int(stamp), Pose(tuple(xyz), tuple(turn)))
        for stamp, xyz, turn in zip(
            odometry.stamps_ns, odometry.xyz.tolist(), odometry.quaternions.tolist(), strict=True
        )
    ]
    left = sorted(closures, key=lambda one: max(one.query_ns, one.match_ns), reverse=True)
    for stamp, pose in driven:
        graph.add_odometry(stamp, pose)
        while left and max(left[-1].query_ns, left[-1].match_ns) <= stamp:
            graph.add_closure(left.pop())
    for closure in reversed(left):
        graph.add_closure(closure)
    graph.finish()
    poses = []
    for stamp, pose in driven:
        pose3 = graph.corrected(stamp, pose)
        assert pose3 is not None, "the graph begins and ends with the odometry"
        poses.append(to_pose(pose3))
    trajectory = Poses(
        np.array([pose.position for pose in poses]),
        odometry.stamps_ns,
        None,
        np.array([pose.quaternion for pose in poses]),
    )
    return Corrected(trajectory, graph)


def describe(report: Record) -> str:
    """A report in a few lines for people."""
    counts = ", ".join(f"{name} {count}" for name, count in report["counts"].items() if count)
    lines = [
        f"{report['odometry']}: {report['poses']} poses; closures: {counts or 'none'}; "
        f"taken for false: {report['rejected']}"
    ]
    for when in ("before", "after"):
        if report[when]:
            lines.append(f"  {when}: {_error(report[when])}")
    lines.append(f"  files: {report['output']}/ (corrected.tum, pose_graph.json, map.png)")
    return "\n".join(lines)


def _error(figures: Record) -> str:
    text = f"ATE {figures['ate_m']:.2f} m"
    if figures["ate_start_m"] is not None:
        text += f" (aligned at the start alone: {figures['ate_start_m']:.2f} m)"
    if figures["rpe_m"] is not None:
        text += f", RPE over 20 m {figures['rpe_m']:.2f} m, {figures['rpe_deg']:.2f} degrees"
    return text


def draw_and_measure(
    picture: Path,
    odometry: Poses,
    corrected: Poses,
    truth: Poses | None,
    closures: Sequence[tuple[int, int, bool]],
) -> tuple[Record | None, Record | None]:
    """Draw the map; return the errors before and after correction, where the truth is known.

    Parameters
    ----------
    picture
        File to write, ``.png``.
    odometry, corrected
        Of the same stamps.
    closures
        Stamps of query and match in nanoseconds, and whether the closure is believed.
    """
    assert corrected.stamps_ns is not None
    before, after = odometry.xyz, corrected.xyz
    errors: tuple[Record | None, Record | None] = None, None
    title = f"{len(closures)} closures"
    if truth is not None:
        at_first, at_last = compare(odometry, truth), compare(corrected, truth)
        before, after = at_first.xyz, at_last.xyz
        errors = at_first.figures, at_last.figures
        title += "; ATE {:.2f} m before, {:.2f} m after".format(*(one["ate_m"] for one in errors))
    lines = []
    for query_ns, match_ns, believed in closures:
        rows = np.searchsorted(corrected.stamps_ns, (query_ns, match_ns))
        query, match = rows.clip(0, len(corrected) - 1).tolist()
        lines.append((query, match, believed))
    draw_map(picture, after, before, truth.xyz if truth else None, lines, title)
    return errors


def measure_path(
    bag: Path, path: Poses, closures: Sequence[tuple[int, int]], picture: Path
) -> tuple[Record, Record]:
    """Errors of a bag's odometry and of a corrected path that was made from it; draws both.

    Parameters
    ----------
    path
        Corrected poses at stamps of the odometry.
    closures
        Stamps of query and match, nanoseconds.

    Raises
    ------
    SourceError
        If the bag has no odometry or no true poses beside it.
    """
    odometry, truth = read_trajectory(bag), read_poses(bag)
    assert odometry.stamps_ns is not None and odometry.quaternions is not None
    assert path.stamps_ns is not None
    if np.array_equal(odometry.xyz, truth.xyz):
        raise SourceError(f"{bag} has no true poses beside its odometry")
    rows = np.flatnonzero(np.isin(odometry.stamps_ns, path.stamps_ns))
    used = Poses(odometry.xyz[rows], odometry.stamps_ns[rows], None, odometry.quaternions[rows])
    before, after = draw_and_measure(
        picture, used, path, truth, [(query, match, True) for query, match in closures]
    )
    assert before is not None and after is not None
    return before, after


# -- files -------------------------------------------------------------------------------------


def read_closures(path: Path) -> list[Closure]:
    """Closures as `replay` writes them, one JSON object a line.

    Raises
    ------
    SourceError
        If the file is missing or holds something else.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist. Pass a folder that vpr-lite replay has written")
    closures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            closures.append(_to_closure(json.loads(line)))
        except KeyError as error:
            raise SourceError(
                f"{path}, line {number} lacks {error}: replay the recording anew"
            ) from error
        except (TypeError, ValueError) as error:
            raise SourceError(f"{path}, line {number} is no closure: {error}") from error
    return closures


def _to_closure(fields: dict[str, Any]) -> Closure:
    kind = PoseType[fields["pose_type"]]
    closure = Closure(
        int(fields["query_stamp_ns"]),
        int(fields["match_stamp_ns"]),
        kind,
        other_session=fields["match_frame"] is None,
    )
    if kind is PoseType.NONE:
        return closure
    x, y, z = (float(fields[name]) for name in ("x", "y", "z"))
    qx, qy, qz, qw = (float(fields[name]) for name in ("qx", "qy", "qz", "qw"))
    closure = replace(closure, translation=(x, y, z), quaternion=(qx, qy, qz, qw))
    if kind is not PoseType.METRIC and "covariance" not in fields:  # of a release before
        return closure
    covariance = np.array(fields["covariance"], np.float64).reshape(6, 6)
    return replace(closure, covariance=covariance)


def read_trajectory(path: Path, topic: str | None = None, *, of_camera: bool = False) -> Poses:
    """The odometry of a drive, with stamps and orientations, in the order of time.

    Raises
    ------
    SourceError
        If there is none, or stamps or orientations are missing.
    """
    if path.exists() and is_bag(path):
        odometry = read_odometry(path, topic)
        if odometry is None or not len(odometry.stamps_ns):
            raise SourceError(f"{path} has not one odometry topic: name it with --odom-topic")
        poses = Poses(odometry.poses[:, :3], odometry.stamps_ns, None, odometry.poses[:, 3:])
    else:
        poses = read_poses(path)
    if poses.stamps_ns is None or poses.quaternions is None:
        raise SourceError(
            f"{path} has no {'stamps' if poses.stamps_ns is None else 'orientations'}: odometry "
            "needs a TUM trajectory, or columns stamp_s, x, y, z, qx, qy, qz, qw"
        )
    return to_body(poses) if of_camera else poses


def to_body(poses: Poses) -> Poses:
    """Poses of a camera (x right, y down, z forward) as those of a body that looks the same way.

    The frame they are expressed in is turned likewise: z is up afterwards.
    """
    assert poses.quaternions is not None
    turned = [
        OPTICAL_IN_BODY @ rotation_matrix(*turn) @ OPTICAL_IN_BODY.T for turn in poses.quaternions
    ]
    return replace(
        poses,
        xyz=poses.xyz @ OPTICAL_IN_BODY.T,
        quaternions=np.array([quaternion(one) for one in turned]),
    )


def write_tum(poses: Poses, path: Path) -> None:
    """Write lines ``stamp x y z qx qy qz qw``; seconds with all nine decimals, metres."""
    assert poses.stamps_ns is not None and poses.quaternions is not None
    rows: NDArray[np.float64] = np.hstack([poses.xyz, poses.quaternions])
    with path.open("w", encoding="utf-8") as file:
        for stamp, row in zip(poses.stamps_ns.tolist(), rows.tolist(), strict=True):
            numbers = " ".join(f"{value:.9f}" for value in row)
            print(f"{stamp // 10**9}.{stamp % 10**9:09} {numbers}", file=file)
