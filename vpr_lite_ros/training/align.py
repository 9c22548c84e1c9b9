"""Find where several walks pass the same places: positions for clips that have none.

    python -m vpr_lite_ros.training.align TABLE XFEAT OUTPUT --same floor

compares all clips of TABLE (``file``, ``clip``, rows in order of time), or those that share a value
in the column given, such as walks along both sides of a floor's corridor, and writes a table
(``file``, ``x``, ``y``) for each two that run alongside each other: x is metres along the second
clip, at walking pace. What was filmed from one metre beside, a place network must learn to call
the same; what was filmed three metres further on, another.

XFeat's matches say how much two frames have in common. A corridor's doors look alike, so single
frames are not believed: only a chain that goes forward in both clips, and only if it holds far
more than the best one that runs against time, which is what chance would give.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vpr_lite_ros.bags.tables import read_table
from vpr_lite_ros.training.files import read_rgb
from vpr_lite_ros.training.xfeat import KeyPoints, XFeat, correspondences, mutual_nearest

_LEAST_INLIERS = 35
_BY_CHANCE = 25
"""Inliers that two frames of different places have."""
_LOOKED_AT = 6
"""Frames of the other clip, those with the most matches, whose geometry is looked at."""
_LEAST_CHAIN = 9
_AGAINST_TIME = 2.0
"""How many times the weight of the best chain backwards the one forwards must have."""
_WIDEST_GAP = 4
"""Frames between two of a chain that still get positions of their own."""


def count_inliers(first: Sequence[KeyPoints], second: Sequence[KeyPoints]) -> NDArray[np.int64]:
    """(N, M) matches of two clips' frames that agree with one motion; 0 where few match at all."""
    counts = np.zeros((len(first), len(second)), np.int64)
    for i, frame in enumerate(first):
        matched = np.array([len(mutual_nearest(frame, other)) for other in second])
        for j in np.argsort(-matched, kind="stable")[:_LOOKED_AT]:
            counts[i, j] = len(correspondences(frame, second[j]))
    return counts


def best_chain(inliers: NDArray[np.int64]) -> tuple[list[tuple[int, int]], float]:
    """Pairs (i, j), both growing, that have the most inliers together, and their weight."""
    weights = np.where(inliers >= _LEAST_INLIERS, inliers - _BY_CHANCE, 0)
    rows, columns = weights.shape
    best = np.zeros((rows + 1, columns + 1), np.int64)
    for i, j in itertools.product(range(rows), range(columns)):
        best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + weights[i, j])
    chain = []
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            chain.append((i, j))
    return chain[::-1], float(best[rows, columns])


def positions(inliers: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """(N,) where in the second clip each frame of the first is, in frames; NaN where unknown.

    None if the clips do not run alongside each other.
    """
    chain, weight = best_chain(inliers)
    _, by_chance = best_chain(inliers[:, ::-1])
    if len(chain) < _LEAST_CHAIN or weight < _AGAINST_TIME * by_chance:
        return None
    found = np.full(len(inliers), np.nan)
    for (i, at), (following, then) in itertools.pairwise(chain):
        if following - i <= _WIDEST_GAP:
            found[i : following + 1] = np.interp(
                range(i, following + 1), (i, following), (at, then)
            )
        else:
            found[[i, following]] = at, then
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, help="CSV with file and clip, in order of time")
    parser.add_argument("xfeat", type=Path, help="xfeat.onnx")
    parser.add_argument("output", type=Path, help="folder for the tables")
    parser.add_argument("--same", help="compare only clips that share this column's value")
    parser.add_argument(
        "--metres-per-frame", type=float, default=1.4, help="default: a frame a second, walking"
    )
    args = parser.parse_args()
    rows = read_table(args.table)
    for column in ("file", "clip", args.same):
        if column and column not in rows[0]:
            parser.error(f"{args.table} has no column {column}, only {', '.join(rows[0])}")
    groups: dict[str, dict[str, list[Path]]] = {}
    for row in rows:
        clips = groups.setdefault(row[args.same] if args.same else args.table.stem, {})
        clips.setdefault(row["clip"], []).append(args.table.parent / row["file"])
    xfeat = XFeat(args.xfeat)
    args.output.mkdir(parents=True, exist_ok=True)
    for group, clips in groups.items():
        seen = {
            clip: [xfeat(read_rgb(file)) for file in tqdm(files, f"{group}: {clip}", leave=False)]
            for clip, files in clips.items()
        }
        for first, second in itertools.combinations(clips, 2):
            along = positions(count_inliers(seen[first], seen[second]))
            if along is None:
                continue
            path = args.output / f"{first}-{second}.csv"
            _write(path, clips[first], clips[second], along, args.metres_per_frame)
            print(f"{path}: {np.isfinite(along).sum()} of {len(along)} frames", flush=True)


def _write(
    path: Path,
    first: Sequence[Path],
    second: Sequence[Path],
    along: NDArray[np.float64],
    metres_per_frame: float,
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "x", "y"])
        where = [*zip(first, along, strict=True), *zip(second, range(len(second)), strict=True)]
        for image, frame in where:
            if np.isfinite(frame):
                name = os.path.relpath(image, path.parent)
                writer.writerow([name, f"{frame * metres_per_frame:.2f}", 0])


if __name__ == "__main__":
    main()
