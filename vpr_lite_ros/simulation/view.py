"""What a pinhole camera sees of textured rectangles, a ground plane and a sky.

Frames: the world is ENU (x east, y north, z up, metres). The camera is the usual optical one
(x right, y down, z forward). The robot's body `base_link` stands on the ground with x forward,
y left, z up; the camera looks straight ahead from `CAMERA_IN_BASE`, without tilt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Array = NDArray[np.float64]

CAMERA_IN_BASE = (0.3, 0.0, 1.5)
"""Where the camera sits on the robot: metres forward, left and up from base_link."""

_NEAR = 0.3  # Metres in front of the camera; nothing nearer is drawn,
_FAR = 130.0  # nor anything further away.
_OPAQUE = 128  # Below this alpha a texture has a hole.
_UNIT_SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
_PIXEL_CENTRE = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])


@dataclass(frozen=True)
class Pinhole:
    """An ideal camera: focal length, principal point and size in pixels."""

    focal: float
    cx: float
    cy: float
    width: int
    height: int

    @property
    def matrix(self) -> Array:
        """The (3, 3) camera matrix K."""
        return np.array([[self.focal, 0, self.cx], [0, self.focal, self.cy], [0, 0, 1.0]])

    @property
    def inverse(self) -> Array:
        """The (3, 3) inverse of K: pixels to rays."""
        scale = 1.0 / self.focal
        return np.array([[scale, 0, -self.cx * scale], [0, scale, -self.cy * scale], [0, 0, 1.0]])


def camera_pose(x: float, y: float, yaw: float) -> tuple[Array, Array]:
    """Place the camera for a pose of the body.

    Parameters
    ----------
    x, y, yaw
        Pose of base_link in the world: metres, radians from east towards north.

    Returns
    -------
    rotation : (3, 3) array
        World to camera: ``p_camera = rotation @ (p_world - position)``.
    position : (3,) array
        Camera centre in the world, metres.
    """
    cos, sin = np.cos(yaw), np.sin(yaw)
    forward, left, up = CAMERA_IN_BASE
    rotation = np.array([[sin, -cos, 0.0], [0.0, 0.0, -1.0], [cos, sin, 0.0]])
    position = np.array([x + cos * forward - sin * left, y + sin * forward + cos * left, up])
    return rotation, position


def rectangle(corner: Array, across: Array, down: Array) -> Array:
    """Return the corners (4, 3) of a rectangle, clockwise from the top left of its front."""
    return np.asarray(corner + _UNIT_SQUARE @ np.stack([across, down]))


class Texture:
    """Pixels (H, W, 3 or 4) and smaller copies of them, each axis halved on its own.

    A wall seen along the street is squeezed much more across than down. Sampling the copy that
    fits both keeps bricks from turning into noise.
    """

    def __init__(self, pixels: Image) -> None:
        self._levels: dict[tuple[int, int], Image] = {(0, 0): np.ascontiguousarray(pixels)}
        height, width = pixels.shape[:2]
        self._last = (max(0, width.bit_length() - 3), max(0, height.bit_length() - 3))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self._levels[0, 0].shape[:2]
        return width, height

    def seen_at(self, to_texture: Array, x: float, y: float) -> Image:
        """Return the copy with about one texture pixel per image pixel around (x, y).

        Parameters
        ----------
        to_texture : (3, 3) array
            Homography from image pixels to texture coordinates, 0..1 across and down.
        x, y
            Image pixel.
        """
        u, v, w = to_texture @ (x, y, 1.0)
        du = np.abs(to_texture[0, :2] * w - u * to_texture[2, :2]).max() / w**2
        dv = np.abs(to_texture[1, :2] * w - v * to_texture[2, :2]).max() / w**2
        width, height = self.size
        return self._level(
            min(self._last[0], int(np.log2(max(1.0, du * width)) + 0.4)),
            min(self._last[1], int(np.log2(max(1.0, dv * height)) + 0.4)),
        )

    def _level(self, across: int, down: int) -> Image:
        if (across, down) not in self._levels:
            # Each copy is made of the next larger one, so that none costs much.
            larger = self._level(*((across - 1, down) if across > down else (across, down - 1)))
            width, height = self.size
            small = (width >> across, height >> down)
            self._levels[across, down] = np.asarray(
                cv2.resize(larger, small, interpolation=cv2.INTER_AREA), dtype=np.uint8
            )
        return self._levels[across, down]


class Canvas:
    """One image being drawn, nearest things first.

    Attributes
    ----------
    image : (H, W, 3) uint8 array
        RGB.
    inverse_depth : (H, W) float32 array
        1 / metres along the optical axis of what is drawn so far; 0 where nothing is. The sky
        leaves it 0.
    """

    def __init__(self, camera: Pinhole, rotation: Array, position: Array) -> None:
        self.camera = camera
        self.rotation = rotation
        self.position = position
        self.image: Image = np.zeros((camera.height, camera.width, 3), np.uint8)
        self.inverse_depth = np.zeros((camera.height, camera.width), np.float32)

    def draw_rectangles(self, corners: Array, texture_of: Callable[[int], Texture]) -> None:
        """Draw all rectangles that face the camera, hidden parts left out.

        Parameters
        ----------
        corners : (N, 4, 3) array
            World metres, clockwise from the top left of the front.
        texture_of
            Called with the index of a rectangle once some of it is seen.
        """
        seen = (corners - self.position) @ self.rotation.T
        across, down = seen[:, 1] - seen[:, 0], seen[:, 3] - seen[:, 0]
        facing = np.einsum("nk,nk->n", np.cross(across, down), seen[:, 0]) > 1e-6
        depth, side = seen[..., 2], seen[..., 0] * self.camera.focal
        inside = (
            (depth > _NEAR).any(axis=1)
            & (depth < _FAR).any(axis=1)
            & (side > -self.camera.cx * depth).any(axis=1)
            & (side < (self.camera.width - self.camera.cx) * depth).any(axis=1)
        )
        chosen = np.flatnonzero(facing & inside)
        # Nearest first, so that most of what is hidden is never painted. The order matters to
        # nothing else: what hides what is decided pixel by pixel.
        chosen = chosen[np.argsort(depth[chosen].min(axis=1), kind="stable")]
        edges = np.stack([across[chosen], down[chosen], seen[chosen, 0]], axis=1)
        homographies = _texture_from_pixels(edges, self.camera.inverse)
        for index, to_texture in zip(chosen, homographies, strict=True):
            self._draw(seen[index], to_texture, partial(texture_of, int(index)))

    def _draw(self, seen: Array, to_texture: Array, texture: Callable[[], Texture]) -> None:
        """Draw one rectangle, given in camera coordinates (4, 3), where nothing nearer is."""
        outline = self._project(seen)
        if len(outline) < 3:
            return
        left, top = (max(0, int(value)) for value in outline.min(axis=0))
        right = min(self.camera.width, int(outline[:, 0].max()) + 2)
        bottom = min(self.camera.height, int(outline[:, 1].max()) + 2)
        if right <= left or bottom <= top:
            return
        mask = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillConvexPoly(
            mask, np.round((outline - (left, top)) * 16).astype(np.int32), (255,), shift=4
        )
        # The last row of the homography is the inverse depth: see _texture_from_pixels.
        slope_x, slope_y, level = to_texture[2]
        columns = (slope_x * np.arange(left, right) + level).astype(np.float32)
        rows = (slope_y * np.arange(top, bottom)).astype(np.float32)
        depth = rows[:, None] + columns
        mask[depth <= self.inverse_depth[top:bottom, left:right]] = 0
        x, y, width, height = cv2.boundingRect(mask)
        if width == 0:
            return

        mask, depth = mask[y : y + height, x : x + width], depth[y : y + height, x : x + width]
        left, top = left + x, top + y
        patch = _sample(texture(), to_texture, (left, top, width, height))
        if patch.shape[2] == 4:
            mask = np.where(patch[..., 3] < _OPAQUE, np.uint8(0), mask)
            patch = patch[..., :3]
        where = np.s_[top : top + height, left : left + width]
        cv2.copyTo(np.ascontiguousarray(patch), np.ascontiguousarray(mask), self.image[where])
        np.copyto(self.inverse_depth[where], depth, where=mask > 0)

    def draw_ground(
        self, texture: Texture, origin: tuple[float, float], metres: float, grain: Image
    ) -> None:
        """Draw the plane z = 0 where nothing stands.

        Parameters
        ----------
        texture
            A map of the town, north up.
        origin
            World x, y of its top left corner, metres.
        metres
            Size of one of its pixels.
        grain : (S, S) uint8 array
            Fine grain of the road, repeated every four metres; 128 changes nothing.
        """
        camera = self.camera
        horizon = int(np.ceil(camera.cy)) + 1
        to_texture = self._ground_homography(origin, texture.size[0] * metres,
                                             texture.size[1] * metres)  # fmt: skip
        # Bands of rows, each twice as near as the last, have their own level of detail.
        edges = [row for row in (0, 2, 4, 8, 16, 32, 64, 128, 256) if row < camera.height - horizon]
        for first, last in pairwise([*edges, camera.height - horizon]):
            top, bottom = horizon + first, horizon + last
            free = np.equal(self.inverse_depth[top:bottom], 0).astype(np.uint8)
            if not free.any():
                continue
            patch = _sample(texture, to_texture, (0, top, camera.width, bottom - top))
            if first >= 64:  # Near enough to see the stones in the asphalt.
                to_grain = self._ground_homography((0.0, 0.0), 4.0, 4.0)
                fine = _warp(grain, to_grain, (0, top, camera.width, bottom - top), True)
                patch = np.asarray(cv2.multiply(patch, cv2.merge([fine] * 3), scale=1 / 128))
            cv2.copyTo(patch, free, self.image[top:bottom])
        slope_x, slope_y, level = to_texture[2]
        columns = slope_x * np.arange(camera.width) + level
        depth = (slope_y * np.arange(horizon, camera.height)[:, None] + columns).astype(np.float32)
        below = self.inverse_depth[horizon:]
        np.copyto(below, depth, where=below == 0)

    def _ground_homography(self, origin: tuple[float, float], east: float, south: float) -> Array:
        edges = np.array([[east, 0, 0], [0, -south, 0], [*origin, 0.0] - self.position])
        return _texture_from_pixels((edges @ self.rotation.T)[None], self.camera.inverse)[0]

    def draw_sky(self, panorama: Image, yaw: float) -> None:
        """Fill what is left from a panorama.

        Parameters
        ----------
        panorama : (H, W, 3) uint8 array
            All 360 degrees, azimuth falling from 0 at the left; the lowest row is the horizon
            and pixels are as many radians high as wide.
        yaw
            Azimuth of the optical axis, radians.
        """
        camera = self.camera
        bottom = min(camera.height, int(camera.cy) + 3)
        free = np.equal(self.inverse_depth[:bottom], 0).astype(np.uint8)
        if not free.any():
            return
        height, width = panorama.shape[:2]
        per_radian = width / (2 * np.pi)
        x = np.arange(camera.width) - camera.cx
        y = np.arange(bottom) - camera.cy
        column = ((np.arctan2(x, camera.focal) - yaw) * per_radian % width).astype(np.float32)
        slope = (-y[:, None] / np.hypot(x, camera.focal)).astype(np.float32)
        row = np.float32(height - 1) - np.arctan(slope) * np.float32(per_radian)
        columns = np.ascontiguousarray(np.broadcast_to(column, row.shape))
        patch = cv2.remap(panorama, columns, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        cv2.copyTo(patch, free, self.image[:bottom])

    def depth(self) -> NDArray[np.float32]:
        """Metres (H, W) along the optical axis of what is drawn; 0 where that is the sky."""
        with np.errstate(divide="ignore"):
            return np.where(self.inverse_depth > 0, 1 / self.inverse_depth, np.float32(0))

    def _project(self, points: Array) -> Array:
        """Project a polygon (N, 3) in camera coordinates, cut at the near plane, to pixels."""
        if (points[:, 2] < _NEAR).any():
            points = _cut(points)
        pixels = points[:, :2] / points[:, 2:] * self.camera.focal
        return np.asarray(pixels + np.array([self.camera.cx, self.camera.cy]))


def _texture_from_pixels(edges: Array, inverse_matrix: Array) -> Array:
    """Return homographies from image pixels to texture coordinates.

    A point of the plane is ``X = u a + v b + c``, and a pixel p sees it at ``X = z K^-1 p``.
    So ``[a b c]^-1 K^-1 p = (u, v, 1) / z``: dividing by the last component gives the texture
    coordinates, and the last component itself is the inverse depth, linear in p.

    Parameters
    ----------
    edges : (N, 3, 3) array
        Rows a (across), b (down) and c (top left corner) in camera coordinates, metres.
    inverse_matrix : (3, 3) array
        K^-1.

    Returns
    -------
    (N, 3, 3) array
    """
    a, b, c = edges[:, 0], edges[:, 1], edges[:, 2]
    rows = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
    volume = np.einsum("nk,nk->n", a, rows[:, 0])
    return np.asarray(rows / volume[:, None, None] @ inverse_matrix)


def _sample(texture: Texture, to_texture: Array, box: tuple[int, int, int, int]) -> Image:
    """Return what a box (left, top, width, height) of the image shows of a plane."""
    left, top, width, height = box
    pixels = texture.seen_at(to_texture, left + width / 2, top + height / 2)
    return _warp(pixels, to_texture, box, False)


def _warp(pixels: Image, to_texture: Array, box: tuple[int, int, int, int], repeat: bool) -> Image:
    left, top, width, height = box
    scale = np.diag([pixels.shape[1], pixels.shape[0], 1.0])
    shift = np.array([[1, 0, left], [0, 1, top], [0, 0, 1.0]])
    warped = cv2.warpPerspective(
        pixels,
        _PIXEL_CENTRE @ scale @ to_texture @ shift,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_WRAP if repeat else cv2.BORDER_REPLICATE,
    )
    return np.asarray(warped, dtype=np.uint8)


def _cut(points: Array) -> Array:
    """Keep the part of a convex polygon in front of the near plane."""
    kept: list[Array] = []
    for first, second in zip(points, np.roll(points, -1, axis=0), strict=True):
        if first[2] >= _NEAR:
            kept.append(first)
        if (first[2] >= _NEAR) != (second[2] >= _NEAR):
            kept.append(first + (second - first) * (_NEAR - first[2]) / (second[2] - first[2]))
    return np.array(kept).reshape(-1, 3)
