"""Sun and sky, and the small tools that every painter uses.

Painters draw from a generator of random numbers and return uint8 RGB, or RGBA where they leave
holes. They paint what a thing reflects (albedo, float 0..255); `Light` makes a picture of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]
Colour = tuple[float, float, float]

PIXELS_PER_METRE = 40
"""Resolution of everything upright."""


@dataclass(frozen=True)
class Light:
    """Sun and sky of one lap.

    Attributes
    ----------
    azimuth, elevation : float
        Where the sun stands, radians from east towards north and above the horizon.
    sun, ambient : colour
        What a white surface shows of direct sun and of everything else, as factors.
    sky_high, sky_low, cloud : colour
        The sky far up, at the horizon, and its clouds, 0..255.
    lit_windows : float
        Share of windows with a lamp on.
    """

    azimuth: float
    elevation: float
    sun: Colour
    ambient: Colour
    sky_high: Colour
    sky_low: Colour
    cloud: Colour
    lit_windows: float

    def on_wall(self, albedo: Floats, normal_azimuth: float, height: float) -> Floats:
        """Light a wall.

        The sun reaches the walls that face it, above the shadow of the houses opposite.

        Parameters
        ----------
        albedo : (H, W, 3) float32 array
            The lowest row is at street level.
        normal_azimuth
            Where the wall faces, radians.
        height
            Of the image, metres.
        """
        facing = float(np.cos(self.elevation) * np.cos(normal_azimuth - self.azimuth))
        up = np.linspace(height, 0.0, albedo.shape[0], dtype=np.float32)[:, None]
        shadow_top = 10.0 - 13.0 * np.tan(self.elevation) / max(0.2, facing)
        sunny = np.clip((up - shadow_top) / 0.4, 0, 1) * max(0.0, facing)
        open_sky = 0.8 + 0.2 * np.clip(up / 8.0, 0, 1)  # A street is darker at its bottom.
        factor = sunny * rgb(self.sun) + open_sky * rgb(self.ambient)
        return albedo * factor[:, None, :].astype(np.float32)

    def on_thing(self, albedo: Floats, sunny: float = 0.5) -> Floats:
        """Light something round that has no single normal: so much of the sun reaches it."""
        return albedo * (sunny * rgb(self.sun) + rgb(self.ambient))


def rgb(colour: Colour) -> Floats:
    """Return a colour as an array (3,)."""
    return np.array(colour, dtype=np.float32)


def pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 10.0) -> Colour:
    """Choose one of some colours and vary it a little."""
    base = np.array(colours[rng.integers(len(colours))])
    red, green, blue = np.clip(base + rng.normal(0, spread, 3), 5, 250)
    return float(red), float(green), float(blue)


def noise(
    rng: np.random.Generator, height: int, width: int, cells: Sequence[float], fade: float = 1.0
) -> Floats:
    """Return smooth noise (height, width), roughly -1..1.

    Parameters
    ----------
    cells
        Sizes of its blobs in pixels.
    fade
        Strength of each size relative to the one before.
    """
    total = np.zeros((height, width), np.float32)
    strength, power = 1.0, 0.0
    for cell in cells:
        rows, columns = int(height / cell) + 2, int(width / cell) + 2
        grid = rng.uniform(-strength, strength, (rows, columns)).astype(np.float32)
        # Only large blobs show that straight lines were drawn between their corners.
        smooth = cv2.INTER_CUBIC if cell > 16 else cv2.INTER_LINEAR
        total += np.asarray(cv2.resize(grid, (width, height), interpolation=smooth))
        power += strength**2
        strength *= fade
    return total / np.float32(np.sqrt(power))


def to_uint8(image: Floats) -> Image:
    """Round to 0..255."""
    return np.clip(image, 0, 255).astype(np.uint8)


def with_alpha(image: Floats, alpha: Image) -> Image:
    """Join colours (H, W, 3) and alpha (H, W) to RGBA."""
    return np.dstack([to_uint8(image), alpha])
