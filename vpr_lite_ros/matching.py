"""From an assignment to a verdict: mutual matches, epipolar check, acceptance."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_SHARE = 0.1
"""Least share of a patch's mass that must flow to its partner for the two to be a match."""
PATCH_SPACING_PX = 16
"""Of the network's input, from one patch to the next: the backbone's stride."""
ROTATION_SIGMA, DIRECTION_SIGMA = 0.1, 0.7
"""Radians: how far matches of patches, 16 px apart, tell the motion between two cameras."""
_OF_FUNDAMENTAL, _OF_ZOOM = 8, 8
"""Fewer matches say nothing."""
_ZOOM_STEPS = (2, 3, 4, 5)
"""Each match is paired with those that come so many parts of the whole list after it."""
_MOST_SAMPLES = 300
"""Samples that RANSAC draws: enough for a motion that half of the matches agree with, as those of
a place do; candidates of other places need all of them. More do not tell places better, in twice
the time (docs/training.md)."""
_NO_PARALLAX = 0.9
"""A rotation that explains this share of the matches that the best motion explains is preferred."""


class Status(enum.IntEnum):
    """What became of a candidate; the numbers are those of ``LoopClosure.msg``."""

    ACCEPTED = 0
    LOW_SIMILARITY = 1
    LOW_SCORE = 2
    FEW_MATCHES = 3
    GEOMETRY = 4
    NOT_CONSISTENT = 5
    ODOMETRY = 6
    TOO_SOON = 7
    LOW_CONFIDENCE = 8
    NO_CANDIDATE = 9
    NOT_BEST = 10


@dataclass(frozen=True)
class Camera:
    """Intrinsics as in ``sensor_msgs/CameraInfo``."""

    width: int
    height: int
    """Size in pixels of the image that ``matrix`` speaks of."""
    matrix: tuple[float, ...]
    """K, nine numbers row by row: fx 0 cx, 0 fy cy, 0 0 1, in pixels."""
    distortion: tuple[float, ...] = ()
    model: str = "plumb_bob"
    """``plumb_bob`` or ``rational_polynomial`` (OpenCV's), ``equidistant`` (fish-eye)."""

    def __post_init__(self) -> None:
        if self.model not in ("plumb_bob", "rational_polynomial", "equidistant"):
            raise ValueError(
                f"distortion model {self.model!r} is unknown: publish rectified images with "
                "plumb_bob and no coefficients, or plumb_bob, rational_polynomial, equidistant"
            )
        # "not >" and not "<=": NaN is no focal length either.
        if len(self.matrix) != 9 or not (self.matrix[0] > 0 and self.matrix[4] > 0):
            raise ValueError(
                f"camera matrix {self.matrix} has no focal lengths: the camera is not calibrated"
            )
        if self.width <= 0 or self.height <= 0:
            raise ValueError(f"camera size {self.width}x{self.height} is not a size")

    def rays(self, centres: NDArray[np.floating]) -> NDArray[np.float64]:
        """Points (N, 2), fractions of the image, to undistorted x / z, y / z (N, 2)."""
        if not len(centres):
            return np.zeros((0, 2))  # which OpenCV would refuse
        pixels = centres.astype(np.float64) * (self.width, self.height)
        matrix = np.array(self.matrix).reshape(3, 3)
        coefficients = np.array(self.distortion)
        if self.model == "equidistant":
            if not coefficients.size:
                coefficients = np.zeros(4)
            rays = cv2.fisheye.undistortPoints(pixels[:, None], matrix, coefficients[:4])
        else:
            rays = cv2.undistortPoints(pixels[:, None], matrix, coefficients)
        return np.asarray(rays, np.float64).reshape(-1, 2)

    def radians_per_pixel(self, input_width: int) -> float:
        """Angle of one pixel of an image ``input_width`` wide, near the optical axis."""
        return self.width / input_width / self.matrix[0]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Camera:
        fields = json.loads(text)
        fields["matrix"] = tuple(fields["matrix"])
        fields["distortion"] = tuple(fields["distortion"])
        return cls(**fields)


