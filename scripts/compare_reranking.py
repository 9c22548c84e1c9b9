"""Put the same candidates in order in several ways, and see which way is best.

`python scripts/compare_reranking.py DATA [--untrained BUNDLE] [--xfeat FILE]` prints a table of
each benchmark of `vpr-lite evaluate`: Recall@1, recall at 100% precision and milliseconds a
candidate, for

- the order of the global descriptors, which all others begin with;
- the detector's confidence: similarity, match score, and the matches that agree;
- the match score of the bundle (`--bundle`) alone;
- that of BUNDLE, if given: the same place network with a matcher that passes descriptors through;
- Patch-NetVLAD's two scorings (CVPR 2021) of the bundle's patches: those of the patches nearest
  to each other that agree with one homography, and the rapid one, which asks how far each of them
  moves otherwise than all do on average;
- XFeat (CVPR 2024): key points nearest to each other that agree with one fundamental matrix.

Patch-NetVLAD's patches are not passed through self-attention, so while that is untrained they are
the same; of a trained bundle its BUNDLE without attention is used.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.benchmarks import Benchmark, find_benchmarks, read_frames
from vpr_lite_ros.image import fit
from vpr_lite_ros.inference import DEFAULT_BUNDLE, Description, PlaceModel, open_model
from vpr_lite_ros.measurement import Answer, look_up, measure, reorder
from vpr_lite_ros.progress import progress
from vpr_lite_ros.training.xfeat import KeyPoints, XFeat, correspondences

MIN_TIME_GAP_S = 30.0
"""In one sequence, as by default in `vpr-lite evaluate`."""
STEP = 16
"""Pixels between patches; Patch-NetVLAD lets its homography be this far off, too."""

Scorer = Callable[[int, list[int]], list[float]]


@dataclass(frozen=True)
class Seen:
    """One frame, as each way sees it."""

    ours: Description
    plain: Description
    """Without attention."""
    points: KeyPoints | None


def nearest_patches(
    query: Description, candidate: Description, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixels of patches that are each other's nearest, in the query and in the candidate."""
    cosines = query.tokens.astype(np.float32) @ candidate.tokens.astype(np.float32).T
    there, back = cosines.argmax(axis=1), cosines.argmax(axis=0)
    kept = np.flatnonzero(back[there] == np.arange(len(there)))
    scale = np.array(size, np.float32)
    return query.centres[kept] * scale, candidate.centres[there[kept]] * scale


def homography_score(query: Description, candidate: Description, size: tuple[int, int]) -> float:
    """Share of the patches that agree with one homography."""
    first, second = nearest_patches(query, candidate, size)
    if len(first) < 4:
        return 0.0
    _, inliers = cv2.findHomography(first, second, cv2.RANSAC, STEP * 1.5)
    return 0.0 if inliers is None else float(inliers.sum()) / len(query.tokens)


def rapid_score(query: Description, candidate: Description, size: tuple[int, int]) -> float:
    """Sum over patches of how little each moves otherwise than all do on average."""
    first, second = nearest_patches(query, candidate, size)
    if not len(first):
        return 0.0
    moved = (second - first) / STEP
    aside = np.abs(moved - moved.mean(axis=0))
    most = np.array(size) / STEP
    return float(((most - aside) ** 2).sum()) / len(query.tokens)


