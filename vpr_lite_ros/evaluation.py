"""What "good" means, exactly: ground truth, precision, recall, curves.

Frames are numbered by their place in a sequence, from 0. A *query* is a keyframe that was looked
up; a *match* is an earlier keyframe. Nothing here knows how queries were answered, so the same
definitions serve replay, demo, evaluation and reports. A figure that is not defined (a precision
without closures, a recall with nothing to find) is NaN, never 0 or 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Booleans = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class GroundTruth(Protocol):
    """Which frames show the same place."""

    definition: str
    """One phrase for reports: when two frames count as the same place."""

    def known(self, frames: Integers) -> Booleans:
        """(M,) of which of these frames the place is known."""

    def same_place(self, query: int, matches: Integers) -> Booleans:
        """(M,) which of ``matches`` show the place of ``query``; False where not known."""

    def partners(self, query: int) -> Integers:
        """All frames that show the place of ``query``, and perhaps some near it; rising."""


class RadiusTruth:
    """Two frames show the same place if they were taken at most ``radius_m`` apart.

    Parameters
    ----------
    xyz
        (N, 3) where each frame was taken, metres; NaN where that is not known.
    radius_m
        Metres, inclusive. Direction of view plays no part.
    """

    def __init__(self, xyz: Floats, radius_m: float) -> None:
        self.xyz, self.radius_m = np.asarray(xyz, np.float64), radius_m
        self.definition = f"taken within {radius_m:g} m"
        # Frames by cube of side ``radius_m``: what is near lies in the 27 cubes around.
        self._cubes: dict[tuple[int, ...], list[int]] = {}
        known = np.flatnonzero(np.isfinite(self.xyz).all(axis=1))
        for frame, cube in zip(known.tolist(), self._cube(known).tolist(), strict=True):
            self._cubes.setdefault(tuple(cube), []).append(frame)

    def _cube(self, frames: Integers) -> Integers:
        return np.floor(self.xyz[frames] / self.radius_m).astype(np.int64)

    def known(self, frames: Integers) -> Booleans:
        return np.isfinite(self.xyz[frames]).all(axis=1)

    def same_place(self, query: int, matches: Integers) -> Booleans:
        # Comparisons with NaN are False.
        distances = np.linalg.norm(self.xyz[matches] - self.xyz[query], axis=1)
        return np.asarray(distances <= self.radius_m)

    def partners(self, query: int) -> Integers:
        if not np.isfinite(self.xyz[query]).all():
            return np.zeros(0, np.int64)
        at = self._cube(np.array([query]))[0].tolist()
        around = itertools.product(*(range(one - 1, one + 2) for one in at))
        found = [frame for cube in around for frame in self._cubes.get(cube, ())]
        return np.array(sorted(found), np.int64)


class PairTruth:
    """Two frames show the same place if a list says so; every frame is known.

    Parameters
    ----------
    pairs
        Frame numbers. (a, b) says the same as (b, a).
    definition
        What the list holds, as one phrase for reports.
    """

    def __init__(
        self, pairs: Iterable[tuple[int, int]], definition: str = "listed as a pair"
    ) -> None:
        self._partners: dict[int, set[int]] = {}
        for first, second in pairs:
            self._partners.setdefault(first, set()).add(second)
            self._partners.setdefault(second, set()).add(first)
        self.definition = definition

    def known(self, frames: Integers) -> Booleans:
        return np.ones(len(frames), np.bool_)

    def same_place(self, query: int, matches: Integers) -> Booleans:
        partners = self._partners.get(query, set())
        return np.array([match in partners for match in matches.tolist()], np.bool_)

    def partners(self, query: int) -> Integers:
        return np.array(sorted(self._partners.get(query, ())), np.int64)


def findable(
    truth: GroundTruth, queries: Sequence[int], stamps_ns: Integers, min_gap_ns: int
) -> Booleans:
    """Which queries could be answered with a true closure at all.

    Parameters
    ----------
    queries
        Q keyframes in the order in which they were stored.
    stamps_ns
        (N,) stamps of all frames.
    min_gap_ns
        A match closer in time than this is not eligible.

    Returns
    -------
    (Q,) bool
        True where a keyframe stored before the query is eligible and shows the query's place.
    """
    order = np.asarray(queries, np.int64)
    stamps = np.asarray(stamps_ns, np.int64)
    found = np.zeros(len(order), np.bool_)
    stored: set[int] = set()
    for position, query in enumerate(order.tolist()):
        # Only what can be near: of 100,000 frames all earlier ones are too many.
        near = [frame for frame in truth.partners(query).tolist() if frame in stored]
        earlier = np.array(near, np.int64)
        eligible = earlier[np.abs(stamps[earlier] - stamps[query]) >= min_gap_ns]
        found[position] = bool(truth.same_place(query, eligible).any())
        stored.add(query)
    return found


@dataclass(frozen=True)
class ClosureScore:
    """How good the closures of a run are."""

    closures: int
    """Closures that can be judged: the place of both frames is known."""
    unjudged: int
    """Closures that cannot."""
    true_closures: int
    queries: int
    """Keyframes that could have been answered: see ``findable``."""
    recalled: int
    """Of these, the ones with a true closure."""

    @property
    def precision(self) -> float:
        """True closures / closures; NaN without closures."""
        return self.true_closures / self.closures if self.closures else math.nan

    @property
    def recall(self) -> float:
        """Findable keyframes with a true closure / findable keyframes; NaN if there are none."""
        return self.recalled / self.queries if self.queries else math.nan


def score_closures(
    truth: GroundTruth,
    closures: Sequence[tuple[int, int]],
    queries: Sequence[int],
    stamps_ns: Integers,
    min_gap_ns: int,
    held_back: Sequence[tuple[int, int]] = (),
) -> ClosureScore:
    """Judge accepted closures.

    Parameters
    ----------
    closures
        Frame numbers (query, match); a match of -1 lies outside this sequence (a keyframe of an
        earlier session) and is not judged.
    held_back
        The same for queries that were recognised too soon after a closure to be one: those that
        are true count as recalled.
    queries, stamps_ns, min_gap_ns
        As in ``findable``.
    """
    pairs = np.asarray(closures, np.int64).reshape(-1, 2)
    inside = pairs[pairs[:, 1] >= 0]
    judged = inside[truth.known(inside[:, 0]) & truth.known(inside[:, 1])]
    correct = [int(query) for query, match in judged if truth.same_place(query, match[None]).all()]
    could = findable(truth, queries, stamps_ns, min_gap_ns)
    answered = set(correct)
    answered |= {
        query
        for query, match in held_back
        if match >= 0 and truth.same_place(query, np.array([match])).all()
    }
    recalled = sum(query in answered for query, can in zip(queries, could, strict=True) if can)
    return ClosureScore(
        closures=len(judged),
        unjudged=len(pairs) - len(judged),
        true_closures=len(correct),
        queries=int(could.sum()),
        recalled=recalled,
    )


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall as the threshold falls; all arrays (T,), one entry a threshold."""

    thresholds: Floats
    """Distinct scores, strictly falling: answers with at least this score are given."""
    precision: Floats
    """True answers / answers given."""
    recall: Floats
    """True answers / positives; never falls."""
    positives: int
    """Queries that have a true answer."""

    @property
    def auc(self) -> float:
        """Area under the curve as average precision; NaN without positives.

        The sum over thresholds of (recall - recall at the threshold before) × precision, with
        recall 0 before the first. No interpolation, and no area beyond the recall reached.
        """
        steps = np.diff(self.recall, prepend=0.0)
        return float(np.sum(steps * self.precision)) if self.positives else math.nan

    @property
    def recall_at_100_precision(self) -> float:
        """Largest recall at a threshold without a false answer; NaN without positives.

        0 if there is no such threshold.
        """
        if not self.positives:
            return math.nan
        return float(self.recall[self.precision == 1.0].max(initial=0.0))


