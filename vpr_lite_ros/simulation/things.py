"""What stands in the street: trees, hedges, lamps, signs and cars."""

from __future__ import annotations

import cv2
import numpy as np

from vpr_lite_ros.simulation.light import (
    PIXELS_PER_METRE,
    Colour,
    Floats,
    Image,
    Light,
    noise,
    pick,
    rgb,
    to_uint8,
    with_alpha,
)
from vpr_lite_ros.simulation.materials import (
    BRIGHT_COLOURS,
    TRIM_COLOURS,
    WALL_COLOURS,
    boards,
    brick,
)

Profile = tuple[tuple[float, float], ...]
"""Outline of a car from its rear over the roof to its front: (x, z) in metres."""

CARS: tuple[Profile, ...] = (
    # saloon
    ((0, 0.3), (0, 0.85), (0.15, 0.98), (0.7, 1.0), (1.25, 1.45), (2.45, 1.45), (3.15, 0.98),
     (4.1, 0.85), (4.25, 0.6), (4.25, 0.3)),
    # hatchback
    ((0, 0.3), (0, 0.9), (0.3, 1.5), (2.1, 1.52), (2.8, 1.0), (3.55, 0.85), (3.7, 0.6),
     (3.7, 0.3)),
    # van
    ((0, 0.3), (0, 1.0), (0.08, 2.0), (3.3, 2.05), (4.0, 1.15), (4.6, 0.95), (4.7, 0.6),
     (4.7, 0.3)),
)  # fmt: skip
CAR_COLOURS: tuple[Colour, ...] = (
    (190, 192, 196), (30, 32, 36), (240, 240, 238), (150, 24, 28), (30, 54, 110), (90, 94, 98),
    (36, 76, 60), (206, 170, 60), (120, 160, 190), (110, 70, 50),
)  # fmt: skip
_GREENS: tuple[Colour, ...] = (
    (70, 104, 46), (92, 122, 54), (52, 84, 44), (128, 120, 52), (168, 112, 48), (84, 100, 72),
)  # fmt: skip
_BARKS: tuple[Colour, ...] = ((92, 74, 58), (120, 110, 96), (70, 58, 48))
_METALS: tuple[Colour, ...] = ((60, 64, 66), (120, 124, 126), (40, 60, 50))
_BELT = 0.95  # Where a car's windows begin, metres above the road.


def _size(width: float, height: float) -> tuple[int, int]:
    return round(height * PIXELS_PER_METRE), round(width * PIXELS_PER_METRE)