def compare(
    benchmark: Benchmark, ours: PlaceModel, plain: PlaceModel | None, xfeat: XFeat | None, most: int
) -> list[tuple[str, float, float, float]]:
    """Rows of (way, Recall@1, recall at 100% precision, milliseconds a candidate)."""
    could = benchmark.findable(MIN_TIME_GAP_S)
    if not could.any():
        return []  # no place is seen twice
    size = ours.bundle.image_size
    frames: list[Seen] = []
    images = (frame for source in benchmark.sources for frame in read_frames(source))
    total = sum(map(len, benchmark.sources))
    for frame in progress(images, total, "frame", benchmark.name):
        fitted = fit(frame.image, size)
        described = ours.describe(fitted)
        points = xfeat(frame.image) if xfeat else None
        frames.append(Seen(described, plain.describe(fitted) if plain else described, points))
    found = list(look_up(benchmark, ours, min_time_gap_s=MIN_TIME_GAP_S, examine=most))
    answers = [one.answer for one in found]
    # Matching is timed below; what confidence adds to it is the geometry of the matches.
    rows = [
        ("global descriptor", *_figures(answers, benchmark, could), 0.0),
        ("confidence", *_figures([one.reranked() for one in found], benchmark, could), math.nan),
    ]
    for name, scorer in _scorers(frames, ours, plain, xfeat is not None).items():
        began, count, reordered = time.perf_counter(), 0, []
        for answer in progress(answers, len(answers), "query", name):
            candidates = answer.matches[:most]
            reordered.append(reorder(answer, scorer(answer.frame, candidates)))
            count += len(candidates)
        seconds = time.perf_counter() - began
        rows.append((name, *_figures(reordered, benchmark, could), 1e3 * seconds / max(count, 1)))
    return rows


def _figures(
    answers: list[Answer], benchmark: Benchmark, could: NDArray[np.bool_]
) -> tuple[float, float]:
    figures = measure(answers, benchmark.truth, could)
    return figures["recall_at_1"], figures["recall_at_100_precision"]


def _scorers(
    frames: list[Seen], ours: PlaceModel, plain: PlaceModel | None, with_xfeat: bool
) -> dict[str, Scorer]:
    def by_tokens(model: PlaceModel, descriptions: list[Description]) -> Scorer:
        def score(query: int, candidates: list[int]) -> list[float]:
            if not candidates:
                return []
            tokens = np.stack([descriptions[other].tokens for other in candidates])
            scores: list[float] = model.match(descriptions[query].tokens, tokens)[0].tolist()
            return scores

        return score

    def by_patches(scorer: Callable[[Description, Description, tuple[int, int]], float]) -> Scorer:
        size = ours.bundle.image_size

        def score(query: int, candidates: list[int]) -> list[float]:
            asked = frames[query].plain
            return [scorer(asked, frames[other].plain, size) for other in candidates]

        return score

    def by_points(query: int, candidates: list[int]) -> list[float]:
        asked, others = frames[query].points, [frames[other].points for other in candidates]
        return [float(len(correspondences(asked, other))) for other in others if asked and other]

    found = {"match score": by_tokens(ours, [frame.ours for frame in frames])}
    if plain:
        found["match score, untrained"] = by_tokens(plain, [frame.plain for frame in frames])
    found |= {
        "Patch-NetVLAD, RANSAC": by_patches(homography_score),
        "Patch-NetVLAD, rapid": by_patches(rapid_score),
    }
    return found | ({"XFeat, MAGSAC": by_points} if with_xfeat else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--untrained", type=Path)
    parser.add_argument("--xfeat", type=Path)
    parser.add_argument("--candidates", type=int, default=10)
    args = parser.parse_args()
    ours = open_model(args.bundle)
    untrained = open_model(args.untrained) if args.untrained else None
    xfeat = XFeat(args.xfeat) if args.xfeat else None
    for benchmark in find_benchmarks(args.data):
        rows = compare(benchmark, ours, untrained, xfeat, args.candidates)
        if not rows:
            continue
        print(f"\n{benchmark.name}: {args.candidates} candidates\n")
        print("| order by | Recall@1 | recall at 100% precision | ms a candidate |")
        print("|---|---|---|---|")
        for name, recall, at_precision, milliseconds in rows:
            cost = "" if math.isnan(milliseconds) else f"{milliseconds:.1f}"
            print(f"| {name} | {recall:.3f} | {at_precision:.3f} | {cost} |")


if __name__ == "__main__":
    main()