def precision_recall(
    scores: Floats, correct: Booleans, positives: int | None = None
) -> PrecisionRecall:
    """The curve of answers with a score each, one answer a query.

    Parameters
    ----------
    scores
        (Q,) higher is surer; no NaN. Equal scores are one threshold: they are given together
        or not at all, so their order cannot matter.
    correct
        (Q,) which answers are true.
    positives
        Number of queries that have a true answer. May exceed ``correct.sum()``, where queries
        got a false answer or none; None takes that sum.

    Raises
    ------
    ValueError
        If the arrays do not fit together or ``positives`` is less than the true answers.
    """
    scores, correct = np.asarray(scores, np.float64), np.asarray(correct, np.bool_)
    if scores.shape != correct.shape or scores.ndim != 1:
        raise ValueError(
            f"scores {scores.shape} and correct {correct.shape} must be as long as one another"
        )
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: leave out queries without an answer")
    if positives is None:
        positives = int(correct.sum())
    if positives < correct.sum():
        raise ValueError(f"{int(correct.sum())} true answers, but only {positives} to be found")
    order = np.argsort(-scores, kind="stable")
    scores, correct = scores[order], correct[order]
    # The last of each run of equal scores: there all of them have been given.
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True)) if len(scores) else order
    true = np.cumsum(correct)[last].astype(np.float64)
    recall = true / positives if positives else np.full(len(last), math.nan)
    return PrecisionRecall(scores[last], true / (last + 1), recall, positives)


def roc_auc(scores: Floats, true: Booleans) -> float:
    """P(a true pair scores higher than a false one), equal scores counted half.

    Parameters
    ----------
    scores
        (M,) no NaN.
    true
        (M,) which pairs are true.

    Returns
    -------
    float
        0.5 says that the score tells nothing; NaN where all are true or none is.
    """
    scores, true = np.asarray(scores, np.float64), np.asarray(true, np.bool_)
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # The mean rank of each group of equal scores, from 1.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives or not negatives:
        return math.nan
    above = float(ranks[true].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def recall_at(
    ranks: Iterable[Booleans | Sequence[bool]], ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Recall@K of retrieval: queries with a true match among the first K / queries.

    Parameters
    ----------
    ranks
        For each query *that has an eligible true match*, whether the candidate of rank 0, 1, …
        is true. Lists may be shorter than K: what was not proposed was not found.
    ks
        Each K, 1 or more.

    Returns
    -------
    dict
        Recall by K; NaN without queries.
    """
    # Rank of the first true candidate; infinite where there is none.
    first = []
    for row in ranks:
        hits = np.flatnonzero(np.asarray(row, np.bool_))
        first.append(float(hits[0]) if len(hits) else math.inf)
    found = np.array(first)
    return {k: float(np.mean(found < k)) if len(found) else math.nan for k in ks}