def _leaves(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    clumps = noise(rng, rows, columns, (70, 25, 9)) + 0.8 * noise(rng, rows, columns, (4, 2.5))
    return np.asarray(rgb(colour) * (1 + 0.42 * clumps)[..., None], np.float32)


def paint_fence(
    rng: np.random.Generator, light: Light, *, azimuth: float, width: float, height: float
) -> Image:
    """Paint a hedge, a garden wall or a wooden fence (H, W, 3)."""
    rows, columns = _size(width, height)
    kind = ("hedge", "wall", "fence")[rng.integers(3)]
    if kind == "hedge":
        image = _leaves(rng, rows, columns, pick(rng, _GREENS[:3]))
    elif kind == "wall":
        image = brick(rng, rows, columns, pick(rng, WALL_COLOURS))
        image[: int(0.15 * PIXELS_PER_METRE)] = (180, 176, 168)
    else:
        image = np.rot90(boards(rng, columns, rows, pick(rng, TRIM_COLOURS))).copy()
    return to_uint8(light.on_wall(image, azimuth, height))


def paint_tree(rng: np.random.Generator, light: Light, *, width: float, height: float) -> Image:
    """Paint a tree (H, W, 4)."""
    rows, columns = _size(width, height)
    crown_low, conical = rng.uniform(0.55, 0.75), rng.random() < 0.3
    crown = np.zeros((rows, columns), np.uint8)
    for _ in range(90):
        share = rng.random()
        reach = columns * (0.06 + 0.36 * share if conical else 0.36 * np.sin(0.4 + share * 2.3))
        radius = columns * rng.uniform(0.05, 0.12)
        x, y = columns / 2 + rng.uniform(-1, 1) * reach, share * crown_low * rows + radius
        cv2.circle(crown, (int(x), int(y)), int(radius), (255,), -1)
    crown[noise(rng, rows, columns, (16, 7, 3)) > 0.7] = 0

    stem = np.zeros_like(crown)
    trunk = max(5, int(rng.uniform(0.2, 0.4) * PIXELS_PER_METRE))
    middle = columns // 2
    cv2.line(stem, (middle, rows), (middle + int(rng.uniform(-8, 8)), rows // 4), (255,), trunk)
    for side in (-1, 1):
        tip = (middle + int(side * columns * 0.22), int(rows * crown_low * 0.6))
        cv2.line(stem, (middle, int(rows * crown_low)), tip, (255,), trunk // 2)

    image = _leaves(rng, rows, columns, pick(rng, _GREENS))
    # Light comes from above: a crown is bright on top and dark underneath.
    image *= np.linspace(1.25, 0.6, rows, dtype=np.float32)[:, None, None]
    bare = (stem > 0) & (crown == 0)
    image[bare] = _leaves(rng, rows, columns, pick(rng, _BARKS))[bare]
    return with_alpha(light.on_thing(image), np.maximum(crown, stem))


def paint_lamp(rng: np.random.Generator, light: Light, *, width: float, height: float) -> Image:
    """Paint a street lamp with two arms (H, W, 4)."""
    rows, columns = _size(width, height)
    drawing = _Cutout(rows, columns)
    metal, arm = pick(rng, _METALS), rows // 14
    drawing.box((columns // 2 - 2, arm), (columns // 2 + 2, rows), metal)
    drawing.box((0, arm), (columns - 1, arm + 4), metal)
    for x in (columns // 8, columns - columns // 8):
        drawing.box((x - 8, arm), (x + 8, arm + 14), (250, 240, 210))
    return drawing.lit(light)


def paint_sign(rng: np.random.Generator, light: Light, *, width: float, height: float) -> Image:
    """Paint a traffic sign or an advertising pillar (H, W, 4)."""
    rows, columns = _size(width, height)
    drawing = _Cutout(rows, columns)
    colour, white = pick(rng, BRIGHT_COLOURS[:4]), (240.0, 240.0, 236.0)
    middle, radius = columns // 2, int(columns * 0.45)
    kind = ("round", "triangle", "square", "pillar")[rng.integers(4)]
    if kind != "pillar":
        drawing.box((middle - 2, radius), (middle + 2, rows), pick(rng, _METALS))
    if kind == "round":
        drawing.disc((middle, radius + 2), radius, colour)
        drawing.disc((middle, radius + 2), int(radius * 0.7), white)
    elif kind == "triangle":
        drawing.polygon([(0, 2 * radius), (columns, 2 * radius), (middle, 0)], colour)
        low, left = int(1.8 * radius), radius // 3
        drawing.polygon([(left, low), (columns - left, low), (middle, radius // 2)], white)
    elif kind == "square":
        drawing.box((0, 0), (columns, 2 * radius), colour)
        drawing.box((middle - 3, radius // 2), (middle + 3, int(1.6 * radius)), white)
    else:
        drawing.box((2, rows // 4), (columns - 2, rows), pick(rng, BRIGHT_COLOURS))
        for y in range(rows // 4 + 4, rows - 20, 26):
            drawing.box((5, y), (columns - 5, y + 20), pick(rng, BRIGHT_COLOURS, 30))
    return drawing.lit(light)


class _Cutout:
    """A picture that is clear wherever nothing is drawn."""

    def __init__(self, rows: int, columns: int) -> None:
        self.image = np.zeros((rows, columns, 3), np.float32)
        self.alpha = np.zeros((rows, columns), np.uint8)

    def box(self, first: tuple[int, int], last: tuple[int, int], colour: Colour) -> None:
        cv2.rectangle(self.image, first, last, colour, -1)
        cv2.rectangle(self.alpha, first, last, (255,), -1)

    def disc(self, centre: tuple[int, int], radius: int, colour: Colour) -> None:
        cv2.circle(self.image, centre, radius + 1, colour, -1)
        cv2.circle(self.alpha, centre, radius, (255,), -1, cv2.LINE_AA)

    def polygon(self, points: list[tuple[int, int]], colour: Colour) -> None:
        outline = [np.array(points, np.int32)]
        cv2.fillPoly(self.image, outline, colour)
        cv2.fillPoly(self.alpha, outline, (255,), cv2.LINE_AA)

    def lit(self, light: Light) -> Image:
        return with_alpha(light.on_thing(self.image, 0.6), self.alpha)


def paint_car_side(
    rng: np.random.Generator, light: Light, *, colour: Colour, profile: Profile, mirrored: bool
) -> Image:
    """Paint a side of a car (H, W, 4), its front to the right unless mirrored."""
    del rng  # A car is what its colour and profile say.
    rows, columns = _size(profile[-1][0], max(z for _, z in profile))
    scale = PIXELS_PER_METRE
    outline = np.array([(x * scale, rows - z * scale) for x, z in profile])
    alpha = np.zeros((rows, columns), np.uint8)
    cv2.fillPoly(alpha, [outline.astype(np.int32)], (255,), cv2.LINE_AA)
    image = np.tile(rgb(colour), (rows, columns, 1))
    image *= np.linspace(1.15, 0.7, rows, dtype=np.float32)[:, None, None]

    belt = int(rows - _BELT * scale)
    glass = np.zeros((rows, columns), np.uint8)
    inner = outline + np.sign(outline.mean(axis=0) - outline) * 4
    cv2.fillPoly(glass, [inner.astype(np.int32)], (255,))
    image[:belt][glass[:belt] > 0] = (38, 44, 50)
    for share in (0.42, 0.6):  # pillars between the windows
        image[:belt, int(share * columns) : int(share * columns) + 4] = colour
    for share in (0.35, 0.58):  # gaps of the doors
        image[belt : rows - 14, int(share * columns)] *= 0.6
    for share in (0.18, 0.8):
        wheel, radius = (int(share * columns), rows - int(0.31 * scale)), int(0.31 * scale)
        cv2.circle(image, wheel, radius + 2, (20, 20, 20), -1)
        cv2.circle(image, wheel, radius // 2, (150, 150, 155), -1)
        cv2.circle(alpha, wheel, radius, (255,), -1, cv2.LINE_AA)
    side = with_alpha(light.on_thing(image), alpha)
    return side[:, ::-1].copy() if mirrored else side


def paint_car_panel(rng: np.random.Generator, light: Light, *, colour: Colour, kind: str) -> Image:
    """Paint a strip across a car (48, 64, 3): "body", "glass", "front" or "rear"."""
    del rng
    image = np.tile(rgb(colour), (48, 64, 1))
    image *= np.linspace(1.15, 0.8, 48, dtype=np.float32)[:, None, None]
    if kind == "glass":
        image[3:-3, 4:-4] = np.linspace(90, 35, 42)[:, None, None] * rgb((0.9, 1.0, 1.1))
    elif kind in ("front", "rear"):
        lamp = (250, 245, 225) if kind == "front" else (190, 24, 20)
        image[8:20, 3:13] = image[8:20, -13:-3] = lamp
        if kind == "front":
            image[10:20, 18:46] = (30, 30, 32)  # grille
        image[24:34, 22:42] = (235, 235, 230)  # number plate
        image[38:] = (40, 40, 42)  # bumper
    return to_uint8(light.on_thing(image, 0.65))
