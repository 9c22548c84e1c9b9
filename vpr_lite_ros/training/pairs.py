"""Pairs of views of one place: what the place network and the matcher learn from.

The views are one image cut out twice, from another point of view and in another light, or two
images of one place: a webcam's by day and by night, neighbours of a drive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from vpr_lite_ros.training.corridor import AT_PICTURE, Corridor, Eye, some_corridor
from vpr_lite_ros.training.files import by_root, read_rgb, weighted_folders
from vpr_lite_ros.training.loop import Schedule

_CAMERAS = 0.2
"""How often ``Pairs.still`` draws from a camera that does not move."""
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
    corridor: Corridor | None = None
    """What the window shows, where the cameras do not stand where its picture was taken."""
    eyes: tuple[Eye, Eye] = (AT_PICTURE, AT_PICTURE)


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
    one_place: bool = True
    """Whether the views should be alike as a whole, and not only cell by cell."""


class Pairs:
    """The images of a configuration, to draw pairs from."""

    def __init__(self, config: PairsConfig, stage: str) -> None:
        self.folders, self.weights = weighted_folders(config.images, f"{stage}.images")
        radii = config.positive_radius_m, config.negative_radius_m
        frames = config.positive_frames, config.negative_frames
        self.cameras = [load_places(Path(table)) for table in config.fixed_cameras]
        kinds = (
            (self.cameras, True),
            ([load_places(Path(table), *radii) for table in config.places], False),
            ([clip for t in config.sequences for clip in load_sequences(Path(t), *frames)], False),
        )
        self.sources: list[tuple[list[PlaceDataset], bool]] = [kind for kind in kinds if kind[0]]

    def of_places(
        self,
        count: int,
        rng: np.random.Generator,
        of_still: Callable[[bool, np.random.Generator], Look],
    ) -> list[Pair]:
        """Up to ``count`` pairs of places that differ, of one data set or else a few.

        Parameters
        ----------
        of_still
            How two images of a camera that does not move are looked at, from ``mirrored`` and a
            generator.
        """
        pairs: list[Pair] = []
        for choice in rng.permutation(len(self.sources)):
            datasets, aligned = self.sources[choice]
            weights = by_root([len(dataset.queries) for dataset in datasets])
            dataset = datasets[rng.choice(len(datasets), p=weights)]
            mirrored = bool(rng.random() < 0.5)
            for query, partner in _distinct_places(dataset, count - len(pairs), rng):
                look = (of_still if aligned else whole)(mirrored, rng)
                first, second = dataset.queries[query], dataset.database[partner]
                pairs.append(Pair(first, second, look, aligned, len(pairs)))
        return pairs

    def still(self, rng: np.random.Generator) -> tuple[Path, Path]:
        """Any image twice, or two of a camera that does not move.

        Large folders count for more, but do not drown the small ones.
        """
        if self.cameras and rng.random() < _CAMERAS:
            camera = self.cameras[rng.integers(len(self.cameras))]
            query = int(rng.choice(camera.queries_with_positives))
            return camera.queries[query], camera.database[int(rng.choice(camera.positives(query)))]
        files = self.folders[rng.choice(len(self.folders), p=self.weights)]
        file = files[rng.integers(len(files))]
        return file, file


@dataclass(frozen=True)
class Standpoint:
    """Where the pixels of a view come from."""

    homography: NDArray[np.float64]
    """(3, 3) from the image's pixels, as the camera would have seen them there, to the view's."""
    eye: Eye
    corridor: Corridor | None
    centre: NDArray[np.float64]
    half: NDArray[np.float64]
    """(2,) x, y of the window that the corridor is seen in, in pixels of the image."""

    def from_image(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 2) pixels of the image to pixels of the view."""
        moved = self._walk(points, AT_PICTURE, self.eye)
        return np.asarray(cv2.perspectiveTransform(moved[None], self.homography)[0], np.float64)

    def to_image(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 2) pixels of the view to pixels of the image."""
        back = np.linalg.inv(self.homography)
        return self._walk(cv2.perspectiveTransform(points[None], back)[0], self.eye, AT_PICTURE)

    def _walk(self, points: NDArray[np.float64], here: Eye, there: Eye) -> NDArray[np.float64]:
        if self.corridor is None:
            return np.asarray(points, np.float64)
        seen = self.corridor.seen_from(there, (points - self.centre) / self.half, here)
        return seen * self.half + self.centre


def render(
    pair: Pair, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Image, Image, Standpoint, Standpoint]:
    """Both views of a pair, ``size`` (width, height), the second and half of the first distorted.

    Returns
    -------
    first, second
        (H, W, 3) RGB.
    of_first, of_second
        Where they are seen from; the pair's second image is scaled to the size of the first.
    """
    a = read_rgb(pair.first)
    b = a if pair.second == pair.first else read_rgb(pair.second)
    height, width = a.shape[:2]
    if b.shape != a.shape:
        b = np.asarray(cv2.resize(b, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    of_first, of_second = _standpoints((width, height), pair.look, size, rng)
    first, second = _view(a, of_first, size), _view(b, of_second, size)
    if rng.random() < 0.5:
        first = distort(first, rng)
    return first, distort(second, rng), of_first, of_second


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


def part_from_beside(mirrored: bool, rng: np.random.Generator) -> Look:
    """The same, and the other camera stands some steps beside, before or behind."""
    corridor = some_corridor(rng)
    beside = rng.uniform(-0.5, 0.5) * corridor.half_width
    eye = Eye(beside, rng.uniform(-0.3, 0.4))
    return replace(part(mirrored, rng), corridor=corridor, eyes=(AT_PICTURE, eye))


def here_and_ahead(mirrored: bool, rng: np.random.Generator) -> tuple[Look, Look]:
    """A window, and what is seen of it some steps ahead; both seen again from beside."""
    centre, sides = _window(rng)
    corridor, ahead = some_corridor(rng), rng.uniform(0.25, 0.65)
    room = 0.5 * corridor.half_width

    def look(forward: float) -> Look:
        beside = Eye(rng.uniform(-room, room), forward + rng.uniform(-0.08, 0.08))
        same = (0.2, 0.1), 0.05, 0.05, mirrored
        return Look(centre, sides, *same, corridor, (Eye(0.0, forward), beside))

    return look(0.0), look(ahead)


def here(mirrored: bool, rng: np.random.Generator) -> Look:
    """A window, and what is seen of it from beside."""
    return here_and_ahead(mirrored, rng)[0]


def _window(rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centre and sides of a random window, in shares of the image's sides."""
    side = math.exp(rng.uniform(math.log(_SMALLEST), 0))
    stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(1.5))
    width, height = min(side * stretch, 1.0), min(side / stretch, 1.0)
    x, y = rng.uniform([width / 2, height / 2], [1 - width / 2, 1 - height / 2])
    return (float(x), float(y)), (width, height)


