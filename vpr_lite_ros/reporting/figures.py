"""All figures of a report, as plain data: what is in ``report.json`` is what the page shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from vpr_lite_ros.candidate import sureness
from vpr_lite_ros.config import Config
from vpr_lite_ros.evaluation import Booleans, Integers, PrecisionRecall, RadiusTruth, roc_auc
from vpr_lite_ros.matching import Status
from vpr_lite_ros.measurement import Answer, answer_curve, measure, reorder
from vpr_lite_ros.reporting.decisions import (
    FALSE,
    NONE,
    TRUE,
    UNJUDGED,
    Decisions,
    Outcomes,
    closures,
    furthest,
    make_detector,
    same_place,
)
from vpr_lite_ros.reporting.parameter_file import caution, parameter_file
from vpr_lite_ros.reporting.recording import Recording
from vpr_lite_ros.reporting.truth import Truth, stamps_of
from vpr_lite_ros.reporting.tuning import Tuning, share
from vpr_lite_ros.summary import Record, judge

FORMAT = 1
BINS = 40
CURVE_POINTS = 1000
NOT_PROPOSED = "NOT_PROPOSED"
"""Why a keyframe was missed: retrieval did not bring a true candidate."""
STAGES = ("resize", "place", "search", "match", "verify", "refine", "store")
STORED_OUTCOMES = {NONE: "none", TRUE: "true", FALSE: "false", UNJUDGED: "unjudged"}


def about(recording: Recording, decisions: Decisions, source: Path, config: Config) -> Record:
    """What needs no ground truth."""
    detector = decisions.detector
    model = detector.model
    total = np.nansum(list(recording.timings_ms.values()), axis=0)
    seconds = (recording.stamp_ns - recording.stamp_ns[:1]) / 1e9
    return {
        "format": FORMAT,
        "source": str(source),
        "stopped": recording.stopped or None,
        "frames": recording.frames,
        "frames_in_source": recording.total,
        "skipped": recording.skipped,
        "keyframes": len(recording),
        "closures": int((decisions.match >= 0).sum()),
        "candidates": decisions.counts,
        "model_id": model.bundle.model_id,
        "backend": model.backend,
        "epipolar_check": recording.camera is not None,
        "odometry": recording.odometry or None,
        "duration_s": float(seconds[-1]) if len(seconds) else 0.0,
        "thresholds": {
            "similarity_threshold": detector.similarity_threshold,
            "match_threshold": detector.match_threshold,
            "min_inliers": detector.min_inliers,
        },
        "parameters": asdict(config),
        "latency_ms": {
            stage: _spread(values)
            for stage, values in [
                *((name, recording.timings_ms[name]) for name in _stages(recording)),
                ("total", total),
            ]
        },
        "memory": {
            "peak_mb": recording.peak_memory_mb,
            "disk_mb": recording.bytes_on_disk / 1e6,
            "disk_kb_per_keyframe": recording.bytes_on_disk / 1e3 / max(1, len(recording)),
            "descriptors_mb": len(recording) * model.bundle.parts * model.bundle.dimension / 1e6,
        },
        "recording_seconds": recording.seconds,
        "recording_folder": str(recording.folder),
        "timeline": {
            "seconds": np.round(seconds, 3).tolist(),
            "frame": recording.frame.tolist(),
            "reason": [reason.name for reason in decisions.reason],
        },
    }


def _stages(recording: Recording) -> list[str]:
    known = [stage for stage in STAGES if stage in recording.timings_ms]
    return known + sorted(set(recording.timings_ms) - set(STAGES))


def _spread(values: np.ndarray) -> Record:
    values = values[np.isfinite(values)]
    if not len(values):
        return {"p50": None, "p95": None, "max": None}
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "max": float(values.max())}


def against_truth(
    recording: Recording,
    decisions: Decisions,
    truth: Truth,
    outcomes: Outcomes,
    could: Booleans,
    config: Config,
) -> Record:
    """What ground truth tells of the decisions and of every score."""
    closed = np.flatnonzero(decisions.match >= 0)
    pairs = np.stack([recording.frame[closed], recording.frame[decisions.match[closed]]], axis=1)
    evaluation = judge(
        truth.judge,
        [(int(query), int(match)) for query, match in pairs],
        recording.frame.tolist(),
        stamps_of(recording).tolist(),
        config.min_time_gap_s,
    )
    given = outcomes[(outcomes == TRUE) | (outcomes == FALSE)]
    precision, recall = share(given == TRUE), share(outcomes[could] == TRUE)
    same = same_place(recording, truth)
    retrieved, reranked, detected = _answers(recording, truth, decisions, config)
    known = truth.judge.known(recording.frame)
    curves, recalls = {}, {}
    for name, answers in (
        ("retrieval", retrieved), ("reranked", reranked), ("detector", detected),
    ):  # fmt: skip
        curves[name] = _curve(answer_curve(answers, truth.judge, could[known]))
        if name != "detector":
            measured = measure(answers, truth.judge, could[known])
            recalls[name] = {k: v for k, v in measured.items() if k.startswith("recall_at_")}
            recalls[name].pop("recall_at_100_precision", None)
    missed: Counter[str] = Counter()
    for keyframe in np.flatnonzero(could & (outcomes != TRUE)).tolist():
        rows = recording.rows(keyframe)
        ends = [Status(end) for end in decisions.status[rows][same[rows]].tolist()]
        missed[furthest(ends).name if ends else NOT_PROPOSED] += 1
    return {
        "truth": {"source": truth.source, "caveat": truth.caveat or None,
                  "known_keyframes": int(known.sum())},
        "evaluation": {
            **evaluation,
            "false_closures": evaluation["closures_judged"] - evaluation["true_closures"],
            "false_apart_m": _apart_m(truth, pairs[outcomes[closed] == FALSE]),
            "precision_low": precision.low, "precision_high": precision.high,
            "recall_low": recall.low, "recall_high": recall.high,
        },
        "curves": curves,
        "recall_at": recalls,
        "scores": _scores(recording, same, truth),
        "missed": dict(missed.most_common()),
        "outcomes": [STORED_OUTCOMES[outcome] for outcome in outcomes.tolist()],
    }  # fmt: skip


def _apart_m(truth: Truth, pairs: Integers) -> list[float] | None:
    """How far apart the images (M, 2) of each pair were taken; None where no poses tell."""
    if not isinstance(truth.judge, RadiusTruth):
        return None
    distances = np.linalg.norm(truth.judge.xyz[pairs[:, 0]] - truth.judge.xyz[pairs[:, 1]], axis=1)
    return np.sort(distances).round(2).tolist()


def _answers(
    recording: Recording, truth: Truth, decisions: Decisions, config: Config
) -> tuple[list[Answer], list[Answer], list[Answer]]:
    """For each keyframe whose place is known: as retrieved, re-ranked, and by the detector.

    The detector's are all that its other checks let through, whatever their sureness: its curve
    is drawn as ``target_precision``, or else ``match_threshold``, changes.
    """
    known = truth.judge.known(recording.frame)
    frames, sure = recording.frame, recording.sureness
    retrieved, reranked = [], []
    for keyframe in np.flatnonzero(known).tolist():
        rows = recording.rows(keyframe)
        matches = recording.frame[recording.match[rows]].tolist()
        score = float(recording.similarity[rows][0]) if matches else np.nan
        answer = Answer(int(frames[keyframe]), matches, score)
        retrieved.append(answer)
        reranked.append(reorder(answer, sure[rows].tolist()))

    calibrated = decisions.detector.model.bundle.calibration is not None
    opened = make_detector(
        recording, replace(config, target_precision=0.0), decisions.detector.model
    )
    if not calibrated:
        opened.match_threshold = 0.0

    every = map(recording.candidates, range(len(recording)))
    answers = []
    for frame, closure in zip(frames.tolist(), closures(recording, opened, every), strict=True):
        if closure is None:
            answers.append(Answer(frame, [], np.nan))
        else:
            match = int(recording.frame[recording.number_of[closure.keyframe.id]])
            answers.append(Answer(frame, [match], sureness(closure)[0]))
    detected = [answer for answer, knows in zip(answers, known, strict=True) if knows]
    return retrieved, reranked, detected


def _curve(curve: PrecisionRecall) -> Record:
    """The curve for drawing: of very many points as many as can be seen; area from all."""
    chosen = np.unique(np.linspace(0, len(curve.recall) - 1, CURVE_POINTS).astype(int))
    chosen = chosen[: len(curve.recall)] if len(curve.recall) else chosen[:0]
    return {
        "auc": curve.auc,
        "recall_at_100_precision": curve.recall_at_100_precision,
        "positives": curve.positives,
        "points": len(curve.recall),
        "threshold": curve.thresholds[chosen].tolist(),
        "precision": curve.precision[chosen].tolist(),
        "recall": curve.recall[chosen].tolist(),
    }


def _scores(recording: Recording, same: Booleans, truth: Truth) -> Record:
    """Histograms of true and false candidates by each score, and how well it tells them apart."""
    counts = np.diff(recording.first)
    known = truth.judge.known(recording.frame)
    judged = np.repeat(known, counts) & known[recording.match]
    found: Record = {}
    for name, values in (
        ("similarity", recording.similarity),
        ("match_score", recording.match_score),
        ("agreement", recording.agreement),
        ("correlation", recording.num_correlated),
        ("confidence", recording.confidence),
    ):
        usable = judged & np.isfinite(values)
        if not usable.any():
            continue
        values, true = values[usable].astype(np.float64), same[usable]
        edges = np.histogram_bin_edges(values, BINS)
        found[name] = {
            "roc_auc": roc_auc(values, true),
            "edges": edges.tolist(),
            "true": np.histogram(values[true], edges)[0].tolist(),
            "false": np.histogram(values[~true], edges)[0].tolist(),
            "true_count": int(true.sum()),
            "false_count": int((~true).sum()),
        }
    return found


def recommendation(tuning: Tuning, config: Config, source: Path) -> Record:
    """What was tuned, and the file to copy."""
    return {
        **asdict(tuning),
        "reached": tuning.reached,
        "promised": tuning.promised,
        "caution": caution(tuning) or None,
        "yaml": parameter_file(config, tuning, source.name),
    }