@dataclass(frozen=True)
class Matches:
    """Patches of the query and of the candidate that chose each other."""

    query: NDArray[np.int64]
    """(M,) indices of the query's patches."""
    candidate: NDArray[np.int64]
    """(M,) indices of the candidate's patches."""
    shares: NDArray[np.float32]
    """(M,) mass that flows from one to the other, 0…1."""

    def __len__(self) -> int:
        return len(self.query)


@dataclass(frozen=True)
class EpipolarFit:
    """One camera motion and the matches that agree with it."""

    inliers: NDArray[np.bool_]
    """(M,) which matches agree."""
    rotation: NDArray[np.float64]
    """(3, 3) of the candidate's camera in the query's camera frame (optical)."""
    direction: NDArray[np.float64]
    """(3,) unit vector to the candidate's camera in the query's, its length is not known; zeros
    where a rotation alone explains the matches: the way between is short beside what is seen."""
    covariance: NDArray[np.float64] | None = None
    """(6, 6) of x y z of the direction, added, and of rotations about x y z, applied last, all in
    the query's frame; radians². None: as rough as ``ROTATION_SIGMA`` and ``DIRECTION_SIGMA``."""


def mutual_matches(assignment: NDArray[np.float32], min_share: float = MIN_SHARE) -> Matches:
    """Pairs of an assignment (N, M) that are each other's largest, with at least ``min_share``."""
    best_candidate = assignment.argmax(axis=1)
    best_query = assignment.argmax(axis=0)
    query = np.arange(assignment.shape[0])
    shares = assignment[query, best_candidate]
    kept = (best_query[best_candidate] == query) & (shares >= min_share)
    return Matches(query[kept], best_candidate[kept], shares[kept])


def meeting_points(
    assignment: NDArray[np.float32],
    matches: Matches,
    query_centres: NDArray[np.float32],
    candidate_centres: NDArray[np.float32],
    image_size: tuple[int, int],
) -> NDArray[np.float64]:
    """(M, 2) where the candidate shows what lies at the matched patches of the query.

    Patches lie on a grid, what they show does not: a patch that lies between four of the other
    image shares its mass among them. Where that mass is on average, seen from both sides, is half
    as far off as the grid's nearest point (3 pixels in place of 6, docs/training.md).

    Parameters
    ----------
    assignment
        (N, M') that ``matches`` were found in.
    query_centres, candidate_centres
        (N, 2) and (M', 2) of all patches, fractions of the image, as are those returned.
    image_size
        Width and height of the network's input.
    """
    there = _mean_place(assignment[matches.query], matches.candidate, candidate_centres, image_size)
    back = _mean_place(assignment.T[matches.candidate], matches.query, query_centres, image_size)
    # From the query's patch to there, and from back to the candidate's patch: the mean of both.
    forth = there - query_centres[matches.query]
    return query_centres[matches.query] + (forth + candidate_centres[matches.candidate] - back) / 2


def _mean_place(
    shares: NDArray[np.float32],
    nearest: NDArray[np.int64],
    centres: NDArray[np.float32],
    image_size: tuple[int, int],
) -> NDArray[np.float64]:
    """(M, 2) where the roots of ``shares`` (M, P) are on average, in the patch ``nearest`` (M)
    and the eight around it.

    Roots, because transport exaggerates: of two patches that are nearly as alike, one gets most.
    """
    spacing = PATCH_SPACING_PX / np.array(image_size)
    column, row = np.floor(centres / spacing).astype(np.int64).T + 1
    patch_at = np.full((row.max() + 2, column.max() + 2), -1)  # with a margin of no patches
    patch_at[row, column] = np.arange(len(centres))
    down, right = (step.ravel() - 1 for step in np.indices((3, 3)))
    around = patch_at[row[nearest, None] + down, column[nearest, None] + right]
    weights = np.sqrt(np.take_along_axis(shares, np.maximum(around, 0), axis=1), dtype=np.float64)
    weights[around < 0] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    return np.asarray((weights[:, :, None] * centres[around]).sum(axis=1))


