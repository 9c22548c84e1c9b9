"""Thresholds for a target precision, tried on recorded scores, and what to expect of them.

Every setting of a grid is decided by the detector itself, keyframe by keyframe. The figure that is
promised was not measured where the setting was chosen: the trajectory is cut into blocks, and what
is chosen on all blocks but one is measured on that one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.config import Config
from vpr_lite_ros.evaluation import Booleans, Integers
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.matching import Status
from vpr_lite_ros.measurement import OPEN
from vpr_lite_ros.progress import progress
from vpr_lite_ros.reporting.decisions import (
    FALSE,
    NONE,
    TRUE,
    Outcomes,
    closures,
    findable_keyframes,
    judged,
    make_detector,
)
from vpr_lite_ros.reporting.recording import Recording
from vpr_lite_ros.reporting.truth import Truth

AGREEING = (1, 2, 3, 5)
MATCH_LEVELS = 10
INLIER_LEVELS = (0, 12, 20, 30)
BLOCKS = 5
MARGINS = (0, 1, 2, 3)


class TuningError(ValueError):
    """Nothing can be tuned, or the target is out of reach; the message says why."""


@dataclass(frozen=True)
class Share:
    """A share that was counted, and where it may lie on another recording."""

    value: float
    """NaN if there was nothing to count."""
    low: float
    high: float
    of: int
    """How many there were."""


@dataclass(frozen=True)
class Tuning:
    """The setting that was chosen and what to expect of it."""

    target: float
    parameters: dict[str, Any]
    """By name, as ``config.make_config`` takes them."""
    precision: Share
    """Of blocks that the setting was not chosen on."""
    recall: Share
    fitted_precision: float
    """Of the same setting on all that it was chosen on."""
    fitted_recall: float
    closures: int
    """That the setting gives on the whole recording."""
    findable: int
    blocks: int
    margin: int
    """Steps of the match threshold between the setting and where errors begin."""
    settings: int
    """How many were tried."""

    @property
    def reached(self) -> bool:
        """Whether the target held on blocks that the setting was not chosen on."""
        return self.precision.value >= self.target


# -- the grid ------------------------------------------------------------------------------------


def grid(recording: Recording, truth: Truth, config: Config, model: PlaceModel) -> list[Config]:
    """Settings to try: families of rising match threshold, ``MATCH_LEVELS`` each.

    Where the model is calibrated, a family has one ``target_precision`` of those that the model's
    card tells apart; else one ``min_inliers``, if cameras are known.
    """
    detector = make_detector(recording, config, model)
    scores = _best_true_scores(recording, truth)
    levels = sorted({0.0, *np.quantile(scores, np.linspace(0.02, 0.9, MATCH_LEVELS - 1)).tolist()})
    families: list[dict[str, Any]] = [{}]
    if (calibration := model.bundle.calibration) is not None:
        curve = calibration.curve(recording.camera is not None)
        # Of targets with one threshold the highest: it promises most.
        targets = {threshold: target for target, threshold in curve.precision}
        families = [{"target_precision": target} for target in (0.0, *targets.values())]
    elif recording.camera is not None:
        counts = sorted({detector.min_inliers, *INLIER_LEVELS})
        families = [{"min_inliers": count} for count in counts]
    return [
        replace(
            config,
            similarity_threshold=detector.similarity_threshold,
            min_inliers=family.get("min_inliers", detector.min_inliers),
            target_precision=family.get("target_precision", config.target_precision),
            min_agreeing_keyframes=agreeing,
            match_threshold=float(f"{level:.4g}"),
        )
        for family, agreeing, level in itertools.product(families, AGREEING, levels)
    ]


def _best_true_scores(recording: Recording, truth: Truth) -> NDArray[np.float64]:
    """Of each keyframe with a true candidate, the highest match score of one."""
    found = []
    for keyframe in range(len(recording)):
        rows = recording.rows(keyframe)
        matches = recording.frame[recording.match[rows]]
        true = truth.judge.same_place(int(recording.frame[keyframe]), matches)
        if true.any():
            found.append(float(recording.match_score[rows][true].max()))
    if not found:
        raise TuningError(
            "no candidate is true: the robot does not come back to a place it saw at least "
            "min_time_gap_s before, or the model does not find it. Tune on a recording with "
            "loops, or check --radius and the ground truth"
        )
    return np.array(found)


def try_all(
    recording: Recording, truth: Truth, settings: Sequence[Config], model: PlaceModel
) -> list[Outcomes]:
    """What each setting makes of each keyframe, by the detector's own decisions."""
    detectors = [make_detector(recording, setting, model) for setting in settings]
    loosest = make_detector(recording, replace(settings[0], **OPEN), model)
    loosest.similarity_threshold = min(one.similarity_threshold for one in detectors)
    loosest.match_threshold = min(one.match_threshold for one in detectors)
    kept: list[list[Any]] = []
    for keyframe in range(len(recording)):
        candidates = recording.candidates(keyframe)
        kept.append([one for one in candidates if loosest.judge(one) is Status.NOT_BEST])
    found = []
    for detector in progress(detectors, len(detectors), "setting", "tuning"):
        matches = np.full(len(recording), -1, np.int64)
        for keyframe, closure in enumerate(closures(recording, detector, kept)):
            if closure is not None:
                matches[keyframe] = recording.number_of[closure.keyframe.id]
        found.append(judged(recording, truth, matches))
    return found


