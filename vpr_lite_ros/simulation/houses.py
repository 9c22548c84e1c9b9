"""Houses: windows, doors, shops and roofs on walls of many materials."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vpr_lite_ros.simulation.light import (
    PIXELS_PER_METRE,
    Colour,
    Floats,
    Image,
    Light,
    pick,
    rgb,
    to_uint8,
    with_alpha,
)
from vpr_lite_ros.simulation.materials import (
    BRIGHT_COLOURS,
    FOOT_MATERIALS,
    MATERIALS,
    ROOF_COLOURS,
    TRIM_COLOURS,
    WALL_COLOURS,
    Material,
    tiles,
    weather,
)

Boxes = list[tuple[float, float, float, float]]  # left, bottom, width, height in metres

_CLOTH_COLOURS: tuple[Colour, ...] = (
    (225, 215, 195), (200, 190, 180), (190, 120, 100), (150, 160, 180), (214, 208, 196),
)  # fmt: skip
_LAMP_LIGHT: Colour = (255, 214, 140)
_IRON: Colour = (46, 46, 50)
_WORDS = (
    "BAKERY", "BOOKS", "CAFE ROMA", "HOTEL", "PHARMACY", "FLOWERS", "SHOES", "BANK", "PIZZA",
    "OPTICS", "BIKES", "MUSIC", "TAILOR", "BAR 21", "CINEMA", "TOYS", "WINE", "MARKET", "KIOSK",
    "ATELIER", "TEA HOUSE", "GALLERY", "BARBER", "PRINT", "TOOLS", "RADIO", "FISH", "THEATRE",
    "LIBRARY", "POST", "GYM", "SUSHI", "KEBAB", "PHOTO", "TRAVEL", "NOODLES", "ICE CREAM",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Parts of a facade


class _Brush:
    """Draws on a wall in metres, x from the left and y up from the street."""

    def __init__(self, image: Floats) -> None:
        self.image = image

    def part(self, x: float, y: float, width: float, height: float) -> Floats:
        """Return a view of a rectangle, as much of it as lies on the wall."""
        rows, columns = self.image.shape[:2]
        left, right = round(x * PIXELS_PER_METRE), round((x + width) * PIXELS_PER_METRE)
        top, bottom = round((y + height) * PIXELS_PER_METRE), round(y * PIXELS_PER_METRE)
        return self.image[
            min(max(rows - top, 0), rows) : min(max(rows - bottom, 0), rows),
            min(max(left, 0), columns) : min(max(right, 0), columns),
        ]

    def fill(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Paint a rectangle."""
        self.part(x, y, width, height)[:] = colour

    def shade(self, x: float, y: float, width: float, height: float, factor: float) -> None:
        """Darken or lighten a rectangle."""
        self.part(x, y, width, height)[:] *= np.float32(factor)

    def glass(self, rng: np.random.Generator, x: float, y: float, w: float, h: float) -> None:
        """Paint a pane: dark inside, with a slanting reflection of the sky."""
        pane = self.part(x, y, w, h)
        rows, columns = pane.shape[:2]
        slope = np.linspace(0, 1, rows)[:, None] + rng.uniform(-0.8, 0.8) * np.linspace(
            0, 1, columns
        )
        shine = np.clip(1 - np.abs(slope - rng.uniform(0, 1)) * rng.uniform(1.5, 4), 0, 1)
        inside, sky = rng.uniform(25, 70), rng.uniform(0.3, 1.0)
        pane[:] = inside * rgb((0.9, 1.0, 1.1)) + sky * shine[..., None] * rgb((110, 130, 150))

    def text(self, x: float, y: float, w: float, h: float, words: str, ink: Colour) -> None:
        """Write words that fill a rectangle."""
        part = self.part(x, y, w, h)
        if min(part.shape[:2]) < 8:
            return
        (span, _), _ = cv2.getTextSize(words, cv2.FONT_HERSHEY_DUPLEX, 1.0, 1)
        scale = min(part.shape[1] * 0.9 / span, part.shape[0] * 0.6 / 22)
        at = (int((part.shape[1] - span * scale) / 2), int(part.shape[0] / 2 + 11 * scale))
        written = to_uint8(part)
        thick = max(1, round(scale * 2))
        cv2.putText(written, words, at, cv2.FONT_HERSHEY_DUPLEX, scale, ink, thick, cv2.LINE_AA)
        part[:] = written


