"""What happens to a robot's camera: crops, and distortions of light, weather and lens.

Crops and standpoints move the picture; distortions keep every pixel where it is, so that a
student that sees the distorted picture can be compared, cell by cell, with a teacher that sees the
clean one.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""RGB, (H, W, 3)."""

CORNERS = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
"""x, y of a window's corners, from its centre in halves of its sides."""


def random_crop(
    image: Image, rng: np.random.Generator, size: int, smallest: int = 96, stretch: float = 1.7
) -> Image:
    """A random window of ``image``, scaled to ``size`` × ``size`` and mirrored half the time.

    Windows are at least ``smallest`` pixels and their sides differ by up to ``stretch``: the
    network's input is 640×480 whatever the camera's shape, so real pictures arrive stretched.
    """
    height, width = image.shape[:2]
    longest = min(height, width)
    side = math.exp(rng.uniform(math.log(min(smallest, longest)), math.log(longest)))
    aspect = math.exp(rng.uniform(-1, 1) * math.log(stretch))
    window_w = min(round(side * math.sqrt(aspect)), width)
    window_h = min(round(side / math.sqrt(aspect)), height)
    left = int(rng.integers(0, width - window_w + 1))
    top = int(rng.integers(0, height - window_h + 1))
    window = image[top : top + window_h, left : left + window_w]
    shrinks = window_w * window_h > size * size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    crop = cv2.resize(window, (size, size), interpolation=method)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.ascontiguousarray(crop)


def homography_of(window: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """From an image's pixels to those of a view of ``size`` (width, height).

    ``window`` (4, 2) are the view's corners in the image, in the order of ``CORNERS``.
    """
    corners = (CORNERS + 1) / 2 * (np.array(size) - 1)
    found = cv2.getPerspectiveTransform(window.astype(np.float32), corners.astype(np.float32))
    return np.asarray(found, np.float64)


def move(image: Image, rng: np.random.Generator) -> Image:
    """``image`` from a standpoint nearby: shifted, scaled and slanted a little.

    What lies outside of it is its mirror image.
    """
    height, width = image.shape[:2]
    size = np.array([width, height])
    looked_at = size / 2 + rng.uniform([-0.2, -0.1], [0.2, 0.1]) * size
    scale = math.exp(rng.uniform(-0.25, 0.25))
    window = (CORNERS * scale + rng.normal(0, 0.04, (4, 2))) * size / 2 + looked_at
    homography = homography_of(window, (width, height))
    moved = cv2.warpPerspective(
        image, homography, (width, height), borderMode=cv2.BORDER_REFLECT_101
    )
    return np.asarray(moved, np.uint8)


def distort(image: Image, rng: np.random.Generator) -> Image:
    """``image`` in another light, season or camera; every pixel stays where it is."""
    picture = image.astype(np.float32) / 255
    if rng.random() < 0.25:
        picture = _season(picture, rng)
    if rng.random() < 0.3:
        picture = _shadow(picture, rng)
    kind = rng.random()
    if kind < 0.45:
        picture = _night(picture, rng)
    elif kind < 0.9:
        picture = picture ** math.exp(rng.uniform(-0.7, 0.7))
        picture = (picture - 0.5) * rng.uniform(0.5, 1.4) + 0.5 + rng.uniform(-0.2, 0.2)
    if rng.random() < 0.4:
        picture = picture * rng.uniform(0.75, 1.25, size=3).astype(np.float32)
    if rng.random() < 0.35:
        grey = picture.mean(axis=2, keepdims=True)
        keep = 0.0 if rng.random() < 0.5 else rng.uniform(0, 0.6)
        picture = grey + (picture - grey) * keep
    if rng.random() < 0.3:
        picture = _blur(picture, rng)
    if rng.random() < 0.5:
        strength = rng.uniform(0.005, 0.08)
        picture = picture + rng.standard_normal(picture.shape, dtype=np.float32) * strength
    out: Image = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.25:
        quality = int(rng.integers(15, 70))
        _, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, quality])
        out = cv2.imdecode(data, cv2.IMREAD_COLOR).astype(np.uint8)
    return out


def _night(picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Dark sky first, then lamps, sensor noise and the camera's own gain."""
    height, width = picture.shape[:2]
    dark = picture ** rng.uniform(1.3, 3.0) * rng.uniform(0.15, 0.7)
    # The sky is the brightest part by day and the darkest by night.
    horizon = rng.uniform(0.15, 0.6)
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    dark = dark * np.clip(0.15 + rows / horizon, 0, 1) ** rng.uniform(0, 1.5)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    light = np.zeros((height, width, 1), np.float32)
    for _ in range(int(rng.integers(0, 5))):
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        radius = rng.uniform(0.02, 0.25) * width
        spot = np.exp(-((xs - cx) ** 2 + (ys - cy) ** 2) / (2 * radius**2))
        light += spot[:, :, None] * rng.uniform(0.3, 1.2)
    tint = np.array([1.0, rng.uniform(0.75, 1), rng.uniform(0.45, 1)], np.float32)
    dark = dark + light * tint * (0.25 + picture * 0.75)
    dark = dark + rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(0, 0.06)
    if rng.random() < 0.5:  # automatic gain brings the mean back, and the noise with it
        dark = dark * min(rng.uniform(0.2, 0.5) / max(float(dark.mean()), 0.02), 6.0)
    return np.clip(dark, 0, 1)


def _season(picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Green turns yellow, brown or white, as leaves and lawns do."""
    green = picture[:, :, 1:2] - 0.5 * (picture[:, :, 0:1] + picture[:, :, 2:3])
    mask = np.clip(green * rng.uniform(4, 12), 0, 1)
    target = rng.uniform(0.1, 1.0, size=3).astype(np.float32)
    brightness = picture.mean(axis=2, keepdims=True)
    recoloured = brightness * target / max(float(target.mean()), 1e-3)
    if rng.random() < 0.3:  # snow: bright surfaces in the lower half go white
        rows = np.linspace(0, 1, picture.shape[0], dtype=np.float32)[:, None, None]
        mask = np.maximum(mask, np.clip((rows - 0.4) * 3, 0, 0.8) * (brightness > 0.3))
        recoloured = 0.7 + 0.3 * brightness.repeat(3, axis=2)
    return picture * (1 - mask) + recoloured * mask


def _shadow(picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """One side of a random soft edge darkens or brightens."""
    height, width = picture.shape[:2]
    angle = rng.uniform(0, 2 * math.pi)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    side = (xs - rng.uniform(0.2, 0.8) * width) * math.cos(angle)
    side += (ys - rng.uniform(0.2, 0.8) * height) * math.sin(angle)
    edge = 1 / (1 + np.exp(-np.clip(side / rng.uniform(1, 12), -30, 30)))
    factor = 1 - edge * rng.uniform(0.2, 0.75)
    return picture * factor[:, :, None].astype(np.float32)


def _blur(picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Out of focus, or moved during the exposure."""
    if rng.random() < 0.5:
        return cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 1.6)).astype(np.float32)
    length = int(rng.integers(3, 9))
    kernel = np.zeros((length, length), np.float32)
    centre = (length - 1) / 2
    angle = rng.uniform(0, math.pi)
    offset = (centre * math.cos(angle), centre * math.sin(angle))
    start = (round(centre - offset[0]), round(centre - offset[1]))
    end = (round(centre + offset[0]), round(centre + offset[1]))
    cv2.line(kernel, start, end, 1.0)
    return cv2.filter2D(picture, -1, kernel / kernel.sum()).astype(np.float32)
