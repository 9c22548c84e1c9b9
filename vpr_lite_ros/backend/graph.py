"""Odometry and loop closures to one consistent trajectory: an incremental pose graph (iSAM2).

Nothing here knows ROS. Poses are of the robot's body (x forward, y left, z up); ``map`` is the
frame of the corrected trajectory and begins where ``odom``, the frame of the odometry, begins.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import gtsam
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.database import Pose
from vpr_lite_ros.matching import DIRECTION_SIGMA, ROTATION_SIGMA
from vpr_lite_ros.relative_pose import PLACE_M, PoseType

MAX_WAITING = 1000
"""Closures that may wait for their odometry."""
MAX_ITERATIONS = 10
"""Of iSAM2 after a closure; what a great correction leaves to do, the next closure does."""
SETTLED_M = 0.01
"""An iteration that moves no pose further than this was the last."""
RECALIBRATED_M, RECALIBRATED_RAD = 0.5, 0.01
"""Only a correction this large says something new of the odometry's bias; the bias is taken over
if it turns the whole way by more than this."""
REJECTED_WEIGHT = 0.02
"""A closure with less of its weight left is 7 standard deviations off: taken for false."""
FLAT = 1e-9
"""Odometry between two poses that leaves the plane by less than this is two-dimensional."""


@dataclass(frozen=True)
class Noise:
    """How far measurements are trusted. Standard deviations."""

    odometry_rotation: float = 0.002
    """Radians per square root of a metre driven: 0.06 rad after a kilometre."""
    odometry_bias: float = 3e-4
    """Radians per metre that the odometry turns too far, always the same: a degree in 60 m. Wheels
    and gyroscopes err so; what the closures say of it corrects what no loop encloses, too."""
    odometry_translation: float = 0.1
    """Metres per square root of a metre driven: 3 m after a kilometre."""
    odometry_turning: float = 0.02
    """Of the angle turned, added to the rotation."""
    place_m: float = PLACE_M
    """Metres between the two poses of a closure, where the closure does not say."""
    kernel: float = 1.0
    """Standard deviations from which a closure counts less and less (Cauchy)."""


@dataclass(frozen=True)
class Closure:
    """What the graph needs of a ``LoopClosure`` message."""

    query_ns: int
    match_ns: int
    """Stamps of the two images, nanoseconds, in the odometry's clock."""
    pose_type: PoseType = PoseType.NONE
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of the body at the match in the body's frame at the query, as far as pose_type knows it."""
    quaternion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)
    """x y z w, likewise."""
    covariance: NDArray[np.float64] = field(
        default_factory=lambda: np.diag(
            [(PLACE_M * DIRECTION_SIGMA) ** 2] * 3 + [ROTATION_SIGMA**2] * 3
        )
    )
    """(6, 6) over x y z and rotations about x y z of the query's body frame, metres², radians².
    The translation's part is read of METRIC and, across the direction, of
    ROTATION_AND_DIRECTION; the rotation's of all but NONE."""
    other_session: bool = False
    """The match was taken in another session, or by another robot: this trajectory has no pose of
    it."""


@dataclass
class _Constraint:
    closure: Closure
    rows: tuple[int, int]
    factor: gtsam.NonlinearFactor