@dataclass
class _WindowStyle:
    """How the windows of one house look; lengths in metres."""

    width: float
    height: float
    frame: Colour
    bars: tuple[int, int]
    lintel: Colour | None = None
    sill: bool = True
    shutters: Colour | None = None
    balcony: bool = False
    flowers: bool = False

    @staticmethod
    def plain(rng: np.random.Generator) -> _WindowStyle:
        """Choose windows without anything in front of them."""
        return _WindowStyle(
            width=rng.uniform(0.8, 1.7),
            height=rng.uniform(1.2, 2.0),
            frame=pick(rng, TRIM_COLOURS),
            bars=(int(rng.integers(0, 3)), int(rng.integers(0, 3))),
            lintel=pick(rng, TRIM_COLOURS) if rng.random() < 0.5 else None,
            sill=bool(rng.random() < 0.7),
        )

    @staticmethod
    def rich(rng: np.random.Generator) -> _WindowStyle:
        """Choose windows that may have shutters, balconies or flowers."""
        style = _WindowStyle.plain(rng)
        style.shutters = pick(rng, TRIM_COLOURS + BRIGHT_COLOURS) if rng.random() < 0.3 else None
        style.balcony, style.flowers = bool(rng.random() < 0.2), bool(rng.random() < 0.15)
        return style


def _window(
    brush: _Brush, rng: np.random.Generator, x: float, y: float, look: _WindowStyle
) -> None:
    """Paint one window with its left bottom corner at (x, y)."""
    width, height = look.width, look.height
    if look.lintel is not None:
        brush.fill(x - 0.15, y - 0.12, width + 0.3, height + 0.36, look.lintel)
        brush.shade(x - 0.15, y + height + 0.2, width + 0.3, 0.05, 0.6)
    brush.fill(x - 0.07, y - 0.07, width + 0.14, height + 0.14, look.frame)
    brush.glass(rng, x, y, width, height)
    drawn = rng.random()
    if drawn < 0.3:  # curtains
        cloth, share = pick(rng, _CLOTH_COLOURS), rng.uniform(0.15, 0.45) * width
        brush.fill(x, y, share, height, cloth)
        brush.fill(x + width - share, y, share, height, cloth)
    elif drawn < 0.5:  # a blind
        share = rng.uniform(0.2, 0.9) * height
        brush.fill(x, y + height - share, width, share, pick(rng, _CLOTH_COLOURS))
    for bar in range(look.bars[0]):
        brush.fill(x + width * (bar + 1) / (look.bars[0] + 1) - 0.03, y, 0.06, height, look.frame)
    for bar in range(look.bars[1]):
        brush.fill(x, y + height * (bar + 1) / (look.bars[1] + 1) - 0.03, width, 0.06, look.frame)
    if look.shutters is not None:
        for left in (x - 0.07 - width / 2, x + width + 0.07):
            brush.fill(left, y, width / 2, height, look.shutters)
            for slat in np.arange(y + 0.1, y + height - 0.05, 0.12):
                brush.shade(left + 0.05, float(slat), width / 2 - 0.1, 0.04, 0.65)
    if look.sill:
        brush.fill(x - 0.15, y - 0.15, width + 0.3, 0.1, (200, 196, 188))
        brush.shade(x - 0.15, y - 0.22, width + 0.3, 0.07, 0.6)
    if look.flowers:
        brush.fill(x - 0.05, y - 0.12, width + 0.1, 0.2, (90, 60, 40))
        bed = brush.part(x - 0.05, y, width + 0.1, 0.3)
        bed[rng.random(bed.shape[:2]) < 0.6] = (60, 110, 50)
        bed[rng.random(bed.shape[:2]) < 0.18] = pick(rng, BRIGHT_COLOURS)
    if look.balcony:
        brush.fill(x - 0.4, y - 0.15, width + 0.8, 0.12, (120, 116, 110))
        for rail in np.arange(x - 0.38, x + width + 0.4, 0.14):
            brush.fill(float(rail), y - 0.05, 0.035, 0.95, _IRON)
        brush.fill(x - 0.4, y + 0.85, width + 0.8, 0.06, _IRON)


def _door(brush: _Brush, rng: np.random.Generator, x: float, width: float, height: float) -> None:
    brush.fill(x - 0.15, 0, width + 0.3, height + 0.15, pick(rng, TRIM_COLOURS))
    brush.fill(x, 0.08, width, height - 0.08, pick(rng, TRIM_COLOURS + BRIGHT_COLOURS))
    for low, high in ((0.2, 0.45), (0.52, 0.9)):
        for side in (0.1, 0.55):
            brush.shade(x + side * width, low * height, 0.35 * width, (high - low) * height, 0.75)
    if rng.random() < 0.5:
        brush.glass(rng, x + 0.15, height * 0.6, width - 0.3, height * 0.28)
    brush.fill(x + width * 0.85, height * 0.47, 0.07, 0.1, (210, 190, 120))
    brush.fill(x - 0.4, 0, width + 0.8, 0.1, (150, 148, 144))


