"""Matches of patches to a fraction of a pixel, by correlation of the two small pictures, and the
motion between the two cameras that follows from them.

Between patches 16 px apart a point is found to some 3 px, and neighbours are off alike: good enough
to compare places, not to measure a way. And what looks alike to a network need not be the same
thing: whether the pictures correlate there tells much about that.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.matching import (
    DIRECTION_SIGMA,
    EpipolarFit,
    cross,
    epipolar_distance,
    fit_epipolar,
    fit_rotation,
)

HALF = 6
"""Pixels of the small picture from the centre of a template to its edge ..."""
SEARCH = 12
"""... and how far around the patch it is looked for: a patch and a half."""
MIN_CORRELATION = 0.6
_FLAT = 2.0
"""Deviation of grey levels below which there is nothing to correlate."""
MIN_POINTS = 12
"""Fewer points that agree could agree by chance."""
MIN_OF_MOTION = 40
"""The same without depth: motions that fewer points agree on are often wrong."""
MIN_SHARE = 0.5
"""Of the points that were found again, this share must agree."""
CORRELATED = 8.0
"""Errors of neighbouring points are alike, and depth has some of its own: variances are so many
times those that the points' misses alone would give. Drawn towns with exact depth ask for 4."""
ROTATION_FLOOR, DIRECTION_FLOOR = 0.03, 0.1
"""Radians about each axis that are added to what the misses say: intrinsics, where the camera sits,
and when the images were taken are off by as much, and all closures of a revisit alike."""
_STARTS = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, -1]]) / np.array(
    [[1], [1], [2**0.5], [2**0.5]]
)
"""Directions on the ground that the motion is looked for around, beside RANSAC's."""
_MOST_SAMPLES = 1000
"""That RANSAC draws of points found again: more than to compare candidates, for a closure alone."""
_ROUNDS = 8
_STEP = 1e-5


def refine_motion(
    query_rays: NDArray[np.float64], match_rays: NDArray[np.float64], tolerance: float
) -> EpipolarFit | None:
    """The motion between two cameras once more, from points that correlation found again.

    None if they are too few, or too few of them agree: by night, or on bare walls.

    Parameters
    ----------
    query_rays, match_rays
        (F, 2) such points as ``Camera.rays`` gives them.
    tolerance
        Largest distance to the epipolar line, in the unit of rays.

    Returns
    -------
    With its covariance. The direction is zero where it cannot be told to ``DIRECTION_SIGMA``.
    """
    if len(query_rays) < MIN_OF_MOTION:
        return None
    fit = fit_epipolar(query_rays, match_rays, tolerance, _MOST_SAMPLES)
    enough = max(MIN_OF_MOTION, MIN_SHARE * len(query_rays))
    if fit is None or np.count_nonzero(fit.inliers) < enough:
        return None
    polished = _best_of_several(fit, query_rays, match_rays, tolerance)
    if np.count_nonzero(polished.inliers) < enough:
        return None
    known = polished.covariance
    if known is None or np.trace(known[:3, :3]) > 2 * DIRECTION_SIGMA**2:
        covariance = np.diag([0.0] * 3 + [ROTATION_FLOOR**2] * 3)
        return EpipolarFit(polished.inliers, polished.rotation, np.zeros(3), covariance)
    return polished


def _best_of_several(
    fit: EpipolarFit,
    query_rays: NDArray[np.float64],
    match_rays: NDArray[np.float64],
    tolerance: float,
) -> EpipolarFit:
    """The motion that the points agree with best, and how far others that do nearly as well lie.

    Fronts of houses are planes, and what is seen of a plane can come from two motions.
    """
    if not fit.direction.any():
        return fit
    turn = fit_rotation(query_rays, match_rays, tolerance, _MOST_SAMPLES) or fit
    others = [replace(turn, direction=start) for start in _STARTS]
    found = []
    for start in (fit, *others):
        one = _polish(start, query_rays, match_rays, tolerance)
        miss = epipolar_distance(
            cross(one.direction[None])[0] @ one.rotation, match_rays, query_rays
        )
        cost = float(np.log1p((2 * miss / tolerance) ** 2).sum())
        found.append((cost, _facing(one, query_rays, match_rays)))
    least, best = min(found, key=lambda pair: pair[0])
    assert best.covariance is not None
    apart, weights = [], []
    for cost, one in found:
        turn = cv2.Rodrigues(one.rotation @ best.rotation.T)[0].ravel()
        apart.append(np.concatenate([one.direction - best.direction, turn]))
        weights.append(np.exp((least - cost) / CORRELATED))
    spread = np.einsum("n,ni,nj->ij", np.array(weights) / sum(weights), apart, apart)
    return replace(best, covariance=best.covariance + spread)


