"""What the detector makes of recorded scores with given parameters, and whether it is right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.candidate import Candidate
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import Keyframe, KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.evaluation import Booleans, Integers, findable
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.matching import Status
from vpr_lite_ros.reporting.recording import SESSION, Recording
from vpr_lite_ros.reporting.truth import Truth, stamps_of

NONE, TRUE, FALSE, UNJUDGED = 0, 1, 2, 3
"""What became of a keyframe: no closure, a true one, a false one, one without ground truth."""
HOW_FAR = (
    Status.NO_CANDIDATE, Status.LOW_SIMILARITY, Status.LOW_SCORE, Status.FEW_MATCHES,
    Status.GEOMETRY, Status.ODOMETRY, Status.LOW_CONFIDENCE, Status.NOT_CONSISTENT,
    Status.NOT_BEST, Status.TOO_SOON, Status.ACCEPTED,
)  # fmt: skip
"""Ends of a candidate, in the order of the checks that it passed before."""
_RANK = {status: rank for rank, status in enumerate(HOW_FAR)}
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


class RecordedDrive:
    """What decisions on recorded scores ask of a database: which keyframes are neighbours."""

    session = SESSION
    last_id = 0

    def __init__(self, recording: Recording) -> None:
        self._number_of = recording.number_of

    def steps_between(self, one: Keyframe, other: Keyframe) -> float:
        if one.session != other.session:
            return math.inf
        return abs(self._number_of[one.id] - self._number_of[other.id])


def make_detector(recording: Recording, config: Config, model: PlaceModel) -> LoopDetector:
    """A detector that decides on recorded scores.

    It recognises every keyframe that it can: that at most one closure leaves the node in
    ``min_closure_interval_s`` would hide what the thresholds do.
    """
    drive = cast(KeyframeDatabase, RecordedDrive(recording))
    return LoopDetector(replace(config, min_closure_interval_s=0.0), model, drive)


def closures(
    recording: Recording, detector: LoopDetector, candidates: Iterable[Sequence[Candidate]]
) -> Iterator[Candidate | None]:
    """The closure of each keyframe, of whose measured candidates the detector decides."""
    before = SESSION
    for session, stamp_ns, found in zip(
        recording.session, recording.stamp_ns.tolist(), candidates, strict=True
    ):
        if session != before:
            detector.forget()
        before = session
        yield detector.decide(found, stamp_ns)


def decide(recording: Recording, config: Config, model: PlaceModel) -> Decisions:
    """Decide every keyframe with the parameters of ``config``, as the detector does."""
    detector = make_detector(recording, config, model)
    match, row = (np.full(len(recording), -1, np.int64) for _ in range(2))
    status = np.empty(len(recording.match), np.int8)
    reasons = []
    decided: list[Sequence[Candidate]] = []

    def measured() -> Iterator[Sequence[Candidate]]:
        for keyframe in range(len(recording)):
            decided[:] = [recording.candidates(keyframe)]
            yield decided[0]

    for keyframe, closure in enumerate(closures(recording, detector, measured())):
        candidates = decided[0]
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


def candidate_outcomes(recording: Recording, truth: Truth) -> Outcomes:
    """(M,) what would become of a keyframe whose closure is this candidate."""
    known = truth.judge.known(recording.frame)
    queries = np.repeat(np.arange(len(recording)), np.diff(recording.first))
    outcomes = np.where(same_place(recording, truth), TRUE, FALSE).astype(np.int8)
    outcomes[~(known[queries] & known[recording.match])] = UNJUDGED
    return outcomes


def same_place(recording: Recording, truth: Truth) -> Booleans:
    """(M,) which candidates show the place of their keyframe; False where not known."""
    same = np.zeros(len(recording.match), np.bool_)
    for keyframe, frame in enumerate(recording.frame.tolist()):
        rows = recording.rows(keyframe)
        same[rows] = truth.judge.same_place(frame, recording.frame[recording.match[rows]])
    return same


def judged(decisions: Decisions, of_rows: Outcomes) -> Outcomes:
    """(K,) what became of each keyframe; ``of_rows`` as ``candidate_outcomes`` returns it."""
    closed = decisions.row >= 0
    outcomes = np.full(len(closed), NONE, np.int8)
    outcomes[closed] = of_rows[decisions.row[closed]]
    return outcomes


def findable_keyframes(recording: Recording, truth: Truth, min_time_gap_s: float) -> Booleans:
    """(K,) which keyframes show a place that was seen long enough before."""
    return findable(
        truth.judge, recording.frame.tolist(), stamps_of(recording), round(min_time_gap_s * 1e9)
    )
