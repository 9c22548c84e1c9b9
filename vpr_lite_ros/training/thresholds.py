"""Thresholds that a bundle recommends, measured on labelled images it was fitted on."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vpr_lite_ros.image import fit
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.training.fit import read_rgb

Relation = NDArray[np.int8]
"""(Q, Q) of images: 1 the same place, -1 another, 0 unknown (the image itself, too)."""


@dataclass(frozen=True)
class Scores:
    """What the model said of retrieved pairs, and what is true of them."""

    similarity: NDArray[np.float32]
    match: NDArray[np.float32]
    true: NDArray[np.bool_]
    queries: int
    """Images that have a true partner."""
    recognised: int
    """Of these, how many have one as their best candidate after re-ranking."""


def score_pairs(
    model: PlaceModel, files: list[Path], relation: Relation, top_k: int = 10
) -> Scores:
    """Look up every image among the others, as the detector does, pairs of unknown truth aside."""
    descriptions = [
        model.describe(fit(read_rgb(path), model.bundle.image_size))
        for path in tqdm(files, desc="describe")
    ]
    descriptors = np.stack([description.descriptor for description in descriptions])
    similarity = np.where(relation == 0, -np.inf, descriptors @ descriptors.T)
    found: list[tuple[float, float, bool]] = []
    queries = recognised = 0
    for query in tqdm(range(len(files)), desc="match"):
        best = np.argsort(-similarity[query], kind="stable")[:top_k]
        best = best[np.isfinite(similarity[query, best])]
        if not len(best):
            continue
        tokens = np.stack([descriptions[candidate].tokens for candidate in best])
        scores, _ = model.match(descriptions[query].tokens, tokens)
        true = relation[query, best] > 0
        found += zip(similarity[query, best].tolist(), scores.tolist(), true.tolist(), strict=True)
        if (relation[query] > 0).any():
            queries += 1
            recognised += bool(true[scores.argmax()])
    columns = np.array(found, np.float32).reshape(-1, 3)
    return Scores(columns[:, 0], columns[:, 1], columns[:, 2] > 0, queries, recognised)


def least_threshold(
    scores: NDArray[np.float32], true: NDArray[np.bool_], false_rate: float
) -> float:
    """The least score that at most ``false_rate`` of the false pairs reach."""
    false_scores = np.sort(scores[~true])
    if not len(false_scores):
        raise ValueError("there is no false pair among the images: label more places")
    allowed = int(false_rate * len(false_scores))
    return float(np.nextafter(false_scores[-1 - allowed], np.float32(np.inf)))


def labelled_sets(folder: Path) -> dict[str, tuple[list[Path], Relation]]:
    """The labelled training sets under ``folder``: name to files and what is true of them.

    ``grief_places`` and ``webcam`` name their places. On a drive (``karlsruhe``) up to 10 m is
    the same place, from 25 m on another. In ``ie_tower`` frames of one clip up to 2 s apart show
    the same place, frames of other floors another.
    """
    return {
        "grief_places": _places(folder / "grief_places", "places.csv"),
        "webcam": _places(folder / "webcam", "images.csv"),
        "karlsruhe": _drive(folder / "karlsruhe"),
        "ie_tower": _clips(folder / "ie_tower", every=10),
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


def _places(folder: Path, table: str) -> tuple[list[Path], Relation]:
    rows = _rows(folder / table)
    places = [row["place"] for row in rows]
    return [folder / row["file"] for row in rows], _relate(
        len(rows), lambda i, j: 1 if places[i] == places[j] else -1
    )


def _drive(folder: Path) -> tuple[list[Path], Relation]:
    rows = _rows(folder / "poses.csv")
    xy = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    return [folder / row["file"] for row in rows], _relate(
        len(rows), lambda i, j: 1 if distance[i, j] <= 10 else -int(distance[i, j] >= 25)
    )


def _clips(folder: Path, every: int) -> tuple[list[Path], Relation]:
    """Pairs of neighbouring frames, one pair every ``every`` seconds."""
    rows = [row for row in _rows(folder / "frames.csv") if int(row["order_in_clip"]) % every < 2]

    def relate(i: int, j: int) -> int:
        if rows[i]["floor"] != rows[j]["floor"]:
            return -1
        gap = abs(int(rows[i]["order_in_clip"]) - int(rows[j]["order_in_clip"]))
        return int(rows[i]["clip"] == rows[j]["clip"] and gap <= 2)

    return [folder / row["file"] for row in rows], _relate(len(rows), relate)