def _standpoints(
    image_size: tuple[int, int], look: Look, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Standpoint, Standpoint]:
    """Of the two views of ``size`` that ``look`` takes of an image of ``image_size``."""
    width, height = image_size
    centre = np.array([look.centre[0] * width, look.centre[1] * height])
    half = np.array([look.sides[0] * width, look.sides[1] * height]) / 2
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
        to_first, to_second = mirror @ to_first, mirror @ to_second
    return (
        Standpoint(to_first, look.eyes[0], look.corridor, centre, half),
        Standpoint(to_second, look.eyes[1], look.corridor, centre, half),
    )


def _view(image: Image, standpoint: Standpoint, size: tuple[int, int]) -> Image:
    """What is seen there; what lies outside of the image is its mirror image.

    Where the view is smaller than what it shows, the image is blurred first: ``remap`` only looks
    at the nearest pixels.
    """
    linear = standpoint.homography[:2, :2]
    shrink = 1 / math.sqrt(max(abs(float(np.linalg.det(linear))), 1e-9))
    if shrink > 1.2:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), 0.5 * math.sqrt(shrink**2 - 1)))
    width, height = size
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=2).reshape(-1, 2)
    spots = standpoint.to_image(pixels.astype(np.float64)).reshape(height, width, 2)
    view = cv2.remap(
        image,
        spots.astype(np.float32),
        None,
        interpolation=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return np.asarray(view, np.uint8)
