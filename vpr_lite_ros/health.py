"""Is this camera fit to recognise places with? Judged from its images and stamps as they come.

``StreamHealth`` is told of one image at a time and keeps a bounded window of the latest; its
``findings`` say what is wrong there now, and what to do. The node puts them on
``/diagnostics``, ``vpr-lite doctor`` prints them.

>>> health = StreamHealth()                                      # doctest: +SKIP
>>> health.see(image, stamp_ns)
>>> [finding.name for finding in health.findings()]
['blurred', 'stamps go back']
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""RGB, (H, W, 3)."""

SIZE = (640, 480)
"""Larger images are judged at this size, that of the network's input; smaller ones as they are."""

# Limits for one image, chosen on the training images and on drawn towns, with exposure and blur
# made worse step by step. What place-v4 still recognises decides: a blur of 5 pixels deviation
# leaves it a tenth of the neighbouring frames that it recognises sharp, one of 25 pixels by
# motion half, while a dark image without much noise costs it little.
DARK_MEAN = 10.0
"""Mean grey value, 0..255, below which an image is dark, ..."""
DARK_HIGHLIGHTS = 40.0
"""... unless its brightest hundredth is at least this bright, as lamps are by night."""
OVEREXPOSED_SHARE = 0.55
"""Share of pixels at or above ``WHITE`` from which an image is overexposed."""
WHITE = 250
CONSTANT_DEVIATION = 5.0
"""Standard deviation of grey values, at 80x60, below which an image shows nothing."""
BLURRED_DETAIL = 0.017
"""Least ``detail`` of an image that is not blurred."""

# Limits for the window.
LEAST_SHARE, MOST_SHARE = 0.25, 0.75
"""Share of bad images from which there is a warning, and an error."""
LEAST_IMAGES = 3
"""Fewer bad images than this say nothing, unless there are no others."""
JUMP_NS = 10_000_000_000
"""Stamps that run ahead of the time that passed by more than this have jumped."""
GAP_FACTOR, LEAST_GAP_NS = 5.0, 1_000_000_000
"""A gap is this many times the usual time between two images, and at least this long."""
LEAST_RATE_HZ = 1.0


class Severity(enum.IntEnum):
    """How bad; the numbers are those of ``diagnostic_msgs/DiagnosticStatus``."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """Short, and the same for the same thing."""
    severity: Severity
    seen: str
    """What was seen, with its value."""
    remedy: str = ""
    """The way out, a sentence; empty if nothing is wrong."""


class Look(enum.Enum):
    """What one image looks like: the first of these that is true of it."""

    DARK = "dark"
    OVEREXPOSED = "overexposed"
    CONSTANT = "constant picture"
    BLURRED = "blurred"
    GOOD = "good"


@dataclass(frozen=True)
class Measures:
    """What is measured of one image."""

    mean: float
    """Grey value, 0..255."""
    highlights: float
    """99th percentile of grey values."""
    deviation: float
    """Standard deviation of grey values at 80x60: what is left when noise is averaged away."""
    white: float
    """Share of pixels at or above ``WHITE``."""
    detail: float
    """Second differences at half of ``SIZE`` in the direction that has less of them, over those
    at a sixteenth: the contrast cancels out, and blur, whether all round or along the robot's
    motion, lessens it. NaN where the image is too small to tell."""

    @property
    def look(self) -> Look:
        if self.mean < DARK_MEAN and self.highlights < DARK_HIGHLIGHTS:
            return Look.DARK
        if self.white >= OVEREXPOSED_SHARE:
            return Look.OVEREXPOSED
        if self.deviation < CONSTANT_DEVIATION:
            return Look.CONSTANT
        # "<" is False for NaN.
        return Look.BLURRED if self.detail < BLURRED_DETAIL else Look.GOOD


def to_grey(image: Image) -> Image:
    """Grey (H, W), shrunk to ``SIZE`` if it is larger."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if grey.size > SIZE[0] * SIZE[1]:
        grey = cv2.resize(grey, SIZE, interpolation=cv2.INTER_AREA)
    return np.asarray(grey, np.uint8)


