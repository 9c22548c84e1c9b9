"""Ground truth: where each image was taken, or which image shows the place of which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.bags.errors import SourceError
from vpr_lite_ros.bags.rosbag import Bag, is_bag
from vpr_lite_ros.bags.tables import (
    frame_column,
    frame_key,
    parse_stamp,
    read_table,
    seconds_to_ns,
)

POSE_TYPES = (
    "nav_msgs/msg/Odometry",
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/PoseWithCovarianceStamped",
)


@dataclass(frozen=True)
class Poses:
    """Positions known by stamp, by frame name, or by both.

    Attributes
    ----------
    xyz : (N, 3) float64 array
        Metres, in the frame of whoever recorded them.
    stamps_ns : (N,) int64 array or None
        Strictly increasing nanoseconds.
    names : tuple of N str or None
        What the table calls each frame: a file name or a number.
    quaternions : (N, 4) float64 array or None
        Unit quaternions x y z w, where they were recorded.
    """

    xyz: NDArray[np.float64]
    stamps_ns: NDArray[np.int64] | None = None
    names: tuple[str, ...] | None = None
    quaternions: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.xyz)

    def positions_for(
        self,
        stamps_ns: Sequence[int],
        names: Sequence[str] | None = None,
        *,
        max_gap_s: float = 1.0,
    ) -> NDArray[np.float64]:
        """Look up where frames were taken.

        By name where table and frames have names (folders, zeros and suffixes do not count),
        else by stamp, linearly between the poses around it.

        Parameters
        ----------
        stamps_ns : (M,) nanoseconds
            Stamps of the frames.
        names : (M,) str, optional
            Names of the frames.
        max_gap_s
            Poses further apart than this, in seconds, are not interpolated between.

        Returns
        -------
        (M, 3) float64 array
            Metres; NaN where nothing is known.
        """
        if self.names is not None and names is not None:
            rows = {frame_key(name): row for row, name in enumerate(self.names)}
            found = [rows.get(frame_key(name), -1) for name in names]
            known = np.asarray(found, dtype=np.int64).reshape(-1)
            if (known >= 0).any() or self.stamps_ns is None:
                return np.where(known[:, None] >= 0, self.xyz[known], np.nan)
        if self.stamps_ns is None:
            return np.full((len(stamps_ns), 3), np.nan)

        asked = np.asarray(stamps_ns, dtype=np.int64)
        after = np.searchsorted(self.stamps_ns, asked).clip(0, len(self) - 1)
        before = np.where(self.stamps_ns[after] == asked, after, (after - 1).clip(0))
        # Differences first: a float cannot hold nanoseconds since 1970.
        gap = (self.stamps_ns[after] - self.stamps_ns[before]).astype(np.float64)
        done = (asked - self.stamps_ns[before]).astype(np.float64)
        weight = np.divide(done, gap, out=np.zeros_like(gap), where=gap > 0)
        xyz = self.xyz[before] + weight[:, None] * (self.xyz[after] - self.xyz[before])
        inside = (self.stamps_ns[0] <= asked) & (asked <= self.stamps_ns[-1])
        xyz[~inside | (gap > max_gap_s * 1e9)] = np.nan
        return xyz


def read_poses(path: str | Path, *, topic: str | None = None) -> Poses:
    """Read positions from a CSV table, a TUM trajectory or a bag.

    Parameters
    ----------
    path
        - `.csv` with a header: columns `x`, `y`, optionally `z` (metres) and `qx`, `qy`, `qz`,
          `qw`, and at least one of `stamp_s`, `stamp_ns`, `frame`, `file`;
        - any other text file: TUM lines `stamp tx ty tz qx qy qz qw` (seconds, metres);
        - a bag with odometry or pose messages.
    topic
        Which topic of a bag. Where there are several, the one with `ground_truth` in its name
        is taken without asking.

    Raises
    ------
    SourceError
        If the file is missing, holds no poses or holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path} does not exist. Pass a CSV table, a TUM trajectory or a bag")
    if is_bag(path):
        return _poses_of_bag(path, topic)
    if path.is_dir():
        if (path / "poses.csv").is_file():
            return _poses_of_csv(path / "poses.csv")
        raise SourceError(f"{path} is a folder without poses.csv; pass the file with the poses")
    return _poses_of_csv(path) if path.suffix.lower() == ".csv" else _poses_of_tum(path)


