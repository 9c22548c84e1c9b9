"""Fit P(same place) to what the detector says of labelled sequences.

Each sequence is run through the detector, every candidate of every frame is a case, and the
labels say which are true. What the result is worth is measured on each sequence with a curve
that was fitted to the others.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vpr_lite_ros.benchmarks import Benchmark
from vpr_lite_ros.calibration import (
    FEATURES,
    WITH_CAMERA,
    WITHOUT_CAMERA,
    Calibration,
    Curve,
    expected_calibration_error,
)
from vpr_lite_ros.candidate import features_of
from vpr_lite_ros.export import amend_card
from vpr_lite_ros.inference import CARD, PlaceModel
from vpr_lite_ros.measurement import Found, detect, look_up
from vpr_lite_ros.training.errors import TrainingError

log = logging.getLogger(__name__)

TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
"""Precisions of which the least confidence that reaches them is noted."""
_LEEWAY = 150.0
"""Inverse of the penalty on weights. A larger one fits the towns that it is fitted to better, and
towns by night, the same lane driven twice and walks worse (docs/training.md)."""
THINNED_OUT = 0.01
"""Share of true candidates that may fall below the recommended similarity and match score."""


@dataclass(frozen=True)
class Cases:
    """Candidates of one sequence; arrays of one entry a candidate."""

    benchmark: Benchmark
    found: list[Found]
    values: NDArray[np.float64]
    """(C, F) ``FEATURES``."""
    frame: NDArray[np.int64]
    true: NDArray[np.bool_]

    @property
    def name(self) -> str:
        return self.benchmark.name

    def closures(
        self, confidence: NDArray[np.float64], model: PlaceModel, min_agreeing: int
    ) -> tuple[list[float], list[bool]]:
        """How sure the detector would be of its closures, and which of them are true."""
        candidates = [candidate for one in self.found for candidate in one.candidates]
        for candidate, value in zip(candidates, confidence.tolist(), strict=True):
            candidate.confidence_alone = value
        answers = [one for one in detect(self.found, model, min_agreeing) if one.matches]
        truth = self.benchmark.truth
        true = [
            bool(truth.same_place(answer.frame, np.array(answer.matches))[0]) for answer in answers
        ]
        return [answer.score for answer in answers], true

    def best(self, confidence: NDArray[np.float64]) -> NDArray[np.int64]:
        """(F,) of each frame the candidate with the highest confidence."""
        order = np.lexsort((-confidence, self.frame))
        _, first = np.unique(self.frame[order], return_index=True)
        return order[first]


@dataclass(frozen=True)
class Fitted:
    """A curve and what it is worth on sequences that it was not fitted to."""

    curve: Curve
    errors: dict[str, float]
    """Expected calibration error by sequence."""
    confidence: NDArray[np.float64]
    true: NDArray[np.bool_]
    """Of each frame's surest candidate, of all sequences."""
    closures: NDArray[np.float64]
    closures_true: NDArray[np.bool_]
    """How sure the detector is of its closures, of all sequences, and which of them are true."""


