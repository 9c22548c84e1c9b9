"""What walls are made of: bricks, plaster, stone, boards, beams, tiles, and their age.

A material is a function ``(rng, rows, columns, colour) -> albedo (rows, columns, 3)``.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from vpr_lite_ros.simulation.light import PIXELS_PER_METRE, Colour, Floats, noise, pick, rgb

Material = Callable[[np.random.Generator, int, int, Colour], Floats]

WALL_COLOURS: tuple[Colour, ...] = (
    (176, 92, 70), (146, 72, 58), (196, 128, 92), (214, 190, 148), (232, 218, 184),
    (206, 206, 200), (158, 160, 162), (222, 176, 120), (226, 200, 110), (170, 190, 170),
    (150, 176, 196), (196, 150, 150), (236, 232, 224), (120, 108, 98), (104, 120, 104),
    (90, 104, 124), (184, 164, 132), (214, 150, 118),
)  # fmt: skip
TRIM_COLOURS: tuple[Colour, ...] = (
    (240, 238, 230), (244, 244, 244), (66, 50, 40), (40, 62, 48), (46, 58, 82), (110, 36, 34),
    (150, 150, 146), (216, 204, 176), (34, 34, 36), (96, 74, 52),
)  # fmt: skip
BRIGHT_COLOURS: tuple[Colour, ...] = (
    (196, 40, 36), (28, 92, 160), (236, 180, 28), (22, 116, 72), (40, 40, 44), (122, 44, 120),
    (232, 110, 30), (240, 240, 236), (14, 130, 140), (94, 22, 30), (180, 200, 40),
    (226, 120, 150),
)  # fmt: skip
ROOF_COLOURS: tuple[Colour, ...] = (
    (150, 74, 56), (112, 60, 50), (86, 88, 96), (66, 66, 70), (128, 92, 74), (96, 110, 104),
)  # fmt: skip


def _blocks(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    colour: Colour,
    block: tuple[float, float],
    joint: float,
    jitter: float,
) -> Floats:
    """Lay courses of blocks (width, height in metres), every other one shifted by half."""
    step_x, step_y = block[0] * PIXELS_PER_METRE, block[1] * PIXELS_PER_METRE
    course = (np.arange(rows) / step_y).astype(int)
    place = np.arange(columns)[None, :] / step_x + 0.5 * (course[:, None] % 2)
    number = place.astype(int)
    shape = (int(course.max()) + 1, int(number.max()) + 1)
    shades = rng.normal(0, jitter, (*shape, 1)) + rng.normal(0, jitter / 3, (*shape, 3))
    image = (rgb(colour) + shades.astype(np.float32))[course[:, None], number]
    in_joint = ((np.arange(rows) % step_y) < max(1.0, 0.12 * step_y))[:, None] | (
        (place - number) * step_x < max(1.0, 0.05 * step_x)
    )
    image[in_joint] = image[in_joint] * 0.4 + joint * 0.6
    return image


def brick(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    """Bricks of 26 by 10 centimetres."""
    joint = float(rng.choice([90.0, 150.0, 200.0]))
    return _blocks(rng, rows, columns, colour, (0.26, 0.1), joint, 16.0)


def _stone(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    """Large blocks of stone."""
    size = (rng.uniform(0.5, 1.0), rng.uniform(0.28, 0.45))
    return _blocks(rng, rows, columns, colour, size, float(np.mean(colour)) * 0.6, 9.0)


def _panels(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    """Slabs of concrete."""
    size = (rng.uniform(1.2, 2.6), rng.uniform(1.0, 1.6))
    return _blocks(rng, rows, columns, colour, size, float(np.mean(colour)) * 0.5, 5.0)


def tiles(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    """Roof or wall tiles."""
    return _blocks(rng, rows, columns, colour, (0.3, 0.25), float(np.mean(colour)) * 0.45, 12.0)


def boards(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    """Horizontal boards."""
    step = rng.uniform(0.16, 0.26) * PIXELS_PER_METRE
    course = (np.arange(rows) / step).astype(int)
    shades = rng.normal(0, 8, (int(course.max()) + 1, 1, 3)).astype(np.float32)
    image = np.repeat(rgb(colour) + shades[course], columns, axis=1)
    image[(np.arange(rows) % step) < 2] *= 0.6
    return image


def _plaster(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    """Smooth plaster."""
    image = np.tile(rgb(colour), (rows, columns, 1))
    if rng.random() < 0.35:  # Some has come off and shows the bricks.
        bare = noise(rng, rows, columns, (120, 45, 12)) > rng.uniform(0.75, 1.0)
        image[bare] = brick(rng, rows, columns, (168, 96, 72))[bare]
    return image


def _timber(rng: np.random.Generator, rows: int, columns: int, colour: Colour) -> Floats:
    """Dark beams over light plaster, whatever the colour asked for."""
    image = _plaster(rng, rows, columns, (232, 222, 200))
    beam = pick(rng, ((48, 32, 24), (36, 24, 16), (60, 22, 24)))
    step = int(rng.uniform(1.1, 1.7) * PIXELS_PER_METRE)
    for x in range(0, columns, step):
        cv2.line(image, (x, 0), (x, rows), beam, 7)
        if rng.random() < 0.6:
            y = int(rng.integers(0, max(1, rows - step)))
            cv2.line(image, (x, y), (x + step, y + step), beam, 6)
    for y in range(0, rows, int(1.4 * PIXELS_PER_METRE)):
        cv2.line(image, (0, y), (columns, y), beam, 7)
    return image


MATERIALS: tuple[Material, ...] = (
    brick, brick, _plaster, _plaster, _plaster, _stone, _panels, boards, _timber, tiles,
)  # fmt: skip
FOOT_MATERIALS: tuple[Material, ...] = (brick, _plaster, _stone, _panels)


def weather(rng: np.random.Generator, image: Floats) -> None:
    """Age a wall in place: blotches, streaks of rain, dirt at the foot."""
    rows, columns = image.shape[:2]
    age = 1 + 0.06 * noise(rng, rows, columns, (90, 30, 8))
    streaks = np.maximum(noise(rng, 1, columns, (3, 9)), 0)
    age -= 0.05 * streaks * np.linspace(1, 0.2, rows, dtype=np.float32)[:, None]
    age += 0.02 * rng.standard_normal((rows, columns), dtype=np.float32)
    dirt = np.clip(1 - np.arange(rows)[::-1] / (0.9 * PIXELS_PER_METRE), 0, 1)
    age *= (1 - 0.35 * dirt**2)[:, None].astype(np.float32)
    image *= age[..., None]
