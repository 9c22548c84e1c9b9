"""What a run comes to: figures as JSON for programs and as sentences for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpr_lite_ros.bags import SourceError
from vpr_lite_ros.evaluation import GroundTruth, score_closures
from vpr_lite_ros.matching import Status

Record = dict[str, Any]


def judge(
    truth: GroundTruth,
    closures: Sequence[tuple[int, int]],
    queries: Sequence[int],
    stamps_ns: Sequence[int],
    min_time_gap_s: float,
    held_back: Sequence[tuple[int, int]] = (),
) -> Record:
    """Precision and recall of a run's closures, with what they mean.

    Parameters
    ----------
    closures, queries, stamps_ns, held_back
        As in ``evaluation.score_closures``.
    min_time_gap_s
        A place counts as seen before if it was seen at least this long ago.

    Raises
    ------
    SourceError
        If the ground truth knows none of the queries' places.
    """
    if queries and not truth.known(np.asarray(queries, np.int64)).any():
        raise SourceError(
            "the ground truth has a pose for none of the keyframes: do its stamps (same clock, "
            "same seconds) or frame names belong to this recording?"
        )
    score = score_closures(
        truth,
        closures,
        queries,
        np.asarray(stamps_ns, np.int64),
        round(min_time_gap_s * 1e9),
        held_back,
    )
    return {
        "true_if": truth.definition,
        "min_time_gap_s": min_time_gap_s,
        "closures_judged": score.closures,
        "closures_unjudged": score.unjudged,
        "true_closures": score.true_closures,
        "findable_keyframes": score.queries,
        "found_keyframes": score.recalled,
        "precision": score.precision,
        "recall": score.recall,
    }


def describe(summary: Record) -> str:
    """A summary for people: what was found, why the rest was not, how good it is."""
    candidates = dict(summary["candidates"])
    candidates.pop(Status.ACCEPTED.name, None)
    lonely = candidates.pop(Status.NO_CANDIDATE.name, 0)
    turned_down = ", ".join(f"{name} {count}" for name, count in candidates.items()) or "none"
    lines = [
        f"{summary['source']}: {summary['frames']} frames, {summary['keyframes']} keyframes, "
        f"{summary['closures']} closures",
        f"  model {summary['model_id']} on {summary['backend']}, "
        f"{summary['latency_ms_p50'] or 0:.0f} ms a keyframe (median); "
        f"epipolar check {'on' if summary['epipolar_check'] else 'off (no calibration)'}; "
        f"odometry {summary['odometry'] or 'none'}",
        f"  candidates turned down: {turned_down}; keyframes without a candidate: {lonely}",
    ]
    if summary["skipped"]:
        causes = ", ".join(f"{cause} {count}" for cause, count in summary["skipped"].items())
        lines.append(f"  frames skipped: {causes}")
    if summary["evaluation"]:
        lines.append(f"  {describe_evaluation(summary['evaluation'])}")
    if summary["stopped"]:
        lines.append(f"  stopped early: {summary['stopped']}")
    lines.append(f"  files: {summary['output']}/ (closures.csv, closures.jsonl, decisions.jsonl)")
    return "\n".join(lines)


def describe_evaluation(evaluation: Record) -> str:
    """One line: precision and recall, of what, and what counts as true."""
    unjudged = evaluation["closures_unjudged"]
    return (
        f"precision {_figure(evaluation['precision'])} "
        f"({evaluation['true_closures']} of {evaluation['closures_judged']} closures true), "
        f"recall {_figure(evaluation['recall'])} "
        f"({evaluation['found_keyframes']} of {evaluation['findable_keyframes']} keyframes that "
        f"revisit a place); true: {evaluation['true_if']}, "
        f"at least {evaluation['min_time_gap_s']:g} s apart"
        + (f"; {unjudged} closures have no ground truth" if unjudged else "")
    )


def _figure(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.3f}"


def percentile(values: list[float], percent: float) -> float:
    """NaN without values."""
    return round(float(np.percentile(values, percent)), 1) if values else math.nan


def write_json(path: Path, content: Record) -> None:
    """Write JSON for people to read; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(content, indent=2) + "\n", encoding="utf-8")


def dumps(content: Record, indent: int | None = None) -> str:
    """JSON text, in which what is not a number is null: NaN is not JSON."""
    return json.dumps(_nan_to_none(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
