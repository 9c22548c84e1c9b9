"""How far a trajectory is from the truth, by ``evo``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from evo.core import metrics, sync
from evo.core.filters import FilterException
from evo.core.trajectory import PoseTrajectory3D
from numpy.typing import NDArray

from vpr_lite_ros.bags import Poses, SourceError
from vpr_lite_ros.summary import Record

RPE_WAY_M = 20.0
"""Metres of way over which a relative pose error is taken."""
MAX_DIFFERENCE_S = 0.05
"""A true pose this far in time from an estimated one is not its."""


@dataclass(frozen=True)
class Aligned:
    """An estimate laid over the truth."""

    figures: Record
    """``ate_m``: root mean square distance after the best rigid alignment. ``ate_start_m``:
    likewise, with nothing aligned but the first pose. ``rpe_m``, ``rpe_deg``: root mean square
    error of the relative pose over 20 m of way. None where the truth knows no orientations, or
    the way is too short."""
    xyz: NDArray[np.float64]
    """(N, 3) the whole estimate, aligned, metres."""


def compare(estimate: Poses, truth: Poses) -> Aligned:
    """Lay a trajectory over the truth and measure what is left.

    Both need stamps, the estimate orientations, too.

    Raises
    ------
    SourceError
        If fewer than three poses of the two belong together.
    """
    whole = _to_evo(estimate)
    try:
        reference, found = sync.associate_trajectories(
            _to_evo(truth), whole, max_diff=MAX_DIFFERENCE_S
        )
    except sync.SyncException as error:
        raise _unrelated(str(error)) from error
    if found.num_poses < 3:
        raise _unrelated(f"{found.num_poses} stamps of the odometry have a true pose")
    from_start, shorter = None, None
    if truth.quaternions is not None:
        first = reference.poses_se3[0] @ np.linalg.inv(found.poses_se3[0])
        at_start = _copy(found)
        at_start.transform(first)
        from_start = _rms(metrics.APE(metrics.PoseRelation.translation_part), reference, at_start)
        shorter = [
            _rms(
                metrics.RPE(part, RPE_WAY_M, metrics.Unit.meters, all_pairs=True), reference, found
            )
            for part in (
                metrics.PoseRelation.translation_part,
                metrics.PoseRelation.rotation_angle_deg,
            )
        ]
    rotation, shift, _ = found.align(reference)
    figures = {
        "ate_m": _rms(metrics.APE(metrics.PoseRelation.translation_part), reference, found),
        "ate_start_m": from_start,
        "rpe_m": shorter[0] if shorter else None,
        "rpe_deg": shorter[1] if shorter else None,
        "poses": found.num_poses,
    }
    return Aligned(figures, estimate.xyz @ rotation.T + shift)


def _unrelated(reason: str) -> SourceError:
    return SourceError(
        f"odometry and true poses do not belong together: {reason}. Are both of this drive, with "
        f"stamps of the same clock, at most {MAX_DIFFERENCE_S:g} s apart?"
    )


def _to_evo(poses: Poses) -> PoseTrajectory3D:
    assert poses.stamps_ns is not None
    turns = poses.quaternions
    if turns is None:
        turns = np.tile([0.0, 0.0, 0.0, 1.0], (len(poses), 1))
    return PoseTrajectory3D(poses.xyz.copy(), turns[:, [3, 0, 1, 2]], poses.stamps_ns / 1e9)


def _copy(one: PoseTrajectory3D) -> PoseTrajectory3D:
    return PoseTrajectory3D(one.positions_xyz, one.orientations_quat_wxyz, one.timestamps)


def _rms(metric: metrics.PE, reference: PoseTrajectory3D, found: PoseTrajectory3D) -> float | None:
    try:
        metric.process_data((reference, found))
    except FilterException:  # no two poses that far apart
        return None
    return round(float(metric.get_statistic(metrics.StatisticsType.rmse)), 3)
