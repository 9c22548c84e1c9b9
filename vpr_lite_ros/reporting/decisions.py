"""What the detector makes of recorded scores with given parameters, and whether it is right."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.config import Config
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.evaluation import Booleans, Integers, findable
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.matching import Status
from vpr_lite_ros.reporting.recording import Recording
from vpr_lite_ros.reporting.truth import Truth, stamps_of

NONE, TRUE, FALSE, UNJUDGED = 0, 1, 2, 3
"""What became of a keyframe: no closure, a true one, a false one, one without ground truth."""
HOW_FAR = (
    Status.NO_CANDIDATE, Status.LOW_SIMILARITY, Status.LOW_SCORE, Status.FEW_MATCHES,
    Status.GEOMETRY, Status.LOW_CONFIDENCE, Status.ODOMETRY, Status.NOT_CONSISTENT,
    Status.NOT_BEST, Status.TOO_SOON, Status.ACCEPTED,
)  # fmt: skip
"""Ends of a candidate, in the order of the checks that it passed before."""
_RANK = {status: rank for rank, status in enumerate(HOW_FAR)}
NO_DATABASE: KeyframeDatabase = None  # type: ignore[assignment]
"""Deciding on scores that are known reads no keyframe."""

Outcomes = NDArray[np.int8]


@dataclass(frozen=True)
class Decisions:
    """What became of each keyframe and each candidate."""

    match: Integers
    """(K,) keyframe of the closure, -1 for none."""
    row: Integers
    """(K,) the closure's place in the recording's arrays of candidates, -1 for none."""
    status: NDArray[np.int8]
    """(M,) of each candidate."""
    reason: list[Status]
    """Of each keyframe: how far its furthest candidate came."""
    detector: LoopDetector
    """Who decided, for its thresholds."""

    @property
    def counts(self) -> dict[str, int]:
        """How many candidates came to which end, and how many keyframes had none."""
        found = Counter(Status(number).name for number in self.status.tolist())
        found[Status.NO_CANDIDATE.name] = self.reason.count(Status.NO_CANDIDATE)
        return {name: found[name] for name in sorted(found) if found[name]}


def decide(recording: Recording, config: Config, model: PlaceModel) -> Decisions:
    """Decide every keyframe with the parameters of ``config``, as the detector does."""
    detector = LoopDetector(config, model, NO_DATABASE)
    match, row = (np.full(len(recording), -1, np.int64) for _ in range(2))
    status = np.empty(len(recording.match), np.int8)
    reasons = []
    for keyframe in range(len(recording)):
        candidates = recording.candidates(keyframe)
        closure = detector.decide(candidates)
        if closure is not None:
            match[keyframe] = recording.number_of[closure.keyframe.id]
            row[keyframe] = recording.first[keyframe] + closure.rank
        ends = [candidate.status for candidate in candidates]
        status[recording.rows(keyframe)] = ends
        reasons.append(furthest(ends))
    return Decisions(match, row, status, reasons, detector)


def furthest(ends: list[Status]) -> Status:
    """The end of the candidate that passed the most checks."""
    return max(ends, key=_RANK.__getitem__, default=Status.NO_CANDIDATE)


def judged(recording: Recording, truth: Truth, closures: Integers) -> Outcomes:
    """(K,) what became of each keyframe whose closure is ``closures`` (K,), keyframe numbers."""
    outcomes = np.full(len(recording), NONE, np.int8)
    for keyframe in np.flatnonzero(closures >= 0).tolist():
        pair = recording.frame[[keyframe, int(closures[keyframe])]]
        if not truth.judge.known(pair).all():
            outcomes[keyframe] = UNJUDGED
        else:
            same = truth.judge.same_place(int(pair[0]), pair[1:])[0]
            outcomes[keyframe] = TRUE if same else FALSE
    return outcomes


def findable_keyframes(recording: Recording, truth: Truth, min_time_gap_s: float) -> Booleans:
    """(K,) which keyframes show a place that was seen long enough before."""
    return findable(
        truth.judge, recording.frame.tolist(), stamps_of(recording), round(min_time_gap_s * 1e9)
    )
