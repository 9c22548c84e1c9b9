"""Thresholds that a bundle recommends, measured on labelled images it was fitted on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vpr_lite_ros.config import Config
from vpr_lite_ros.datasets import PlaceDataset, load_dataset
from vpr_lite_ros.descriptors import similarities
from vpr_lite_ros.image import fit
from vpr_lite_ros.inference import Description, PlaceModel
from vpr_lite_ros.matching import Camera, fit_epipolar, meeting_points, mutual_matches
from vpr_lite_ros.training.augment import distort
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import read_rgb
from vpr_lite_ros.training.town import draw_town

TRUE_PER_QUERY = 3
FALSE_PER_QUERY = 8
"""Of each query's pairs the most similar ones: what retrieval would bring."""
NOMINAL_FOCAL = 0.8
"""Focal length, in image widths, of a camera of 64°: most training images name none."""


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
    drawn: bool = False
    """Whether the places are a drawn town's."""


def score_pairs(
    model: PlaceModel,
    dataset: PlaceDataset,
    *,
    distorted: bool = False,
    most_queries: int | None = None,
    seed: int = 0,
) -> Scores:
    """Match every query with its most similar true and its most similar false candidates.

    Parameters
    ----------
    distorted
        Queries are seen in another light, season or camera (``augment.distort``).
    most_queries
        Of more queries, this many are drawn.
    """
    rng = np.random.default_rng(seed)
    size = model.bundle.image_size
    candidates = [
        model.describe(fit(read_rgb(path), size)) for path in tqdm(dataset.database, "describe")
    ]
    known = np.stack([candidate.descriptor for candidate in candidates])
    found: list[tuple[float, float, float, bool]] = []
    with_partner = recognised = 0
    chosen_queries = np.sort(rng.permutation(len(dataset.queries))[:most_queries])
    for index in tqdm(chosen_queries.tolist(), "match"):
        image = read_rgb(dataset.queries[index])
        query = model.describe(fit(distort(image, rng) if distorted else image, size))
        cosines = similarities(query.descriptor, known)
        order = np.argsort(-cosines, kind="stable")
        true = order[np.isin(order, dataset.positives(index))]
        false = order[~np.isin(order, dataset.non_negatives(index))]
        if len(true):
            with_partner += 1
            recognised += bool(not len(false) or cosines[true[0]] > cosines[false[0]])
        chosen = np.concatenate([true[:TRUE_PER_QUERY], false[:FALSE_PER_QUERY]])
        if not len(chosen):
            continue
        tokens = np.stack([candidates[candidate].tokens for candidate in chosen])
        scores, assignments = model.match(query.tokens, tokens)
        for candidate, score, assignment in zip(chosen, scores, assignments, strict=True):
            agreeing = _count_inliers(model, query, candidates[candidate], assignment)
            is_true = bool(candidate in true)
            found.append((float(cosines[candidate]), float(score), agreeing, is_true))
    columns = np.array(found, np.float32).reshape(-1, 4)
    similarity, match, inliers, is_same = columns.T
    return Scores(similarity, match, inliers, is_same > 0, with_partner, recognised)


def _count_inliers(
    model: PlaceModel, query: Description, candidate: Description, assignment: NDArray[np.float32]
) -> int:
    """Matches that agree with one motion of a camera with a nominal lens."""
    width, height = model.bundle.image_size
    focal = NOMINAL_FOCAL * width
    matrix = (focal, 0.0, width / 2, 0.0, focal, height / 2, 0.0, 0.0, 1.0)
    camera = Camera(width, height, matrix)
    matches = mutual_matches(assignment)
    points = meeting_points(assignment, matches, query.centres, candidate.centres, (width, height))
    motion = fit_epipolar(
        camera.rays(query.centres[matches.query]),
        camera.rays(points),
        Config().epipolar_tolerance_px * camera.radians_per_pixel(width),
    )
    return int(motion.inliers.sum()) if motion else 0


def least_threshold(
    scores: NDArray[np.float32], true: NDArray[np.bool_], false_rate: float
) -> float:
    """The least score that at most ``false_rate`` of the false pairs reach."""
    false_scores = np.sort(scores[~true])
    if not len(false_scores):
        raise TrainingError("there is no false pair among the images: label more places")
    allowed = int(false_rate * len(false_scores))
    return float(np.nextafter(false_scores[-1 - allowed], np.float32(np.inf)))


def recommend(sets: Mapping[str, Scores], false_rate: float) -> dict[str, Any]:
    """Thresholds that a bundle recommends: ``similarity``, ``match``, ``inliers``.

    Of match score and inliers the strictest that any set asks for: streets ask for more than
    rooms, and pooled with many easy pairs nobody would hear them. Similarity only thins out what
    need not be matched: score and geometry decide.

    Drawn towns are not asked for inliers: from 30 m further back along a straight street the same
    houses are seen, so these false pairs agree with one motion, and rightly.
    """
    scores = list(sets.values())
    photographs = [x for x in scores if not x.drawn] or scores
    inliers = [least_threshold(x.inliers, x.true, false_rate) for x in photographs]
    return {
        "similarity": round(min(float(np.quantile(x.similarity[x.true], 0.02)) for x in scores), 3),
        "match": round(max(least_threshold(x.match, x.true, false_rate) for x in scores), 4),
        "inliers": math.ceil(max(inliers)),
    }


def score_labelled_sets(
    model: PlaceModel, entries: Sequence[Mapping[str, Any]], most_queries: int, seed: int = 0
) -> dict[str, Scores]:
    """``score_pairs`` on each of the data sets ``entries``, by their names.

    An entry is one of ``load_dataset``, or ``{town: SEED}``: a drive through a town that is drawn
    from a seed (0 is the demo's). No network has learned its streets, so its false pairs score
    what those of a user's streets do; of streets that were trained on they score far less.

    With ``distorted: true`` an entry's queries are seen in another light: for true pairs of
    places that were seen only once. Its false pairs differ in light, too, and score less than
    those of one drive by day, so such a set is best listed both ways.
    """
    found: dict[str, Scores] = {}
    for entry in entries:
        distorted = bool(entry.get("distorted", False))
        source = {key: value for key, value in entry.items() if key != "distorted"}
        with tempfile.TemporaryDirectory() as folder:
            match source:
                case {"town": int(town), **rest} if not rest:
                    drawn = draw_town(town, Path(folder) / f"town {town}")
                    dataset = load_dataset({"table": str(drawn / "poses.csv")})
                case _:
                    dataset = load_dataset(source)
            name = f"{dataset.name}, distorted" if distorted else dataset.name
            scores = score_pairs(
                model, dataset, distorted=distorted, most_queries=most_queries, seed=seed
            )
        found[name] = replace(scores, drawn="town" in source)
    return found
