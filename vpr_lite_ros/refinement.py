"""Matches of patches to a fraction of a pixel, by correlation of the two small pictures.

Patches lie 16 px apart, so that their matches are off by half of that, and neighbours alike: good
enough to recognise a place, not to measure a way.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

HALF = 6
"""Pixels of the small picture from the centre of a template to its edge ..."""
SEARCH = 12
"""... and how far around the patch it is looked for: a patch and a half."""
MIN_CORRELATION = 0.6
_FLAT = 2.0
"""Deviation of grey levels below which there is nothing to correlate."""


def find_again(
    one: bytes, points: NDArray[np.float32], other: bytes, near: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Where the points of one picture are in another one of the same place.

    Parameters
    ----------
    one, other
        Small JPEGs as ``image.thumbnail`` makes them; with an empty one nothing is found.
    points
        (M, 2) in ``one``, fractions of width and height.
    near
        (M, 2) where each was matched to in ``other``, likewise.

    Returns
    -------
    centres
        (M, 2) as ``near``, to a fraction of a pixel where it was found.
    found
        (M,) whether the two pictures correlate there.
    """
    template_of, image = _grey(one), _grey(other)
    centres, found = near.copy(), np.zeros(len(near), np.bool_)
    if template_of is None or image is None:
        return centres, found
    size = np.array(image.shape[::-1])
    at, start = points * np.array(template_of.shape[::-1]), near * size
    for index, (here, there) in enumerate(zip(at, start, strict=True)):
        template = cv2.getRectSubPix(template_of, (2 * HALF + 1,) * 2, here.tolist())
        if template.std() < _FLAT:
            continue
        around = cv2.getRectSubPix(image, (2 * (HALF + SEARCH) + 1,) * 2, there.tolist())
        map_ = cv2.matchTemplate(around, template, cv2.TM_CCOEFF_NORMED)
        _, best, _, (x, y) = cv2.minMaxLoc(map_)
        if best < MIN_CORRELATION or not (0 < x < 2 * SEARCH and 0 < y < 2 * SEARCH):
            continue
        offset = x + _peak(map_[y, x - 1 : x + 2]), y + _peak(map_[y - 1 : y + 2, x])
        centres[index] = (there + np.array(offset) - SEARCH) / size
        found[index] = True
    return centres, found


def _grey(picture: bytes) -> NDArray[np.float32] | None:
    if not picture:
        return None
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_GRAYSCALE)
    return None if image is None else image.astype(np.float32)


def _peak(three: NDArray[np.float32]) -> float:
    """Of three values the middle one of which is largest: where a parabola has its peak, ±0.5."""
    before, middle, after = three.tolist()
    curvature = 2 * middle - before - after
    return (after - before) / 2 / curvature if curvature > 1e-9 else 0.0
