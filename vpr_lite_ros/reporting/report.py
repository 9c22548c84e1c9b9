"""One command from a recording to a page, or to a parameter file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vpr_lite_ros.bags import SourceError
from vpr_lite_ros.config import Config
from vpr_lite_ros.inference import DEFAULT_BUNDLE, PlaceModel, open_model
from vpr_lite_ros.reporting import plots
from vpr_lite_ros.reporting.advice import advice, verdict
from vpr_lite_ros.reporting.decisions import (
    FALSE,
    TRUE,
    Decisions,
    Outcomes,
    candidate_outcomes,
    decide,
    findable_keyframes,
    judged,
    same_place,
)
from vpr_lite_ros.reporting.figures import about, against_truth, recommendation
from vpr_lite_ros.reporting.gallery import choose, draw
from vpr_lite_ros.reporting.page import render
from vpr_lite_ros.reporting.parameter_file import caution, parameter_file, said
from vpr_lite_ros.reporting.recorder import record
from vpr_lite_ros.reporting.recording import Recording
from vpr_lite_ros.reporting.truth import Truth, find_truth
from vpr_lite_ros.reporting.tuning import Tuning, TuningError, tune
from vpr_lite_ros.summary import Record, describe_evaluation, write_json

PAGE, FIGURES = "report.html", "report.json"


@dataclass(frozen=True)
class Asked:
    """What a user says about a recording; as in ``replay.replay_recording``."""

    source: Path
    image_topic: str | None = None
    odom_topic: str | None = None
    rate_hz: float = 1.0
    camera_file: Path | None = None
    poses: Path | None = None
    poses_topic: str | None = None
    pairs: Path | None = None
    radius_m: float = 5.0


def make_report(asked: Asked, output: Path, config: Config, target: float) -> Record:
    """Write ``report.html`` and ``report.json`` to the folder ``output``; return the figures.

    Parameters
    ----------
    target
        Precision to recommend parameters for.

    Raises
    ------
    SourceError
        If the recording cannot be opened, or ground truth that was asked for cannot be used. If
        there is merely none, the report says so.
    """
    model, recording = _record(asked, output, config)
    truth, no_truth = None, ""
    try:
        truth = _truth(asked, recording)
    except SourceError as error:
        if asked.poses or asked.pairs or asked.poses_topic:
            raise
        no_truth = str(error)
    decisions = decide(recording, config, model)
    figures = about(recording, decisions, asked.source, config)
    figures |= {"name": asked.source.resolve().name, "truth": None, "evaluation": None}
    figures |= {"no_truth": no_truth or None, "recommended": None, "missed": None}
    cannot: list[str] = []
    drawn: dict[str, str] = {}
    outcomes = could = same = None
    if truth is not None and len(recording):
        outcomes = judged(decisions, candidate_outcomes(recording, truth))
        could = findable_keyframes(recording, truth, config.min_time_gap_s)
        same = same_place(recording, truth)
        figures |= against_truth(recording, decisions, truth, outcomes, could, config)
        drawn["precision_recall"] = plots.precision_recall(figures["curves"], figures["evaluation"])
        if figures["scores"]:
            drawn["scores"] = plots.scores(figures["scores"])
        if truth.xyz is not None:
            judgeable = [
                (query, match, true)
                for query, match, true in _closures(recording, decisions, outcomes)
                if true is not None
            ]
            drawn["trajectory"] = plots.trajectory(truth.xyz, judgeable)
        else:
            cannot.append("Where it was: the ground truth is a list of pairs, without positions")
        try:
            tuning = tune(recording, truth, config, model, target)
            figures["recommended"] = recommendation(tuning, config, asked.source)
        except TuningError as error:
            cannot.append(f"Which parameters are best: {error}")
    else:
        cannot.append(
            "Precision, recall, curves, where closures are true, recommended parameters: "
            + (no_truth or "no frame became a keyframe")
        )
    closures = _closures(recording, decisions, outcomes)
    if closures and "trajectory" not in drawn:
        drawn["matches"] = plots.matches(closures)
    if len(recording):
        drawn["timeline"] = plots.timeline(figures["timeline"], figures.get("outcomes"))
        drawn["latency"] = plots.latency(figures["latency_ms"])
    chosen = choose(
        recording, decisions, truth, outcomes, could, same, config.min_time_gap_s
    )  # fmt: skip
    gallery = draw(recording, chosen, decisions, truth, config, model)
    figures |= {
        "target_precision": target,
        "verdict": verdict(figures, target),
        "advice": advice(figures, target),
        "cannot": cannot,
        "gallery": {
            kind: [picture.caption for picture in shown] for kind, shown in gallery.items()
        },
    }
    write_json(output / FIGURES, figures)
    page = output / PAGE
    kinds = ("best", "worst", "close", "missed", "surest", "least")
    names = ("trajectory", "matches", "precision_recall", "scores", "timeline", "latency")
    text = render(
        figures,
        {name: drawn.get(name, "") for name in names},
        {kind: gallery.get(kind, []) for kind in kinds},
    )
    page.write_text(text, encoding="utf-8")
    return figures


def _closures(
    recording: Recording, decisions: Decisions, outcomes: Outcomes | None
) -> list[tuple[int, int, bool | None]]:
    """Frames of each closure and whether it is true; None where nobody knows."""
    closed = np.flatnonzero(decisions.match >= 0)
    verdicts: dict[int, bool] = {TRUE: True, FALSE: False}
    true = [None if outcomes is None else verdicts.get(int(outcomes[one])) for one in closed]
    frames = recording.frame
    return list(
        zip(frames[closed].tolist(), frames[decisions.match[closed]].tolist(), true, strict=True)
    )


def tune_parameters(asked: Asked, work: Path, config: Config, target: float) -> Tuning | Recording:
    """Tuned parameters; or the recording, if it was not gone through to its end.

    Raises
    ------
    SourceError, TuningError
        If there is no ground truth, or nothing to tune on.
    """
    model, recording = _record(asked, work, config)
    if recording.stopped:
        return recording
    return tune(recording, _truth(asked, recording), config, model, target)


def describe_report(figures: Record, output: Path) -> str:
    """A report for people at a terminal."""
    lines = [f"{figures['source']}: {figures['verdict']['text']}"]
    if figures["evaluation"]:
        lines.append(f"  {describe_evaluation(figures['evaluation'])}")
    lines += [f"  {one['level']}: {one['text']}" for one in figures["advice"]]
    lines.append(f"  files: {output / PAGE}, {output / FIGURES}")
    return "\n".join(lines)


def describe_tuning(tuning: Tuning, file: Path) -> str:
    """What was tuned, for people at a terminal."""
    tuned = ", ".join(f"{name} {value:g}" for name, value in tuning.parameters.items())
    beware = caution(tuning)
    return "\n".join(
        [
            f"expected precision {said(tuning.precision)}; recall {said(tuning.recall)}",
            *([f"  {beware}"] if beware else []),
            f"  {tuned}",
            f"  on all of the recording, which it was chosen on: precision "
            f"{tuning.fitted_precision:.3f}, recall {tuning.fitted_recall:.3f}",
            f"  file: {file}",
        ]
    )


def write_parameters(file: Path, config: Config, tuning: Tuning, source: Path) -> None:
    """Write the file for ``params_file``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(parameter_file(config, tuning, source.name), encoding="utf-8")


def _record(asked: Asked, work: Path, config: Config) -> tuple[PlaceModel, Recording]:
    bundle = Path(config.bundle) if config.bundle else DEFAULT_BUNDLE
    model = open_model(bundle, config.backend, config.threads)
    recording = record(
        asked.source,
        work,
        config,
        model,
        image_topic=asked.image_topic,
        odom_topic=asked.odom_topic,
        rate_hz=asked.rate_hz,
        camera_file=asked.camera_file,
    )
    return model, recording


def _truth(asked: Asked, recording: Recording) -> Truth:
    return find_truth(
        asked.source,
        recording,
        poses=asked.poses,
        poses_topic=asked.poses_topic,
        pairs=asked.pairs,
        radius_m=asked.radius_m,
    )