def read_pairs(path: str | Path) -> list[tuple[int, int]]:
    """Read true loops from a CSV table with the columns `query` and `match`.

    Returns
    -------
    list of (query, match)
        Frame indices from 0, in the order of the file.

    Raises
    ------
    SourceError
        If the file is missing or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path} does not exist. Pass a CSV table with columns query,match")
    pairs: list[tuple[int, int]] = []
    for number, row in enumerate(read_table(path), start=2):
        try:
            pairs.append((int(row["query"]), int(row["match"])))
        except KeyError as error:
            raise SourceError(
                f"{path} has no column {error}; it needs query,match and has {','.join(row)}"
            ) from error
        except ValueError as error:
            raise SourceError(f"{path}, line {number}: {error}") from error
    return pairs


def _poses_of_csv(path: Path) -> Poses:
    rows = read_table(path)
    missing = [column for column in ("x", "y") if column not in rows[0]]
    if missing:
        raise SourceError(
            f"{path} has no column {' or '.join(missing)}; its columns are {','.join(rows[0])}"
        )
    column = frame_column(rows[0])
    turned = all(f"q{axis}" in rows[0] for axis in "xyzw")
    xyz: list[list[float]] = []
    turns: list[list[float]] = []
    stamps: list[int] = []
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        try:
            xyz.append([float(row.get(axis) or 0.0) for axis in "xyz"])
            if turned:
                turns.append([float(row[f"q{axis}"]) for axis in "xyzw"])
        except ValueError as error:
            raise SourceError(f"{where}: {error}") from error
        stamp_ns = parse_stamp(row, where)
        if stamp_ns is not None:
            stamps.append(stamp_ns)
    names = tuple(row[column] for row in rows) if column else None
    if not stamps and names is None:
        raise SourceError(
            f"{path} says of no pose which image it belongs to: add a column stamp_s "
            f"(seconds) or file; its columns are {','.join(rows[0])}"
        )
    return _checked(path, xyz, stamps or None, names, turns)


def _poses_of_tum(path: Path) -> Poses:
    xyz: list[list[float]] = []
    turns: list[list[float]] = []
    stamps: list[int] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is neither a CSV table nor a TUM trajectory: {error}") from error
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"{path}, line {number}"
        if len(fields) != 8:
            raise SourceError(
                f"{where}: a TUM trajectory has 8 numbers a line "
                f"(stamp tx ty tz qx qy qz qw), this one has {len(fields)}"
            )
        stamps.append(seconds_to_ns(fields[0], where))
        try:
            xyz.append([float(field) for field in fields[1:4]])
            turns.append([float(field) for field in fields[4:]])
        except ValueError as error:
            raise SourceError(f"{where}: {error}") from error
    return _checked(path, xyz, stamps, None, turns)


def _poses_of_bag(path: Path, topic: str | None) -> Poses:
    bag = Bag(path)
    try:
        if topic is None:
            truths = [name for name in bag.topics(*POSE_TYPES) if "ground_truth" in name]
            topic = truths[0] if len(truths) == 1 else None
        topic = bag.choose_topic(POSE_TYPES, topic, "pose", "--poses-topic")
        xyz: list[list[float]] = []
        turns: list[list[float]] = []
        stamps: list[int] = []
        for _, message in bag.messages(topic):
            # Odometry and PoseWithCovariance wrap the pose once more than PoseStamped.
            pose = message.pose.pose if hasattr(message.pose, "pose") else message.pose
            xyz.append([pose.position.x, pose.position.y, pose.position.z])
            turn = pose.orientation
            turns.append([turn.x, turn.y, turn.z, turn.w])
            stamps.append(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)
    finally:
        bag.close()
    return _checked(path, xyz, stamps, None, turns)


def _checked(
    path: Path,
    xyz: list[list[float]],
    stamps: list[int] | None,
    names: tuple[str, ...] | None,
    turns: list[list[float]],
) -> Poses:
    """Sort by stamp, drop repeats, refuse what no evaluation could use."""
    positions = np.asarray(xyz, dtype=np.float64).reshape(-1, 3)
    if len(positions) == 0:
        raise SourceError(f"{path} holds no poses")
    if not np.isfinite(positions).all():
        row = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise SourceError(f"{path}: pose {row} is not finite: {positions[row].tolist()}")
    quaternions = np.asarray(turns, dtype=np.float64).reshape(-1, 4)
    lengths = np.linalg.norm(quaternions, axis=1, keepdims=True)
    # Who records positions alone often leaves the rest zero.
    known = len(quaternions) == len(positions) and bool((abs(lengths - 1) < 0.1).all())
    unit = quaternions / lengths if known else None
    if stamps is None:
        return Poses(positions, None, names, unit)
    times, order = np.unique(np.asarray(stamps, dtype=np.int64), return_index=True)
    ordered = tuple(names[row] for row in order) if names is not None else None
    return Poses(positions[order], times, ordered, unit[order] if unit is not None else None)
