"""Small keyframes for the tests of the database."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.database import KeyframeDatabase, Pose
from vpr_lite_ros.inference import Description
from vpr_lite_ros.matching import Camera

DIMENSION, PATCHES = 16, 5
SECOND = 1_000_000_000
POSE = Pose((1.5, -2.25, 0.125), (0.0, 0.0, 0.6, 0.8))
CAMERA = Camera(640, 480, (500.0, 0, 320.5, 0, 501.0, 240.5, 0, 0, 1), (0.1, -0.2, 0, 0, 0))

Open = Callable[..., KeyframeDatabase]
"""``open_database(session, **arguments)`` of conftest.py."""


def describe(seed: int, patches: int = PATCHES) -> Description:
    """A keyframe's description that is the same for the same seed."""
    rng = np.random.default_rng(seed)
    descriptor = rng.standard_normal((3, DIMENSION)).astype(np.float32)
    return Description(
        descriptor / np.linalg.norm(descriptor, axis=1, keepdims=True),
        rng.standard_normal((patches, DIMENSION)).astype(np.float16),
        rng.random((patches, 2)).astype(np.float32),
    )


def rounded(descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
    """As memory holds them: one byte a number, of so few numbers 1 is 127."""
    return np.asarray(np.rint(descriptors * 127) / 127, np.float32)
