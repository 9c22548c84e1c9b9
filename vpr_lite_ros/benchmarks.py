"""Benchmarks: labelled images on disk.

There are two kinds. In *one sequence* every frame is looked up among the frames before it that
are at least a time gap older, as the node does. With *two sequences* every frame of one is looked
up among all frames of the other, the database. ``measurement.py`` does that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vpr_lite_ros.bags import Frame, Source, read_pairs, read_poses
from vpr_lite_ros.bags.pixels import UnusableImage, decode_file
from vpr_lite_ros.bags.sources import FolderSource
from vpr_lite_ros.camera_file import camera_beside, read_camera
from vpr_lite_ros.evaluation import (
    Booleans,
    GroundTruth,
    PairTruth,
    RadiusTruth,
    findable,
)
from vpr_lite_ros.matching import Camera

if TYPE_CHECKING:
    from vpr_lite_ros.datasets import PlaceDataset

log = logging.getLogger(__name__)

DATABASE_TRAVERSE = "day_right"
QUERY_TRAVERSES = {"day": "day_left", "night": "night_right"}
"""Traverses of Gardens Point. day_right is the database, as in the literature's figures."""

QUERY_FOLDERS = {
    "pitts30k_test": ("queries_real", "queries"),
    "tokyo247": ("247query_subset_v2", "query"),
}
"""NetVLAD's data sets by the name of their ``.mat`` file, and where their queries may lie."""

MSLS_CITIES = ("amman", "trondheim", "goa", "london")
"""The cities of MSLS that figures are given for."""

LAYOUTS = (
    "a folder of images (or with a sub-folder images) and loops.csv (query,match) or poses.csv "
    f"(file,x,y), a folder with {DATABASE_TRAVERSE} and {' or '.join(QUERY_TRAVERSES.values())}, "
    "Pittsburgh 30k, Tokyo 24/7 or MSLS as published (pitts30k_test.mat, tokyo247.mat, "
    f"train_val/{{{','.join(MSLS_CITIES)}}}), a city of MSLS (train_val/<city>), or a folder of "
    "such folders; two aligned sequences go with --queries A --database B"
)


class BenchmarkError(ValueError):
    """Images or labels that cannot be evaluated; the message says which, and what to do."""


class ListedImages(Source):
    """Image files in the order of a list. Their stamps number them, from 0, and are no time.

    Parameters
    ----------
    path
        The folder that they all lie in, however deep.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        super().__init__(path)
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def frames(self) -> Iterator[Frame]:
        for number, file in enumerate(self._files):
            try:
                image = decode_file(file.read_bytes())
            except UnusableImage as cause:
                self._skip(str(cause), str(file.relative_to(self.path)))
                continue
            yield Frame(number, image, file.name)


@dataclass(frozen=True)
class Benchmark:
    """What to look up where, and what is true.

    Frames are numbered from 0 in the order of ``database`` and then ``queries``.
    """

    name: str
    queries: Source
    database: Source | None
    """None: one sequence, in which frames are looked up among the frames before them."""
    truth: GroundTruth
    tolerance: float
    """How far from the query's place a match may lie and still be true."""
    tolerance_unit: str
    """``m`` or ``frames``."""
    camera: Camera | None = None
    """Intrinsics of all images, if known: without them there is no epipolar check."""

    @property
    def first_query(self) -> int:
        """Number of the first frame that is looked up."""
        return 0 if self.database is None else len(self.database)

    @property
    def sources(self) -> list[Source]:
        """Where all frames come from, in their order."""
        return [self.queries] if self.database is None else [self.database, self.queries]

    def gap_ns(self, min_time_gap_s: float) -> int:
        """Least time between two frames to be compared: two sequences know no time."""
        return round(min_time_gap_s * 1e9) if self.database is None else 0

    def findable(self, min_time_gap_s: float) -> Booleans:
        """(Q,) which of the frames that are looked up have an eligible true match."""
        if self.database is None:
            assert isinstance(self.queries, FolderSource)  # a list knows no time
            stamps = np.array(_stamps(self.queries))
            return findable(self.truth, range(len(stamps)), stamps, self.gap_ns(min_time_gap_s))
        # ``findable`` would look up the database's frames, too: slow where they are 75,000.
        known = np.arange(self.first_query)
        asked = range(self.first_query, self.first_query + len(self.queries))
        return np.array([self.truth.same_place(query, known).any() for query in asked], np.bool_)


