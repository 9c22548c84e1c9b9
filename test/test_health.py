"""Is a camera fit? Each fault is found where it is, and not where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.health import Finding, Look, Severity, StreamHealth, measure, to_grey
from vpr_lite_ros.simulation import simulate_drive

Image = NDArray[np.uint8]
SECOND = 10**9


@pytest.fixture(scope="module")
def street() -> list[Image]:
    """Twelve sharp, well lit images of a drawn town."""
    drive = simulate_drive(1)
    return [frame.image for frame in drive.part(0, 120, 10).frames()]


def expose(image: Image, gain: float) -> Image:
    """As a sensor would see it with ``gain`` times the light: shot noise, read noise, clipping."""
    rng = np.random.default_rng(0)
    electrons = rng.poisson(np.minimum((image / 255.0) ** 2.2 * gain, 1) * 8000)
    grey = (electrons / 8000) ** (1 / 2.2) * 255 + rng.normal(0, 1.5, image.shape)
    return np.clip(np.round(grey), 0, 255).astype(np.uint8)


def out_of_focus(image: Image) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 5), np.uint8)


def moving(image: Image) -> Image:
    """Blurred by 25 pixels sideways, as in a turn: sharp still from top to bottom."""
    return np.asarray(cv2.blur(image, (25, 1)), np.uint8)


def covered(image: Image) -> Image:
    """A finger on the lens: light enough, but nothing to be seen."""
    noise = np.random.default_rng(int(image.sum())).normal(0, 3, image.shape)
    return np.clip(np.array([120, 60, 50]) + noise, 0, 255).astype(np.uint8)


FAULTS: dict[str, Callable[[Image], Image]] = {
    "dark": lambda image: expose(image, 0.002),
    "overexposed": lambda image: expose(image, 40),
    "blurred": out_of_focus,
    "constant picture": covered,
}


def names(findings: Iterable[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def seen(images: Iterable[Image], window: int = 30) -> StreamHealth:
    health = StreamHealth(images=window)
    for number, image in enumerate(images):
        health.see(image, SECOND + number * SECOND // 5, number * SECOND // 5)
    return health


# --- images


def test_nothing_is_found_where_nothing_is_wrong(street: list[Image]) -> None:
    health = seen(street)
    assert health.findings() == []
    assert health.rate_hz == pytest.approx(5)
    assert StreamHealth().findings() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_only_that(street: list[Image], fault: str) -> None:
    findings = seen(FAULTS[fault](image) for image in street).findings()
    assert names(findings) == [fault]
    assert findings[0].severity is Severity.ERROR
    assert "12 of 12 are " + fault in findings[0].seen
    assert findings[0].remedy.endswith(".")


def test_motion_blurs_in_one_direction_only(street: list[Image]) -> None:
    assert names(seen(map(moving, street)).findings()) == ["blurred"]
    upright = [np.ascontiguousarray(image.swapaxes(0, 1)) for image in map(moving, street)]
    assert names(seen(upright).findings()) == ["blurred"]


def test_a_few_bad_images_are_a_warning_and_pass(street: list[Image]) -> None:
    assert seen([*street[:10], *map(out_of_focus, street[10:])]).findings() == []
    health = seen([*street[:8], *map(out_of_focus, street[8:])], window=12)
    findings = health.findings()
    assert names(findings) == ["blurred"] and findings[0].severity is Severity.WARNING
    assert "4 of 12" in findings[0].seen
    for image in street:
        health.see_image(image)
    assert health.findings() == [], "the window has moved on"


def test_the_only_image_counts(street: list[Image]) -> None:
    assert names(seen([out_of_focus(street[0])]).findings()) == ["blurred"]


@pytest.mark.parametrize("size", [(1920, 1080), (1280, 720), (640, 360), (320, 240)])
def test_any_size_is_judged_alike(street: list[Image], size: tuple[int, int]) -> None:
    for image in street[:4]:
        scaled = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        if size[0] > 640:  # enlarging invents no detail: draw some from a mosaic of images
            scaled = np.tile(image, (3, 3, 1))[: size[1], : size[0]]
        assert measure(to_grey(scaled)).look is Look.GOOD
        factor = size[0] / 640
        blurred = np.asarray(cv2.GaussianBlur(scaled, (0, 0), 6 * factor), np.uint8)
        assert measure(to_grey(blurred)).look is Look.BLURRED


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (16, 16)])
def test_tiny_images_do_no_harm(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    health = StreamHealth()
    health.see(image, SECOND)
    assert "blurred" not in names(health.findings())


def test_a_frozen_camera_is_found_a_robot_that_stands_is_not(street: list[Image]) -> None:
    findings = seen([street[0]] * 10).findings()
    assert names(findings) == ["repeated images"] and "9 of 9" in findings[0].seen
    twice = [image for image in street for _ in range(2)]
    assert names(seen(twice).findings()) == ["repeated images"]
    # A real sensor is never still.
    assert seen([expose(street[0], 0.9 + 0.001 * number) for number in range(10)]).findings() == []


def test_memory_is_bounded(street: list[Image]) -> None:
    health = StreamHealth(images=4, stamps=8)
    for number in range(100):
        health.see(street[number % 12], (number + 1) * SECOND)
    kept = [len(value) for value in vars(health).values() if hasattr(value, "maxlen")]
    assert kept and max(kept) == 8


# --- good images are called good, real ones, too


def test_good_images_are_called_bad_less_than_once_in_a_hundred(data_dir: Path) -> None:
    """On a seventh of the training images, of which some are in truth blurred."""
    looks: Counter[Look] = Counter()
    for name in ("karlsruhe", "camvid", "webcam", "grief_places", "ie_tower"):
        for file in sorted((data_dir / "train" / name).rglob("*.jpg"))[::7]:
            bgr = cv2.imread(str(file))
            looks[measure(to_grey(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8))).look] += 1
    total = sum(looks.values())
    assert total > 500
    assert total - looks[Look.GOOD] <= 0.01 * total, looks


# --- stamps


def stamped(stamps: Iterable[float], arrivals: Iterable[float] | None = None) -> StreamHealth:
    health = StreamHealth()
    times = list(stamps)
    for stamp, arrival in zip(times, arrivals or times, strict=True):
        health.see_stamp(round(stamp * SECOND), round(arrival * SECOND))
    return health


def steady(count: int, start: float = 100.0, rate: float = 10.0) -> list[float]:
    return [start + number / rate for number in range(count)]


def test_steady_stamps_are_fine() -> None:
    jitter = np.random.default_rng(0).uniform(-0.03, 0.03, 200)
    assert stamped(np.array(steady(200)) + jitter).findings() == []
    assert stamped([5.0]).findings() == []


def test_zero_stamps_are_found() -> None:
    findings = stamped([0.0] * 5).findings()
    assert names(findings) == ["zero stamps"] and findings[0].severity is Severity.ERROR
    mixed = stamped([*steady(20), 0.0, *steady(20, 102)], steady(41)).findings()
    assert names(mixed) == ["zero stamps"] and "1 of 40 is" in mixed[0].seen


def test_a_bag_that_loops_is_told_from_images_out_of_order() -> None:
    once = stamped([*steady(50), *steady(50)], steady(100)).findings()
    assert names(once) == ["stamps go back"] and once[0].severity is Severity.WARNING
    assert "4.9 s" in once[0].seen and "loop" in once[0].remedy
    swapped = steady(100)
    swapped[1::2], swapped[::2] = swapped[::2], swapped[1::2]
    often = stamped(swapped, steady(100)).findings()
    assert often[0].name == "stamps go back" and often[0].severity is Severity.ERROR
    assert "publishers" in often[0].remedy


def test_the_step_after_one_back_is_no_gap() -> None:
    late = steady(60)
    late[20] -= 5  # its stamp is 5 s too early; the next one's is right again
    assert names(stamped(late, steady(60)).findings()) == ["stamps go back"]


def test_equal_stamps_are_found() -> None:
    twice = [stamp for stamp in steady(20) for _ in range(2)]
    assert names(stamped(twice).findings()) == ["equal stamps"]


def test_a_clock_that_jumps_is_told_from_a_camera_that_pauses() -> None:
    stamps = [*steady(30), *steady(30, 3700)]
    jump = stamped(stamps, steady(60)).findings()
    assert names(jump) == ["stamps jump"] and "3.6e+03 s" in jump[0].seen
    pause = stamped(stamps).findings()
    assert names(pause) == ["gaps"] and "usual are 0.1 s" in pause[0].seen


def test_a_slow_camera_is_found() -> None:
    findings = stamped(steady(10, rate=0.5)).findings()
    assert names(findings) == ["slow"] and "0.5 images a second" in findings[0].seen


def test_silence_is_found_by_the_receivers_clock() -> None:
    health = stamped(steady(20, start=7.0), steady(20, start=1000.0))
    assert health.findings(round(1002.5 * SECOND)) == []
    silent = health.findings(1012 * SECOND)
    assert names(silent) == ["silence"] and silent[0].severity is Severity.ERROR
    assert "10.1 s" in silent[0].seen


def test_the_worst_comes_first(street: list[Image]) -> None:
    health = StreamHealth()
    for image in map(out_of_focus, street):
        health.see(image, 5 * SECOND)
    assert names(health.findings()) == ["blurred", "equal stamps"]