class PoseGraph:
    """The corrected trajectory of one robot, kept up to date as odometry and closures come.

    Parameters
    ----------
    noise
        How far measurements are trusted.
    spacing_m, spacing_rad
        A pose enters the graph once the robot has moved or turned this far; poses between are
        interpolated.
    max_gap_s
        Where odometry is missing for longer than this, in seconds, nothing is interpolated.

    Attributes
    ----------
    counts : Counter of str
        What became of closures: ``used``; ``out of order`` (of those used, the ones that came after
        one of a later image); and of those not used: ``duplicate``, ``other session``,
        ``no odometry at the query``, ``no odometry at the match``, ``same moment``,
        ``not a pose``, ``waited in vain``. Of odometry: ``odometry out of order``. Of the
        optimizer: ``not solved``.
    """

    def __init__(
        self,
        noise: Noise | None = None,
        *,
        spacing_m: float = 1.0,
        spacing_rad: float = 0.2,
        max_gap_s: float = 1.0,
    ) -> None:
        self.noise = noise or Noise()
        self.counts: Counter[str] = Counter()
        self._spacing_m, self._spacing_rad = spacing_m, spacing_rad
        self._max_gap_ns = round(max_gap_s * 1e9)
        self._isam = _make_isam()
        self._new_factors, self._new_values = gtsam.NonlinearFactorGraph(), gtsam.Values()
        # By row: stamps, odometry's poses, estimates, and whether odometry has a hole before it.
        self._stamps: list[int] = []
        self._odometry: list[gtsam.Pose3] = []
        self._estimates: list[gtsam.Pose3] = []
        self._hole_before: list[bool] = []
        self._head: tuple[int, gtsam.Pose3] | None = None
        self._hole_after_last = False
        self._constraints: list[_Constraint] = []
        self._known: set[tuple[int, int]] = set()
        self._waiting: list[Closure] = []
        self._bias = np.zeros(3)
        self._newest_query_ns = -1

    # -- what comes in -------------------------------------------------------------------------

    def add_odometry(self, stamp_ns: int, pose: Pose) -> None:
        """Take the body's pose in ``odom``, in the order of time; older ones are left out."""
        if self._head is not None and stamp_ns <= self._head[0]:
            self.counts["odometry out of order"] += 1
            return
        if self._head is not None and stamp_ns - self._head[0] > self._max_gap_ns:
            # What comes after a hole is a new stretch, tied to the old one at its very end.
            self._add_row()
            self._hole_after_last = True
        self._head = (stamp_ns, to_pose3(pose))
        if not self._stamps or self._hole_after_last or self._has_moved():
            self._add_row()
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for closure in waiting:
                self._place(closure)
            self._settle()

    def add_closure(self, closure: Closure) -> str:
        """Take a closure, at any time and in any order; return what became of it.

        ``used``, ``waiting`` (for odometry of its stamps), or why it is not used: see ``counts``.
        """
        outcome = self._refusal(closure)
        if outcome:
            self.counts[outcome] += 1
            return outcome
        self._known.add((closure.query_ns, closure.match_ns))
        outcome = self._place(closure)
        if outcome == "used":
            self._settle()
        return outcome

    def finish(self) -> None:
        """No more will come: closures that wait for odometry will not be used, all poses rest."""
        self.counts["waited in vain"] += len(self._waiting)
        self._waiting.clear()
        self._settle(10 * MAX_ITERATIONS)

    # -- what comes out ------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Closures that wait for odometry."""
        return len(self._waiting)

    def correction(self) -> gtsam.Pose3:
        """Pose of ``odom`` in ``map``, now."""
        if not self._stamps:
            return gtsam.Pose3()
        return self._estimates[-1].compose(self._odometry[-1].inverse())

    def trajectory(self) -> tuple[NDArray[np.int64], list[gtsam.Pose3]]:
        """Stamps and corrected poses of the body in ``map``, the newest included."""
        stamps, poses = list(self._stamps), list(self._estimates)
        if self._head is not None and self._head[0] != stamps[-1]:
            stamps.append(self._head[0])
            poses.append(self.correction().compose(self._head[1]))
        return np.array(stamps, np.int64), poses

    def corrected(self, stamp_ns: int, pose: Pose) -> gtsam.Pose3 | None:
        """A pose of the odometry, corrected; None if the graph does not reach to its stamp."""
        if self._head is None or not self._stamps[0] <= stamp_ns <= self._head[0]:
            return None
        row = bisect.bisect_right(self._stamps, stamp_ns) - 1
        near = row
        if row + 1 < len(self._stamps) and not self._hole_before[row + 1]:
            before, after = stamp_ns - self._stamps[row], self._stamps[row + 1] - stamp_ns
            near = row if before <= after else row + 1
        here = self._odometry[near].between(to_pose3(pose))
        return self._estimates[near].compose(here)

    def closures(self) -> Iterator[tuple[Closure, gtsam.Pose3, gtsam.Pose3, float]]:
        """Closures in the graph: corrected poses near query and match, and the weight left, 0…1.

        Below ``REJECTED_WEIGHT`` the graph takes a closure for false.
        """
        if not self._constraints:
            return
        values = gtsam.Values()
        for row in {row for one in self._constraints for row in one.rows}:
            values.insert(row, self._estimates[row])
        for one in self._constraints:
            query, match = one.rows
            # Cauchy's loss is k² / 2 · ln(1 + e² / k²), its weight 1 / (1 + e² / k²).
            weight = math.exp(-2 * one.factor.error(values) / self.noise.kernel**2)
            yield one.closure, self._estimates[query], self._estimates[match], weight

    # -- the graph -----------------------------------------------------------------------------

    def _has_moved(self) -> bool:
        assert self._head is not None
        way = self._odometry[-1].between(self._head[1])
        return (
            float(np.linalg.norm(way.translation())) >= self._spacing_m
            or _angle(way) >= self._spacing_rad
        )

    def _add_row(self) -> None:
        """Put the newest odometry into the graph."""
        assert self._head is not None
        stamp, pose = self._head
        row = len(self._stamps)
        if row and stamp == self._stamps[-1]:
            return
        self._stamps.append(stamp)
        self._odometry.append(pose)
        self._estimates.append(self._estimates[-1].compose(self._way(row)) if row else pose)
        self._hole_before.append(self._hole_after_last)
        self._hole_after_last = False
        self._enter(row)

    def _enter(self, row: int) -> None:
        """Hand a row to the optimizer with its next update."""
        if row:
            way = self._way(row)
            noise = self._odometry_noise(row)
            self._new_factors.add(gtsam.BetweenFactorPose3(row - 1, row, way, noise))
        else:
            fixed = gtsam.noiseModel.Isotropic.Sigma(6, 1e-4)
            self._new_factors.add(gtsam.PriorFactorPose3(row, self._odometry[row], fixed))
        self._new_values.insert(row, self._estimates[row])

    def _way(self, row: int) -> gtsam.Pose3:
        """From the row before to this one by odometry, less what it is known to err always."""
        way = self._odometry[row - 1].between(self._odometry[row])
        moved = float(np.linalg.norm(way.translation()))
        bias = self._bias * (0, 0, 1) if _is_flat(way) else self._bias
        turn = way.rotation().compose(gtsam.Rot3.Expmap(bias * moved))
        return gtsam.Pose3(turn, way.translation())

    def _odometry_noise(self, row: int) -> gtsam.noiseModel.Base:
        way = self._odometry[row - 1].between(self._odometry[row])
        # Variances grow with the way, so that the spacing of poses does not matter.
        moved = math.sqrt(max(float(np.linalg.norm(way.translation())), 0.01))
        turn = self.noise.odometry_rotation * moved + self.noise.odometry_turning * _angle(way)
        step = self.noise.odometry_translation * moved
        if _is_flat(way):
            # Two-dimensional odometry: the map stays in the plane.
            return gtsam.noiseModel.Diagonal.Sigmas(np.array([1e-4, 1e-4, turn, step, step, 1e-4]))
        return gtsam.noiseModel.Diagonal.Sigmas(np.array([turn] * 3 + [step] * 3))

    def _refusal(self, closure: Closure) -> str:
        numbers = (*closure.translation, *closure.quaternion, *closure.covariance.ravel())
        if closure.other_session:
            return "other session"
        if (closure.query_ns, closure.match_ns) in self._known:
            return "duplicate"
        if not all(math.isfinite(value) for value in numbers) or not (
            0.5 < math.hypot(*closure.quaternion) < 1.5
        ):
            return "not a pose"
        return ""

    def _place(self, closure: Closure) -> str:
        """Tie the closure to the rows nearest to its stamps, if odometry reaches that far."""
        newest = max(closure.query_ns, closure.match_ns)
        if self._head is None or newest > self._head[0]:
            self._waiting.append(closure)
            if len(self._waiting) > MAX_WAITING:
                self._waiting.pop(0)
                self.counts["waited in vain"] += 1
            return "waiting"
        if newest > self._stamps[-1]:
            self._add_row()
        outcome = "used"
        query, match = self._locate(closure.query_ns), self._locate(closure.match_ns)
        if query is None or match is None:
            outcome = f"no odometry at the {'match' if query else 'query'}"
        elif query[0] == match[0]:
            outcome = "same moment"
        else:
            self._tie(closure, query, match)
        self.counts[outcome] += 1
        return outcome

    def _locate(self, stamp_ns: int) -> tuple[int, gtsam.Pose3] | None:
        """The row nearest to a stamp, and the pose at the stamp in the row's frame."""
        after = bisect.bisect_left(self._stamps, stamp_ns)
        if after < len(self._stamps) and self._stamps[after] == stamp_ns:
            return after, gtsam.Pose3()
        if after in (0, len(self._stamps)) or self._hole_before[after]:
            return None
        begin, end = self._stamps[after - 1], self._stamps[after]
        share = (stamp_ns - begin) / (end - begin)
        way = self._odometry[after - 1].between(self._odometry[after])
        here = gtsam.Pose3.Expmap(share * gtsam.Pose3.Logmap(way))
        return (after - 1, here) if share <= 0.5 else (after, way.between(here))

    def _tie(
        self, closure: Closure, query: tuple[int, gtsam.Pose3], match: tuple[int, gtsam.Pose3]
    ) -> None:
        if closure.query_ns < self._newest_query_ns:
            self.counts["out of order"] += 1
        self._newest_query_ns = max(closure.query_ns, self._newest_query_ns)
        rows = query[0], match[0]
        if closure.pose_type is PoseType.NONE:
            factor = _same_place(*rows, self._robust(np.eye(3) * self.noise.place_m**2))
        else:
            pose, covariance = _measured(closure, self.noise)
            # From the body at the images' stamps to the rows, which are not far from them.
            pose = query[1].compose(pose).compose(match[1].inverse())
            moved = match[1].AdjointMap()
            factor = gtsam.BetweenFactorPose3(
                *rows, pose, self._robust(moved @ covariance @ moved.T)
            )
        self._new_factors.add(factor)
        self._constraints.append(_Constraint(closure, rows, factor))

    def _robust(self, covariance: NDArray[np.float64]) -> gtsam.noiseModel.Base:
        return gtsam.noiseModel.Robust.Create(
            gtsam.noiseModel.mEstimator.Cauchy.Create(self.noise.kernel),
            gtsam.noiseModel.Gaussian.Covariance(covariance),
        )

    def _settle(self, iterations: int = MAX_ITERATIONS) -> None:
        """Solve for all poses, until they rest."""
        if not self._constraints:
            return
        before = np.array([pose.translation() for pose in self._estimates])
        for _ in range(iterations):
            try:
                self._isam.update(self._new_factors, self._new_values)
            except RuntimeError:  # no solution: what is known stays, the next closure tries again
                self.counts["not solved"] += 1
                self._begin_anew()
                return
            self._new_factors, self._new_values = gtsam.NonlinearFactorGraph(), gtsam.Values()
            values = self._isam.calculateEstimate()
            # Rows of rotation and position, in the order of the keys, which are the rows' numbers.
            xyz = gtsam.utilities.extractPose3(values)[:, 9:]
            moved = float(np.linalg.norm(xyz - before, axis=1).max())
            before = xyz
            if moved > RECALIBRATED_M:
                self._estimates = _poses_of(values)
                self._calibrate()
            elif moved < SETTLED_M:
                break
        self._estimates = _poses_of(values)

    def _calibrate(self) -> None:
        """Learn from the corrections what the odometry errs always; begin anew if that is much."""
        rows = [row for one in self._constraints for row in one.rows]
        turned, way = np.zeros(3), 0.0
        for row in range(min(rows) + 1, max(rows) + 1):
            said = self._odometry[row - 1].between(self._odometry[row])
            found = self._estimates[row - 1].between(self._estimates[row])
            turned += gtsam.Rot3.Logmap(said.rotation().between(found.rotation()))
            way += float(np.linalg.norm(said.translation()))
        # The most probable one, of a bias and a random walk that together turned so far.
        bias = turned / (way + (self.noise.odometry_rotation / self.noise.odometry_bias) ** 2)
        if np.linalg.norm(bias - self._bias) * way < RECALIBRATED_RAD:
            return
        self._bias = bias
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Hand everything to a new optimizer, from the newest estimates on."""
        self._isam = _make_isam()
        self._new_factors, self._new_values = gtsam.NonlinearFactorGraph(), gtsam.Values()
        for row in range(len(self._stamps)):
            self._enter(row)
        for one in self._constraints:
            self._new_factors.add(one.factor)


def _poses_of(values: gtsam.Values) -> list[gtsam.Pose3]:
    return [values.atPose3(row) for row in range(values.size())]


def _make_isam() -> gtsam.ISAM2:
    parameters = gtsam.ISAM2Params()
    parameters.setRelinearizeThreshold(0.01)
    parameters.relinearizeSkip = 1
    # Cholesky, faster, gives up where tight odometry meets wide closures on a long drive.
    parameters.setFactorization("QR")
    return gtsam.ISAM2(parameters)


def to_pose3(pose: Pose) -> gtsam.Pose3:
    """GTSAM's type of the same pose."""
    x, y, z, w = pose.quaternion
    return gtsam.Pose3(gtsam.Rot3.Quaternion(w, x, y, z), np.array(pose.position))


