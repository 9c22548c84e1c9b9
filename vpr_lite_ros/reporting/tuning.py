"""Thresholds for a target precision, tried on recorded scores, and what to expect of them.

The figure that is promised was not measured where the setting was chosen: the trajectory is cut
into blocks, and what is chosen on all blocks but one is measured on that one.
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
from vpr_lite_ros.detector import AGREEMENT_WINDOW, LoopDetector
from vpr_lite_ros.evaluation import Booleans, Integers
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.reporting.decisions import (
    FALSE,
    NONE,
    TRUE,
    Outcomes,
    candidate_outcomes,
    findable_keyframes,
    make_detector,
)
from vpr_lite_ros.reporting.recording import Recording
from vpr_lite_ros.reporting.trials import try_all
from vpr_lite_ros.reporting.truth import Truth

AGREEING = (1, 2, 3, 5)
MATCH_LEVELS = 10
INLIER_LEVELS = (0, 12, 20, 30)
BLOCKS = 5
SPAN = AGREEMENT_WINDOW
"""Keyframes in a row share what they see, and errors come in runs: so many are one observation."""
CAUTION = ((0.0, 0), (0.0, 1), (0.0, 2), (0.0, 3), (0.5, 0), (0.5, 2), (1.0, 0), (1.0, 2))
"""Ways to choose, ever more cautious: by how much of what the target leaves to perfection more is
asked for, and how many levels the match threshold keeps away from where errors begin."""


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
    settings: int
    """How many were tried."""

    @property
    def reached(self) -> bool:
        """Whether the target held on blocks that the setting was not chosen on."""
        return self.precision.value >= self.target

    @property
    def promised(self) -> bool:
        """Whether it is to be expected of 19 in 20 other recordings, too."""
        return self.precision.low >= self.target

    @property
    def needed(self) -> int:
        """Closures, none of them false, that it takes to promise the target; 0: none would do."""
        if self.target >= 1:
            return 0
        # As many as have no more than three errors 19 times in 20, after one such without any.
        return math.ceil(round(3 / (1 - self.target), 6)) * SPAN


# -- the grid ------------------------------------------------------------------------------------


def grid(
    recording: Recording, of_rows: Outcomes, config: Config, model: PlaceModel
) -> list[Config]:
    """Settings to try: families of rising match threshold, that of ``config`` among them.

    Where the model is calibrated, a family has one ``target_precision`` of those that the model's
    card tells apart; else one ``min_inliers``, if cameras are known.
    """
    detector = make_detector(recording, config, model)
    scores = np.quantile(
        _best_true_scores(recording, of_rows), np.linspace(0.02, 0.9, MATCH_LEVELS - 1)
    )
    rounded = (float(f"{level:.4g}") for level in scores.tolist())
    levels = sorted({0.0, detector.match_threshold, *rounded})
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
            match_threshold=level,
        )
        for family, agreeing, level in itertools.product(families, AGREEING, levels)
    ]


def _best_true_scores(recording: Recording, of_rows: Outcomes) -> NDArray[np.float64]:
    """Of each keyframe with a true candidate, the highest match score of one."""
    true = of_rows == TRUE
    queries = np.repeat(np.arange(len(recording)), np.diff(recording.first))[true]
    best = np.full(len(recording), -np.inf)
    np.maximum.at(best, queries, recording.match_score[true])
    if not len(queries):
        raise TuningError(
            "no candidate is true: the robot does not come back to a place it saw at least "
            "min_time_gap_s before, or the model does not find it. Tune on a recording with "
            "loops, or check --radius and the ground truth"
        )
    return best[np.isfinite(best)]


def _braver(settings: Sequence[Config], config: Config, detector: LoopDetector) -> Booleans:
    """(S,) which settings accept on less evidence than ``config`` does."""
    calibration = detector.model.bundle.calibration

    def sure(target: float) -> list[float]:
        curves = (calibration.curve(one) for one in (False, True)) if calibration else ()
        return [curve.threshold(target) for curve in curves]

    asked = sure(config.target_precision)
    return np.array(
        [
            setting.min_agreeing_keyframes < config.min_agreeing_keyframes
            or setting.match_threshold < detector.match_threshold
            or setting.min_inliers < detector.min_inliers
            or sure(setting.target_precision) < asked
            for setting in settings
        ]
    )


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

    A setting that is braver than ``config`` is chosen only if the recording proves that it
    reaches the target; a stricter one if it merely seems so.

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
    of_rows = candidate_outcomes(recording, truth)
    settings = grid(recording, of_rows, config, model)
    outcomes = try_all(recording, of_rows, settings, model)
    blocks = cut(could & asked, asked)
    choice = _Choice.of(
        outcomes,
        could,
        blocks,
        braver=_braver(settings, config, make_detector(recording, config, model)),
        levels=len({setting.match_threshold for setting in settings}),
        target=target,
    )
    everything = list(range(len(blocks)))
    held = np.full(len(recording), NONE, np.int8)
    for number, block in enumerate(blocks):
        others = [one for one in everything if one != number] or everything
        held[block] = outcomes[choice.pick(others), block]

    chosen = choice.pick(everything)
    setting, all_of_it = settings[chosen], outcomes[chosen][asked]
    given = held[(held == TRUE) | (held == FALSE)]
    true, false = (int((all_of_it == kind).sum()) for kind in (TRUE, FALSE))
    names = [
        "similarity_threshold", "match_threshold", "min_inliers", "target_precision",
        "min_agreeing_keyframes",
    ]  # fmt: skip
    return Tuning(
        target=target,
        parameters={name: getattr(setting, name) for name in names},
        precision=share(given == TRUE),
        recall=share(held[could & asked] == TRUE),
        fitted_precision=true / (true + false) if true + false else math.nan,
        fitted_recall=float((all_of_it[could[asked]] == TRUE).mean()),
        closures=int((all_of_it != NONE).sum()),
        findable=int((could & asked).sum()),
        blocks=len(blocks),
        settings=len(settings),
    )


def cut(could: Booleans, asked: Booleans) -> list[Integers]:
    """``BLOCKS`` stretches of the trajectory with as many findable keyframes each."""
    count = np.cumsum(could)
    block = np.minimum((count - could) * BLOCKS // max(1, int(count[-1])), BLOCKS - 1)
    parts = [np.flatnonzero((block == number) & asked) for number in range(BLOCKS)]
    return [part for part in parts if len(part)]


@dataclass(frozen=True)
class _Choice:
    """How S settings did on B blocks, and which to choose by some of these."""

    true: Integers
    """(S, B) closures, ..."""
    false: Integers
    found: Integers
    """(S, B) findable keyframes with a true closure."""
    runs: Integers
    """(S, B) stretches of false closures, without a true one between."""
    braver: Booleans
    """(S,) which settings have to prove themselves."""
    levels: int
    """Settings of one family, which differ in rising match threshold, follow each other."""
    target: float

    @classmethod
    def of(
        cls, outcomes: Outcomes, could: Booleans, blocks: Sequence[Integers], **about: Any
    ) -> _Choice:
        counts = np.zeros((4, len(outcomes), len(blocks)), np.int64)
        for setting, made in enumerate(outcomes):
            for number, block in enumerate(blocks):
                one = made[block]
                given = one[(one == TRUE) | (one == FALSE)] == TRUE
                counts[:, setting, number] = (
                    given.sum(),
                    (~given).sum(),
                    (could[block] & (one == TRUE)).sum(),
                    _runs(~given),
                )
        return cls(*counts, **about)

    def pick(self, blocks: list[int]) -> int:
        """The setting to choose by these blocks: in the least cautious way that holds the target
        where it was not chosen, or else in the most precise one."""
        precision = []
        for way in CAUTION:
            held = np.zeros(2, np.int64)
            for one in blocks:
                chosen = self._best([other for other in blocks if other != one] or blocks, *way)
                held += self.true[chosen, one], self.false[chosen, one]
            precision.append(held[0] / held.sum() if held[0] else 0.0)
            if precision[-1] >= self.target:
                break
        return self._best(blocks, *CAUTION[int(np.argmax(precision))])

    def _best(self, blocks: list[int], more: float, margin: int) -> int:
        """The setting with the most recall among those that reach the target, in one way.

        A setting counts as good only if those of its family are good, too, whose match threshold
        is up to ``margin`` levels lower. If no setting is good that may be chosen, the one of
        the good ones for whose precision most is to be said; else the most precise one.
        """
        aim = self.target + more * (1 - self.target)
        true, false, found, runs = (
            counts[:, blocks].sum(axis=1)
            for counts in (self.true, self.false, self.found, self.runs)
        )
        given = true + false
        precision = np.where(given > 0, true / np.maximum(given, 1), 0.0)
        good = (precision >= aim).reshape(-1, self.levels)
        kept = good.copy()
        for step in range(1, margin + 1):
            kept[:, step:] &= good[:, :-step]
            kept[:, :step] = False
        kept = kept.reshape(-1)
        if not kept.any():
            return int(np.lexsort((found, precision))[-1])
        span = np.maximum(SPAN, false / np.maximum(runs, 1))
        proven = at_least(precision, given / span)
        allowed = kept & (~self.braver | (proven >= self.target))
        if not allowed.any():
            return int(np.lexsort((found, proven, kept))[-1])
        # Of equal recall the one in the middle: the loosest lets errors in elsewhere, the
        # strictest just lets pass what was seen here.
        equal = np.flatnonzero(allowed & (found == found[allowed].max()))
        return int(equal[len(equal) // 2])


def _runs(marked: Booleans) -> int:
    """How many stretches of True there are."""
    return int((np.diff(marked.astype(np.int8), prepend=0) == 1).sum())


def at_least(share: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a share of ``count`` observations proves to be exceeded, with 95% confidence: Wilson's
    lower bound."""
    squared = 1.6449**2 / np.maximum(count, 1e-9)
    spread = np.sqrt(squared * share * (1 - share) + squared**2 / 4)
    return np.asarray((share + squared / 2 - spread) / (1 + squared))


