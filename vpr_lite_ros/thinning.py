"""Which keyframes a full database can best do without: the densest in place and time.

A keyframe is dispensable as far as others of the same robot show its place: look like it, lie
where odometry says it lies, and were taken at about the same time. Age counts for nothing.
"""

from __future__ import annotations

import heapq

import faiss
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.descriptors import DescriptorIndex

SAMPLE = 512
"""Keyframes compared with all others at a time. Dense places have more in it, as they should."""
NEIGHBOURS = 16
CROWD = 4
"""A keyframe is as crowded as its nearest four others are close."""
TIME_SHARE = 0.1
TIME_SCALE_S = 60.0
"""Of two as similar, one taken at the same time is closer by up to this much cosine."""
ODOMETRY_SLACK_M = 3.0
ODOMETRY_DRIFT = 0.05
"""Farther apart than this, plus this share of the way between them: two places that look alike."""
BLOCK = 16384
"""Descriptors that are compared at once: 34 MB of 512 numbers."""
FAR = -1.0
"""Closeness of two that do not stand for each other."""


def densest(
    index: DescriptorIndex,
    robots: NDArray[np.int32],
    drives: NDArray[np.int32],
    stamps_ns: NDArray[np.int64],
    positions: NDArray[np.float64],
    travelled_m: NDArray[np.float64],
    count: int,
    seed: int,
) -> NDArray[np.int64]:
    """Row numbers of ``count`` keyframes to delete, at most half of all, ascending.

    None of them is the newest, and while any keyframe has others of its robot around it, none
    without goes. With more than ``SAMPLE`` rows those compared are drawn by chance, with ``seed``.

    Parameters
    ----------
    index
        Descriptors of N keyframes, by row number. How alike two are is that of their wholes.
    robots, drives, stamps_ns
        (N,) each keyframe's robot, its robot and session, and when it was taken.
    positions
        (N, 3) metres, in the frame of the drive's odometry; NaN where not known.
    travelled_m
        (N,) metres that the robot had travelled in that drive.
    """
    rows = np.arange(len(index) - 1)
    if len(rows) > max(SAMPLE, 2 * count):
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(rows, max(SAMPLE, 2 * count), replace=False))
    queries = index.wholes(rows)
    similarity, others = _most_similar(index, queries, min(NEIGHBOURS + 1, len(index)))

    of = rows[:, None]
    apart_s = np.abs(stamps_ns[of] - stamps_ns[others]) / 1e9
    closeness = similarity - TIME_SHARE * apart_s / (apart_s + TIME_SCALE_S)
    distance = np.linalg.norm(positions[of] - positions[others], axis=2)
    way = np.abs(travelled_m[of] - travelled_m[others])
    elsewhere = distance > ODOMETRY_SLACK_M + ODOMETRY_DRIFT * way  # not so where one is NaN
    elsewhere &= drives[of] == drives[others]
    closeness[elsewhere | (robots[of] != robots[others]) | (others == of)] = FAR
    best_first = np.argsort(-closeness, axis=1, kind="stable")
    closeness = np.take_along_axis(closeness, best_first, axis=1)
    others = np.take_along_axis(others, best_first, axis=1)

    gone: set[int] = set()

    def crowding(number: int) -> float:
        near = [
            close
            for close, other in zip(
                closeness[number].tolist(), others[number].tolist(), strict=True
            )
            if close > FAR and other not in gone
        ][:CROWD]
        return (sum(near) + FAR * (CROWD - len(near))) / CROWD

    # Each deletion makes its neighbours less crowded, so what was true of one is looked up anew.
    waiting = [(-crowding(number), number) for number in range(len(rows))]
    heapq.heapify(waiting)
    while waiting and len(gone) < min(count, len(index) // 2):
        believed, number = heapq.heappop(waiting)
        now = -crowding(number)
        if now > believed:
            heapq.heappush(waiting, (now, number))
        else:
            gone.add(int(rows[number]))
    return np.array(sorted(gone), np.int64)


def _most_similar(
    index: DescriptorIndex, queries: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(Q, ``count``) similarities and row numbers, best first.

    Of so many queries at once FAISS is much faster with float32 vectors than with an index of
    bytes, so these are taken out block by block.
    """
    found = faiss.ResultHeap(len(queries), count, keep_max=True)
    for first in range(0, len(index), BLOCK):
        block = index.wholes(np.arange(first, min(first + BLOCK, len(index))))
        best = min(count, len(block))
        similarity, rows = faiss.knn(queries, block, best, faiss.METRIC_INNER_PRODUCT)
        found.add_result(similarity, rows + first)
    found.finalize()
    return found.D, found.I
