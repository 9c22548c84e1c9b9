"""Pairs of views of one place: what the place network and the matcher learn from.

The views are one image cut out twice, from another point of view and in another light, or two
images of one place: a webcam's by day and by night, neighbours of a drive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.datasets import (
    NEGATIVE_RADIUS_M,
    POSITIVE_RADIUS_M,
    PlaceDataset,
    load_places,
    load_sequences,
)
from vpr_lite_ros.image import Image
from vpr_lite_ros.training.augment import CORNERS, distort, homography_of
from vpr_lite_ros.training.files import by_root, read_rgb, weighted_folders
from vpr_lite_ros.training.loop import Schedule

_SMALLEST = 0.4
"""Windows show at least this share of an image's sides, give or take their stretch."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Schedule):
    """Which images show the same place."""

    images: Sequence[str]
    """Folders of images, each seen twice."""
    fixed_cameras: Sequence[str] = ()
    """Tables (``file``, ``place``) of cameras that do not move: pixels correspond."""
    places: Sequence[str] = ()
    """Tables (``file`` with ``place`` or with ``x``, ``y``) of places seen more than once."""
    sequences: Sequence[str] = ()
    """Tables (``file``, ``clip``) of frames in order of time."""
    positive_radius_m: float = POSITIVE_RADIUS_M
    negative_radius_m: float = NEGATIVE_RADIUS_M
    """Of ``places`` with positions: up to the former one place, beyond the latter another."""
    positive_frames: int = 1
    negative_frames: int = 5
    """The same of ``sequences``, in frames."""


@dataclass(frozen=True)
class Look:
    """What two views show of an image, or of two that are taken for one."""

    centre: tuple[float, float]
    """x, y of the first view's centre, in shares of the image's sides."""
    sides: tuple[float, float]
    """Width and height of what it shows, in the same shares."""
    shift: tuple[float, float]
    """How far the second view's centre may lie from the first's, in shares of ``sides``."""
    scale: float
    """How much larger or smaller the second view may be: exp(±scale)."""
    slant: float
    """Standard deviation of the second view's corners, in half sides, and of its turn (rad)."""
    mirrored: bool


@dataclass(frozen=True)
class Pair:
    """Two images of one place."""

    first: Path
    second: Path
    look: Look
    aligned: bool
    """Whether equal pixels show the same."""
    scene: int
    """Pairs of one scene are different places that show some of the same things."""


class Pairs:
    """The images of a configuration, to draw pairs from."""

    def __init__(self, config: PairsConfig, stage: str) -> None:
        self.folders, self.weights = weighted_folders(config.images, f"{stage}.images")
        radii = config.positive_radius_m, config.negative_radius_m
        frames = config.positive_frames, config.negative_frames
        kinds = (
            ([load_places(Path(table)) for table in config.fixed_cameras], True),
            ([load_places(Path(table), *radii) for table in config.places], False),
            ([clip for t in config.sequences for clip in load_sequences(Path(t), *frames)], False),
        )
        self.sources: list[tuple[list[PlaceDataset], bool]] = [kind for kind in kinds if kind[0]]

    def of_places(self, count: int, rng: np.random.Generator) -> list[Pair]:
        """Up to ``count`` pairs of places that differ, of one data set or else a few."""
        pairs: list[Pair] = []
        for choice in rng.permutation(len(self.sources)):
            datasets, aligned = self.sources[choice]
            weights = by_root([len(dataset.queries) for dataset in datasets])
            dataset = datasets[rng.choice(len(datasets), p=weights)]
            mirrored = bool(rng.random() < 0.5)
            for query, partner in _distinct_places(dataset, count - len(pairs), rng):
                look = part(mirrored, rng) if aligned else whole(mirrored, rng)
                first, second = dataset.queries[query], dataset.database[partner]
                pairs.append(Pair(first, second, look, aligned, len(pairs)))
        return pairs

    def image(self, rng: np.random.Generator) -> Path:
        """Any image; large folders count for more, but do not drown the small ones."""
        files = self.folders[rng.choice(len(self.folders), p=self.weights)]
        return files[rng.integers(len(files))]


