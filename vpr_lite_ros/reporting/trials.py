"""What some hundred settings make of recorded scores, all at once.

The same as the detector would decide with each of them, one after the other (a test holds the two
together); of 100,000 keyframes that would take an hour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.config import Config
from vpr_lite_ros.detector import AGREEMENT_WINDOW, LoopDetector
from vpr_lite_ros.evaluation import Booleans, Integers
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.progress import progress
from vpr_lite_ros.reporting.decisions import NONE, Outcomes, make_detector
from vpr_lite_ros.reporting.recording import Recording

AT_A_TIME = 1024
"""Keyframes whose candidates are judged together: some MB, however long the recording is."""


def try_all(
    recording: Recording, of_rows: Outcomes, settings: Sequence[Config], model: PlaceModel
) -> Outcomes:
    """(S, K) what each of S settings makes of each keyframe.

    Parameters
    ----------
    of_rows
        (M,) what becomes of a keyframe whose closure is this candidate.
    """
    detectors = [make_detector(recording, setting, model) for setting in settings]
    gates: dict[tuple[Any, ...], int] = {}
    gate = [gates.setdefault(_thresholds(one), len(gates)) for one in detectors]
    least = np.array([setting.min_agreeing_keyframes for setting in settings])
    gate_of = np.array(gate, np.int64)
    thresholds = np.array(list(gates), np.float64).T[:, :, None]

    sureness = recording.sureness
    outcomes = np.full((len(settings), len(recording)), NONE, np.int8)
    for keyframe, rows, counts in _agreement(recording, thresholds):
        # Surest first; a stable sort, so that of equal ones retrieval's first goes before.
        order = np.argsort(-sureness[rows], kind="stable")
        agree = counts[gate_of][:, order] >= least[:, None]
        row = rows.start + order[agree.argmax(axis=1)]
        outcomes[:, keyframe] = np.where(agree.any(axis=1), of_rows[row], NONE)
    return outcomes


def _thresholds(detector: LoopDetector) -> tuple[float, ...]:
    """Numbers that decide what ``LoopDetector.judge`` says of a candidate."""
    config, calibration = detector.config, detector.model.bundle.calibration
    return (
        detector.similarity_threshold,
        detector.match_threshold,
        config.min_matches,
        detector.min_inliers,
        *(
            calibration.curve(has_camera).threshold(config.target_precision) if calibration else 0.0
            for has_camera in (False, True)
        ),
        config.odometry.place_radius_m,
        config.odometry.max_drift,
    )


def _passed(recording: Recording, rows: slice, thresholds: NDArray[np.float64]) -> Booleans:
    """(G, m) which candidates pass every check of ``LoopDetector.judge``, by each gate."""
    similarity, score, matches, inliers, sure_without, sure_with, radius_m, drift = thresholds
    camera, confidence = recording.has_camera[rows], recording.confidence[rows]
    fit = recording.match_score[rows] >= score
    fit &= recording.num_matches[rows] >= matches
    fit &= ~camera | (recording.num_inliers[rows] >= inliers)
    fit &= np.isnan(confidence) | (confidence >= np.where(camera, sure_with, sure_without))
    # What odometry does not know it does not turn down: NaN exceeds nothing.
    fit &= ~(recording.apart_m[rows] > radius_m + drift * recording.travelled_m[rows])
    fit |= np.isnan(recording.match_score[rows])
    return np.asarray(fit & (recording.similarity[rows] >= similarity))


def _agreement(
    recording: Recording, thresholds: NDArray[np.float64]
) -> Iterator[tuple[int, slice, Integers]]:
    """Each keyframe of which something passes, its rows, and (G, m) by how many keyframes in a
    row each of its candidates was pointed to; 0 where it did not pass."""
    sessions = np.unique(recording.session, return_inverse=True)[1]
    none = np.zeros((thresholds.shape[1], 0), np.int64)
    before, counts_before = np.zeros(0, np.int64), none
    first, passed = 0, np.zeros((0, 0), np.bool_)
    for keyframe in progress(range(len(recording)), len(recording), "keyframe", "tuning"):
        rows = recording.rows(keyframe)
        if keyframe % AT_A_TIME == 0:
            first = rows.start
            end = min(keyframe + AT_A_TIME, len(recording))
            passed = _passed(recording, slice(first, int(recording.first[end])), thresholds)
        here = passed[:, rows.start - first : rows.stop - first]
        if not here.any() or (keyframe and sessions[keyframe] != sessions[keyframe - 1]):
            before, counts_before = before[:0], none
        if not here.any():
            continue
        matches = recording.match[rows]
        near = np.abs(matches[:, None] - before) <= AGREEMENT_WINDOW
        near &= sessions[matches][:, None] == sessions[before]
        streaks = np.where(near, counts_before[:, None, :], 0).max(axis=2, initial=0)
        before, counts_before = matches, np.where(here, 1 + streaks, 0)
        yield keyframe, rows, counts_before
