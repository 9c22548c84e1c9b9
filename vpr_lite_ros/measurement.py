"""How well a model finds places: by its descriptors, by matching, and the detector as a whole.

What the figures mean is in ``evaluation.py``. *Queries* are the frames that have an eligible true
match: Recall@K is over these. The precision-recall curves are over all frames that were looked up,
because on a drive most frames show a new place and a match for one of these is a false loop;
their recall counts the queries, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from vpr_lite_ros.benchmarks import Benchmark, read_frames
from vpr_lite_ros.calibration import expected_calibration_error
from vpr_lite_ros.candidate import Candidate, sureness
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import Keyframe, KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.evaluation import (
    Booleans,
    GroundTruth,
    PrecisionRecall,
    precision_recall,
    recall_at,
)
from vpr_lite_ros.image import fit, thumbnail
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.progress import progress
from vpr_lite_ros.summary import Record, write_json

RECALL_KS = (1, 5, 10)
OPEN: dict[str, Any] = {
    "similarity_threshold": -1.0,
    "match_threshold": 0.0,
    "min_matches": 0,
    "min_inliers": 0,
    "target_precision": 0.0,
}
"""Parameters with which every candidate passes every check, so that its scores are known."""


@dataclass(frozen=True)
class Answer:
    """What was found for one frame."""

    frame: int
    matches: list[int]
    """Frame numbers, best first; empty if nothing was eligible."""
    score: float
    """How sure the first match is; NaN without matches."""


@dataclass(frozen=True)
class Found:
    """What was found for one frame, and what matching says of it."""

    answer: Answer
    """In the order of retrieval; the score is the first one's similarity."""
    candidates: list[Candidate]
    """The first of these, examined."""

    def reranked(self) -> Answer:
        """The same, those that were examined by falling sureness; the rest stay behind."""
        scores = [sureness(candidate)[0] for candidate in self.candidates]
        return reorder(self.answer, scores)


def evaluate(
    benchmark: Benchmark,
    model: PlaceModel,
    *,
    min_time_gap_s: float = 30.0,
    rerank: int = 0,
    min_agreeing: int = 3,
) -> Record:
    """Look everything up and measure how good the answers are.

    Parameters
    ----------
    min_time_gap_s
        In one sequence, a frame is looked up among frames at least this much older.
    rerank
        This many candidates of each frame are also matched and put in the order of their
        confidence (or match score, if the model is not calibrated). 0: none, which is much faster.
    min_agreeing
        With ``rerank``: keyframes in a row that must point to one stretch of the map before the
        detector would say so; every frame is a keyframe.

    Returns
    -------
    dict
        ``queries``, ``looked_up`` and ``database`` (numbers of frames), ``query_sequence`` and
        ``database_sequence`` (names of folders), ``tolerance``, ``tolerance_unit``, ``true_if``,
        ``min_time_gap_s`` (None with two sequences), ``model_id``, ``backend``, and ``global``
        and, if asked for, ``reranked``: each ``recall_at_1``, ``recall_at_5``, ``recall_at_10``,
        ``auc``, ``recall_at_100_precision`` (NaN without queries); ``reranked`` also
        ``candidates``, the value of ``rerank``, and there are
        ``detector_recall_at_100_precision``, ``epipolar_check`` (whether a camera was known for
        it), and ``expected_calibration_error``, of the confidence that the detector publishes of
        each frame's surest candidate, which grows from frame to frame, and
        ``expected_calibration_error_alone``, of that by each image alone (NaN if the model is not
        calibrated).

    Raises
    ------
    BenchmarkError
        If an image cannot be read: the figures would be those of another set of images.
    """
    could = benchmark.findable(min_time_gap_s)
    found = list(look_up(benchmark, model, min_time_gap_s=min_time_gap_s, examine=rerank))
    retrieved = [one.answer for one in found]
    report: Record = {
        "dataset": benchmark.name,
        "queries": int(could.sum()),
        "looked_up": sum(bool(answer.matches) for answer in retrieved),
        "database": len(benchmark.sources[0]),
        "query_sequence": benchmark.queries.path.resolve().name,
        "database_sequence": benchmark.sources[0].path.resolve().name,
        "tolerance": benchmark.tolerance,
        "tolerance_unit": benchmark.tolerance_unit,
        "true_if": benchmark.truth.definition,
        "min_time_gap_s": min_time_gap_s if benchmark.database is None else None,
        "model_id": model.bundle.model_id,
        "backend": model.backend,
        "global": measure(retrieved, benchmark.truth, could),
    }
    if rerank:
        reranked = [one.reranked() for one in found]
        figures = measure(reranked, benchmark.truth, could)
        report["reranked"] = {"candidates": rerank, **figures}
        detected = measure(detect(found, model, min_agreeing), benchmark.truth, could)
        report["detector_recall_at_100_precision"] = detected["recall_at_100_precision"]
        report["epipolar_check"] = benchmark.camera is not None
        calibrated = model.bundle.calibration is not None
        for name, answers in (
            ("expected_calibration_error", detect(found, model, 1)),
            ("expected_calibration_error_alone", reranked),
        ):
            error = _calibration_error(answers, benchmark.truth) if calibrated else math.nan
            report[name] = error
    return report