def measure(grey: Image) -> Measures:
    """Measure one image, as ``to_grey`` returns it."""
    height, width = grey.shape
    # In float: rounding to whole grey values would look like detail.
    half = _shrink(grey.astype(np.float32), width // 2, height // 2)
    small = _shrink(half, 80, 60)
    eighth = _shrink(half, width // 8, height // 8)
    detail = math.nan
    if min(eighth.shape) >= 6:
        across = half[:, 2:] + half[:, :-2] - 2 * half[:, 1:-1]
        down = half[2:] + half[:-2] - 2 * half[1:-1]
        finest = min(_energy(across), _energy(down))
        detail = finest / (_energy(cv2.Laplacian(eighth, cv2.CV_32F)[1:-1, 1:-1]) + 1e-3)
    return Measures(
        mean=float(small.mean()),
        highlights=float(np.percentile(small, 99)),
        deviation=float(small.std()),
        white=np.count_nonzero(grey >= WHITE) / grey.size,
        detail=detail,
    )


def _shrink(picture: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    size = max(1, width), max(1, height)
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.float32)


def _energy(differences: NDArray[np.float32]) -> float:
    return float(np.mean(np.square(differences)))


class StreamHealth:
    """The latest images and stamps of one camera.

    Not thread-safe: where one thread sees stamps and another images, share a lock. Takes some
    0.3 MB and, for a picture of 640x480, about a millisecond.

    Parameters
    ----------
    images, stamps
        How many of the latest are judged.
    least_share
        Share of bad images from which there is a warning.
    """

    def __init__(
        self, images: int = 30, stamps: int = 300, least_share: float = LEAST_SHARE
    ) -> None:
        self._least_share = least_share
        self._measures: deque[Measures] = deque(maxlen=images)
        self._looks: deque[Look] = deque(maxlen=images)
        self._repeated: deque[bool] = deque(maxlen=images)
        self._last_grey: Image | None = None
        # Of each stamp: nanoseconds since the one before (None: it was zero), and the same by
        # the receiver's clock, where it is known.
        self._steps: deque[tuple[int | None, int | None]] = deque(maxlen=stamps)
        self._last_stamp_ns: int | None = None
        self._last_arrival_ns: int | None = None

    def see(self, image: Image, stamp_ns: int, arrival_ns: int | None = None) -> None:
        """Take one image, RGB (H, W, 3) of any size, and its stamp."""
        self.see_stamp(stamp_ns, arrival_ns)
        self.see_image(image)

    def see_stamp(
        self, stamp_ns: int, arrival_ns: int | None = None, *, follows: bool = True
    ) -> None:
        """Take the stamp of an image whose pixels are not looked at.

        ``arrival_ns`` is when it came, by any clock that does not jump; without it, a jump of
        the camera's clock cannot be told from a gap. An image does not follow the one before if
        others came between that nobody looked at: then it tells nothing of the pace.
        """
        waited = None
        if arrival_ns is not None and self._last_arrival_ns is not None:
            waited = arrival_ns - self._last_arrival_ns
        self._last_arrival_ns = arrival_ns
        if not follows and stamp_ns and self._last_stamp_ns is not None:
            step = stamp_ns - self._last_stamp_ns
            if step >= 0 and (waited is None or step - waited <= JUMP_NS):
                self._last_stamp_ns = stamp_ns
                return
        if stamp_ns == 0:
            self._steps.append((None, waited))
            return
        if self._last_stamp_ns is not None:
            self._steps.append((stamp_ns - self._last_stamp_ns, waited))
        self._last_stamp_ns = stamp_ns

    def see_image(self, image: Image) -> Look:
        """Take an image whose stamp was seen before, or is of no interest; return its look."""
        grey = to_grey(image)
        measures = measure(grey)
        if self._last_grey is not None:
            self._repeated.append(np.array_equal(grey, self._last_grey))
        self._last_grey = grey
        self._measures.append(measures)
        self._looks.append(measures.look)
        return measures.look

    @property
    def rate_hz(self) -> float:
        """Images a second by their stamps (median), however long ago; NaN while unknown."""
        steps = [step for step, _ in self._steps if step is not None and step > 0]
        return 1e9 / float(np.median(steps)) if steps else math.nan

    def findings(self, now_ns: int | None = None) -> list[Finding]:
        """What is wrong with the latest images, worst first; empty if nothing is.

        With ``now_ns``, by the clock of ``arrival_ns``, also whether they have ceased to come.
        """
        found = [*self._judge_looks(), *self._judge_stamps(), *self._judge_silence(now_ns)]
        return sorted(found, key=lambda finding: -finding.severity)

    # -- images --------------------------------------------------------------------------------

    def _judge_looks(self) -> Iterable[Finding]:
        total = len(self._looks)
        for look, count in Counter(self._looks).items():
            if look is not Look.GOOD and self._is_much(count, total):
                of = [m for m, one in zip(self._measures, self._looks, strict=True) if one is look]
                value, remedy = _ABOUT[look]
                severity = Severity.ERROR if count >= MOST_SHARE * total else Severity.WARNING
                seen = f"{_of(count, total)} {look.value}: {value(of)}"
                yield Finding(look.value, severity, seen, remedy)
        repeated = sum(self._repeated)
        if self._is_much(repeated, len(self._repeated)):
            yield Finding(
                "repeated images",
                Severity.WARNING,
                f"{_of(repeated, len(self._repeated))} the image before, pixel for pixel",
                "Look whether the camera or its driver has frozen, or sends each image twice. "
                "In a simulator, a robot that stands still looks the same.",
            )

    def _is_much(self, count: int, total: int) -> bool:
        return count >= max(min(LEAST_IMAGES, total), self._least_share * total, 1)

    # -- stamps --------------------------------------------------------------------------------

    def _judge_stamps(self) -> Iterable[Finding]:
        total = len(self._steps)
        steps = [step for step, _ in self._steps if step is not None]
        if zeros := total - len(steps):
            yield Finding(
                "zero stamps",
                Severity.ERROR,
                f"{_of(zeros, total)} without a stamp",
                "Let the camera's driver fill in header.stamp: images without one are dropped.",
            )
        if back := [step for step in steps if step < 0]:
            often = len(back) > max(1, 0.01 * total)
            yield Finding(
                "stamps go back",
                Severity.ERROR if often else Severity.WARNING,
                f"{_of(len(back), total)} stamped before the one before, by up to "
                f"{-min(back) / 1e9:.3g} s",
                "Look whether two publishers share the topic, or the driver sends images out of "
                "order."
                if often
                else "Does a bag loop, or was the clock set? Then all is well from here on.",
            )
        if same := steps.count(0):
            yield Finding(
                "equal stamps",
                Severity.WARNING,
                f"{_of(same, total)} stamped as the one before",
                "Look whether two publishers share the topic, or the driver sends each image "
                "twice.",
            )
        yield from self._judge_pace()

    def _judge_pace(self) -> Iterable[Finding]:
        # The step after one back only makes up for it.
        before = [0, *(step if step is not None else 0 for step, _ in self._steps)]
        forward = [
            (step, waited)
            for last, (step, waited) in zip(before, self._steps, strict=False)
            if step is not None and step > 0 and last >= 0
        ]
        if not forward:
            return
        period = float(np.median([step for step, _ in forward]))
        jumps, gaps = [], []
        for step, waited in forward:
            if waited is not None and step - waited > JUMP_NS:
                jumps.append(step)
            elif step > max(GAP_FACTOR * period, LEAST_GAP_NS):
                gaps.append(step)
        if jumps:
            yield Finding(
                "stamps jump",
                Severity.WARNING,
                f"{_of(len(jumps), len(self._steps))} stamped up to {max(jumps) / 1e9:.3g} s "
                "after the one before, though no such time had passed",
                "Let the clocks settle (NTP, PTP) before the camera starts; on a bag that jumps, "
                "pass --clock and use_sim_time.",
            )
        if gaps:
            yield Finding(
                "gaps",
                Severity.WARNING,
                f"{len(gaps)} of {len(self._steps)} came late, after up to "
                f"{max(gaps) / 1e9:.3g} s; usual are {period / 1e9:.3g} s",
                "Look at the link, the driver and the load of the machine: images are lost. Raw "
                "images over a network want image_transport: compressed.",
            )
        if 1e9 / period < LEAST_RATE_HZ and len(forward) >= LEAST_IMAGES:
            yield Finding(
                "slow",
                Severity.WARNING,
                f"{1e9 / period:.2g} images a second",
                f"Let the camera send at least {LEAST_RATE_HZ:g} a second: places between two "
                "images are never seen.",
            )

    def _judge_silence(self, now_ns: int | None) -> Iterable[Finding]:
        if now_ns is None or self._last_arrival_ns is None:
            return
        waits = [waited for _, waited in self._steps if waited is not None]
        usual = float(np.median(waits)) if waits else 0.0
        silent = now_ns - self._last_arrival_ns
        if silent > max(GAP_FACTOR * usual, 2 * LEAST_GAP_NS):
            yield Finding(
                "silence",
                Severity.ERROR,
                f"no image for {silent / 1e9:.3g} s; usual are {usual / 1e9:.3g} s",
                "Look whether the camera's driver still runs (ros2 topic hz).",
            )


def _of(count: int, total: int) -> str:
    verb = "is" if count == 1 else "are"
    return f"{count} of {total} {verb}" if total > 1 else "the only one is"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


_ABOUT = {
    Look.CONSTANT: (
        lambda of: (
            f"grey values deviate by {_mean(m.deviation for m in of):.1f} of 255, expected at "
            f"least {CONSTANT_DEVIATION:g}"
        ),
        "Look whether the lens is covered, fogged or faces a wall.",
    ),
    Look.DARK: (
        lambda of: (
            f"mean grey value {_mean(m.mean for m in of):.0f} of 255, expected at least "
            f"{DARK_MEAN:g}"
        ),
        "Look whether the lens is covered; else turn on light, or let the camera expose longer.",
    ),
    Look.OVEREXPOSED: (
        lambda of: (
            f"{_mean(m.white for m in of):.0%} of the pixels are white, expected at most "
            f"{OVEREXPOSED_SHARE:.0%}"
        ),
        "Turn on automatic exposure, or let the camera expose shorter.",
    ),
    Look.BLURRED: (
        lambda of: (
            f"detail {_mean(m.detail for m in of):.3f}, expected at least {BLURRED_DETAIL:g}"
        ),
        "Clean and focus the lens; if it blurs in motion, expose shorter with more light.",
    ),
}
