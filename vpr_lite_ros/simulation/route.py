"""Where the robot is when: two laps of the town's streets, in another lane the second time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.simulation.town import CROSSINGS

_START = (0.0, 30.0)  # On the street F-A, heading south.
_LAPS = ("ABCDEF", "ASDEF")  # Lap two takes a street of its own from S to D.
_LANE = (-1.4, 0.9)  # Metres left of the middle of the road.
_SPEED = (11.0, 9.8)  # Metres a second on the straight.
_CORNER_RADIUS = 5.5
_STEP = 0.1  # Metres between points of the path.


def plan(
    rate_hz: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return where the robot is at an even rate. All rates describe the same drive.

    Parameters
    ----------
    rate_hz
        Poses per second.

    Returns
    -------
    seconds : (N,) float64 array
        Since the start.
    poses : (N, 3) float64 array
        x, y (metres) and yaw (radians) of base_link in the world.
    laps : (N,) int64 array
        1 or 2.
    """
    points, lap = _route()
    gone = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    tangent = np.gradient(points, axis=0)
    heading = np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0]))
    # Corners are taken at half the speed, braking over some metres.
    window = np.ones(41) / 41
    bend = np.convolve(np.pad(np.abs(np.gradient(heading, gone)), 20, "edge"), window, "valid")
    speed = np.where(lap == 1, *_SPEED) / (1 + 5.0 * bend)
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(gone) * 2 / (speed[1:] + speed[:-1]))])
    # Nobody holds a heading to the degree; on lap two the driver is a little less steady.
    heading += np.where(lap == 1, 0.008, 0.025) * np.sin(gone / np.where(lap == 1, 5.0, 3.7))

    times = np.arange(int(seconds[-1] * rate_hz) + 1, dtype=np.float64) / rate_hz
    x, y, yaw = (np.interp(times, seconds, of) for of in (points[:, 0], points[:, 1], heading))
    laps = lap[np.searchsorted(seconds, times).clip(0, len(lap) - 1)]
    return times, np.stack([x, y, wrap(yaw)], axis=1), laps


def _route() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return points (N, 2) along both laps, in the lane, and the lap of each."""
    middles, laps = [], []
    for number, crossings in enumerate(_LAPS, start=1):
        corners = [_START, *(CROSSINGS[name] for name in crossings), _START]
        line = _rounded(np.array(corners, dtype=np.float64))
        middles.append(line[:-1])
        laps.append(np.full(len(line) - 1, number))
    middle, lap = np.concatenate(middles), np.concatenate(laps)
    # Change lanes over some 12 metres.
    lane = np.where(lap == 1, *_LANE)
    window = np.hanning(121) / np.hanning(121).sum()
    lane = np.convolve(np.pad(lane, 60, "edge"), window, "valid")
    tangent = np.gradient(middle, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return middle + lane[:, None] * np.stack([-tangent[:, 1], tangent[:, 0]], axis=1), lap


def _rounded(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points every `_STEP` along a polyline whose corners are rounded by arcs."""
    pieces = [corners[:1]]
    for before, corner, after in zip(corners[:-2], corners[1:-1], corners[2:], strict=True):
        arrive = (corner - before) / np.linalg.norm(corner - before)
        leave = (after - corner) / np.linalg.norm(after - corner)
        if np.dot(arrive, leave) > 0.99:
            pieces.append(corner[None])
            continue
        # Corners are right angles: the arc begins and ends one radius from them.
        angle = np.linspace(0, np.pi / 2, 60)[:, None]
        centre = corner - arrive * _CORNER_RADIUS + leave * _CORNER_RADIUS
        pieces.append(centre + _CORNER_RADIUS * (np.sin(angle) * arrive - np.cos(angle) * leave))
    pieces.append(corners[-1:])
    line = np.concatenate(pieces)
    gone = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    even = np.arange(0.0, gone[-1], _STEP)
    return np.stack([np.interp(even, gone, line[:, axis]) for axis in (0, 1)], axis=1)


def wrap(angle: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Bring angles in radians to -pi..pi."""
    return np.asarray((np.asarray(angle) + np.pi) % (2 * np.pi) - np.pi)