def _shop(brush: _Brush, rng: np.random.Generator, x: float, width: float, height: float) -> Boxes:
    """Paint a shop front and return its panes."""
    board, ink = pick(rng, BRIGHT_COLOURS), pick(rng, BRIGHT_COLOURS)
    if abs(float(np.mean(board)) - float(np.mean(ink))) < 70:  # Nobody could read it.
        ink = (245, 242, 230) if np.mean(board) < 128 else (25, 25, 30)
    brush.fill(x, 0, width, height, pick(rng, TRIM_COLOURS))
    brush.fill(x, 0, width, 0.4, pick(rng, TRIM_COLOURS))
    sign = rng.uniform(0.5, 0.8)
    brush.fill(x, height - sign, width, sign, board)
    brush.text(x, height - sign, width, sign, str(rng.choice(_WORDS)), ink)
    boxes: Boxes = []
    panes = max(1, round(width / rng.uniform(1.3, 2.4)))
    door = int(rng.integers(panes))
    for index in range(panes):
        left, span = x + index * width / panes + 0.08, width / panes - 0.16
        bottom = 0.1 if index == door else 0.45
        high = height - sign - 0.12 - bottom
        brush.glass(rng, left, bottom, span, high)
        boxes.append((left, bottom, span, high))
        if index == door:
            brush.fill(left + span / 2 - 0.04, bottom, 0.08, high, pick(rng, TRIM_COLOURS))
            continue
        for _ in range(int(rng.integers(4, 12))):  # goods
            wide, tall = rng.uniform(0.1, 0.4), rng.uniform(0.1, 0.6)
            at = left + rng.uniform(0, max(0.01, span - wide))
            brush.fill(at, bottom + rng.uniform(0, 0.5), wide, tall, pick(rng, BRIGHT_COLOURS))
    if rng.random() < 0.5:  # awning
        stripe, low = pick(rng, BRIGHT_COLOURS), height - sign - 0.75
        brush.fill(x, low, width, 0.75, (238, 234, 224))
        for left in np.arange(x, x + width, 0.5):
            brush.fill(float(left), low, min(0.25, x + width - float(left)), 0.75, stripe)
        brush.shade(x, low - 0.25, width, 0.25, 0.5)
    return boxes


def _garage(brush: _Brush, rng: np.random.Generator, x: float, width: float, height: float) -> None:
    brush.fill(x - 0.12, 0, width + 0.24, height + 0.12, pick(rng, TRIM_COLOURS))
    brush.fill(x, 0, width, height, pick(rng, TRIM_COLOURS + BRIGHT_COLOURS))
    for slat in np.arange(0, height, 0.22):
        brush.shade(x, float(slat), width, 0.05, 0.7)


def _scrawl(brush: _Brush, rng: np.random.Generator, x: float, width: float) -> None:
    """Cover a bare piece of wall with posters or graffiti."""
    if rng.random() < 0.5:
        for _ in range(int(rng.integers(2, 6))):
            at, low = x + rng.uniform(0, max(0.1, width - 0.7)), rng.uniform(0.7, 1.6)
            brush.fill(at, low, 0.6, 0.85, pick(rng, BRIGHT_COLOURS, 25))
            brush.fill(at + 0.08, low + 0.1, 0.44, 0.3, pick(rng, BRIGHT_COLOURS, 25))
            brush.text(at, low + 0.5, 0.6, 0.25, str(rng.choice(_WORDS)), pick(rng, TRIM_COLOURS))
        return
    part = brush.part(x, 0.4, width, 1.8)
    drawn = to_uint8(part)
    for _ in range(3):
        start = rng.uniform(0, 1, 2) * (drawn.shape[1], drawn.shape[0] * 0.4)
        line = (start + np.cumsum(rng.normal(0, 14, (14, 2)), axis=0)).astype(np.int32)
        cv2.polylines(drawn, [line], False, pick(rng, BRIGHT_COLOURS), 5, cv2.LINE_AA)
    part[:] = drawn


# ---------------------------------------------------------------------------------------------
# Whole walls


