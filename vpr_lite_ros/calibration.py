"""How likely a candidate shows the same place: what similarity, score and geometry say together.

A logistic regression of what the detector knows of a candidate, fitted by ``vpr-lite calibrate``
to labelled sequences and kept in the bundle's model card. There are two: where the camera is
known, so that matches that agree with one motion of it can be counted, and where it is not, and
those are counted that agree with one homography.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEATURES = ("similarity", "match", "agreement", "correlated", "zoom")
"""In this order; ``features`` says of what."""
WITH_CAMERA, WITHOUT_CAMERA = "with_camera", "without_camera"
NEUTRAL = 0.12
"""P(same place) that speaks neither for nor against: the next keyframe forgets what is below."""
LASTING = 0.6
"""So much of what one keyframe says for a place still counts at the next. Both were chosen on drawn
towns and on walks kept from training (docs/training.md)."""
MOST_SUPPORT = 6.0
"""Log odds that the keyframes before can add at most: however sure they were, the robot may have
left the stretch that it came by."""
_MOST_ZOOM = 0.3
"""Beyond this, a zoom says nothing more."""
_LEAST_SCORE = 1e-3
"""Of match scores below this, the logarithm says nothing more."""


def features(
    similarity: float, match_score: float, agreement: int, correlated: int, zoom: float
) -> list[float]:
    """What the weights of a ``Curve`` are multiplied with.

    Scores and counts span orders of magnitude, and twice as much says the same everywhere, so
    they are taken as logarithms. The rank in retrieval is left out: what it knows the similarity
    knows, too, and a curve that has learned how seldom later candidates are true no longer puts
    those first that are.
    """
    score = math.log(max(match_score, _LEAST_SCORE))
    apart = min(abs(zoom), _MOST_ZOOM)
    return [similarity, score, math.log1p(agreement), math.log1p(correlated), apart]


@dataclass(frozen=True)
class Curve:
    """A logistic regression, and what its answers were worth where it was measured."""

    bias: float
    weights: tuple[float, ...]
    """One for each of ``FEATURES``."""
    precision: tuple[tuple[float, float], ...]
    """(target, least confidence whose closures were right at least as often), rising."""

    def confidence(self, values: list[float]) -> float:
        """P(same place), 0…1."""
        logit = self.bias + sum(w * x for w, x in zip(self.weights, values, strict=True))
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, logit))))

    def threshold(self, target_precision: float) -> float:
        """Least confidence to accept; of targets above all that were measured, the highest."""
        if target_precision <= 0:
            return 0.0
        reached = [least for target, least in self.precision if target >= target_precision]
        return reached[0] if reached else self.precision[-1][1]


@dataclass(frozen=True)
class Calibration:
    """Both curves of a bundle."""

    with_camera: Curve
    without_camera: Curve

    def curve(self, has_camera: bool) -> Curve:
        return self.with_camera if has_camera else self.without_camera

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Calibration | None:
        """What ``model.yaml`` says, checked; None if the bundle is not calibrated.

        Raises
        ------
        KeyError, TypeError, ValueError
            If it is garbled.
        """
        if (entry := card.get("calibration")) is None:
            return None
        return cls(_read_curve(entry[WITH_CAMERA]), _read_curve(entry[WITHOUT_CAMERA]))

    def to_card(self) -> dict[str, Any]:
        """What ``from_card`` reads."""
        return {
            name: {
                "bias": curve["bias"],
                "weights": dict(zip(FEATURES, curve["weights"], strict=True)),
                "precision": [list(pair) for pair in curve["precision"]],
            }
            for name, curve in asdict(self).items()
        }


def _read_curve(entry: Any) -> Curve:
    weights = tuple(float(entry["weights"][name]) for name in FEATURES)
    precision = tuple((float(target), float(least)) for target, least in entry["precision"])
    numbers = [float(entry["bias"]), *weights, *(value for pair in precision for value in pair)]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("not all numbers are finite")
    if not precision or any(
        list(column) != sorted(column) for column in zip(*precision, strict=True)
    ):
        raise ValueError("precision should be pairs that rise")
    return Curve(float(entry["bias"]), weights, precision)


def sequential(confidence: ArrayLike, before: ArrayLike) -> NDArray[np.float64]:
    """P(same place) by an image and by the keyframes before it.

    Log odds add up, as far as images are independent; those of keyframes in a row are not quite,
    so that what was seen before fades by ``LASTING``, and adds ``MOST_SUPPORT`` at most. What spoke
    against the place is forgotten at once: places are entered from elsewhere.

    Parameters
    ----------
    confidence
        P by this image alone, of any shape; NaN stays NaN.
    before
        What this function returned for the same stretch of the map at the keyframe before; 0 if
        that keyframe did not point there. NaN counts as 0.
    """
    alone, earlier = np.broadcast_arrays(np.asarray(confidence, float), np.asarray(before, float))
    supported = np.asarray(earlier > NEUTRAL)
    support = LASTING * (_log_odds(np.where(supported, earlier, NEUTRAL)) - _log_odds(NEUTRAL))
    together = 1 / (1 + np.exp(-(_log_odds(alone) + np.minimum(support, MOST_SUPPORT))))
    return np.asarray(np.where(supported, together, alone))


def _log_odds(probability: ArrayLike) -> NDArray[np.float64]:
    inside = np.clip(probability, 1e-15, 1 - 1e-15)
    return np.asarray(np.log(inside / (1 - inside)))


def expected_calibration_error(
    confidence: NDArray[np.float64], true: NDArray[np.bool_], bins: int = 10
) -> float:
    """How far confidence and frequency lie apart: mean over all answers; NaN without any.

    Answers are sorted into ``bins`` of equal width by confidence; of each bin the share of true
    answers is compared with the mean confidence.
    """
    if not len(confidence):
        return math.nan
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(float(confidence[number == i].sum() - true[number == i].sum())) for i in range(bins)
    ]
    return sum(gaps) / len(confidence)
