"""Positions that a bag recorded in other ways than as poses: by satellite, or as transforms."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

FIX_TYPE = "sensor_msgs/msg/NavSatFix"
TRANSFORM_TYPES = ("tf2_msgs/msg/TFMessage", "tf/msg/tfMessage")
BODY_FRAMES = ("base_link", "base_footprint")
"""The robot's body in tf, by REP 105; the first that there is."""

Floats = NDArray[np.float64]
Rigid = tuple[Floats, Floats]
"""Translation (3,) in metres and quaternion (4,) x y z w."""

_EQUATOR_M = 6378137.0
_SQUARED_ECCENTRICITY = 6.69437999014e-3
"""Of the WGS84 ellipsoid."""


def fixes_to_metres(fixes: Floats) -> Floats:
    """Satellite fixes in a plane that touches the Earth at the first one.

    Parameters
    ----------
    fixes
        (N, 2) latitude and longitude, degrees (WGS84), N at least 1.

    Returns
    -------
    (N, 3) float64 array
        East and north in metres; up is 0, because satellites tell heights worst of all, and an
        error of 10 m there would make one place two.
    """
    latitude, longitude = np.radians(fixes).T
    across = _EQUATOR_M / np.sqrt(1 - _SQUARED_ECCENTRICITY * np.sin(latitude) ** 2)
    earth = np.stack(
        [
            across * np.cos(latitude) * np.cos(longitude),
            across * np.cos(latitude) * np.sin(longitude),
            across * (1 - _SQUARED_ECCENTRICITY) * np.sin(latitude),
        ],
        axis=1,
    )
    lat, lon = latitude[0], longitude[0]
    east = np.array([-np.sin(lon), np.cos(lon), 0.0])
    north = np.array([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)])
    moved = earth - earth[0]
    return np.stack([moved @ east, moved @ north, np.zeros(len(moved))], axis=1)


class Transforms:
    """A tree of frames that move, as tf tells it: what was said last counts."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}
        self._links: dict[str, Rigid] = {}

    @property
    def frames(self) -> list[str]:
        """All that were named, sorted."""
        return sorted({*self._parents, *self._parents.values()})

    def hear(self, parent: str, child: str, translation: Floats, quaternion: Floats) -> None:
        """``child`` lies there in ``parent``. Names may begin with a slash, as in ROS 1."""
        child = child.strip("/")
        self._parents[child] = parent.strip("/")
        self._links[child] = translation, quaternion

    def root_and_chain(self, body: str) -> tuple[str, frozenset[str]]:
        """The frame that all else hangs from, as seen from ``body``, and the frames on the way."""
        chain: list[str] = []
        frame = body
        while frame in self._parents and frame not in chain:
            chain.append(frame)
            frame = self._parents[frame]
        return frame, frozenset(chain)

    def position(self, body: str) -> Floats:
        """(3,) metres of ``body`` in the root."""
        at = np.zeros(3)
        frame, seen = body, set[str]()
        while frame in self._parents and frame not in seen:
            seen.add(frame)
            translation, quaternion = self._links[frame]
            at = rotate(quaternion, at) + translation
            frame = self._parents[frame]
        return at


def rotate(quaternion: Floats, point: Floats) -> Floats:
    """``point`` (3,) turned by a unit quaternion (4,) x y z w."""
    axis, real = quaternion[:3], quaternion[3]
    twice = 2 * np.cross(axis, point)
    return point + real * twice + np.cross(axis, twice)


def body_of(frames: Iterable[str]) -> str | None:
    """Which of ``frames`` is the robot's body; None if none has a name known for it."""
    known = set(frames)
    return next((frame for frame in BODY_FRAMES if frame in known), None)
