"""Place recognition data sets: their images, and which of them show the same place.

Each loader reads a data set as it was published, or a table beside images of one's own, into a
``PlaceDataset``, and checks that everything it lists is there. Neighbours are looked up when
they are asked for: no matrix of queries × database is ever made.

Layouts and meanings follow those who published them: Pittsburgh and Tokyo 24/7 the NetVLAD
project (``dbBase.m``, ``dbPitts.m``, ``dbTokyo247.m``), MSLS the Mapillary Street-Level
Sequences kit (``mapillary_sls/datasets/msls.py``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.io
from numpy.typing import NDArray
from scipy.spatial import KDTree

from vpr_lite_ros.bags.errors import SourceError
from vpr_lite_ros.bags.tables import read_table

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
"""(n,) places in ``PlaceDataset.database``, increasing."""

POSITIVE_RADIUS_M = 10.0
NEGATIVE_RADIUS_M = 25.0
"""The usual radii of NetVLAD and MSLS, for data that does not say its own."""

_SPECIFICATION = "netvlad_v100_datasets.tar.gz (from the NetVLAD project page)"


@dataclass(frozen=True, eq=False)
class Positions:
    """Places known by where the images were taken; the direction of view plays no part."""

    database: Floats
    """(N, D) metres in one Cartesian frame, D = 2 (UTM east, north) or 3."""
    queries: Floats
    """(Q, D) metres in the same frame."""
    positive_radius_m: float = POSITIVE_RADIUS_M
    """Up to and including this far apart, two images may show the same."""
    negative_radius_m: float = NEGATIVE_RADIUS_M
    """Further apart than this they do not. Recall is counted with this radius, too."""

    @cached_property
    def _tree(self) -> KDTree:
        return KDTree(self.database)

    def positives(self, query: int) -> Indices:
        return self._within(query, self.positive_radius_m)

    def non_negatives(self, query: int) -> Indices:
        return self._within(query, self.negative_radius_m)

    def _within(self, query: int, radius_m: float) -> Indices:
        found = self._tree.query_ball_point(self.queries[query], radius_m, return_sorted=True)
        return np.asarray(found, np.int64)


@dataclass(frozen=True, eq=False)
class PlaceIds:
    """Places known by name: the same name is the same place, any other name another place."""

    database: tuple[str, ...]
    queries: tuple[str, ...]

    @cached_property
    def _members(self) -> dict[str, Indices]:
        members: dict[str, list[int]] = {}
        for index, place in enumerate(self.database):
            members.setdefault(place, []).append(index)
        return {place: np.asarray(indices, np.int64) for place, indices in members.items()}

    def positives(self, query: int) -> Indices:
        return self._members.get(self.queries[query], np.empty(0, np.int64))

    def non_negatives(self, query: int) -> Indices:
        return self.positives(query)


@dataclass(frozen=True, eq=False)
class PlaceDataset:
    """Images of a database, images to look up in it, and what is true of each pair.

    Of a pair, three things can be true: positive (the same place), negative (another one), or
    neither (too close to be called another, too far to be sure of seeing the same).
    """

    name: str
    database: tuple[Path, ...]
    """N image files."""
    queries: tuple[Path, ...]
    """Q image files; equal to ``database`` where each image is looked up among the others."""
    truth: Positions | PlaceIds

    @cached_property
    def among_themselves(self) -> bool:
        """Whether queries and database are the same images."""
        return self.queries == self.database

    def positives(self, query: int) -> Indices:
        """Which database images show the place of ``query``, itself left out."""
        found = self.truth.positives(query)
        return found[found != query] if self.among_themselves else found

    def non_negatives(self, query: int) -> Indices:
        """Which database images cannot serve as negatives of ``query``, itself among them."""
        return self.truth.non_negatives(query)

    @cached_property
    def queries_with_positives(self) -> Indices:
        """The queries that can be trained on, increasing."""
        found = [query for query in range(len(self.queries)) if len(self.positives(query))]
        return np.asarray(found, np.int64)


def load_pitts30k(root: Path, split: Literal["train", "val", "test"]) -> PlaceDataset:
    """Pittsburgh 30k, one of its three parts (about 10,000 database images each).

    Parameters
    ----------
    root
        Folder with the archives of Pittsburgh 250k unpacked into it (``000/`` … ``010/``,
        ``queries_real/000/`` …) and ``datasets/pitts30k_<split>.mat``. NetVLAD's own names
        (``images/``, ``queries/``, the ``.mat`` beside them) are found, too.

    Raises
    ------
    SourceError
        If a file or field is missing or does not fit, with what to unpack where.
    """
    return _load_db_struct(
        Path(root),
        f"pitts30k_{split}",
        database_folders=(".", "images"),
        query_folders=("queries_real", "queries"),
        database_archives="000.tar … 010.tar of Pittsburgh 250k",
        query_archive="queries_real.tar of Pittsburgh 250k",
    )


def load_tokyo247(root: Path) -> PlaceDataset:
    """Tokyo 24/7: 75,984 street view images, and 315 queries by day, at sunset and by night.

    Parameters
    ----------
    root
        Folder with the archives of the database unpacked into it (``03814/`` … ``03829/``, or
        these in ``database_gsv_vga/`` or ``images/``), the queries in ``247query_subset_v2/``
        (version 2, which the papers use) or ``query/``, and ``datasets/tokyo247.mat``.

    Raises
    ------
    SourceError
        As ``load_pitts30k``.
    """
    return _load_db_struct(
        Path(root),
        "tokyo247",
        database_folders=(".", "database_gsv_vga", "images"),
        query_folders=("247query_subset_v2", "query"),
        database_archives="03814.tar … 03829.tar of Tokyo 24/7 (database_gsv_vga)",
        query_archive="247query_subset_v2.zip of Tokyo 24/7",
    )


def load_msls(root: Path, city: str) -> PlaceDataset:
    """One city of Mapillary Street-Level Sequences, single images, without panoramas.

    Parameters
    ----------
    root
        Folder with ``msls_metadata.zip``, ``msls_images_vol_*.zip`` and the patch unpacked into
        it, in this order: ``train_val/<city>/{database,query}/`` hold ``postprocessed.csv``,
        ``raw.csv`` and ``images/<key>.jpg``.
    city
        As its folder is called: ``melbourne``, ``amman``, ``trondheim``, ``goa``, ``london``, …
        Each city has its own UTM zone, so cities are never mixed.

    Raises
    ------
    SourceError
        If a file or column is missing or does not fit, with what to unpack where.
    """
    root = Path(root)
    folder = root / "train_val" / city
    if not folder.is_dir():
        if (root / "test" / city).is_dir():
            raise SourceError(
                f"{root / 'test' / city}: MSLS publishes no positions of its test cities, so "
                "nothing can be learned or measured here; take a city of train_val/"
            )
        raise SourceError(
            f"{folder} does not exist: unpack msls_metadata.zip and msls_images_vol_*.zip into "
            f"{root}; cities are spelled as their folders, such as melbourne"
        )
    database, database_at = _read_msls(folder / "database", root)
    queries, queries_at = _read_msls(folder / "query", root)
    return PlaceDataset(f"msls_{city}", database, queries, Positions(database_at, queries_at))


def load_posed_images(
    table: Path,
    positive_radius_m: float = POSITIVE_RADIUS_M,
    negative_radius_m: float = NEGATIVE_RADIUS_M,
) -> PlaceDataset:
    """Images with positions, each looked up among the others.

    Parameters
    ----------
    table
        CSV file with the columns ``file`` (relative to the table's folder), ``x``, ``y`` and,
        if it has one, ``z``: metres in any one Cartesian frame.
    positive_radius_m, negative_radius_m
        As in ``Positions``.

    Raises
    ------
    SourceError
        If the table, a column, a number or an image is missing or does not fit.
    """
    table = Path(table)
    rows = _read_columns(table, ("file", "x", "y"), "list each image and where it was taken")
    axes = ("x", "y", "z") if "z" in rows[0] else ("x", "y")
    positions = _read_positions(table, rows, axes)
    images = _listed_images(table, rows)
    truth = Positions(positions, positions, positive_radius_m, negative_radius_m)
    return PlaceDataset(table.parent.name, images, images, truth)


def load_place_images(table: Path) -> PlaceDataset:
    """Images of named places, each looked up among the others.

    Parameters
    ----------
    table
        CSV file with the columns ``file`` (relative to the table's folder) and ``place``. Names
        of places are compared as text.

    Raises
    ------
    SourceError
        If the table, a column, a name or an image is missing.
    """
    table = Path(table)
    rows = _read_columns(table, ("file", "place"), "list each image and the place it shows")
    for number, row in enumerate(rows, start=2):
        if not row["place"]:
            raise SourceError(f"{table}, line {number}: place is empty: name it or drop the row")
    images = _listed_images(table, rows)
    places = tuple(row["place"] for row in rows)
    return PlaceDataset(table.parent.name, images, images, PlaceIds(places, places))


def load_places(
    table: Path,
    positive_radius_m: float = POSITIVE_RADIUS_M,
    negative_radius_m: float = NEGATIVE_RADIUS_M,
) -> PlaceDataset:
    """Images of named places or with positions, by the columns that ``table`` has.

    See ``load_place_images`` and ``load_posed_images``; the radii are for positions.
    """
    way_out = "list each image and the place it shows, or where it was taken"
    columns = _read_columns(Path(table), ("file",), way_out)[0]
    if "place" in columns:
        return load_place_images(table)
    return load_posed_images(table, positive_radius_m, negative_radius_m)


def load_sequences(
    table: Path, positive_frames: int = 1, negative_frames: int = 5
) -> list[PlaceDataset]:
    """Frames of one or more clips in order of time; one data set a clip.

    Neighbours show the same place, frames far from each other another one: what is known of any
    recording that does not come back to where it was.

    Parameters
    ----------
    table
        CSV file with the columns ``file`` (relative to the table's folder) and ``clip``, rows in
        order of time.
    positive_frames, negative_frames
        Up to the former apart, two frames show the same place; beyond the latter they do not.

    Raises
    ------
    SourceError
        If the table, a column or an image is missing.
    """
    table = Path(table)
    rows = _read_columns(table, ("file", "clip"), "list each image and the clip it belongs to")
    clips: dict[str, list[Path]] = {}
    for row, image in zip(rows, _listed_images(table, rows), strict=True):
        clips.setdefault(row["clip"], []).append(image)
    found = []
    for clip, images in clips.items():
        order = np.arange(len(images), dtype=np.float64)[:, None]
        truth = Positions(order, order, positive_frames, negative_frames)
        found.append(PlaceDataset(f"{table.parent.name}/{clip}", *2 * (tuple(images),), truth))
    return found


def load_dataset(entry: Mapping[str, Any]) -> PlaceDataset:
    """The data set that an entry of a training configuration names.

    ``{pitts30k: ROOT, split: train}``, ``{tokyo247: ROOT}``, ``{msls: ROOT, city: melbourne}`` or
    ``{table: FILE}``, a CSV file with ``file`` and ``place`` or ``file``, ``x`` and ``y``.

    Raises
    ------
    SourceError
        If the entry is none of these, or as the loaders above.
    """
    match dict(entry):
        case {"pitts30k": root, "split": "train" | "val" | "test" as split, **rest} if not rest:
            return load_pitts30k(Path(root), split)
        case {"tokyo247": root, **rest} if not rest:
            return load_tokyo247(Path(root))
        case {"msls": root, "city": city, **rest} if not rest:
            return load_msls(Path(root), str(city))
        case {"table": table, **rest} if not rest:
            return load_places(Path(table))
    raise SourceError(
        f"{dict(entry)} names no data set: write {{pitts30k: ROOT, split: train}} (or val, test), "
        "{tokyo247: ROOT}, {msls: ROOT, city: melbourne} or {table: FILE}"
    )


# dbStruct of NetVLAD


def _load_db_struct(
    root: Path,
    name: str,
    *,
    database_folders: Sequence[str],
    query_folders: Sequence[str],
    database_archives: str,
    query_archive: str,
) -> PlaceDataset:
    path = root / "datasets" / f"{name}.mat"
    if not path.is_file():
        path = root / f"{name}.mat"
    if not path.is_file():
        raise SourceError(
            f"{root} holds neither datasets/{name}.mat nor {name}.mat: unpack {_SPECIFICATION} "
            "into it"
        )
    struct = _DbStruct(path)
    database_names, query_names = struct.names("dbImageFns"), struct.names("qImageFns")
    truth = Positions(
        struct.positions("utmDb", len(database_names)),
        struct.positions("utmQ", len(query_names)),
        # The one is stored squared, the other is not.
        positive_radius_m=math.sqrt(struct.radius("nonTrivPosDistSqThr")),
        negative_radius_m=struct.radius("posDistThr"),
    )
    database = _image_files(
        _folder_of(root, database_folders, database_names[0]),
        database_names,
        f"database images of {path}",
        f"unpack {database_archives} into {root}",
    )
    queries = _image_files(
        _folder_of(root, query_folders, query_names[0]),
        query_names,
        f"queries of {path}",
        f"unpack {query_archive} into {root}",
    )
    return PlaceDataset(name, database, queries, truth)


class _DbStruct:
    """The MATLAB struct ``dbStruct`` of a ``.mat`` file (version 7 or before)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = scipy.io.loadmat(path, variable_names=["dbStruct"])
        except NotImplementedError as error:
            raise SourceError(
                f"{path} is a MATLAB 7.3 file: save it again with -v7, or unpack the published "
                f"one from {_SPECIFICATION}"
            ) from error
        except Exception as error:  # a damaged file fails in ten ways: zlib, struct, index, …
            raise SourceError(
                f"{path} cannot be read as a MATLAB file ({error}): unpack {_SPECIFICATION} again"
            ) from error
        struct = content.get("dbStruct")
        if struct is None or struct.dtype.names is None or struct.size != 1:
            raise SourceError(
                f"{path} holds no struct dbStruct: it should be the file from {_SPECIFICATION}"
            )
        self._struct = struct.reshape(-1)[0]

    def names(self, field: str) -> list[str]:
        """File names of a cell array; at least one."""
        cells = [np.asarray(cell).reshape(-1) for cell in self._field(field).reshape(-1)]
        if not cells or any(cell.size != 1 or cell.dtype.kind != "U" for cell in cells):
            raise self._fault(field, "is no list of file names")
        return [str(cell[0]).strip() for cell in cells]

    def positions(self, field: str, count: int) -> Floats:
        """(count, 2) metres east and north; the file stores (2, count)."""
        values = self._field(field)
        if values.shape != (2, count) or values.dtype.kind not in "fiu":
            raise self._fault(field, f"has shape {values.shape}, should be numbers (2, {count})")
        positions = np.ascontiguousarray(values.T, np.float64)
        if not np.isfinite(positions).all():
            raise self._fault(field, "holds values that are not finite")
        return positions

    def radius(self, field: str) -> float:
        """A positive number."""
        values = self._field(field)
        if values.size != 1 or values.dtype.kind not in "fiu" or not 0 < values.item() < np.inf:
            raise self._fault(field, "is no positive number")
        return float(values.item())

    def _field(self, field: str) -> NDArray[Any]:
        if field not in self._struct.dtype.names:
            raise self._fault(field, f"is missing; there are {', '.join(self._struct.dtype.names)}")
        return np.asarray(self._struct[field])

    def _fault(self, field: str, fault: str) -> SourceError:
        return SourceError(
            f"{self.path}: dbStruct.{field} {fault}. Unpack the published file from "
            f"{_SPECIFICATION}"
        )


def _folder_of(root: Path, folders: Sequence[str], image: str) -> Path:
    """The first of ``folders`` that has the folder of ``image``, else the first."""
    candidates = [root / folder for folder in folders]
    return next((c for c in candidates if (c / image).parent.is_dir()), candidates[0])


# Tables


def _read_msls(folder: Path, root: Path) -> tuple[tuple[Path, ...], Floats]:
    """Images that are no panoramas and their (N, 2) UTM positions, east and north."""
    metadata = f"unpack msls_metadata.zip into {root}"
    table, raw = folder / "postprocessed.csv", folder / "raw.csv"
    rows = _read_columns(table, ("key", "easting", "northing"), metadata)
    panorama = {row["key"]: row["pano"] for row in _read_columns(raw, ("key", "pano"), metadata)}
    for row in rows:
        if panorama.get(row["key"]) not in ("True", "False"):
            raise SourceError(
                f"{raw}: column pano does not say True or False of {row['key']}, which "
                f"{table.name} lists: {metadata}"
            )
    positions = _read_positions(table, rows, ("easting", "northing"))
    kept = [index for index, row in enumerate(rows) if panorama[row["key"]] == "False"]
    if not kept:
        raise SourceError(f"{table} lists panoramas only: choose another city")
    images = _image_files(
        folder / "images",
        [f"{rows[index]['key']}.jpg" for index in kept],
        f"images of {table}",
        f"unpack msls_images_vol_*.zip, then the patch, into {root}",
    )
    return images, positions[kept]


def _read_columns(path: Path, columns: Sequence[str], way_out: str) -> list[dict[str, str]]:
    """A CSV table that has at least ``columns``; one dict a row."""
    if not path.is_file():
        raise SourceError(f"{path} does not exist: {way_out}")
    rows = read_table(path)
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise SourceError(
            f"{path} has no column {' or '.join(missing)}, only {','.join(rows[0])}: {way_out}"
        )
    return rows


def _read_positions(path: Path, rows: list[dict[str, str]], columns: Sequence[str]) -> Floats:
    """(N, D) finite numbers of D columns."""
    positions = np.empty((len(rows), len(columns)))
    for index, row in enumerate(rows):
        for axis, column in enumerate(columns):
            try:
                value = float(row.get(column, ""))
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise SourceError(
                    f"{path}, line {index + 2}: {column} is {row.get(column, '')!r}, should be a "
                    "number of metres: mend or drop the row"
                )
            positions[index, axis] = value
    return positions


def _listed_images(table: Path, rows: list[dict[str, str]]) -> tuple[Path, ...]:
    names = [row["file"] for row in rows]
    seen: set[str] = set()
    for number, name in enumerate(names, start=2):
        # Else an image would be a positive of itself.
        if name in seen or not name:
            raise SourceError(f"{table}, line {number}: {name!r} is empty or listed twice: drop it")
        seen.add(name)
    way_out = f"put them there, or correct the column file of {table.name}"
    return _image_files(table.parent, names, f"images of {table}", way_out)


def _image_files(folder: Path, names: Sequence[str], what: str, way_out: str) -> tuple[Path, ...]:
    """The files ``folder / name``; each folder is listed once, however many images it holds.

    A name that ends in ``.jpg`` may be a ``.png`` on disk: so it is with Tokyo 24/7.
    """
    listings: dict[Path, frozenset[str]] = {}
    found: list[Path] = []
    missing: list[Path] = []
    for name in names:
        path = folder / name
        if path.parent not in listings:
            exists = path.parent.is_dir()
            listings[path.parent] = frozenset(os.listdir(path.parent) if exists else ())
        files = listings[path.parent]
        as_png = path.with_suffix(".png")
        if path.name not in files and path.suffix == ".jpg" and as_png.name in files:
            path = as_png
        (found if path.name in files else missing).append(path)
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(names)} {what} are missing, first {missing[0]}: {way_out}"
        )
    return tuple(found)