def _facing(
    fit: EpipolarFit, query_rays: NDArray[np.float64], match_rays: NDArray[np.float64]
) -> EpipolarFit:
    """``fit``, or the same with the opposite direction, if that puts more points before both
    cameras: epipolar lines do not tell the two apart."""
    one = np.ones((len(query_rays), 1))
    turned = np.hstack([match_rays, one]) @ fit.rotation.T
    seen = np.hstack([query_rays, one])
    across = np.cross(seen, turned)
    depth = -(across * np.cross(seen, fit.direction)).sum(axis=1) / np.maximum(
        (across**2).sum(axis=1), 1e-12
    )
    before = (depth > 0) & (depth * turned[:, 2] + fit.direction[2] > 0)
    behind = (depth < 0) & (depth * turned[:, 2] + fit.direction[2] < 0)
    more = np.count_nonzero(before & fit.inliers) >= np.count_nonzero(behind & fit.inliers)
    return fit if more else replace(fit, direction=-fit.direction)


def _polish(
    fit: EpipolarFit,
    query_rays: NDArray[np.float64],
    match_rays: NDArray[np.float64],
    tolerance: float,
) -> EpipolarFit:
    """Least squares of the distances to the epipolar lines: five numbers, far ones counting less.

    RANSAC's best motion goes through five points; this one goes between all that agree.
    """
    rotation, direction = fit.rotation, fit.direction

    def moved(step: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        there = direction + across @ step[:2]
        return cv2.Rodrigues(step[2:])[0] @ rotation, there / np.linalg.norm(there)

    def misses(step: NDArray[np.float64]) -> NDArray[np.float64]:
        turn, there = moved(step)
        return epipolar_distance(cross(there[None])[0] @ turn, match_rays, query_rays)

    covariance = np.eye(6)
    for _ in range(_ROUNDS):
        across = np.linalg.svd(direction[None])[2][1:].T
        miss = misses(np.zeros(5))
        near = np.abs(miss) <= tolerance
        if not near.any():
            break
        slopes = np.stack(
            [(misses(step) - misses(-step)) / (2 * _STEP) for step in np.eye(5) * _STEP], axis=1
        )[near]
        scale = 1.4826 * float(np.median(np.abs(miss[near]))) + 1e-9
        weights = 1 / (1 + (miss[near] / (2 * scale)) ** 2)
        inverse = np.linalg.pinv(slopes.T @ (weights[:, None] * slopes))
        spread = np.zeros((6, 5))
        spread[:3, :2], spread[3:, 2:] = across, np.eye(3)
        covariance = spread @ inverse @ spread.T * CORRELATED * scale**2
        covariance[:3, :3] += DIRECTION_FLOOR**2 * across @ across.T
        covariance[3:, 3:] += ROTATION_FLOOR**2 * np.eye(3)
        rotation, direction = moved(-inverse @ slopes.T @ (weights * miss[near]))
    return EpipolarFit(near, rotation, direction, covariance)


def find_again(
    one: bytes, points: NDArray[np.floating], other: bytes, near: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Where the points of one picture are in another one of the same place.

    Parameters
    ----------
    one, other
        Small JPEGs as ``image.thumbnail`` makes them; with an empty one nothing is found.
    points
        (M, 2) in ``one``, fractions of width and height.
    near
        (M, 2) where each was matched to in ``other``, likewise.

    Returns
    -------
    centres
        (M, 2) as ``near``, to a fraction of a pixel where it was found.
    found
        (M,) whether the two pictures correlate there.
    """
    template_of, image = _grey(one), _grey(other)
    centres, found = near.copy(), np.zeros(len(near), np.bool_)
    if template_of is None or image is None:
        return centres, found
    size = np.array(image.shape[::-1])
    at, start = points * np.array(template_of.shape[::-1]), near * size
    for index, (here, there) in enumerate(zip(at, start, strict=True)):
        template = cv2.getRectSubPix(template_of, (2 * HALF + 1,) * 2, here.tolist())
        if cv2.meanStdDev(template)[1].item() < _FLAT:
            continue
        around = cv2.getRectSubPix(image, (2 * (HALF + SEARCH) + 1,) * 2, there.tolist())
        map_ = cv2.matchTemplate(around, template, cv2.TM_CCOEFF_NORMED)
        _, best, _, (x, y) = cv2.minMaxLoc(map_)
        if best < MIN_CORRELATION or not (0 < x < 2 * SEARCH and 0 < y < 2 * SEARCH):
            continue
        offset = x + _peak(map_[y, x - 1 : x + 2]), y + _peak(map_[y - 1 : y + 2, x])
        centres[index] = (there + np.array(offset) - SEARCH) / size
        found[index] = True
    return centres, found


@lru_cache(maxsize=16)  # one query is compared with many keyframes, several at once
def _grey(picture: bytes) -> NDArray[np.float32] | None:
    if not picture:
        return None
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_GRAYSCALE)
    return None if image is None else image.astype(np.float32)


def _peak(three: NDArray[np.float32]) -> float:
    """Of three values the middle one of which is largest: where a parabola has its peak, ±0.5."""
    before, middle, after = three.tolist()
    curvature = 2 * middle - before - after
    return (after - before) / 2 / curvature if curvature > 1e-9 else 0.0