def paint_facade(
    rng: np.random.Generator,
    light: Light,
    *,
    azimuth: float,
    width: float,
    wall: float,
    roof: float,
) -> Image:
    """Paint the street side of a house.

    Parameters
    ----------
    rng
        Decides everything about the house.
    light
        Sun and sky, and how many lamps are on.
    azimuth
        Where the wall faces, radians.
    width, wall, roof
        Metres: width, height of the wall, height of what stands above it.

    Returns
    -------
    (H, W, 4) uint8 array
        RGBA, `PIXELS_PER_METRE` pixels a metre, clear above the roof line.
    """
    columns = round(width * PIXELS_PER_METRE)
    rows, above = round(wall * PIXELS_PER_METRE), round(roof * PIXELS_PER_METRE)
    colour, trim = pick(rng, WALL_COLOURS), pick(rng, TRIM_COLOURS)
    material = MATERIALS[rng.integers(len(MATERIALS))]
    image = material(rng, rows, columns, colour)
    brush = _Brush(image)
    first_floor = rng.uniform(2.9, 3.7)
    if rng.random() < 0.4:  # The foot is of another material.
        foot = brush.part(0, 0, width, first_floor)
        other = FOOT_MATERIALS[rng.integers(len(FOOT_MATERIALS))]
        foot[:] = other(rng, foot.shape[0], columns, pick(rng, WALL_COLOURS))
    panes = _ground_floor(brush, rng, width, first_floor)
    weather(rng, image)
    style = _WindowStyle.rich(rng)
    panes += _upper_floors(brush, rng, width, wall, first_floor, style, trim)
    if rng.random() < 0.25 and wall > 7:  # a name painted under the eaves
        brush.text(0.5, wall - 1.6, width - 1, 1.1, str(rng.choice(_WORDS)), trim)
    if rng.random() < 0.6:
        downpipe = float(rng.choice([0.1, width - 0.2]))
        brush.fill(downpipe, 0, 0.1, wall, (100, 100, 98))
        brush.shade(downpipe + 0.1, 0, 0.06, wall, 0.75)
    brush.fill(0, wall - 0.3, width, 0.3, trim)  # cornice
    brush.shade(0, wall - 0.55, width, 0.25, 0.7)

    alpha = np.full((above + rows, columns), 255, np.uint8)
    if above:
        top, alpha[:above] = _roof(rng, above, columns, colour, material, style)
        image = np.concatenate([top, image])
    image = light.on_wall(image, azimuth, wall + roof)
    brush = _Brush(image)
    for box in panes:
        chance, glow = rng.random(), rng.uniform(0.3, 0.5)
        if chance < light.lit_windows:
            pane = brush.part(*box)
            pane[:] = 1.3 * pane + glow * rgb(_LAMP_LIGHT)
    return with_alpha(image, alpha)


def _ground_floor(brush: _Brush, rng: np.random.Generator, width: float, height: float) -> Boxes:
    """Fill the ground floor from left to right; return its panes."""
    panes: Boxes = []
    x = 0.3
    if rng.random() < 0.4:
        while width - x > 2.5:
            span = min(width - x - 0.3, rng.uniform(3.0, 6.0))
            panes += _shop(brush, rng, x, span, height - 0.2)
            x += span + 0.4
        return panes
    style = _WindowStyle.plain(rng)
    style.height = min(style.height, height - 1.4)
    while width - x > 1.4:
        room, what = width - x, rng.random()
        if what < 0.25:
            _door(brush, rng, x + 0.3, 1.1, rng.uniform(2.1, 2.5))
            x += 1.9
        elif what < 0.4 and room > 3.4:
            _garage(brush, rng, x + 0.3, 2.7, 2.4)
            x += 3.5
        elif what < 0.55:
            _scrawl(brush, rng, x + 0.2, min(room - 0.3, 2.6))
            x += 2.8
        else:
            _window(brush, rng, x + 0.3, 1.0, style)
            panes.append((x + 0.3, 1.0, style.width, style.height))
            x += style.width + rng.uniform(0.6, 1.2)
    return panes


