"""Walk into a picture: what a camera would see some steps beside or ahead of where it was taken.

An image says nothing of depth, but where robots drive it is guessed easily: walls or houses to
both sides, a floor, a ceiling or tree tops, and an end where all lines meet. What is near then
moves faster than what is far, as it does when a robot moves, and unlike in any homography.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""(N, 2) x, y in halves of a picture's sides from its centre: its corners are (±1, ±1)."""

_FURTHEST = 6.0
"""What would lie further outside of the picture, or behind the camera, is put there."""


@dataclass(frozen=True)
class Eye:
    """Where a camera stands; its picture was taken at the origin. Unit: see ``Corridor``."""

    sideways: float = 0.0
    forward: float = 0.0


AT_PICTURE = Eye()


@dataclass(frozen=True)
class Corridor:
    """A box around the camera; with half its sides 1, what is at a picture's edge is 1 ahead."""

    vanishing: tuple[float, float]
    """x, y of the point where its lines meet (as ``Points``)."""
    half_width: float
    half_height: float
    length: float

    def seen_from(self, there: Eye, points: Points, here: Eye) -> Points:
        """Where a camera at ``there`` sees what one at ``here`` sees at ``points``."""
        x, y = (points - self.vanishing).T
        wall = np.where(x > 0, self.half_width - here.sideways, self.half_width + here.sideways)
        with np.errstate(divide="ignore"):
            depth = np.minimum(wall / np.abs(x), self.half_height / np.abs(y))
        depth = np.minimum(depth, self.length - here.forward)
        beyond = np.maximum(depth + here.forward - there.forward, 1e-6)
        moved = np.stack([depth * x + here.sideways - there.sideways, depth * y], axis=1)
        return np.clip(moved / beyond[:, None] + self.vanishing, -_FURTHEST, _FURTHEST)


def some_corridor(rng: np.random.Generator) -> Corridor:
    """Any that a robot may drive through."""
    half_width, half_height = np.exp(rng.uniform(math.log(0.7), math.log(1.4), 2)).tolist()
    x, y = rng.uniform([-0.3, -0.2], [0.3, 0.2]).tolist()
    return Corridor((x, y), half_width, half_height, float(rng.uniform(3, 10)))