def calibrate_bundle(
    model: PlaceModel,
    benchmarks: Sequence[Benchmark],
    *,
    top_k: int,
    min_time_gap_s: float,
    min_agreeing: int,
    picture: Path,
) -> str:
    """Calibrate the bundle of ``model`` and write that into its model card.

    Precision is that of closures to which ``min_agreeing`` keyframes in a row point, the last with
    at least that confidence. ``picture`` is drawn: match scores of true and false candidates, and
    confidence against the share that was true.

    Recommended thresholds are lowered to where they only thin out what need not be looked at:
    confidence decides.

    Returns
    -------
    str
        What was fitted to what, and how good it is, for people.

    Raises
    ------
    TrainingError
        If there are fewer than two sequences, two have one name, one has only true or only false
        candidates, or the model card cannot be written.
    """
    if len(benchmarks) < 2:
        raise TrainingError(
            f"calibrating needs two or more labelled sequences, got {len(benchmarks)}: each is "
            "measured with what the others teach"
        )
    names = [benchmark.name for benchmark in benchmarks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TrainingError(
            f"two sequences are called {', '.join(sorted(twice))}: if they are two, rename a "
            "folder; one that is given twice would be measured with what it taught"
        )
    if not os.access(model.bundle.path / CARD, os.W_OK):
        raise TrainingError(
            f"{model.bundle.path / CARD} cannot be written: copy the bundle to a folder of your "
            "own and pass that as --bundle"
        )

    def cases_of(chosen: Sequence[Benchmark]) -> list[Cases]:
        return [
            find_cases(model, one, top_k=top_k, min_time_gap_s=min_time_gap_s) for one in chosen
        ]

    cases = cases_of([replace(benchmark, camera=None) for benchmark in benchmarks])
    fitted = {WITHOUT_CAMERA: fit_curve(cases, model, min_agreeing)}
    with_camera = [benchmark for benchmark in benchmarks if benchmark.camera]
    if len(with_camera) >= 2:
        fitted[WITH_CAMERA] = fit_curve(cases_of(with_camera), model, min_agreeing)
    else:  # nothing tells what a camera's motion adds
        log.warning("fewer than two sequences name their camera: confidence will make no use of it")
    draw(cases, fitted, picture)
    true = np.concatenate([one.values[one.true] for one in cases])
    similarity, score = np.quantile(true[:, :2], THINNED_OUT, axis=0)
    without = fitted[WITHOUT_CAMERA].curve
    curves = Calibration(fitted[WITH_CAMERA].curve if WITH_CAMERA in fitted else without, without)
    told: dict[str, Any] = {
        "created": date.today().isoformat(),
        **curves.to_card(),
        "expected_calibration_error": {
            one.name: {
                kind: round(found.errors[one.name], 4)
                for kind, found in fitted.items()
                if one.name in found.errors
            }
            for one in cases
        },
        "fitted_to": {
            one.name: f"{int(one.true.sum())} of {len(one.true)} candidates true" for one in cases
        },
        "top_k": top_k,
        "min_agreeing_keyframes": min_agreeing,
    }
    thresholds = {
        "similarity": round(float(similarity) - 5e-4, 3),
        "match": round(math.exp(float(score)) - 5e-5, 4),
        "inliers": 0,
    }
    amend_card(model.bundle.path, {"thresholds": thresholds, "calibration": told})
    return _describe(told, model.bundle.name)


def find_cases(
    model: PlaceModel, benchmark: Benchmark, *, top_k: int, min_time_gap_s: float
) -> Cases:
    """What the detector says of each frame's ``top_k`` candidates, and which are true.

    Raises
    ------
    TrainingError
        If all are true, or none is.
    """
    values: list[list[float]] = []
    frames: list[int] = []
    true: list[bool] = []
    found = list(look_up(benchmark, model, min_time_gap_s=min_time_gap_s, examine=top_k))
    for one in found:
        matches = np.array(one.answer.matches[: len(one.candidates)], np.int64)
        values += [features_of(candidate) for candidate in one.candidates]
        frames += [one.answer.frame] * len(matches)
        true += benchmark.truth.same_place(one.answer.frame, matches).tolist()
    labels = np.array(true, np.bool_)
    if not labels.any() or labels.all():
        verdict = "true" if labels.any() else "false"
        raise TrainingError(
            f"{benchmark.name}: each of its {len(labels)} candidates is {verdict}, so nothing "
            "tells true from false ones. Leave it out, or mend its labels"
        )
    return Cases(benchmark, found, np.array(values), np.array(frames, np.int64), labels)


def fit_curve(cases: Sequence[Cases], model: PlaceModel, min_agreeing: int) -> Fitted:
    """A curve, measured on each sequence with all others'.

    ``min_agreeing`` keyframes in a row must point to a place for a closure.
    """
    errors, best_confidence, best_true = {}, [], []
    sure: list[float] = []
    right: list[bool] = []
    for held_out in cases:
        others = [one for one in cases if one is not held_out]
        curve = _regress(others)
        confidence = np.array([curve.confidence(row) for row in held_out.values.tolist()])
        best = held_out.best(confidence)
        errors[held_out.name] = expected_calibration_error(confidence[best], held_out.true[best])
        best_confidence.append(confidence[best])
        best_true.append(held_out.true[best])
        scores, true_closures = held_out.closures(confidence, model, min_agreeing)
        sure, right = sure + scores, right + true_closures
    known, true = np.concatenate(best_confidence), np.concatenate(best_true)
    closures, closures_true = np.array(sure), np.array(right, np.bool_)
    final = replace(_regress(cases), precision=_precision_table(closures, closures_true))
    return Fitted(final, errors, known, true, closures, closures_true)


def _regress(cases: Sequence[Cases]) -> Curve:
    values = np.concatenate([one.values for one in cases])
    true = np.concatenate([one.true for one in cases])
    # Long sequences count for no more than short ones, and many leave the penalty what it is: how
    # the next place differs from all of them, they do not tell.
    shares = np.concatenate([np.full(len(one.true), 1 / len(one.true)) for one in cases])
    shares /= len(cases)
    # In units of its own spread: the penalty would else hold down most what varies least.
    scaler = StandardScaler().fit(values)
    regression = LogisticRegression(C=_LEEWAY, max_iter=1000)
    found = regression.fit(scaler.transform(values), true, sample_weight=shares)
    weights = found.coef_[0] / scaler.scale_
    bias = found.intercept_[0] - weights @ scaler.mean_
    return Curve(float(bias), tuple(weights.tolist()), ((0.0, 0.0),))


def _precision_table(
    confidence: NDArray[np.float64], true: NDArray[np.bool_]
) -> tuple[tuple[float, float], ...]:
    """Of each target the least confidence whose closures were right at least as often.

    Where not even the surest is, 1: nothing is accepted.
    """
    order = np.argsort(-confidence, kind="stable")
    precision = np.cumsum(true[order]) / np.arange(1, len(order) + 1)
    table, least = [], 0.0
    for target in TARGETS:
        reached = np.flatnonzero(precision >= target)
        found = float(confidence[order[reached[-1]]]) if len(reached) else 1.0
        least = max(least, found)
        table.append((target, round(least, 6)))
    return tuple(table)


def draw(cases: Sequence[Cases], fitted: Mapping[str, Fitted], picture: Path) -> None:
    """Match scores of true and false candidates, and how reliable confidence is."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    scores, reliability = figure.subplots(1, 2)
    values = np.exp(np.concatenate([one.values[:, FEATURES.index("match")] for one in cases]))
    true = np.concatenate([one.true for one in cases])
    edges = np.linspace(0, max(float(values.max()), 1e-3), 41)
    for label, chosen, colour in (("false", ~true, "tab:red"), ("true", true, "tab:green")):
        weights = np.full(int(chosen.sum()), 1 / max(int(chosen.sum()), 1))
        scores.hist(values[chosen], edges, weights=weights, label=label, color=colour, alpha=0.6)
    scores.set(xlabel="match score", ylabel="share of the candidates", title="Match score")
    scores.legend()
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for kind, found in fitted.items():
        number = np.minimum((found.confidence * 10).astype(int), 9)
        bins = np.unique(number)
        reliability.plot(
            [found.confidence[number == i].mean() for i in bins],
            [found.true[number == i].mean() for i in bins],
            marker="o",
            label=f"{kind.replace('_', ' ')}, {len(number)} frames",
        )
    reliability.set(
        xlabel="confidence, fitted to the other sequences",
        ylabel="share that was true",
        title="Each frame's surest candidate",
    )
    reliability.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _describe(told: dict[str, Any], name: str) -> str:
    lines = [f"{name}: calibrated on {len(told['fitted_to'])} sequences"]
    lines.append(f"  {'':24}{'candidates':32}{'calibration error, fitted to the others':>40}")
    for sequence, count in told["fitted_to"].items():
        errors = told["expected_calibration_error"][sequence]
        shown = ", ".join(f"{kind.replace('_', ' ')} {error:.3f}" for kind, error in errors.items())
        lines.append(f"  {sequence:24}{count:32}{shown:>40}")
    for kind in (WITH_CAMERA, WITHOUT_CAMERA):
        pairs = ", ".join(f"{target:g}: {least:.3f}" for target, least in told[kind]["precision"])
        lines.append(f"  {kind.replace('_', ' ')}, confidence by target_precision: {pairs}")
    return "\n".join(lines)
