"""What the figures mean for somebody who has a robot to run: a verdict, and what to do next."""

from __future__ import annotations

from vpr_lite_ros.reporting.figures import NOT_PROPOSED
from vpr_lite_ros.summary import Record

GOOD, WARN, BAD = "good", "warn", "bad"
FEW = 20
"""Fewer revisits than this say little about the next drive."""
REMEDIES = {
    NOT_PROPOSED: "retrieval did not propose the place: raise top_k; if that does not help, the "
    "places look too different for the model, and training on images of the site may",
    "LOW_SIMILARITY": "lower similarity_threshold",
    "LOW_SCORE": "lower match_threshold",
    "FEW_MATCHES": "lower min_matches",
    "GEOMETRY": "check the calibration of the camera, then lower min_inliers",
    "LOW_CONFIDENCE": "lower target_precision, or calibrate the model on this site",
    "NOT_CONSISTENT": "the first ones of each revisit always are, which is what "
    "min_agreeing_keyframes costs; with keyframes stored more often (keyframe.min_interval_s) "
    "the robot gets less far meanwhile",
    "NOT_BEST": "another keyframe won that shows another place",
    "ACCEPTED": "another keyframe won that shows another place",
}


def verdict(figures: Record, target: float) -> Record:
    """One sentence and whether it is ``good``, ``warn`` or ``bad`` news."""
    evaluation = figures.get("evaluation")
    if not figures["keyframes"]:
        return _says(BAD, "No frame of this recording became a keyframe: there is nothing to judge")
    if evaluation is None:
        return _says(WARN, "Without ground truth nobody can say whether these closures are true")
    precision, recall = evaluation["precision"], evaluation["recall"]
    if not evaluation["findable_keyframes"]:
        if evaluation["false_closures"]:
            return _says(BAD, "The robot never comes back here, and still there are closures")
        return _says(WARN, "The robot never comes back here: recall cannot be measured")
    if not evaluation["closures_judged"]:
        return _says(BAD, "Nothing is found with these parameters")
    tuned = (figures.get("recommended") or {}).get("reached")
    if precision < target:
        if tuned:
            return _says(WARN, "Not safe with these parameters: try the recommended ones")
        return _says(BAD, "Not safe here: closures are false too often")
    if recall < 0.5:
        return _says(WARN, "Safe here, but it finds less than half of the revisits")
    if (revisits := evaluation["findable_keyframes"]) < FEW:
        return _says(WARN, f"It works here, as far as {revisits} revisits can tell")
    return _says(GOOD, "It works here")


def _says(level: str, text: str) -> Record:
    return {"level": level, "text": text}


def advice(figures: Record, target: float) -> list[Record]:
    """What to know and to do, most urgent first."""
    found: list[Record] = []
    if figures["stopped"]:
        found.append(
            _says(
                BAD,
                f"The recording was gone through only in part ({figures['frames']} of "
                f"{figures['frames_in_source']} frames: {figures['stopped']}). The same command "
                "again goes on from there",
            )
        )
    if evaluation := figures.get("evaluation"):
        found += _about_closures(figures, evaluation, target)
    else:
        found.append(_says(WARN, f"No ground truth: {figures['no_truth']}"))
    if caveat := (figures.get("truth") or {}).get("caveat"):
        found.append(_says(WARN, caveat))
    if not figures["epipolar_check"]:
        found.append(
            _says(
                WARN,
                "The camera is not calibrated, so there is no epipolar check. Record camera_info, "
                "or pass --camera FILE: it is the best guard against false closures",
            )
        )
    if figures["skipped"]:
        causes = ", ".join(f"{cause}: {count}" for cause, count in figures["skipped"].items())
        found.append(_says(WARN, f"Frames that could not be used: {causes}"))
    interval_ms = 1e3 * figures["parameters"]["keyframe"]["min_interval_s"]
    slowest = figures["latency_ms"]["total"]["p95"]
    if slowest and interval_ms and slowest > interval_ms:
        found.append(
            _says(
                WARN,
                f"One keyframe in twenty takes more than {slowest:.0f} ms on this machine, which "
                f"is longer than keyframe.min_interval_s ({interval_ms:.0f} ms): lower top_k, or "
                "the node will drop images",
            )
        )
    return found


def _apart(metres: list[float] | None) -> str:
    """A near miss bends no map; two places that look alike do."""
    if not metres:
        return ""
    nearest, farthest = f"{metres[0]:.1f}", f"{metres[-1]:.1f}"
    return f" ({nearest}{f' to {farthest}' if farthest != nearest else ''} m apart)"


def _about_closures(figures: Record, evaluation: Record, target: float) -> list[Record]:
    found = []
    revisits, false = evaluation["findable_keyframes"], evaluation["false_closures"]
    recommended = figures.get("recommended") or {}
    if false:
        found.append(
            _says(
                BAD if evaluation["precision"] < target else WARN,
                f"{false} of {evaluation['closures_judged']} closures "
                f"{'is' if false == 1 else 'are'} false{_apart(evaluation['false_apart_m'])}. Look "
                "below; a back end needs a robust loss for such"
                + (
                    ", or take the recommended parameters"
                    if recommended.get("reached") and evaluation["precision"] < target
                    else ""
                ),
            )
        )
    if 0 < revisits < FEW:
        found.append(
            _says(
                WARN,
                f"Only {revisits} keyframes revisit a place: the figures may be quite different on "
                "the next drive. Drive one more lap for figures to rely on",
            )
        )
    missed = figures["missed"]
    if count := sum(missed.values()):
        reason = next(iter(missed))
        found.append(
            _says(
                GOOD if evaluation["recall"] >= 0.8 else WARN,
                f"{count} of {revisits} revisits are missed, {missed[reason]} of them by "
                f"{reason}: {REMEDIES.get(reason, 'see the timeline')}",
            )
        )
    return found
