"""Ground truth: where each image was taken, or which image shows the place of which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.bags.errors import SourceError
from vpr_lite_ros.bags.positions import (
    BODY_FRAMES,
    FIX_TYPE,
    TRANSFORM_TYPES,
    Transforms,
    body_of,
    fixes_to_metres,
)
from vpr_lite_ros.bags.rosbag import Bag, is_bag
from vpr_lite_ros.bags.tables import (
    frame_column,
    frame_key,
    parse_stamp,
    read_table,
    seconds_to_ns,
)

POSE_TYPES = (
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/PoseWithCovarianceStamped",
    "geometry_msgs/msg/TransformStamped",
    "geometry_msgs/msg/PointStamped",
)
ODOMETRY_TYPE = "nav_msgs/msg/Odometry"
PREFERRED = (POSE_TYPES, (FIX_TYPE,), TRANSFORM_TYPES, (ODOMETRY_TYPE,))
"""Types of topics that say where the robot was; the first of which there is one is taken."""
ALL_TYPES = tuple(kind for kinds in PREFERRED for kind in kinds)
STATIC_TRANSFORMS = "/tf_static"
_OPTION = "pose", "--poses-topic"
EUROC_POSITION = ("p_RS_R_x", "p_RS_R_y", "p_RS_R_z")


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
    source : str
        Where they come from, for people.
    drifts : bool
        Whether they are dead reckoning: then the same place, seen again, lies elsewhere.
    """

    xyz: NDArray[np.float64]
    stamps_ns: NDArray[np.int64] | None = None
    names: tuple[str, ...] | None = None
    quaternions: NDArray[np.float64] | None = None
    source: str = ""
    drifts: bool = False

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
    """Read positions from a CSV table, a TUM, KITTI or EuRoC trajectory, or a bag.

    Parameters
    ----------
    path
        - `.csv` with a header: columns `x`, `y`, optionally `z` (metres) and `qx`, `qy`, `qz`,
          `qw`, and at least one of `stamp_s`, `stamp_ns`, `frame`, `file`; or EuRoC's, which begins
          with `#timestamp` (nanoseconds);
        - any other text file: TUM lines `stamp tx ty tz qx qy qz qw` (seconds, metres), or KITTI
          lines, twelve numbers of a 3 x 4 matrix, one line for each frame from 0;
        - a bag with poses, satellite fixes, tf or odometry.
    topic
        Which topic of a bag. If none is given, the one with `ground_truth` in its name is taken,
        else the only one of the best kind there is: `PREFERRED`.

    Raises
    ------
    SourceError
        If the file is missing, holds no poses or holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(
            f"{path} does not exist. Pass a CSV table, a TUM, KITTI or EuRoC trajectory or a bag"
        )
    if is_bag(path):
        return _poses_of_bag(path, topic)
    if path.is_dir():
        if (path / "poses.csv").is_file():
            return _poses_of_csv(path / "poses.csv")
        raise SourceError(f"{path} is a folder without poses.csv; pass the file with the poses")
    return _poses_of_csv(path) if path.suffix.lower() == ".csv" else _poses_of_lines(path)


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
    if next(iter(rows[0])).startswith("#timestamp"):
        rows = [_from_euroc(row) for row in rows]
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


def _from_euroc(row: dict[str, str]) -> dict[str, str]:
    """A row under the names that other tables use; units in brackets do not count."""
    named = {column.split("[")[0].strip(): value for column, value in row.items()}
    found = {"stamp_ns": named["#timestamp"]}
    for axis, column in zip("xyz", EUROC_POSITION, strict=True):
        if column in named:
            found[axis] = named[column]
    return found


def _poses_of_lines(path: Path) -> Poses:
    """TUM or KITTI, by how many numbers there are in a line."""
    xyz: list[list[float]] = []
    turns: list[list[float]] = []
    stamps: list[int] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is neither a CSV table nor a trajectory: {error}") from error
    width = 0
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"{path}, line {number}"
        width = width or len(fields)
        if len(fields) != width or width not in (8, 12):
            raise SourceError(
                f"{where}: a TUM trajectory has 8 numbers a line (stamp tx ty tz qx qy qz qw), "
                f"one of KITTI 12 (a 3 x 4 matrix, row by row), this one has {len(fields)}"
            )
        if width == 8:
            stamps.append(seconds_to_ns(fields[0], where))
        try:
            position = fields[1:4] if width == 8 else fields[3::4]
            xyz.append([float(field) for field in position])
            if width == 8:
                turns.append([float(field) for field in fields[4:]])
        except ValueError as error:
            raise SourceError(f"{where}: {error}") from error
    names = tuple(map(str, range(len(xyz)))) if width == 12 else None
    return _checked(path, xyz, stamps if width == 8 else None, names, turns)


def _poses_of_bag(path: Path, topic: str | None) -> Poses:
    bag = Bag(path)
    try:
        wanted, topic = topic, _choose_topic(bag, topic)
        kind = bag.type_of(topic)
        if kind in TRANSFORM_TYPES:
            try:
                return _poses_of_transforms(bag, topic)
            except SourceError:
                if wanted is not None or not bag.topics(ODOMETRY_TYPE):
                    raise
            topic, kind = bag.choose_topic((ODOMETRY_TYPE,), None, *_OPTION), ODOMETRY_TYPE
        xyz: list[list[float]] = []
        turns: list[list[float]] = []
        stamps: list[int] = []
        for _, message in bag.messages(topic):
            position = _position(message, kind)
            if position is not None:
                xyz.append(position)
                turns += _turn(message)
                stamps.append(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)
    finally:
        bag.close()
    if kind == FIX_TYPE:
        if not xyz:
            raise SourceError(f"{path}: no message on {topic} holds a fix")
        xyz = fixes_to_metres(np.array(xyz)).tolist()
    drifts = kind == ODOMETRY_TYPE and "ground_truth" not in topic
    found = _checked(path, xyz, stamps, None, turns)
    return replace(found, source=f"{topic} ({kind})", drifts=drifts)


def _choose_topic(bag: Bag, wanted: str | None) -> str:
    truths = [name for name in bag.topics(*ALL_TYPES) if "ground_truth" in name]
    if wanted is None and len(truths) == 1:
        return truths[0]
    kinds: tuple[str, ...] = ALL_TYPES
    if wanted is None:
        # Static transforms say nothing about a robot that moves.
        moving = (kinds for kinds in PREFERRED if set(bag.topics(*kinds)) - {STATIC_TRANSFORMS})
        kinds = next(moving, ALL_TYPES)
        if kinds == TRANSFORM_TYPES and "/tf" in bag.topics(*kinds):
            return "/tf"
    return bag.choose_topic(kinds, wanted, *_OPTION)


def _position(message: Any, kind: str) -> list[float] | None:
    """Three numbers, metres, or of a satellite fix two, degrees; None if there is no fix."""
    if kind == FIX_TYPE:
        fix = [float(message.latitude), float(message.longitude)]
        return fix if message.status.status >= 0 and np.isfinite(fix).all() else None
    if kind.endswith("PointStamped"):
        at = message.point
    elif kind.endswith("TransformStamped"):
        at = message.transform.translation
    else:
        # Odometry and PoseWithCovariance wrap the pose once more than PoseStamped.
        at = (message.pose.pose if hasattr(message.pose, "pose") else message.pose).position
    return [at.x, at.y, at.z]


def _turn(message: Any) -> list[list[float]]:
    """The orientation of messages that have a pose; none of others."""
    if not hasattr(message, "pose"):
        return []
    turn = (message.pose.pose if hasattr(message.pose, "pose") else message.pose).orientation
    return [[turn.x, turn.y, turn.z, turn.w]]


def _poses_of_transforms(bag: Bag, topic: str) -> Poses:
    """The body in the frame that all else hangs from, each time that a link between moves."""
    tree = Transforms()

    def hear(message: Any) -> Iterator[tuple[str, int]]:
        for one in message.transforms:
            at, turn = one.transform.translation, one.transform.rotation
            tree.hear(
                one.header.frame_id,
                one.child_frame_id,
                np.array([at.x, at.y, at.z]),
                np.array([turn.x, turn.y, turn.z, turn.w]),
            )
            stamp_ns = one.header.stamp.sec * 10**9 + one.header.stamp.nanosec
            yield one.child_frame_id.strip("/"), stamp_ns

    if STATIC_TRANSFORMS in bag.topics(*TRANSFORM_TYPES):
        for _, message in bag.messages(STATIC_TRANSFORMS):
            list(hear(message))
    # Once to learn the tree, because a parent may be heard of late; then once to follow it.
    for _, message in bag.messages(topic):
        list(hear(message))
    body = body_of(tree.frames)
    if body is None:
        raise SourceError(
            f"{bag.path}: {topic} moves none of the frames {' or '.join(BODY_FRAMES)}, only "
            f"{', '.join(tree.frames) or 'none'}: pass the true poses with --poses"
        )
    root, chain = tree.root_and_chain(body)
    xyz: list[list[float]] = []
    stamps: list[int] = []
    for _, message in bag.messages(topic):
        moved = [stamp_ns for child, stamp_ns in hear(message) if child in chain]
        if moved:
            xyz.append(tree.position(body).tolist())
            stamps.append(max(moved))
    found = _checked(bag.path, xyz, stamps, None, [])
    return replace(found, source=f"{topic} ({root} to {body})", drifts=root == "odom")


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
        return Poses(positions, None, names, unit, path.name)
    times, order = np.unique(np.asarray(stamps, dtype=np.int64), return_index=True)
    ordered = tuple(names[row] for row in order) if names is not None else None
    turned = unit[order] if unit is not None else None
    return Poses(positions[order], times, ordered, turned, path.name)
