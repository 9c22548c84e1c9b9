"""Which frames of a recording show the same place: from whatever there is to tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vpr_lite_ros.bags import Poses, SourceError, read_pairs, read_poses
from vpr_lite_ros.bags.rosbag import is_bag
from vpr_lite_ros.evaluation import Floats, GroundTruth, Integers, PairTruth, RadiusTruth
from vpr_lite_ros.reporting.recording import Recording

PAIRS_BESIDE = ("loops.csv", "pairs.csv")
POSES_BESIDE = ("poses.csv", "groundtruth.txt", "groundtruth.csv", "poses.txt")
"""Looked for beside images, in this order, pairs first."""
WHAT_TO_PASS = (
    "Pass --poses FILE (CSV, TUM, KITTI or EuRoC trajectory, or a bag with poses, fixes, tf or "
    "odometry) or --pairs FILE (CSV with columns query,match)"
)


@dataclass(frozen=True)
class Truth:
    """Ground truth and where it comes from."""

    judge: GroundTruth
    """By frame number."""
    source: str
    xyz: Floats | None = None
    """(N, 3) metres by frame number, NaN where not known; None if only pairs are known."""
    caveat: str = ""
    """What to beware of; empty if there is nothing."""


def find_truth(
    source: Path,
    recording: Recording,
    *,
    poses: Path | None = None,
    poses_topic: str | None = None,
    pairs: Path | None = None,
    radius_m: float = 5.0,
) -> Truth:
    """Ground truth as the user says, or else as the recording itself or a file beside it says.

    Raises
    ------
    SourceError
        If there is none, or it knows none of the keyframes; the message says what to pass.
    """
    if poses is None and pairs is None:
        if is_bag(source):
            poses = source
        else:
            poses, pairs = _beside(source)
    if pairs is not None:
        return _from_pairs(pairs, recording)
    if poses is None:
        raise SourceError(f"{source} comes without ground truth. {WHAT_TO_PASS}")
    try:
        known = read_poses(poses, topic=poses_topic)
    except SourceError as error:
        raise SourceError(f"{error}. {WHAT_TO_PASS}") from error
    return _from_poses(known, source, poses, recording, radius_m)


def stamps_of(recording: Recording) -> Integers:
    """(N,) stamps by frame number; 0 for frames that are no keyframes."""
    stamps = np.zeros(int(recording.frame[-1]) + 1 if len(recording) else 0, np.int64)
    stamps[recording.frame] = recording.stamp_ns
    return stamps


def _from_poses(
    known: Poses, source: Path, poses: Path, recording: Recording, radius_m: float
) -> Truth:
    # In a bag all frames bear the topic's name, which says nothing about a frame.
    names = None if is_bag(source) else recording.names
    at = known.positions_for(recording.stamp_ns.tolist(), names)
    found = np.isfinite(at).all(axis=1)
    if len(recording) and not found.any():
        raise SourceError(
            f"{poses} has a pose for none of the {len(recording)} keyframes: do its stamps (same "
            "clock, same seconds) or frame names belong to this recording?"
        )
    xyz = np.full((len(stamps_of(recording)), 3), np.nan)
    xyz[recording.frame] = at
    caveats = []
    if known.drifts:
        caveats.append(
            "Odometry drifts: once its error exceeds the radius, a true closure counts as false, "
            f"and a far place as near. Pass better poses, or a --radius above the drift (now "
            f"{radius_m:g} m)"
        )
    if missing := int((~found).sum()):
        caveats.append(f"{missing} of {len(found)} keyframes have no pose and are not judged")
    origin = known.source if poses == source or is_bag(poses) else str(poses.name)
    return Truth(RadiusTruth(xyz, radius_m), origin, xyz, ". ".join(caveats))


def _from_pairs(pairs: Path, recording: Recording) -> Truth:
    listed = read_pairs(pairs)
    highest = max((max(pair) for pair in listed), default=0)
    if recording.total and highest >= recording.total:
        raise SourceError(
            f"{pairs} lists frame {highest}, but the recording has {recording.total} frames, "
            "numbered from 0"
        )
    return Truth(PairTruth(listed), pairs.name)


def _beside(source: Path) -> tuple[Path | None, Path | None]:
    """Files with poses and with pairs that lie in or beside a folder of images, or with a video."""
    if not source.is_dir():
        files = (source.with_suffix(suffix) for suffix in (".csv", ".txt"))
        return next((file for file in files if file.is_file()), None), None
    folders = [source, source.parent] if source.name == "images" else [source]
    for folder in folders:
        for names, is_pairs in ((PAIRS_BESIDE, True), (POSES_BESIDE, False)):
            for name in names:
                if (folder / name).is_file():
                    return (None, folder / name) if is_pairs else (folder / name, None)
    return None, None