# -- the choice ----------------------------------------------------------------------------------


def tune(
    recording: Recording,
    truth: Truth,
    config: Config,
    model: PlaceModel,
    target: float,
    *,
    queries: Booleans | None = None,
) -> Tuning:
    """Choose thresholds that reach ``target`` precision with the most recall.

    Parameters
    ----------
    config
        Its other parameters stay as they are.
    target
        Share of closures that are to be true, above 0, at most 1.
    queries
        (K,) keyframes to tune on; None takes all. All are looked up in the same map.

    Raises
    ------
    TuningError
        If nothing can be tuned: no loops, or no closures.
    """
    could = findable_keyframes(recording, truth, config.min_time_gap_s)
    asked = np.ones(len(recording), np.bool_) if queries is None else queries
    if not (could & asked).any():
        raise TuningError(
            "the ground truth knows no keyframe that shows a place seen at least "
            f"{config.min_time_gap_s:g} s before: tune on a recording that comes back to where it "
            "was, or lower --min_time_gap_s, or raise --radius"
        )
    settings = grid(recording, truth, config, model)
    outcomes = np.stack(try_all(recording, truth, settings, model))
    levels = len({setting.match_threshold for setting in settings})
    blocks = cut(could & asked, asked)
    tried = [_hold_out(outcomes, could, blocks, levels, target, margin) for margin in MARGINS]
    # The smallest margin that holds the target where it was not chosen; else the most precise.
    good = [margin for margin, held in zip(MARGINS, tried, strict=True) if held[0] >= target]
    margin = good[0] if good else max(MARGINS, key=lambda one: (tried[one][0], -one))
    _, held = tried[margin]

    chosen = _choose(outcomes[:, asked], could[asked], levels, target, margin)
    setting, all_of_it = settings[chosen], outcomes[chosen][asked]
    least = setting.min_agreeing_keyframes
    order = np.flatnonzero(asked)
    held_out = held[order]
    given = held_out[(held_out == TRUE) | (held_out == FALSE)]
    answered = held_out[could[order]]
    true, false = (int((all_of_it == kind).sum()) for kind in (TRUE, FALSE))
    names = [
        "similarity_threshold", "match_threshold", "min_inliers", "target_precision",
        "min_agreeing_keyframes",
    ]  # fmt: skip
    return Tuning(
        target=target,
        parameters={name: getattr(setting, name) for name in names},
        precision=share(given == TRUE, least),
        recall=share(answered == TRUE, least),
        fitted_precision=true / (true + false) if true + false else math.nan,
        fitted_recall=_recall(all_of_it, could[asked]),
        closures=int((all_of_it != NONE).sum()),
        findable=int((could & asked).sum()),
        blocks=len(blocks),
        margin=margin,
        settings=len(settings),
    )


