"""Thresholds that a bundle recommends, measured on labelled images it was fitted on."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vpr_lite_ros.config import Config
from vpr_lite_ros.image import Image, fit
from vpr_lite_ros.inference import Description, PlaceModel
from vpr_lite_ros.matching import Camera, fit_epipolar, mutual_matches
from vpr_lite_ros.training.augment import distort
from vpr_lite_ros.training.files import read_rgb

TRUE_PER_QUERY = 3
FALSE_PER_QUERY = 8
"""Of each query's pairs the most similar ones: what retrieval would bring."""
NOMINAL_FOCAL = 0.8
"""Focal length, in image widths, of a camera of 64°: most training images name none."""

Relation = NDArray[np.int8]
"""(Q, C) of queries and candidates: 1 the same place, -1 another, 0 unknown or the image itself."""


@dataclass(frozen=True)
class LabelledSet:
    """Images, and which of them show the same place."""

    queries: list[Path]
    candidates: list[Path]
    relation: Relation
    distorted: bool = False
    """Whether queries are seen in another light, season or camera (``augment.distort``)."""


@dataclass(frozen=True)
class Scores:
    """What the model said of pairs, and what is true of them; arrays of one entry a pair."""

    similarity: NDArray[np.float32]
    match: NDArray[np.float32]
    inliers: NDArray[np.float32]
    true: NDArray[np.bool_]
    queries: int
    """Images that have a true partner."""
    recognised: int
    """Of these, how many have one as their most similar candidate."""


def score_pairs(model: PlaceModel, labelled: LabelledSet, seed: int = 0) -> Scores:
    """Match every query with its most similar true and its most similar false candidates."""
    rng = np.random.default_rng(seed)

    def describe(path: Path, distorted: bool) -> Description:
        image: Image = read_rgb(path)
        return model.describe(
            fit(distort(image, rng) if distorted else image, model.bundle.image_size)
        )

    queries = [describe(path, labelled.distorted) for path in tqdm(labelled.queries)]
    candidates = queries
    if labelled.distorted or labelled.candidates is not labelled.queries:
        candidates = [describe(path, False) for path in tqdm(labelled.candidates)]
    known = np.stack([candidate.descriptor for candidate in candidates])
    found: list[tuple[float, float, float, bool]] = []
    with_partner = recognised = 0
    for query, relation in zip(tqdm(queries, desc="match"), labelled.relation, strict=True):
        cosines = known @ query.descriptor
        order = np.argsort(-cosines, kind="stable")
        true, false = order[relation[order] > 0], order[relation[order] < 0]
        if len(true):
            with_partner += 1
            recognised += bool(not len(false) or cosines[true[0]] > cosines[false[0]])
        chosen = np.concatenate([true[:TRUE_PER_QUERY], false[:FALSE_PER_QUERY]])
        if not len(chosen):
            continue
        tokens = np.stack([candidates[index].tokens for index in chosen])
        scores, assignments = model.match(query.tokens, tokens)
        for index, score, assignment in zip(chosen, scores, assignments, strict=True):
            agreeing = _count_inliers(model, query, candidates[index], assignment)
            is_true = bool(relation[index] > 0)
            found.append((float(cosines[index]), float(score), agreeing, is_true))
    columns = np.array(found, np.float32).reshape(-1, 4)
    similarity, match, inliers, true = columns.T
    return Scores(similarity, match, inliers, true > 0, with_partner, recognised)


def _count_inliers(
    model: PlaceModel, query: Description, candidate: Description, assignment: NDArray[np.float32]
) -> int:
    """Matches that agree with one motion of a camera with a nominal lens."""
    width, height = model.bundle.image_size
    focal = NOMINAL_FOCAL * width
    matrix = (focal, 0.0, width / 2, 0.0, focal, height / 2, 0.0, 0.0, 1.0)
    camera = Camera(width, height, matrix)
    matches = mutual_matches(assignment)
    motion = fit_epipolar(
        camera.rays(query.centres[matches.query]),
        camera.rays(candidate.centres[matches.candidate]),
        Config().epipolar_tolerance_px * camera.radians_per_pixel(width),
    )
    return int(motion.inliers.sum()) if motion else 0


def least_threshold(
    scores: NDArray[np.float32], true: NDArray[np.bool_], false_rate: float
) -> float:
    """The least score that at most ``false_rate`` of the false pairs reach."""
    false_scores = np.sort(scores[~true])
    if not len(false_scores):
        raise ValueError("there is no false pair among the images: label more places")
    allowed = int(false_rate * len(false_scores))
    return float(np.nextafter(false_scores[-1 - allowed], np.float32(np.inf)))


def labelled_sets(folder: Path) -> dict[str, LabelledSet]:
    """The labelled training sets under ``folder``.

    ``grief_places`` and ``webcam`` name their places, each under many conditions. On the drive
    ``karlsruhe`` up to 10 m is the same place, from 25 m on another street scene that looks much
    the same; its queries are distorted, as it was driven only once. ``ie_tower`` is left out:
    its floors look alike to people, too.
    """
    return {
        "grief_places": _places(folder / "grief_places", "places.csv"),
        "webcam": _places(folder / "webcam", "images.csv"),
        "karlsruhe": _drive(folder / "karlsruhe"),
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _relate(count: int, relate: Callable[[int, int], int]) -> Relation:
    relation = np.zeros((count, count), np.int8)
    for i in range(count):
        for j in range(count):
            if i != j:
                relation[i, j] = relate(i, j)
    return relation


def _places(folder: Path, table: str) -> LabelledSet:
    rows = _rows(folder / table)
    places = [row["place"] for row in rows]
    files = [folder / row["file"] for row in rows]
    relation = _relate(len(rows), lambda i, j: 1 if places[i] == places[j] else -1)
    return LabelledSet(files, files, relation)


def _drive(folder: Path) -> LabelledSet:
    rows = _rows(folder / "poses.csv")
    xy = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    files = [folder / row["file"] for row in rows]
    relation = _relate(
        len(rows), lambda i, j: 1 if distance[i, j] <= 10 else -int(distance[i, j] >= 25)
    )
    return LabelledSet(files, files, relation, distorted=True)