def _calibration_error(answers: Sequence[Answer], truth: GroundTruth) -> float:
    """Of first matches, whose scores are confidences."""
    given = [answer for answer in answers if answer.matches]
    true = [bool(truth.same_place(one.frame, np.array(one.matches[:1]))[0]) for one in given]
    confidence = np.array([answer.score for answer in given])
    return expected_calibration_error(confidence, np.array(true, np.bool_))


def measure(answers: Sequence[Answer], truth: GroundTruth, could: Booleans) -> dict[str, float]:
    """The figures of one ranking.

    Parameters
    ----------
    answers
        One for each frame that was looked up, with or without matches.
    could
        (len(answers),) which of these frames have an eligible true match.
    """
    ranks = [
        truth.same_place(answer.frame, np.array(answer.matches, np.int64)) for answer in answers
    ]
    recall = recall_at([rank for rank, can in zip(ranks, could, strict=True) if can], RECALL_KS)
    curve = answer_curve(answers, truth, could)
    return {
        **{f"recall_at_{k}": value for k, value in recall.items()},
        "auc": curve.auc,
        "recall_at_100_precision": curve.recall_at_100_precision,
    }


def answer_curve(answers: Sequence[Answer], truth: GroundTruth, could: Booleans) -> PrecisionRecall:
    """Precision and recall of first matches, as ``measure`` understands its arguments."""
    first = [
        (answer.score, bool(truth.same_place(answer.frame, np.array(answer.matches[:1]))[0]))
        for answer in answers
        if answer.matches
    ]
    return precision_recall(
        np.array([score for score, _ in first]),
        np.array([true for _, true in first], np.bool_),
        int(could.sum()),
    )


def look_up(
    benchmark: Benchmark, model: PlaceModel, *, min_time_gap_s: float, examine: int
) -> Iterator[Found]:
    """What is found for each frame that is looked up, in their order.

    Parameters
    ----------
    examine
        This many candidates of each frame are matched, too, and their geometry is checked if
        the benchmark names a camera.
    """
    bundle, first = model.bundle, benchmark.first_query
    gap_ns = benchmark.gap_ns(min_time_gap_s)
    keyframes = KeyframeDatabase(
        "",  # a temporary file: tokens of a long sequence do not fit into memory
        model_id=bundle.model_id,
        dimension=bundle.dimension,
        # Where nothing is matched no tokens are stored: those of Tokyo 24/7 would take 30 GB.
        max_patches=bundle.max_patches if examine else 0,
        session=benchmark.name,
    )
    detector = LoopDetector(Config(**OPEN), model, keyframes)
    frames = itertools.chain.from_iterable(map(read_frames, benchmark.sources))
    total = sum(map(len, benchmark.sources))
    number_of: dict[int, int] = {}  # frame number by id of the keyframe
    with closing(keyframes):
        for number, frame in enumerate(progress(frames, total, "frame", benchmark.name)):
            description = model.describe(fit(frame.image, bundle.image_size))
            if examine:
                description = replace(description, picture=thumbnail(frame.image))
            if number >= first:
                depth = max(*RECALL_KS, examine)
                found = keyframes.search(description.descriptor, depth, frame.stamp_ns, gap_ns)
                numbers = [number_of[keyframe_id] for keyframe_id, _ in found]
                answer = Answer(number, numbers, found[0][1] if found else math.nan)
                yield Found(
                    answer, detector.examine(description, found[:examine], benchmark.camera)
                )
            if benchmark.database is None or number < first:
                if not examine:
                    description = replace(description, tokens=description.tokens[:0].copy())
                keyframe_id = keyframes.add(frame.stamp_ns, description, camera=benchmark.camera)
                number_of[keyframe_id] = number