def share(right: Booleans) -> Share:
    """Share of ``right``, in order of time, with a 95% interval for another recording as long.

    As many observations count as there are spans of ``SPAN``, or of the mean run of whichever
    outcome is rarer.
    """
    count = len(right)
    if not count:
        return Share(math.nan, 0.0, 1.0, 0)
    value = float(right.mean())
    rarer = right if value < 0.5 else ~right
    runs = _runs(rarer)
    span = max(float(SPAN), int(rarer.sum()) / runs if runs else 1.0)
    low, high = predicted(value, max(1, round(count / span)))
    return Share(value, low, high, count)


def predicted(value: float, count: int) -> tuple[float, float]:
    """Where the share will lie, 19 times in 20, among as many observations more.

    ``value`` was observed among ``count``. The one is as much a matter of chance as the other:
    the number of successes is beta-binomial, given these and Jeffreys' prior.
    """
    a, b = value * count + 0.5, (1 - value) * count + 0.5
    k = np.arange(count)
    # How much more likely each number of successes is than the one before.
    ratios = np.log((count - k) * (k + a)) - np.log((k + 1) * (count - k - 1 + b))
    logs = np.concatenate([[0.0], np.cumsum(ratios)])
    weights = np.exp(logs - logs.max())
    below = np.cumsum(weights / weights.sum())
    low, high = np.searchsorted(below, [0.025, 0.975]).tolist()
    return low / count, min(high, count) / count