# -- what is on disk -----------------------------------------------------------------------------


def find_benchmarks(
    folder: Path, *, radius_m: float = 5.0, tolerance: int = 2, rate_hz: float = 1.0
) -> list[Benchmark]:
    """The benchmarks in ``folder``, by what lies in it.

    - ``loops.csv``: one sequence, true pairs are listed by frame number;
    - ``poses.csv``: one sequence, true is what was taken within ``radius_m``;
    - ``day_right`` and ``day_left`` or ``night_right``: Gardens Point, ``<folder>_day`` and
      ``<folder>_night``, frame-aligned traverses (``aligned``) with day_right as the database;
    - ``pitts30k_test.mat`` or ``tokyo247.mat``, there or in ``datasets/``: Pittsburgh 30k (test)
      and Tokyo 24/7, queries looked up in the whole database, true by the file's ``posDistThr``;
    - ``train_val/<city>``: MSLS, each of ``MSLS_CITIES`` that is there, true within 25 m without
      regard to the direction of view. The folder of any one city is a benchmark, too;
    - none of these: every sub-folder that is one of these; others are left out with a warning.

    One sequence may have its camera beside it: ``calib.json``, ``camera.json`` or ``camera.yaml``.

    Parameters
    ----------
    radius_m
        Metres, inclusive.
    tolerance
        Frames, inclusive, between aligned sequences.
    rate_hz
        Frames per second of images without stamps.

    Raises
    ------
    BenchmarkError, SourceError
        If there is no benchmark, labels and images do not fit together, or a data set in its
        published layout cannot be read without scipy.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise BenchmarkError(f"dataset {folder} {what}. Pass {LAYOUTS}")
    found = _recognise(folder, radius_m, tolerance, rate_hz)
    if found:
        return found
    for child in sorted(child for child in folder.iterdir() if child.is_dir()):
        inside = _recognise(child, radius_m, tolerance, rate_hz)
        if not inside and not child.name.startswith("."):
            log.warning("%s is left out: it is no benchmark that is known", child)
        found += inside
    if not found:
        raise BenchmarkError(f"dataset {folder} is no benchmark that is known. Pass {LAYOUTS}")
    return found


def aligned(name: str, queries: Path, database: Path, tolerance: int = 2) -> Benchmark:
    """Two sequences whose frames of equal number show the same place, ± ``tolerance`` frames.

    Raises
    ------
    BenchmarkError, SourceError
        If a folder holds no images or the two do not hold as many.
    """
    asked, known = _open(queries), _open(database)
    count = len(asked)
    if count != len(known):
        raise BenchmarkError(
            f"{queries} has {count} images, {database} has {len(known)}: frames of equal "
            "number must show the same place. Remove those without a counterpart"
        )
    pairs = [
        (count + query, match)
        for query in range(count)
        for match in range(max(0, query - tolerance), min(count, query + tolerance + 1))
    ]
    truth = PairTruth(pairs, f"frame numbers at most {tolerance} apart")
    return Benchmark(name, asked, known, truth, tolerance, "frames")


def _recognise(folder: Path, radius_m: float, tolerance: int, rate_hz: float) -> list[Benchmark]:
    name = folder.resolve().name
    if (folder / "loops.csv").is_file():
        return [_from_loops(name, folder, rate_hz)]
    if (folder / "poses.csv").is_file():
        return [_from_poses(name, folder, radius_m, rate_hz)]
    if (folder / DATABASE_TRAVERSE).is_dir():
        return [
            aligned(f"{name}_{light}", folder / query, folder / DATABASE_TRAVERSE, tolerance)
            for light, query in QUERY_TRAVERSES.items()
            if (folder / query).is_dir()
        ]
    return _published(folder)


def _published(folder: Path) -> list[Benchmark]:
    """The data sets that lie in ``folder`` as they were published."""
    named = [
        name
        for name in QUERY_FOLDERS
        if any((folder / place / f"{name}.mat").is_file() for place in ("datasets", "."))
    ]
    # One archive brings the .mat files of all: meant are those whose queries are there. If there
    # are none, loading fails with what to unpack.
    unpacked = [
        name for name in named if any((folder / child).is_dir() for child in QUERY_FOLDERS[name])
    ]
    named = unpacked or named
    whole = folder.absolute()  # "." has no name
    if whole.parent.name == "train_val" and (folder / "database").is_dir():
        root, cities = whole.parent.parent, [whole.name]
    else:
        root = folder
        cities = [city for city in MSLS_CITIES if (folder / "train_val" / city).is_dir()]
    if not named and not cities:
        return []
    try:
        from vpr_lite_ros.datasets import load_msls, load_pitts30k, load_tokyo247
    except ImportError as error:
        raise BenchmarkError(
            f"{folder} holds {', '.join(named + cities)}, and reading that needs scipy ({error}): "
            "pip install -r requirements/train.txt"
        ) from error
    datasets = [
        load_tokyo247(folder) if name == "tokyo247" else load_pitts30k(folder, "test")
        for name in named
    ]
    return [_from_dataset(one) for one in datasets + [load_msls(root, city) for city in cities]]


def _from_dataset(dataset: PlaceDataset) -> Benchmark:
    from vpr_lite_ros.datasets import Positions

    at = dataset.truth
    assert isinstance(at, Positions)  # all that are published are labelled by position
    xyz = np.pad(np.concatenate([at.database, at.queries]), ((0, 0), (0, 1)))
    radius_m = at.negative_radius_m
    truth = RadiusTruth(xyz, radius_m)
    queries, database = _listed(dataset.queries), _listed(dataset.database)
    return Benchmark(dataset.name, queries, database, truth, radius_m, "m")


def _listed(files: Sequence[Path]) -> ListedImages:
    folder = Path(os.path.commonpath([file.parent for file in files]))
    # Of the sequence, the folder above says more.
    return ListedImages(folder.parent if folder.name == "images" else folder, files)


def _from_loops(name: str, folder: Path, rate_hz: float) -> Benchmark:
    source = _open(folder, rate_hz)
    pairs = read_pairs(folder / "loops.csv")
    for pair in pairs:
        if not all(0 <= frame < len(source) for frame in pair):
            raise BenchmarkError(
                f"{folder / 'loops.csv'} lists the pair {pair[0]},{pair[1]}, but the "
                f"{len(source)} images are numbered 0 to {len(source) - 1}: are some missing?"
            )
    return Benchmark(name, source, None, PairTruth(pairs), 0, "frames", _camera(folder))


def _from_poses(name: str, folder: Path, radius_m: float, rate_hz: float) -> Benchmark:
    source, table = _open(folder, rate_hz), folder / "poses.csv"
    poses = read_poses(table)
    if poses.names is None:
        raise BenchmarkError(
            f"{table} does not say which image a pose belongs to: add a column file or frame"
        )
    names = [image for _, image in source.listing()]
    xyz = poses.positions_for(_stamps(source), names)
    missing = np.flatnonzero(~np.isfinite(xyz).all(axis=1))
    if len(missing):
        raise BenchmarkError(
            f"{table} has no pose for {len(missing)} of {len(source)} images, the first is "
            f"{names[missing[0]]}: add the poses or take the images away"
        )
    truth = RadiusTruth(xyz, radius_m)
    return Benchmark(name, source, None, truth, radius_m, "m", _camera(folder))


def _camera(folder: Path) -> Camera | None:
    file = camera_beside(folder)
    return read_camera(file) if file else None


def _open(folder: Path, rate_hz: float = 1.0) -> FolderSource:
    if not folder.is_dir():
        raise BenchmarkError(f"{folder} is no folder of images")
    return FolderSource(folder, rate_hz)


def _stamps(source: FolderSource) -> list[int]:
    """Of every image, nanoseconds."""
    stamps = []
    for stamp_ns, name in source.listing():
        if stamp_ns is None:
            raise BenchmarkError(
                f"poses.csv of {source.path} has no stamp for {name}: add its row or take the "
                "image away"
            )
        stamps.append(stamp_ns)
    return stamps


# -- reading ------------------------------------------------------------------------------------


def read_frames(source: Source) -> Iterator[Frame]:
    """Every frame of ``source``, so that frame numbers are places in the folder or list.

    Raises
    ------
    BenchmarkError
        If an image cannot be read.
    """
    for frame in source:
        if source.skipped:
            break
        yield frame
    if source.skipped:
        causes = ", ".join(source.skipped)
        raise BenchmarkError(
            f"an image in {source.path} cannot be used ({causes}; the warning above names it): "
            "restore it, or take it and its label away"
        )
