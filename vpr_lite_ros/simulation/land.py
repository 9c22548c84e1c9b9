"""The ground under the town and the sky above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.simulation.light import Floats, Image, Light, noise, rgb, to_uint8

Box = tuple[float, float, float, float]
"""West, south, east, north in metres."""

_PIXEL = 0.06  # Metres.
_GRASS, _PAVING, _KERB, _MARKING = (96, 100, 78), (150, 147, 140), (178, 176, 170), (214, 212, 204)


@dataclass(frozen=True)
class Street:
    """A straight street between two crossings.

    Attributes
    ----------
    start, end : (2,) float64 array
        World x, y of its ends on the middle line, metres.
    """

    start: NDArray[np.float64]
    end: NDArray[np.float64]

    @property
    def length(self) -> float:
        """Metres."""
        return float(np.linalg.norm(self.end - self.start))

    @property
    def along(self) -> NDArray[np.float64]:
        """Unit vector (2,) from start to end."""
        return (self.end - self.start) / self.length

    @property
    def left(self) -> NDArray[np.float64]:
        """Unit vector (2,) across, to the left."""
        return np.array([-self.along[1], self.along[0]])

    def box(self, half: float) -> Box:
        """Return the strip of this width to both sides, and as far beyond the ends."""
        low, high = np.minimum(self.start, self.end), np.maximum(self.start, self.end)
        return (
            float(low[0]) - half,
            float(low[1]) - half,
            float(high[0]) + half,
            float(high[1]) + half,
        )


class Ground:
    """A map of the town, north up.

    Parameters
    ----------
    rng
        Decides patches, markings and covers.
    streets
        The streets.
    road, pavement
        Metres from the middle of a street to the kerb, and from there to the houses.
    margin
        Metres of land around the outermost crossings.

    Attributes
    ----------
    albedo : (H, W, 3) uint8 array
        What the land reflects.
    origin : (x, y)
        World coordinates of the top left corner, metres.
    pixel : float
        Metres a pixel.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        streets: Sequence[Street],
        road: float,
        pavement: float,
        margin: float,
    ) -> None:
        boxes = np.array([street.box(margin) for street in streets])
        west, south = boxes[:, :2].min(axis=0)
        east, north = boxes[:, 2:].max(axis=0)
        self.origin = (float(west), float(north))
        self.pixel = _PIXEL
        rows, columns = int((north - south) / _PIXEL), int((east - west) / _PIXEL)
        self.albedo: Image = np.full((rows, columns, 3), _GRASS, np.uint8)
        for street in streets:
            self._fill(street.box(road + pavement), _PAVING)
        self.albedo[:, ::12] = self.albedo[:, ::12] // 5 * 4  # joints between the slabs
        self.albedo[::12] = self.albedo[::12] // 5 * 4
        for street in streets:
            self._fill(street.box(road + 0.15), _KERB)
        for street in streets:
            tone = int(rng.integers(66, 100))
            self._fill(street.box(road), (tone, tone, tone + 3))
        for street in streets:
            self._mark(rng, street, road)
        wear = noise(rng, rows // 2, columns // 2, (60, 9, 2))
        wear = np.asarray(cv2.resize(wear, (columns, rows)))
        worn = to_uint8(128 * (1 + 0.09 * wear))
        self.albedo = np.asarray(cv2.multiply(self.albedo, cv2.merge([worn] * 3), scale=1 / 128))

    def lit(
        self, light: Light, houses: Sequence[tuple[Box, float]], cars: Sequence[tuple[float, ...]]
    ) -> Image:
        """Return the map in this light.

        Parameters
        ----------
        light
            Sun and sky.
        houses
            Footprint and height (metres) of what throws long shadows.
        cars
            x, y, yaw of what stands in its own.
        """
        sun = np.full(self.albedo.shape[:2], 255, np.uint8)
        away = -np.array([np.cos(light.azimuth), np.sin(light.azimuth)]) / np.tan(light.elevation)
        for (west, south, east, north), height in houses:
            base = np.array([(west, south), (east, south), (east, north), (west, north)])
            hull = cv2.convexHull(self._pixels(np.concatenate([base, base + away * height])))
            cv2.fillConvexPoly(sun, np.asarray(hull), (40,))
        sun = np.asarray(cv2.blur(sun, (7, 7)))
        for x, y, yaw in cars:
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
            around = np.array([(-2.2, -0.95), (2.2, -0.95), (2.2, 0.95), (-2.2, 0.95)]) @ turn.T
            cv2.fillConvexPoly(sun, self._pixels(around + np.array([x, y])), (0,))
        # 40 is open shade: no sun but all of the sky. Below it the sky is hidden as well.
        share = np.arange(256, dtype=np.float32)[:, None]
        direct = np.clip((share - 40) / 215, 0, 1) * np.float32(np.sin(light.elevation))
        open_sky = 0.35 + 0.65 * np.clip(share / 40, 0, 1)
        factor = direct * rgb(light.sun) + open_sky * rgb(light.ambient)
        table = to_uint8(np.asarray(128 * factor, np.float32)).reshape(256, 1, 3)
        shade = cv2.LUT(cv2.merge([sun] * 3), table)
        return np.asarray(cv2.multiply(self.albedo, shade, scale=1 / 128))

    def _pixels(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        """Convert world points (N, 2) to pixels of the map."""
        return np.asarray(np.round((points - self.origin) * (1, -1) / self.pixel), dtype=np.int32)

    def _fill(self, box: Box, colour: tuple[int, int, int]) -> None:
        left, bottom, right, top = self._pixels(np.array(box).reshape(2, 2)).reshape(-1).tolist()
        self.albedo[max(top, 0) : bottom, max(left, 0) : right] = colour

    def _stripe(
        self, street: Street, at: float, side: float, long: float, wide: float, tone: Sequence[int]
    ) -> None:
        """Paint a rectangle that starts `at` metres along and lies `side` metres to the left."""
        corners = [
            street.start + street.along * (at + a * long) + street.left * (side + b * wide)
            for a, b in ((0, -0.5), (1, -0.5), (1, 0.5), (0, 0.5))
        ]
        cv2.fillPoly(self.albedo, [self._pixels(np.array(corners))], tone)

    def _mark(self, rng: np.random.Generator, street: Street, road: float) -> None:
        """Paint patches of newer asphalt, the middle line, crossings and manhole covers."""
        length = street.length
        for _ in range(int(length / 9)):
            tone = int(rng.integers(50, 110))
            at, side = rng.uniform(5, length - 8), rng.uniform(-3.5, 3.5)
            size = (rng.uniform(1, 6), rng.uniform(0.6, 2.2))
            self._stripe(street, at, side, *size, (tone, tone, tone))
        dash, last = float(rng.choice([1.5, 3.0, 60.0])), length - road - 5
        for at in np.arange(road + 5, last, 2 * dash):
            self._stripe(street, float(at), 0.0, min(dash, last - float(at)), 0.13, _MARKING)
        for at in (road + 1.0, length - road - 4.0):
            if rng.random() < 0.6:
                for side in np.arange(0.5 - road, road, 1.0):
                    self._stripe(street, at, float(side), 3.0, 0.5, _MARKING)
        for _ in range(int(length / 18)):
            middle = street.start + street.along * rng.uniform(8, length - 8)
            cover = self._pixels((middle + street.left * rng.uniform(-2.5, 2.5))[None])[0]
            cv2.circle(self.albedo, (int(cover[0]), int(cover[1])), 7, (44, 42, 40), -1)


def paint_grain(rng: np.random.Generator) -> Image:
    """Paint the stones in asphalt (512, 512), grey around 128, to be repeated."""
    fine = rng.normal(0, 14, (512, 512)).astype(np.float32)
    coarse = noise(rng, 512, 512, (9, 4))
    return to_uint8(128 + fine + 9 * coarse)


def paint_sky(land: np.random.Generator, air: np.random.Generator, light: Light) -> Image:
    """Paint the sky all round, with hills, houses and towers along the horizon.

    Parameters
    ----------
    land
        Decides the horizon, the same for every lap.
    air
        Decides the clouds.
    light
        Sun and sky.

    Returns
    -------
    (H, W, 3) uint8 array
        Azimuth falls from 0 at the left; the lowest row is the horizon; pixels are square.
    """
    width = 2048
    per_radian = width / (2 * np.pi)
    height = int(per_radian * np.radians(50))
    up = np.linspace(np.radians(50), 0, height, dtype=np.float32)[:, None]
    low, high = rgb(light.sky_low), rgb(light.sky_high)
    image = low + (high - low) * np.sqrt(up / up[0, 0])[..., None]

    cover = _clouds(air, height, width)[..., None]
    image = image + (rgb(light.cloud) - image) * cover
    sun_at = -light.azimuth * per_radian % width
    aside = np.abs((np.arange(width) - sun_at + width / 2) % width - width / 2) / per_radian
    glare = np.exp(-((aside / 0.5) ** 2) - ((up - light.elevation) / 0.4) ** 2)
    image += 60 * glare[..., None].astype(np.float32) * rgb(light.sun)

    shade = light.on_thing(np.full((1, 3), 90, np.float32), 0.4)[0]
    for haze, base, buildings in ((0.65, 0.05, 3), (0.45, 0.03, 14)):
        below = up < _ridge(land, width, base, buildings)
        image[below] = haze * low + (1 - haze) * shade
    return to_uint8(image)


def _clouds(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Return how much cloud covers each direction (height, width), 0..1."""
    # Wider than high: a layer seen from below is foreshortened.
    field = noise(rng, height * 2, width, (300, 140, 60, 26, 11), fade=0.6)
    field = np.asarray(cv2.resize(field, (width, height), interpolation=cv2.INTER_AREA))
    seam = np.linspace(0, 1, 128, dtype=np.float32)
    field[:, -128:] = field[:, -128:] * (1 - seam) + field[:, :1] * seam
    return np.clip(field * 1.3 + 0.15, 0, 1) * np.float32(0.8)


def _ridge(
    rng: np.random.Generator, width: int, base: float, buildings: int
) -> NDArray[np.float64]:
    """Return the elevation (width,) in radians of a line of hills with buildings on it."""
    turns = np.linspace(0, 2 * np.pi, width, endpoint=False)
    ridge = np.full(width, base)
    for waves in (2, 3, 5, 9, 17):
        ridge += rng.uniform(0.005, 0.02) * np.sin(waves * turns + rng.uniform(0, 2 * np.pi))
    for _ in range(buildings):
        at, wide = int(rng.integers(width - 30)), int(rng.integers(5, 30))
        ridge[at : at + wide] = ridge[at : at + wide].mean() + rng.uniform(0.01, 0.06)
    return ridge
