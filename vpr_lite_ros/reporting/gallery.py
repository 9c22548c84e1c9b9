"""Pairs of pictures that say most about a run: the best, the worst, and what was missed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace

import cv2
import numpy as np

from vpr_lite_ros.candidate import Candidate
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.evaluation import Booleans
from vpr_lite_ros.image import draw_matches
from vpr_lite_ros.inference import Description, PlaceModel
from vpr_lite_ros.matching import Status
from vpr_lite_ros.measurement import OPEN
from vpr_lite_ros.reporting.decisions import FALSE, TRUE, Decisions, Outcomes
from vpr_lite_ros.reporting.recording import Recording, open_keyframes
from vpr_lite_ros.reporting.truth import Truth

PAIRS = 4
"""Pictures of each kind."""
APART_S = 5.0
"""Pictures of one kind are this far apart in time, where there are enough."""


@dataclass(frozen=True)
class Pair:
    """A keyframe and one it was, or was not, recognised as."""

    query: int
    match: int
    """Keyframe numbers."""
    row: int = -1
    """Place among the recorded candidates; -1 if it was no candidate."""


@dataclass(frozen=True)
class Picture:
    """A pair, drawn."""

    pair: Pair
    jpeg: bytes
    caption: str


def choose(
    recording: Recording,
    decisions: Decisions,
    truth: Truth | None,
    outcomes: Outcomes | None,
    could: Booleans | None,
    same: Booleans | None,
    min_time_gap_s: float,
) -> dict[str, list[Pair]]:
    """Pairs by kind; a kind without pairs is left out.

    With ground truth ``best`` (surest true closures), ``worst`` (surest false closures),
    ``close`` (surest false candidates that were turned down) and ``missed`` (places seen before
    without a true closure); else ``surest`` and ``least`` sure closures.
    """
    sureness, queries = recording.sureness, np.repeat(
        np.arange(len(recording)), np.diff(recording.first)
    )  # fmt: skip

    def of_rows(rows: np.ndarray, falling: bool = True) -> list[Pair]:
        order = rows[np.argsort(sureness[rows] * (-1 if falling else 1), kind="stable")]
        pairs = (Pair(int(queries[row]), int(recording.match[row]), int(row)) for row in order)
        return spread(recording, pairs)

    closed = np.flatnonzero(decisions.match >= 0)
    if truth is None or outcomes is None or could is None or same is None:
        found = {
            "surest": of_rows(decisions.row[closed]),
            "least": of_rows(decisions.row[closed], falling=False),
        }
        return {kind: pairs for kind, pairs in found.items() if pairs}
    known = truth.judge.known(recording.frame)
    accepted = decisions.status == Status.ACCEPTED
    false = ~same & ~accepted & known[queries] & known[recording.match]
    lost = np.flatnonzero(could & (outcomes != TRUE))
    found = {
        "best": of_rows(decisions.row[outcomes == TRUE]),
        "worst": of_rows(decisions.row[outcomes == FALSE]),
        "close": of_rows(np.flatnonzero(false)),
        "missed": spread(
            recording,
            (_best_true(recording, truth, same, query, min_time_gap_s) for query in lost.tolist()),
        ),
    }
    return {kind: pairs for kind, pairs in found.items() if pairs}


def spread(recording: Recording, pairs: Iterable[Pair]) -> list[Pair]:
    """The first ``PAIRS`` of them that lie apart in time; if these are few, others beside them."""
    chosen: list[Pair] = []
    passed_over: list[Pair] = []
    for pair in pairs:
        at = recording.stamp_ns[pair.query]
        gaps = [abs(at - recording.stamp_ns[one.query]) for one in chosen]
        if all(gap >= APART_S * 1e9 for gap in gaps):
            chosen.append(pair)
        elif 0 not in gaps and len(passed_over) < 50:
            passed_over.append(pair)
        if len(chosen) == PAIRS:
            break
    for pair in passed_over:
        if len(chosen) < PAIRS and all(pair.query != one.query for one in chosen):
            chosen.append(pair)
    return chosen


def _best_true(
    recording: Recording, truth: Truth, same: Booleans, query: int, min_time_gap_s: float
) -> Pair:
    """The surest true candidate of a keyframe, or else any true keyframe that is old enough."""
    rows = np.arange(len(recording.match))[recording.rows(query)]
    true = rows[same[rows]]
    if len(true):
        row = int(true[np.argmax(recording.sureness[true])])
        return Pair(query, int(recording.match[row]), row)
    old = recording.stamp_ns <= recording.stamp_ns[query] - round(min_time_gap_s * 1e9)
    matches = np.flatnonzero(old)
    true = matches[truth.judge.same_place(int(recording.frame[query]), recording.frame[matches])]
    return Pair(query, int(true[len(true) // 2]))


def draw(
    recording: Recording,
    chosen: dict[str, list[Pair]],
    decisions: Decisions,
    truth: Truth | None,
    config: Config,
    model: PlaceModel,
) -> dict[str, list[Picture]]:
    """Match each pair once more and draw the lines."""
    with closing(open_keyframes(recording.folder, model)) as database:
        # All checks are left open: what failed one is to be seen, too.
        detector = LoopDetector(replace(config, **OPEN), model, database)
        return {
            kind: [
                Picture(
                    pair,
                    _drawn(recording, pair, detector, database),
                    _caption(recording, pair, decisions, truth),
                )
                for pair in pairs
            ]
            for kind, pairs in chosen.items()
        }


def _drawn(
    recording: Recording, pair: Pair, detector: LoopDetector, database: KeyframeDatabase
) -> bytes:
    query_id, match_id = (int(recording.id[keyframe]) for keyframe in (pair.query, pair.match))
    keyframe = database.keyframe(query_id)
    description = Description(
        np.zeros((1, database.dimension), np.float32),
        database.tokens([query_id])[0],
        keyframe.centres,
        picture=database.thumbnail(query_id),
    )
    candidate: Candidate = detector.examine(description, [(match_id, 0.0)], recording.camera)[0]
    picture = cv2.imdecode(np.frombuffer(description.picture, np.uint8), cv2.IMREAD_COLOR)
    assert candidate.matches is not None and candidate.points is not None
    drawn = draw_matches(
        cv2.cvtColor(picture, cv2.COLOR_BGR2RGB).astype(np.uint8),
        database.thumbnail(match_id),
        keyframe.centres[candidate.matches.query],
        candidate.points,
        candidate.fit.inliers if candidate.fit else None,
    )
    _, data = cv2.imencode(
        ".jpg", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 78]
    )
    return data.tobytes()


def _caption(recording: Recording, pair: Pair, decisions: Decisions, truth: Truth | None) -> str:
    query, match = int(recording.frame[pair.query]), int(recording.frame[pair.match])
    parts = [f"frame {query} and frame {match}"]
    if truth is not None and truth.xyz is not None:
        away = float(np.linalg.norm(truth.xyz[query] - truth.xyz[match]))
        parts.append(f"{away:.1f} m apart")
    if pair.row < 0:
        return ", ".join([*parts, "not proposed by retrieval"])
    parts.append(f"similarity {recording.similarity[pair.row]:.2f}")
    parts.append(f"match score {recording.match_score[pair.row]:.2f}")
    if np.isfinite(recording.confidence[pair.row]):
        parts.append(f"confidence {recording.confidence[pair.row]:.2f}")
    parts.append(Status(int(decisions.status[pair.row])).name)
    return ", ".join(parts)