def detect(found: Iterable[Found], model: PlaceModel, min_agreeing: int) -> list[Answer]:
    """What the detector would answer to each frame if it had no thresholds, and how sure it is."""
    settings = {**OPEN, "min_agreeing_keyframes": min_agreeing, "min_closure_interval_s": 0.0}
    detector = LoopDetector(Config(**settings), model, cast(KeyframeDatabase, _Neighbours()))
    answers = []
    for one in found:
        closure = detector.decide([replace(candidate) for candidate in one.candidates], 0)
        if closure is None:
            answers.append(Answer(one.answer.frame, [], math.nan))
        else:
            match = one.answer.matches[closure.rank]
            answers.append(Answer(one.answer.frame, [match], sureness(closure)[0]))
    return answers


class _Neighbours:
    """What ``decide`` asks of a database. A measurement deletes none, so that ids count them."""

    session, last_id = "", 0

    def steps_between(self, one: Keyframe, other: Keyframe) -> float:
        drives = (one.robot_id, one.session), (other.robot_id, other.session)
        return abs(one.id - other.id) if drives[0] == drives[1] else math.inf


def reorder(answer: Answer, scores: Sequence[float]) -> Answer:
    """``answer`` with its first ``len(scores)`` matches by falling score; the rest stay behind."""
    count = len(scores)
    # A stable sort: equal scores keep the order of retrieval.
    order = sorted(range(count), key=lambda rank: -scores[rank])
    matches = [answer.matches[rank] for rank in order] + answer.matches[count:]
    return Answer(answer.frame, matches, max(scores, default=math.nan))


def evaluate_all(
    benchmarks: Sequence[Benchmark],
    model: PlaceModel,
    output: Path,
    *,
    min_time_gap_s: float = 30.0,
    rerank: int = 0,
    min_agreeing: int = 3,
) -> Iterator[tuple[Record, Path]]:
    """Evaluate one after the other; each report is in ``output/<name>.json`` when it is yielded."""
    for benchmark in benchmarks:
        report = evaluate(
            benchmark,
            model,
            min_time_gap_s=min_time_gap_s,
            rerank=rerank,
            min_agreeing=min_agreeing,
        )
        path = output / f"{benchmark.name}.json"
        write_json(path, report)
        yield report, path


def describe(report: Record) -> str:
    """A report for people: what was asked, and a table of the figures."""
    gap = report["min_time_gap_s"]
    lines = [
        f"{report['dataset']}: {report['queries']} queries with a true match, "
        f"{report['looked_up']} frames of {report['query_sequence']} looked up among "
        f"{report['database']} of {report['database_sequence']}",
        f"  true: {report['true_if']}" + (f", at least {gap:g} s before" if gap else "")
        + f"; model {report['model_id']} on {report['backend']}",
    ]  # fmt: skip
    if not report["queries"]:
        return "\n".join([*lines, "  no frame has a true match: there is nothing to recall"])
    lines.append(f"  {'':10}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'PR AUC':>8}{'R@100%P':>9}")
    for name in ("global", "reranked"):
        if name in report:
            figures = report[name]
            recalls = "".join(f"{figures[f'recall_at_{k}']:8.3f}" for k in RECALL_KS)
            rest = f"{figures['auc']:8.3f}{figures['recall_at_100_precision']:9.3f}"
            lines.append(f"  {name:10}{recalls}{rest}")
    if "reranked" in report:
        error = report["expected_calibration_error"]
        lines.append(
            f"  detector, {'with' if report['epipolar_check'] else 'without'} epipolar check: "
            f"recall at 100% precision {report['detector_recall_at_100_precision']:.3f}; "
            + (
                "not calibrated"
                if math.isnan(error)
                else f"calibration error {error:.3f} (by one image alone "
                f"{report['expected_calibration_error_alone']:.3f})"
            )
        )
    return "\n".join(lines)