def _upper_floors(
    brush: _Brush,
    rng: np.random.Generator,
    width: float,
    wall: float,
    first_floor: float,
    style: _WindowStyle,
    trim: Colour,
) -> Boxes:
    """Paint rows of windows; return their panes."""
    panes: Boxes = []
    floors = max(1, int((wall - first_floor) / rng.uniform(2.6, 3.3)))
    storey = (wall - first_floor) / floors
    style.height = min(style.height, storey - 0.7)
    if style.height < 0.5:
        return panes
    spacing = style.width * (2.2 if style.shutters else 1.4) + rng.uniform(0.3, 1)
    bays = max(1, int(width / spacing))
    blind = int(rng.integers(bays)) if rng.random() < 0.3 and bays > 2 else -1
    for floor in range(floors):
        low = first_floor + floor * storey + (storey - style.height) * 0.45
        for bay in range(bays):
            if bay != blind:
                left = (bay + 0.5) * width / bays - style.width / 2
                _window(brush, rng, left, low, style)
                panes.append((left, low, style.width, style.height))
        if rng.random() < 0.3:
            band = first_floor + floor * storey
            brush.fill(0, band, width, 0.18, trim)
            brush.shade(0, band - 0.08, width, 0.08, 0.6)
    return panes


def _roof(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    colour: Colour,
    material: Material,
    style: _WindowStyle,
) -> tuple[Floats, Image]:
    """Paint what stands above the wall: albedo (rows, columns, 3), alpha (rows, columns)."""
    kind = ("gable", "steps", "round", "hip", "mansard")[rng.integers(5)]
    of_tiles = kind in ("hip", "mansard")
    alpha = np.zeros((rows, columns), np.uint8)
    outline = np.array(_roof_outline(rng, kind)) * (columns, rows)
    cv2.fillPoly(alpha, [outline.astype(np.int32)], (255,), cv2.LINE_AA)
    if of_tiles:
        image = tiles(rng, rows, columns, pick(rng, ROOF_COLOURS))
    else:
        image = material(rng, rows, columns, colour)
    weather(rng, image)
    width, height = columns / PIXELS_PER_METRE, rows / PIXELS_PER_METRE
    if height > 1.6:
        small = _WindowStyle.plain(rng)
        small.width, small.height = min(style.width, 1.0), min(1.1, height * 0.5)
        count = max(1, int(width / rng.uniform(2.2, 4.0))) if of_tiles else 1
        for index in range(count):
            middle = (index + 0.5) * width / count
            _window(_Brush(image), rng, middle - small.width / 2, 0.25, small)
    for _ in range(int(rng.integers(0, 3))):  # chimneys
        x, wide = int(rng.uniform(0.1, 0.85) * columns), int(0.6 * PIXELS_PER_METRE)
        place = np.s_[rows - int(rows * rng.uniform(0.75, 1.0)) :, x : x + wide]
        image[place][alpha[place] == 0] = (132, 78, 62)
        alpha[place] = 255
    return image, alpha


def _roof_outline(rng: np.random.Generator, kind: str) -> list[tuple[float, float]]:
    """Return a polygon in the unit square, y down, standing on its lower edge."""
    if kind == "gable":
        return [(0, 1), (0, 0.9), (rng.uniform(0.35, 0.65), 0), (1, 0.9), (1, 1)]
    if kind == "steps":
        steps = int(rng.integers(3, 6))
        rising = [(0.5 * i / steps, 1 - j / steps) for i in range(steps) for j in (i, i + 1)]
        return rising + [(1 - x, y) for x, y in reversed(rising)]
    if kind == "round":
        turns = np.linspace(0, np.pi, 24)
        return [(0.5 - 0.5 * float(np.cos(t)), 1 - float(np.sin(t))) for t in turns]
    slope = 0.2 if kind == "hip" else 0.04
    return [(0, 1), (slope, 0.2), (1 - slope, 0.2), (1, 1)]


def paint_blank_wall(
    rng: np.random.Generator, light: Light, *, azimuth: float, width: float, wall: float
) -> Image:
    """Paint a side of a house (H, W, 3): few windows, perhaps an advertisement."""
    rows, columns = round(wall * PIXELS_PER_METRE), round(width * PIXELS_PER_METRE)
    material = MATERIALS[rng.integers(len(MATERIALS))]
    image = material(rng, rows, columns, pick(rng, WALL_COLOURS))
    brush = _Brush(image)
    if rng.random() < 0.4 and wall > 5:
        board = (width * 0.15, wall * 0.45, width * 0.7, wall * 0.4)
        brush.fill(*board, pick(rng, BRIGHT_COLOURS))
        brush.text(*board, str(rng.choice(_WORDS)), (245, 240, 225))
    else:
        style = _WindowStyle.plain(rng)
        for _ in range(int(rng.integers(0, 5))):
            x, y = rng.uniform(0.4, max(0.5, width - 2)), rng.uniform(1.2, max(1.3, wall - 2.4))
            _window(brush, rng, x, y, style)
    weather(rng, image)
    return to_uint8(light.on_wall(image, azimuth, wall))
