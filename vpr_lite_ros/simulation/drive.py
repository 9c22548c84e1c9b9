"""Twice round the town: where the robot is when, what its camera sees, what its wheels say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.simulation.light import Light
from vpr_lite_ros.simulation.route import plan, wrap
from vpr_lite_ros.simulation.town import TownView, build_town
from vpr_lite_ros.simulation.view import CAMERA_IN_BASE, Pinhole

Pose = tuple[float, float, float]

START_NS = 1_700_000_000_000_000_000
FRAME_RATE_HZ = 5.0
ODOMETRY_RATE_HZ = 20.0

# Late morning, sun in the south-east; then evening, sun low in the west.
_LIGHT = (
    Light(
        azimuth=np.radians(-50), elevation=np.radians(48), sun=(0.72, 0.69, 0.62),
        ambient=(0.44, 0.47, 0.52), sky_high=(92, 140, 206), sky_low=(190, 208, 224),
        cloud=(238, 240, 244), lit_windows=0.02,
    ),
    Light(
        azimuth=np.radians(205), elevation=np.radians(14), sun=(0.62, 0.42, 0.22),
        ambient=(0.40, 0.37, 0.39), sky_high=(70, 86, 134), sky_low=(232, 178, 128),
        cloud=(206, 156, 140), lit_windows=0.3,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SimulatedFrame:
    """One image of the drive.

    Attributes
    ----------
    stamp_ns : int
        Nanoseconds.
    image : (H, W, 3) uint8 array
        RGB.
    depth : (H, W) float32 array
        Metres along the optical axis, exact; 0 where there is the sky.
    pose : (x, y, yaw)
        True pose of base_link in the world (ENU): metres, metres, radians.
    lap : int
        1 or 2.
    """

    stamp_ns: int
    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    pose: Pose
    lap: int


@dataclass(frozen=True)
class OdometrySample:
    """One planar pose of base_link with its velocity.

    Attributes
    ----------
    stamp_ns : int
        Nanoseconds.
    pose : (x, y, yaw)
        Metres, metres, radians.
    twist : (forward, yaw rate)
        Metres a second, radians a second, in base_link.
    """

    stamp_ns: int
    pose: Pose
    twist: tuple[float, float]


@dataclass(frozen=True)
class Drive:
    """A drive of two laps, ready to be drawn.

    Attributes
    ----------
    seed : int
        Decides everything.
    camera : Pinhole
        The camera, at `camera_in_base` on base_link, looking along its x axis.
    stamps_ns : (N,) int64 array
        Stamps of the images.
    poses : (N, 3) float64 array
        True x, y, yaw of base_link at these stamps.
    laps : (N,) int64 array
        1 or 2.
    """

    seed: int
    camera: Pinhole
    stamps_ns: NDArray[np.int64]
    poses: NDArray[np.float64]
    laps: NDArray[np.int64]

    @property
    def camera_matrix(self) -> NDArray[np.float64]:
        """Pinhole matrix (3, 3) in pixels; there is no distortion."""
        return self.camera.matrix

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.camera.width, self.camera.height

    @property
    def camera_in_base(self) -> tuple[float, float, float]:
        """Camera centre in base_link: metres forward, left, up."""
        return CAMERA_IN_BASE

    def __len__(self) -> int:
        return len(self.stamps_ns)

    def part(self, start: int, stop: int, step: int = 1) -> Drive:
        """Return some frames of this drive, chosen as by a slice, exactly as they are in it.

        Raises
        ------
        ValueError
            If that leaves no frame or turns time round.
        """
        chosen = slice(start, stop, step)
        if step < 1 or len(self.stamps_ns[chosen]) == 0:
            raise ValueError(
                f"frames {start}:{stop}:{step} of a drive of {len(self)} frames are none"
            )
        return replace(
            self,
            stamps_ns=self.stamps_ns[chosen],
            poses=self.poses[chosen],
            laps=self.laps[chosen],
        )

    def frames(self) -> Iterator[SimulatedFrame]:
        """Draw the images one by one; every call starts again and draws the same."""
        town = build_town(self.seed)
        view: TownView | None = None
        lap = 0
        for stamp, pose, now in zip(self.stamps_ns, self._true_poses(), self.laps, strict=True):
            if view is None or now != lap:
                lap = int(now)
                view = TownView(town, _LIGHT[lap - 1], lap, self.camera)
            # Each frame has its own noise, whichever frames are drawn before it.
            rng = np.random.default_rng([self.seed, 20, (int(stamp) - START_NS) // 10**6])
            image, depth = view.draw(*pose)
            yield SimulatedFrame(int(stamp), _expose(image, lap, rng), depth, pose, lap)

    def _true_poses(self) -> list[Pose]:
        return [(float(x), float(y), float(yaw)) for x, y, yaw in self.poses]

    def ground_truth(self) -> list[OdometrySample]:
        """Return true poses in the world frame at `ODOMETRY_RATE_HZ`."""
        stamps, poses = self._motion()
        twists = _twists(stamps, poses)
        return [
            OdometrySample(int(stamp), (float(x), float(y), float(yaw)), (float(v), float(w)))
            for stamp, (x, y, yaw), (v, w) in zip(stamps, poses, twists, strict=True)
        ]

    def odometry(self) -> list[OdometrySample]:
        """Return what wheels and a cheap gyroscope would report, from (0, 0, 0) on.

        The scale is about 1 % wrong, the heading drifts by some degrees a lap, and every step
        is a little noisy.
        """
        stamps, poses = self._motion()
        rng = np.random.default_rng([self.seed, 21])
        scale = 1.0 + rng.choice([-1, 1]) * rng.uniform(0.007, 0.013)
        bias = rng.choice([-1, 1]) * rng.uniform(0.002, 0.004)  # radians a second
        twists = _twists(stamps, poses)
        twists[1:, 0] = twists[1:, 0] * scale + rng.normal(0, 0.03, len(twists) - 1)
        twists[1:, 1] += bias + rng.normal(0, 0.004, len(twists) - 1)
        seconds = 1.0 / ODOMETRY_RATE_HZ
        x = y = yaw = 0.0
        samples = []
        for stamp, (forward, turn) in zip(stamps, twists, strict=True):
            middle = yaw + turn * seconds / 2
            x += float(forward * np.cos(middle) * seconds)
            y += float(forward * np.sin(middle) * seconds)
            yaw = float(wrap(yaw + turn * seconds))
            samples.append(OdometrySample(int(stamp), (x, y, yaw), (float(forward), float(turn))))
        return samples

    def _motion(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return stamps (M,) and true poses (M, 3) at `ODOMETRY_RATE_HZ`, first to last image."""
        seconds, poses, _ = plan(ODOMETRY_RATE_HZ)
        stamps = _stamps(seconds)
        during = (stamps >= self.stamps_ns[0]) & (stamps <= self.stamps_ns[-1])
        return stamps[during], poses[during]