def to_pose(pose: gtsam.Pose3) -> Pose:
    """Position and unit quaternion of GTSAM's type."""
    x, y, z = (float(value) for value in pose.translation())
    turn = pose.rotation().toQuaternion()
    return Pose((x, y, z), (turn.x(), turn.y(), turn.z(), turn.w()))


def _measured(closure: Closure, noise: Noise) -> tuple[gtsam.Pose3, NDArray[np.float64]]:
    """A closure as pose of the match in the query's frame and its covariance (6, 6), GTSAM's way.

    GTSAM's covariance is over rotation, then translation, in the frame of the match.
    """
    x, y, z, w = closure.quaternion
    rotation = gtsam.Rot3.Quaternion(w, x, y, z)
    translation = np.array(closure.translation, np.float64)
    covariance = closure.covariance.copy()
    if closure.pose_type is not PoseType.METRIC:
        covariance[:3] = covariance[:, :3] = 0.0
    if closure.pose_type is PoseType.ROTATION_AND_DIRECTION:
        # Somewhere on the ray that starts at the query: half way out, give or take as much.
        along = translation / max(float(np.linalg.norm(translation)), 1e-9)
        translation = along * noise.place_m / 2
        aside = np.kron(np.diag([1.0, 0.0]), np.eye(3) - np.outer(along, along))
        aside[3:, 3:] = np.eye(3)
        covariance = aside @ closure.covariance @ aside.T
        if np.trace(covariance[:3, :3]) > 2 * noise.place_m**2:
            # Whoever made it says nothing of it: it is one place all the same.
            covariance[:3] = covariance[:, :3] = 0.0
            covariance[:3, :3] = noise.place_m**2 * aside[:3, :3]
        covariance[:3, :3] += (noise.place_m / 2) ** 2 * np.outer(along, along)
    elif closure.pose_type is PoseType.ROTATION:
        # Too near, beside what is seen, to tell a direction.
        translation = np.zeros(3)
        covariance[:3, :3] = noise.place_m**2 * np.eye(3)
    turned = np.kron(np.eye(2), rotation.matrix().T)
    covariance = turned @ covariance @ turned.T
    order = [3, 4, 5, 0, 1, 2]
    return gtsam.Pose3(rotation, translation), covariance[np.ix_(order, order)]


def _same_place(query: int, match: int, noise: gtsam.noiseModel.Base) -> gtsam.CustomFactor:
    """Two poses at one position, whichever way they look."""

    def error(
        _: gtsam.CustomFactor, values: gtsam.Values, jacobians: list[NDArray[np.float64]] | None
    ) -> NDArray[np.float64]:
        way = values.atPose3(query).between(values.atPose3(match))
        offset = np.asarray(way.translation())
        if jacobians is not None:
            x, y, z = offset
            skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
            jacobians[0] = np.hstack([skew, -np.eye(3)])
            jacobians[1] = np.hstack([np.zeros((3, 3)), way.rotation().matrix()])
        return offset

    return gtsam.CustomFactor(noise, [query, match], error)


def _is_flat(way: gtsam.Pose3) -> bool:
    roll, pitch, _ = gtsam.Rot3.Logmap(way.rotation())
    return max(abs(roll), abs(pitch), abs(way.z())) < FLAT


def _angle(way: gtsam.Pose3) -> float:
    return float(np.linalg.norm(gtsam.Rot3.Logmap(way.rotation())))
