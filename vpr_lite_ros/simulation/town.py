"""The town: where streets, houses, cars and trees stand.

Everything is decided by the seed alone. A texture is painted when it is first seen, from a
generator of its own, so that the order of looking changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.simulation.houses import paint_blank_wall, paint_facade
from vpr_lite_ros.simulation.land import Box, Ground, Street, paint_grain, paint_sky
from vpr_lite_ros.simulation.light import Image, Light, pick
from vpr_lite_ros.simulation.things import (
    CAR_COLOURS,
    CARS,
    Profile,
    paint_car_panel,
    paint_car_side,
    paint_fence,
    paint_lamp,
    paint_sign,
    paint_tree,
)
from vpr_lite_ros.simulation.view import Array, Canvas, Pinhole, Texture, camera_pose, rectangle

Painter = Callable[[np.random.Generator, Light], Image]

# Metres. The circuit is A S B C D E F; S-D is a short cut.
CROSSINGS: dict[str, tuple[float, float]] = {
    "A": (0, 0), "S": (60, 0), "B": (100, 0), "C": (100, 40), "D": (60, 40), "E": (60, 76),
    "F": (0, 76),
}  # fmt: skip
STREETS = tuple(
    Street(np.array(CROSSINGS[first], float), np.array(CROSSINGS[second], float))
    for first, second in ("AS", "SB", "BC", "CD", "DE", "EF", "FA", "SD")
)
_ROAD = 4.5  # From the middle to the kerb,
_PAVEMENT = 2.2  # from there to the houses,
_EDGE = _ROAD + _PAVEMENT
_DEPTH = 8.0  # and from their fronts to their backs.
_CAR_WIDTH = 1.7


@dataclass(frozen=True)
class Panel:
    """One textured rectangle.

    Attributes
    ----------
    corners : (4, 3) float64 array
        World metres, clockwise from the top left of its front.
    painter : callable
        Paints it, given a generator and the light.
    turns : bool
        Whether it stands upright and always faces the camera, as flat trees do.
    laps : tuple of int
        In which laps it is there.
    """

    corners: Array
    painter: Painter
    turns: bool = False
    laps: tuple[int, ...] = (1, 2)


@dataclass
class Town:
    """What stands where.

    Attributes
    ----------
    seed : int
        Decides everything.
    panels : list of Panel
        All that is upright.
    houses : list of (box, height)
        Footprints and heights in metres.
    cars : list of (x, y, yaw, laps)
        Where cars are parked in which laps.
    """

    seed: int
    panels: list[Panel] = field(default_factory=list)
    houses: list[tuple[Box, float]] = field(default_factory=list)
    cars: list[tuple[float, float, float, tuple[int, ...]]] = field(default_factory=list)


def build_town(seed: int) -> Town:
    """Lay out the town of a seed."""
    town = Town(seed)
    rng = np.random.default_rng([seed, 1])
    taken = [street.box(_EDGE) for street in STREETS]
    for street in STREETS:
        for side in (1, -1):
            _build_row(town, rng, taken, street, side)
    for street in STREETS:
        for side in (1, -1):
            _furnish(town, rng, street, side)
    return town


# ---------------------------------------------------------------------------------------------
# Houses and gardens


def _build_row(
    town: Town, rng: np.random.Generator, taken: list[Box], street: Street, side: int
) -> None:
    """Line one side (1 left, -1 right) of a street with houses, and a garden here and there."""
    out = side * street.left
    at, beyond = -_EDGE - _DEPTH - 4, _EDGE + _DEPTH + 4
    while at < street.length + beyond:
        widths = (float(rng.uniform(5.5, 12.5)), 7.0, 5.0, 3.0)
        setback = float(rng.choice([0.0, 0.0, 0.0, 0.7, 2.0]))
        wall, roof = float(rng.uniform(5.0, 15.0)), float(rng.choice([0.0, 1.2, 2.4, 3.2]))
        garden = rng.random() < 0.1
        near = street.start + street.along * at + out * (_EDGE + setback)
        for width in widths:
            far = near + street.along * width + out * _DEPTH
            west, south = np.minimum(near, far).tolist()
            east, north = np.maximum(near, far).tolist()
            box = (west, south, east, north)
            if any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            if garden:
                _add_garden(town, rng, box)
            else:
                _add_house(town, box, wall, roof)
            at += width
            break
        else:
            at += 0.5


def _overlap(first: Box, second: Box) -> bool:
    return (
        first[0] < second[2] - 0.05
        and second[0] < first[2] - 0.05
        and first[1] < second[3] - 0.05
        and second[1] < first[3] - 0.05
    )


def _walls(box: Box, height: float) -> list[tuple[Array, float, float]]:
    """Return corners (4, 3), azimuth of the normal and width of the four walls of a box."""
    west, south, east, north = box
    down = np.array([0, 0, -height])
    ground_lines = (
        ((west, south), (east, south), -np.pi / 2),
        ((east, south), (east, north), 0.0),
        ((east, north), (west, north), np.pi / 2),
        ((west, north), (west, south), np.pi),
    )
    walls = []
    for first, second, azimuth in ground_lines:
        corner, end = np.array([*first, height]), np.array([*second, height])
        width = float(np.linalg.norm(end - corner))
        walls.append((rectangle(corner, end - corner, down), azimuth, width))
    return walls


def _faces_street(corners: Array) -> bool:
    x, y = corners[:, :2].mean(axis=0)
    boxes = (street.box(_EDGE + 2.5) for street in STREETS)
    return any(west < x < east and south < y < north for west, south, east, north in boxes)


def _add_house(town: Town, box: Box, wall: float, roof: float) -> None:
    town.houses.append((box, wall))
    for corners, azimuth, width in _walls(box, wall):
        painter: Painter
        if _faces_street(corners):
            corners[:2, 2] += roof  # The roof is painted above the wall.
            painter = partial(paint_facade, azimuth=azimuth, width=width, wall=wall, roof=roof)
        else:
            painter = partial(paint_blank_wall, azimuth=azimuth, width=width, wall=wall)
        town.panels.append(Panel(corners, painter))


def _add_garden(town: Town, rng: np.random.Generator, box: Box) -> None:
    height = float(rng.uniform(0.9, 2.4))
    for corners, azimuth, width in _walls(box, height):
        painter = partial(paint_fence, azimuth=azimuth, width=width, height=height)
        town.panels.append(Panel(corners, painter))
    for _ in range(3):
        x, y = rng.uniform(np.array(box[:2]) + 1, np.array(box[2:]) - 1).tolist()
        _add_tree(town, rng, x, y)


# ---------------------------------------------------------------------------------------------
# What stands along a street


def _furnish(town: Town, rng: np.random.Generator, street: Street, side: int) -> None:
    """Put trees, lamps and signs on a pavement and park cars along it."""
    out = side * street.left
    # Cars drive and park on the right, looking along the street from whichever side.
    yaw = float(np.arctan2(street.along[1], street.along[0])) + (np.pi if side > 0 else 0.0)
    trees, cars = rng.uniform(0.0, 0.5), rng.uniform(0.15, 0.6)
    for at in np.arange(_ROAD + 3.5, street.length - _ROAD - 3.5, 5.4):
        x, y = (street.start + street.along * at + out * (_ROAD + 0.5)).tolist()
        if rng.random() < trees:
            _add_tree(town, rng, x, y)
        elif rng.random() < 0.12:
            _add_billboard(town, x, y, 1.4, 5.5, paint_lamp)
        elif rng.random() < 0.2:
            _add_billboard(town, x, y, 0.75, 2.4, paint_sign)
        if rng.random() < cars:
            middle = street.start + street.along * (at + 2.5) + out * (_ROAD - 1.0)
            _add_car(town, rng, middle, yaw)


def _add_tree(town: Town, rng: np.random.Generator, x: float, y: float) -> None:
    width, height = float(rng.uniform(2.6, 4.5)), float(rng.uniform(4.0, 8.0))
    _add_billboard(town, x, y, width, height, paint_tree)


def _add_billboard(
    town: Town, x: float, y: float, width: float, height: float, paint: Callable[..., Image]
) -> None:
    corner = np.array([x - width / 2, y, height])
    corners = rectangle(corner, np.array([width, 0, 0]), np.array([0, 0, -height]))
    painter = partial(paint, width=width, height=height)
    town.panels.append(Panel(corners, painter, turns=True))


def _add_car(town: Town, rng: np.random.Generator, middle: Array, yaw: float) -> None:
    """Park a car: two flat sides, and a strip between them for each piece of its outline."""
    profile = CARS[rng.integers(len(CARS))]
    colour = pick(rng, CAR_COLOURS)
    # Some have left and others have come when the robot passes again.
    laps = ((1, 2), (1, 2), (1, 2), (1,), (2,))[rng.integers(5)]
    town.cars.append((float(middle[0]), float(middle[1]), yaw, laps))

    forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    left = np.array([-np.sin(yaw), np.cos(yaw), 0.0]) * _CAR_WIDTH / 2
    length, height = profile[-1][0], max(z for _, z in profile)
    rear = np.array([*middle, 0.0]) - forward * length / 2
    top, down, along = np.array([0, 0, height]), np.array([0, 0, -height]), forward * length
    right_side = rectangle(rear - left + top, along, down)
    left_side = rectangle(rear + along + left + top, -along, down)
    for corners, mirrored in ((right_side, False), (left_side, True)):
        painter = partial(paint_car_side, colour=colour, profile=profile, mirrored=mirrored)
        town.panels.append(Panel(corners, painter, laps=laps))
    outline = [rear + forward * x + np.array([0, 0, z]) for x, z in profile]
    for index in range(len(profile) - 1):
        upper, lower = outline[index + 1], outline[index]
        if _is_front(profile, index):
            upper, lower, hand = lower, upper, left
        else:
            hand = -left
        corners = rectangle(upper - hand, 2 * hand, lower - upper)
        painter = partial(paint_car_panel, colour=colour, kind=_panel_kind(profile, index))
        town.panels.append(Panel(corners, painter, laps=laps))


def _is_front(profile: Profile, index: int) -> bool:
    """Tell whether a piece of the outline is seen from before the car: it falls, or is flat."""
    (_, z0), (x1, z1) = profile[index], profile[index + 1]
    return z1 < z0 or (z1 == z0 and x1 > profile[-1][0] / 2)


def _panel_kind(profile: Profile, index: int) -> str:
    (x0, z0), (x1, z1) = profile[index], profile[index + 1]
    if min(z0, z1) > 0.9 and abs(z1 - z0) > 0.3:
        return "glass"
    if x0 == x1:
        return "rear" if x0 == 0 else "front"
    return "body"


# ---------------------------------------------------------------------------------------------


class TownView:
    """The town as one lap sees it.

    Parameters
    ----------
    town
        What stands where.
    light
        Sun and sky.
    lap
        1 or 2.
    camera
        Draws the images.
    """

    def __init__(self, town: Town, light: Light, lap: int, camera: Pinhole) -> None:
        self._town = town
        self._light = light
        self._camera = camera
        self._numbers = [n for n, panel in enumerate(town.panels) if lap in panel.laps]
        self._textures: dict[int, Texture] = {}
        self._corners = np.stack([town.panels[n].corners for n in self._numbers])
        self._turning = np.array([town.panels[n].turns for n in self._numbers])
        seed = town.seed
        self._ground = Ground(
            np.random.default_rng([seed, 2]), STREETS, _ROAD, _PAVEMENT, _EDGE + _DEPTH + 5
        )
        cars = [car[:3] for car in town.cars if lap in car[3]]
        self._map = Texture(self._ground.lit(light, town.houses, cars))
        self._grain = paint_grain(np.random.default_rng([seed, 3]))
        air = np.random.default_rng([seed, 4, lap])
        self._sky = paint_sky(np.random.default_rng([seed, 5]), air, light)

    def draw(self, x: float, y: float, yaw: float) -> tuple[Image, NDArray[np.float32]]:
        """Return what the camera sees (H, W, 3) from a pose of the body (metres, radians).

        And how far away that is: metres (H, W) along the optical axis, 0 for the sky.
        """
        canvas = Canvas(self._camera, *camera_pose(x, y, yaw))
        canvas.draw_rectangles(self._facing(canvas.position), self._texture)
        canvas.draw_ground(self._map, self._ground.origin, self._ground.pixel, self._grain)
        canvas.draw_sky(self._sky, yaw)
        return canvas.image, canvas.depth()

    def _texture(self, index: int) -> Texture:
        if index not in self._textures:
            number = self._numbers[index]
            rng = np.random.default_rng([self._town.seed, 6, number])
            self._textures[index] = Texture(self._town.panels[number].painter(rng, self._light))
        return self._textures[index]

    def _facing(self, position: Array) -> Array:
        """Return the corners (N, 4, 3) of all panels, billboards turned to the camera."""
        corners = self._corners.copy()
        boards = corners[self._turning]
        middle = (boards[:, 0] + boards[:, 1]) / 2
        away = middle[:, :2] - position[:2]
        away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-6)
        half = np.linalg.norm(boards[:, 1] - boards[:, 0], axis=1, keepdims=True) / 2
        right = np.stack([away[:, 1], -away[:, 0], np.zeros(len(away))], axis=1) * half
        down = boards[:, 3] - boards[:, 0]
        corners[self._turning] = np.stack(
            [middle - right, middle + right, middle + right + down, middle - right + down], axis=1
        )
        return corners
