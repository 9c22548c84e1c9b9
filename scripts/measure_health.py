"""How often ``vpr_lite_ros/health.py`` calls good images bad, and bad ones good.

``python scripts/measure_health.py ../shared/data/train --towns 3``: every image below the folder
and every fourth of three drawn drives is taken to be good; of every sixteenth, bad ones are made.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.health import Look, measure, to_grey
from vpr_lite_ros.image import fit
from vpr_lite_ros.simulation import simulate_drive

Image = NDArray[np.uint8]
BAD_EVERY = 16
TOWN_STEP = 4


def expose(image: Image, gain: float) -> Image:
    """``gain`` times the light, on a sensor of 8,000 electrons with read noise, gamma 2.2."""
    rng = np.random.default_rng(0)
    electrons = rng.poisson(np.minimum((image / 255.0) ** 2.2 * gain, 1) * 8000)
    values = (electrons / 8000) ** (1 / 2.2) * 255 + rng.normal(0, 1.5, image.shape)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def defocus(image: Image, deviation: float) -> Image:
    """Pixels of an image 640 wide."""
    return cv2.GaussianBlur(image, (0, 0), deviation * image.shape[1] / 640).astype(np.uint8)


def move(image: Image, length: int) -> Image:
    """Pixels of an image 640 wide."""
    return cv2.blur(image, (round(length * image.shape[1] / 640) | 1, 1)).astype(np.uint8)


BAD: dict[str, Callable[[Image], Image]] = {
    "light x 0.003": lambda image: expose(image, 0.003),
    "light x 0.001": lambda image: expose(image, 0.001),
    "light x 32": lambda image: expose(image, 32),
    "light x 64": lambda image: expose(image, 64),
    "defocus 3 px": lambda image: defocus(image, 3),
    "defocus 5 px": lambda image: defocus(image, 5),
    "motion 25 px": lambda image: move(image, 25),
    "motion 41 px": lambda image: move(image, 41),
}


def images(folder: Path, towns: int) -> Iterator[tuple[str, Image]]:
    """(Folder's or town's name, RGB image)."""
    for file in sorted(folder.rglob("*.jpg")):
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        yield file.relative_to(folder).parts[0], image.astype(np.uint8)
    for seed in range(1, towns + 1):
        drive = simulate_drive(seed)
        for frame in drive.part(0, len(drive), TOWN_STEP).frames():
            yield f"town {seed}", frame.image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--towns", type=int, default=0, help="also so many drawn drives")
    args = parser.parse_args()
    good: dict[str, Counter[str]] = {}
    bad: dict[str, Counter[str]] = {name: Counter() for name in BAD}
    for number, (name, image) in enumerate(images(args.folder, args.towns)):
        good.setdefault(name, Counter())[measure(to_grey(image)).look.value] += 1
        if number % BAD_EVERY == 0:
            small = fit(image, (640, 480)) if image.size > 3 * 640 * 480 else image
            for fault, spoil in BAD.items():
                bad[fault][measure(to_grey(spoil(small))).look.value] += 1
    good["all"] = sum(good.values(), Counter())
    for name, looks in (good | bad).items():
        total = looks.total()
        print(
            f"{name}: {total} images, {1 - looks[Look.GOOD.value] / total:.2%} called bad", end=""
        )
        print(f"  ({', '.join(f'{look} {count}' for look, count in looks.most_common())})")


if __name__ == "__main__":
    main()