def render(
    pair: Pair, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Image, Image, NDArray[np.float64], NDArray[np.float64]]:
    """Both views of a pair, ``size`` (width, height), the second and half of the first distorted.

    Returns
    -------
    first, second
        (H, W, 3) RGB.
    to_first, to_second
        (3, 3) from pixels of the pair's first image (the second is scaled to its size) to those
        of the views.
    """
    a = read_rgb(pair.first)
    b = a if pair.second == pair.first else read_rgb(pair.second)
    height, width = a.shape[:2]
    if b.shape != a.shape:
        b = np.asarray(cv2.resize(b, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    to_first, to_second = _two_windows((width, height), pair.look, size, rng)
    first, second = _warp(a, to_first, size), _warp(b, to_second, size)
    if rng.random() < 0.5:
        first = distort(first, rng)
    return first, distort(second, rng), to_first, to_second


def _distinct_places(
    dataset: PlaceDataset, count: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Up to ``count`` queries and a positive of each that is a negative of all others."""
    order = dataset.queries_with_positives
    if rng.random() < 0.5:
        order = rng.permutation(order)
    elif len(order):  # one after the other, as close as they may be
        order = np.roll(order, -rng.integers(len(order)))
    surroundings: set[int] = set()
    found: list[tuple[int, int]] = []
    for query in order.tolist():
        if len(found) >= count:
            break
        around = set(dataset.non_negatives(query).tolist())
        partner = int(rng.choice(dataset.positives(query)))
        if partner not in surroundings and around.isdisjoint(other for _, other in found):
            surroundings |= around
            found.append((query, partner))
    return found


def whole(mirrored: bool, rng: np.random.Generator) -> Look:
    """Nearly all of both images: they differ as they are."""
    width, height = rng.uniform(0.8, 1, 2)
    x, y = rng.uniform([width / 2, height / 2], [1 - width / 2, 1 - height / 2])
    return Look((x, y), (width, height), (0.1, 0.05), 0.05, 0.03, mirrored)


def part(mirrored: bool, rng: np.random.Generator) -> Look:
    """A window, and one that is closer or further, looks past it, is tilted and turned."""
    centre, sides = _window(rng)
    return Look(centre, sides, (0.3, 0.2), 0.35, 0.06, mirrored)


def here_and_ahead(mirrored: bool, rng: np.random.Generator) -> tuple[Look, Look]:
    """A window, and what is left of it some steps ahead; both seen again from beside."""
    (x, y), sides = _window(rng)
    ahead = rng.uniform(0.6, 0.8)
    nearer = sides[0] * ahead, sides[1] * ahead
    return (
        Look((x, y), sides, (0.3, 0.1), 0.1, 0.05, mirrored),
        Look((x, y), nearer, (0.3, 0.1), 0.1, 0.05, mirrored),
    )


def _window(rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centre and sides of a random window, in shares of the image's sides."""
    side = math.exp(rng.uniform(math.log(_SMALLEST), 0))
    stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(1.5))
    width, height = min(side * stretch, 1.0), min(side / stretch, 1.0)
    x, y = rng.uniform([width / 2, height / 2], [1 - width / 2, 1 - height / 2])
    return (float(x), float(y)), (width, height)


def _two_windows(
    image_size: tuple[int, int], look: Look, size: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What ``look`` shows of an image, as the homographies to the pixels of the two views."""
    half = np.array(look.sides) * image_size / 2
    centre = np.array(look.centre) * image_size
    # The other camera stands closer or further, looks past it, is tilted and turned a little.
    angle = rng.normal(0, look.slant)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = CORNERS * math.exp(rng.uniform(-look.scale, look.scale)) @ turn.T
    corners = corners + rng.normal(0, look.slant, (4, 2))
    moved = centre + rng.uniform(-1, 1, 2) * look.shift * half * 2
    to_first = homography_of(CORNERS * half + centre, size)
    to_second = homography_of(corners * half + moved, size)
    if look.mirrored:
        mirror = np.array([[-1, 0, size[0] - 1], [0, 1, 0], [0, 0, 1]], np.float64)
        return mirror @ to_first, mirror @ to_second
    return to_first, to_second


def _warp(image: Image, homography: NDArray[np.float64], size: tuple[int, int]) -> Image:
    """A view; what lies outside of the image is its mirror image.

    Where the view is smaller than what it shows, the image is blurred first: ``warpPerspective``
    only looks at the nearest pixels.
    """
    shrink = 1 / math.sqrt(max(abs(float(np.linalg.det(homography[:2, :2]))), 1e-9))
    if shrink > 1.2:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), 0.5 * math.sqrt(shrink**2 - 1)))
    view = cv2.warpPerspective(
        image, homography, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    return np.asarray(view, np.uint8)