def simulate_drive(seed: int = 0, *, image_size: tuple[int, int] = (640, 480)) -> Drive:
    """Plan a drive of two laps; nothing is drawn before `Drive.frames` is asked.

    Parameters
    ----------
    seed
        Another seed is another town.
    image_size
        Width and height in pixels; the field of view across stays at 75 degrees.

    Raises
    ------
    ValueError
        If the size is below 32 x 32 pixels.
    """
    width, height = image_size
    if width < 32 or height < 32:
        raise ValueError(f"image_size must be at least (32, 32), not {image_size}")
    focal = width / 2 / np.tan(np.radians(37.5))
    camera = Pinhole(float(focal), (width - 1) / 2, (height - 1) / 2, width, height)
    seconds, poses, laps = plan(FRAME_RATE_HZ)
    return Drive(seed, camera, _stamps(seconds), poses, laps)


def _stamps(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    return START_NS + np.round(seconds * 1e9).astype(np.int64)


def _twists(stamps: NDArray[np.int64], poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return speed and yaw rate (N, 2) from each pose to the next; the first is zero."""
    seconds = np.diff(stamps) / 1e9
    moved = np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=1) / seconds
    turned = wrap(np.diff(poses[:, 2])) / seconds
    return np.concatenate([[[0.0, 0.0]], np.stack([moved, turned], axis=1)])


def _expose(image: NDArray[np.uint8], lap: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Do to a drawing what lens, sensor and automatic exposure do to light."""
    soft = cv2.GaussianBlur(image, (3, 3), 0.55)
    wanted, noise = (118.0, 3.0) if lap == 1 else (84.0, 7.0)  # mean level, deviation
    gain = float(np.clip(wanted / max(float(soft[::8, ::8].mean()), 1.0), 0.6, 1.6))
    gain *= rng.uniform(0.95, 1.05)
    levels = np.arange(256) * gain
    curve = 255 * (1 - np.exp(-levels / 170)) / (1 - np.exp(-255 / 170))
    exposed = cv2.LUT(soft, np.clip(curve, 0, 255).astype(np.uint8))
    grain = (rng.standard_normal(image.shape[:2], dtype=np.float32) * noise).astype(np.int16)
    noisy = cv2.add(exposed, cv2.merge([grain] * 3), dtype=cv2.CV_8U)
    return np.asarray(noisy, dtype=np.uint8)