def cut(could: Booleans, asked: Booleans) -> list[Integers]:
    """``BLOCKS`` stretches of the trajectory with as many findable keyframes each."""
    count = np.cumsum(could)
    block = np.minimum((count - could) * BLOCKS // max(1, int(count[-1])), BLOCKS - 1)
    parts = [np.flatnonzero((block == number) & asked) for number in range(BLOCKS)]
    return [part for part in parts if len(part)]


def _hold_out(
    outcomes: Outcomes,
    could: Booleans,
    blocks: Sequence[Integers],
    levels: int,
    target: float,
    margin: int,
) -> tuple[float, Outcomes]:
    """Precision and outcomes (K,) where each block is decided by what the others chose."""
    held = np.full(outcomes.shape[1], NONE, np.int8)
    for number, block in enumerate(blocks):
        others = [one for other, one in enumerate(blocks) if other != number] or [block]
        rest = np.concatenate(others)
        chosen = _choose(outcomes[:, rest], could[rest], levels, target, margin)
        held[block] = outcomes[chosen, block]
    true, false = int((held == TRUE).sum()), int((held == FALSE).sum())
    return true / (true + false) if true else 0.0, held


def _choose(outcomes: Outcomes, could: Booleans, levels: int, target: float, margin: int) -> int:
    """The setting with the most recall among those that reach the target, with a margin.

    A setting counts as good only if those of its family are good, too, whose match threshold is
    up to ``margin`` levels lower: it keeps away from where errors begin. If none is good, the
    most precise one, and of these the one with the most recall.
    """
    true, false = (outcomes == TRUE).sum(axis=1), (outcomes == FALSE).sum(axis=1)
    recall = ((outcomes == TRUE) & could).sum(axis=1)
    given = true + false
    precision = np.where(given > 0, true / np.maximum(given, 1), 0.0)
    good = (precision >= target).reshape(-1, levels)
    kept = good.copy()
    for step in range(1, margin + 1):
        kept[:, step:] &= good[:, :-step]
        kept[:, :step] = False
    kept = kept.reshape(-1)
    if not kept.any():
        order = np.lexsort((recall, precision))
        return int(order[-1])
    # Of equal recall the strictest: it costs nothing.
    best = np.flatnonzero(kept & (recall == recall[kept].max()))
    return int(best[-1])


def _recall(outcomes: Outcomes, could: Booleans) -> float:
    return float((outcomes[could] == TRUE).mean()) if could.any() else math.nan


def share(right: Booleans, least: int) -> Share:
    """Share of ``right``, in order of time, with a 95% interval for another recording as long.

    Keyframes in a row share what they see, so errors come in runs: as many observations count as
    there are spans of ``least`` keyframes, or of the mean run of whichever outcome is rarer.
    """
    count = len(right)
    if not count:
        return Share(math.nan, 0.0, 1.0, 0)
    value = float(right.mean())
    rarer = right if value < 0.5 else ~right
    runs = int((np.diff(rarer.astype(np.int8), prepend=0) == 1).sum())
    span = max(float(least), int(rarer.sum()) / runs if runs else 1.0)
    low, high = predicted(value, max(1, round(count / span)))
    return Share(value, low, high, count)


def predicted(value: float, count: int) -> tuple[float, float]:
    """Where the share will lie, 19 times in 20, among as many observations more.

    ``value`` was observed among ``count``. The one is as much a matter of chance as the other:
    the number of successes is beta-binomial, given these and Jeffreys' prior.
    """
    a, b = value * count + 0.5, (1 - value) * count + 0.5
    k = range(count + 1)
    logs = [
        math.lgamma(count + 1) - math.lgamma(one + 1) - math.lgamma(count - one + 1)
        + math.lgamma(one + a) + math.lgamma(count - one + b) - math.lgamma(count + a + b)
        + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        for one in k
    ]  # fmt: skip
    below = np.cumsum(np.exp(logs))
    low, high = np.searchsorted(below, [0.025, 0.975]).tolist()
    return low / count, min(high, count) / count