def fit_epipolar(
    query_rays: NDArray[np.float64],
    candidate_rays: NDArray[np.float64],
    tolerance: float,
    samples: int = _MOST_SAMPLES,
) -> EpipolarFit | None:
    """The camera motion that most matches agree with, or None if there is none.

    A robot that comes back to the very same spot moves nothing in the picture, or turns it as a
    whole: then any direction of motion would do, and a rotation alone is what is found.

    Parameters
    ----------
    query_rays, candidate_rays
        (M, 2) matched points as ``Camera.rays`` gives them.
    tolerance
        Largest distance to the epipolar line, in the same unit (radians near the axis).
    samples
        Most that RANSAC draws.
    """
    if len(query_rays) < 5:
        return None
    turn = fit_rotation(query_rays, candidate_rays, tolerance, samples)
    motion, before = _fit_motion(query_rays, candidate_rays, tolerance, samples)
    if turn is None or motion is None or not before.any():
        return turn if turn is not None and turn.inliers.any() else motion
    # A motion has two numbers more to adapt to noise.
    if np.count_nonzero(turn.inliers) < _NO_PARALLAX * np.count_nonzero(motion.inliers):
        return EpipolarFit(before, motion.rotation, motion.direction)
    # Streets that look alike show alike things at the same pixels, as the same spot does: only
    # those matches count that any one motion leaves before the cameras, half of them or more.
    return EpipolarFit(before, turn.rotation, turn.direction)


def fit_rotation(
    query_rays: NDArray[np.float64],
    candidate_rays: NDArray[np.float64],
    tolerance: float,
    samples: int = _MOST_SAMPLES,
) -> EpipolarFit | None:
    """The rotation alone that most matches agree with; arguments as of ``fit_epipolar``."""
    found, _ = cv2.findHomography(
        candidate_rays, query_rays, cv2.USAC_ACCURATE, tolerance, None, samples, 0.999
    )
    if found is None or not np.isfinite(found).all():
        return None
    left, _, right = np.linalg.svd(found)
    rotation = left @ right * np.sign(np.linalg.det(left @ right))
    return EpipolarFit(
        _turned_only(rotation, query_rays, candidate_rays, tolerance), rotation, np.zeros(3)
    )


def _fit_motion(
    query_rays: NDArray[np.float64],
    candidate_rays: NDArray[np.float64],
    tolerance: float,
    samples: int,
) -> tuple[EpipolarFit | None, NDArray[np.bool_]]:
    """The motion whose epipolar lines most matches lie on, and (M,) which of these lie in front."""
    # Graph-cut RANSAC, its samples drawn from a generator with a fixed start: same input, same
    # result. With 2 pixels of noise and a third of the matches wrong it keeps 99.7 to 100% of the
    # right ones, depending on the motion; MAGSAC kept 92 to 99% in twice the time.
    essential, _ = cv2.findEssentialMat(
        candidate_rays,
        query_rays,
        np.eye(3),
        cv2.USAC_ACCURATE,
        0.999,
        tolerance / 2,
        samples,
    )
    if essential is None or essential.shape != (3, 3) or not np.isfinite(essential).all():
        return None, np.zeros(len(query_rays), np.bool_)
    near = np.abs(epipolar_distance(essential, candidate_rays, query_rays)) <= tolerance
    # It counts only points in front of both cameras, nearer than a great distance.
    _, rotation, direction, mask, _ = cv2.recoverPose(
        essential,
        candidate_rays,
        query_rays,
        np.eye(3),
        distanceThresh=1e9,
        mask=near.astype(np.uint8)[:, None] * 255,
    )
    return EpipolarFit(near, rotation, direction.ravel()), mask.ravel() > 0


