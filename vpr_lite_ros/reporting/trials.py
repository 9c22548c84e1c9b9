"""What some hundred settings make of recorded scores, all at once.

The same as the detector would decide with each of them, one after the other (a test holds the two
together); of 100,000 keyframes that would take an hour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.calibration import sequential
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
    gates: dict[tuple[float, ...], int] = {}
    gate_of = np.array([gates.setdefault(_gate(one), len(gates)) for one in detectors], np.int64)
    least = np.array([setting.min_agreeing_keyframes for setting in settings])[:, None]
    least_sure = np.array([_least_sure(one) for one in detectors]).T[:, :, None]

    outcomes = np.full((len(settings), len(recording)), NONE, np.int8)
    for keyframe, rows, counts, confidence in _follow(recording, np.array(list(gates))):
        unsure = confidence[gate_of] < np.where(recording.has_camera[rows], *least_sure[::-1])
        agree = (counts[gate_of] >= least) & ~unsure  # NaN, not calibrated, is below nothing
        sure = np.where(np.isnan(confidence), recording.match_score[rows], confidence)[gate_of]
        # Of equally sure ones retrieval's first.
        row = rows.start + np.where(agree, sure, -np.inf).argmax(axis=1)
        outcomes[:, keyframe] = np.where(agree.any(axis=1), of_rows[row], NONE)
    return outcomes


def _gate(detector: LoopDetector) -> tuple[float, ...]:
    """Numbers that decide what ``LoopDetector.judge`` says before it asks for confidence."""
    odometry = detector.config.odometry
    return (
        detector.similarity_threshold,
        detector.match_threshold,
        detector.config.min_matches,
        detector.min_inliers,
        odometry.place_radius_m,
        odometry.max_drift,
    )


def _least_sure(detector: LoopDetector) -> tuple[float, float]:
    """The least confidence to accept, without and with a camera."""
    calibration, target = detector.model.bundle.calibration, detector.config.target_precision
    if calibration is None:
        return 0.0, 0.0
    return calibration.without_camera.threshold(target), calibration.with_camera.threshold(target)


def _plausible(recording: Recording, rows: slice, gates: NDArray[np.float64]) -> Booleans:
    """(G, m) which candidates pass every check of ``LoopDetector.judge`` but confidence."""
    similarity, score, matches, inliers, radius_m, drift = gates.T[:, :, None]
    fit = recording.match_score[rows] >= score
    fit &= recording.num_matches[rows] >= matches
    fit &= ~recording.has_camera[rows] | (recording.num_inliers[rows] >= inliers)
    # What odometry does not know it does not turn down: NaN exceeds nothing.
    fit &= ~(recording.apart_m[rows] > radius_m + drift * recording.travelled_m[rows])
    fit |= np.isnan(recording.match_score[rows])
    return np.asarray(fit & (recording.similarity[rows] >= similarity))


def _follow(
    recording: Recording, gates: NDArray[np.float64]
) -> Iterator[tuple[int, slice, Integers, NDArray[np.float64]]]:
    """Each keyframe of which something is plausible, its rows, and by each of (G, 6) gates (G, m)
    by how many keyframes in a row each of its candidates was pointed to (0: it is not plausible)
    and its confidence."""
    sessions = np.unique(recording.session, return_inverse=True)[1]
    none = np.zeros((len(gates), 0))
    before, counts_before, sure_before = np.zeros(0, np.int64), none, none
    first, plausible = 0, np.zeros((0, 0), np.bool_)
    for keyframe in progress(range(len(recording)), len(recording), "keyframe", "tuning"):
        rows = recording.rows(keyframe)
        if keyframe % AT_A_TIME == 0:
            first = rows.start
            end = min(keyframe + AT_A_TIME, len(recording))
            plausible = _plausible(recording, slice(first, int(recording.first[end])), gates)
        here = plausible[:, rows.start - first : rows.stop - first]
        if not here.any() or (keyframe and sessions[keyframe] != sessions[keyframe - 1]):
            before, counts_before, sure_before = before[:0], none, none
        if not here.any():
            continue
        matches = recording.match[rows]
        near = np.abs(matches[:, None] - before) <= AGREEMENT_WINDOW
        near &= sessions[matches][:, None] == sessions[before]
        streaks = np.where(near, counts_before[:, None, :], 0).max(axis=2, initial=0)
        earlier = np.where(near, sure_before[:, None, :], 0).max(axis=2, initial=0)
        confidence = sequential(recording.confidence[rows], earlier)
        before, counts_before = matches, np.where(here, 1 + streaks, 0)
        sure_before = np.where(here & ~np.isnan(confidence), confidence, 0)
        yield keyframe, rows, counts_before.astype(np.int64), confidence