def _turned_only(
    rotation: NDArray[np.float64],
    query_rays: NDArray[np.float64],
    candidate_rays: NDArray[np.float64],
    tolerance: float,
) -> NDArray[np.bool_]:
    """(M,) whether a match is where the rotation alone puts it, as the horizon is."""
    turned = _homogeneous(candidate_rays) @ rotation.T
    depth = turned[:, 2:]
    offset = turned[:, :2] / np.maximum(depth, 1e-6) - query_rays
    near = np.linalg.norm(offset, axis=1) <= tolerance
    return np.asarray(near & (depth[:, 0] > 0))


def count_planar(
    query_points: NDArray[np.float64], candidate_points: NDArray[np.float64], tolerance: float
) -> int:
    """How many matches (M, 2) agree with one homography: geometry where no camera is known.

    Parameters
    ----------
    tolerance
        How far a match may lie from where the homography puts it, in the points' unit.
    """
    if len(query_points) < 5:
        return 0
    _, inliers = cv2.findHomography(
        candidate_points, query_points, cv2.USAC_ACCURATE, tolerance, None, _MOST_SAMPLES, 0.999
    )
    return 0 if inliers is None else int(inliers.sum())


def count_rigid(
    query_points: NDArray[np.float64], candidate_points: NDArray[np.float64], tolerance: float
) -> int:
    """How many matches (M, 2) agree with one fundamental matrix: what does not move, seen from two
    places by whatever cameras.

    Parameters
    ----------
    tolerance
        Largest distance to the epipolar line, in the points' unit.
    """
    if len(query_points) < _OF_FUNDAMENTAL:
        return 0
    try:
        _, inliers = cv2.findFundamentalMat(
            candidate_points, query_points, cv2.USAC_ACCURATE, tolerance, 0.999, _MOST_SAMPLES
        )
    except cv2.error:  # no sample gave a matrix, which OpenCV does not expect
        return 0
    return 0 if inliers is None else int(inliers.sum())


def log_zoom(
    query_points: NDArray[np.float64], candidate_points: NDArray[np.float64], near: float
) -> float:
    """How much larger the query shows what both show: the logarithm of the ratio, 0 where unknown.

    Forward motion brings the scene nearer; a keyframe some metres ahead of the right one is told
    from it by this. It is the median over distances between two points, so that up to a quarter
    of the matches may be wrong.

    Parameters
    ----------
    query_points, candidate_points
        (M, 2) matched points.
    near
        Distances below this say nothing, in the points' unit.
    """
    count = len(query_points)
    if count < _OF_ZOOM:
        return 0.0
    one = np.tile(np.arange(count), len(_ZOOM_STEPS))
    other = (one + np.repeat(count // np.array(_ZOOM_STEPS), count)) % count
    in_query, in_candidate = (
        np.linalg.norm(points[one] - points[other], axis=1)
        for points in (query_points, candidate_points)
    )
    apart = np.minimum(in_query, in_candidate) > near
    if np.count_nonzero(apart) < 2 * _OF_ZOOM:
        return 0.0
    return float(np.median(np.log(in_query[apart] / in_candidate[apart])))


def epipolar_distance(
    essential: NDArray[np.float64], from_rays: NDArray[np.float64], to_rays: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(M,) Sampson distance of matched rays (M, 2) to their epipolar lines, with its side."""
    x0, x1 = _homogeneous(from_rays), _homogeneous(to_rays)
    line1, line0 = x0 @ essential.T, x1 @ essential
    error = np.sum(x1 * line1, axis=1)
    slope = np.sqrt((line1[:, :2] ** 2).sum(axis=1) + (line0[:, :2] ** 2).sum(axis=1))
    return np.asarray(error / np.maximum(slope, 1e-12))


def _homogeneous(rays: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M, 3): with a third coordinate of 1."""
    return np.concatenate([rays, np.ones((len(rays), 1))], axis=1)


def cross(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3, 3) matrices that multiply by vectors (N, 3) as the cross product does."""
    x, y, z = vectors.T
    zero = np.zeros_like(x)
    return np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
