"""Data sets in their published layouts, made small, with neighbours worked out by hand."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")

import scipy.io

from vpr_lite_ros.bags import SourceError
from vpr_lite_ros.datasets import (
    PlaceDataset,
    PlaceIds,
    Positions,
    load_dataset,
    load_msls,
    load_pitts30k,
    load_place_images,
    load_places,
    load_posed_images,
    load_sequences,
    load_tokyo247,
)


def touch(folder: Path, names: Iterable[str]) -> None:
    """Loaders look for images, they do not open them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def write_table(path: Path, header: str, rows: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def cells(names: Sequence[str]) -> np.ndarray:
    """A MATLAB cell array, N × 1, of strings."""
    out = np.empty((len(names), 1), object)
    out[:, 0] = names
    return out


def known(dataset: PlaceDataset, query: int) -> tuple[list[int], list[int]]:
    return dataset.positives(query).tolist(), dataset.non_negatives(query).tolist()


# Who is near whom

# Metres east and north of a corner of UTM zone 17; distances from the first query are whole:
# 0, 10 (6-8-10), 10.001, 25 (7-24-25), 25.001, 1000.
EAST, NORTH = 585_000.0, 4_477_000.0
OFFSETS = [(0, 0), (6, 8), (10.001, 0), (7, -24), (0, 25.001), (1000, 0)]
CORNER = np.array([[EAST], [NORTH]])
DATABASE_UTM = np.array(OFFSETS, float).T + CORNER
# The second query stands 990 m east: 10 m from the last image. The third is far from all.
QUERY_UTM = np.array([(0, 0), (990, 0), (500, 0)], float).T + CORNER
EXPECTED = [([0, 1], [0, 1, 2, 3]), ([5], [5]), ([], [])]


def test_radii_are_inclusive_and_a_gap_lies_between_them() -> None:
    truth = Positions(DATABASE_UTM.T, QUERY_UTM.T)
    names = tuple(Path(f"{index}.jpg") for index in range(6))
    dataset = PlaceDataset("six", names, (Path("a.jpg"), Path("b.jpg"), Path("c.jpg")), truth)
    assert [known(dataset, query) for query in range(3)] == EXPECTED
    assert dataset.queries_with_positives.tolist() == [0, 1]
    assert dataset.positives(2).dtype == np.int64
    # Workers of a data loader get copies.
    copied = pickle.loads(pickle.dumps(dataset))
    assert [known(copied, query) for query in range(3)] == EXPECTED


def test_an_image_among_others_is_no_positive_of_itself_but_no_negative_either() -> None:
    at = np.array([[0, 0, 0], [0, 0, 10], [0, 0, 25], [0, 0, 60]], float)
    images = tuple(Path(f"{index}.jpg") for index in range(4))
    dataset = PlaceDataset("lift", images, images, Positions(at, at))
    assert [known(dataset, query) for query in range(4)] == [
        ([1], [0, 1, 2]),
        ([0], [0, 1, 2]),
        ([], [0, 1, 2]),
        ([], [3]),
    ]
    assert dataset.queries_with_positives.tolist() == [0, 1]


def test_neighbours_of_many_images_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(5)
    database, queries = rng.uniform(0, 3000, (60_000, 2)), rng.uniform(0, 3000, (20, 2))
    truth = Positions(database, queries)
    for query, position in enumerate(queries):
        distances = np.linalg.norm(database - position, axis=1)
        assert truth.positives(query).tolist() == np.flatnonzero(distances <= 10).tolist()
        assert truth.non_negatives(query).tolist() == np.flatnonzero(distances <= 25).tolist()


def test_place_names_are_the_same_or_another() -> None:
    truth = PlaceIds(("a", "b", "a", "c"), ("a", "c", "d"))
    images = tuple(Path(f"{index}.jpg") for index in range(4))
    dataset = PlaceDataset("names", images, images[:3], truth)
    assert [known(dataset, query) for query in range(3)] == [([0, 2], [0, 2]), ([3], [3]), ([], [])]


# Pittsburgh 30k and Tokyo 24/7

PITTS_DATABASE = [f"00{index // 3}/00000{index}_pitch1_yaw1.jpg" for index in range(6)]
PITTS_QUERIES = [f"00{index}/00000{index}_pitch2_yaw3.jpg" for index in range(3)]


def write_db_struct(path: Path, **changes: Any) -> None:
    """A ``dbStruct`` as NetVLAD's files hold it; ``None`` leaves a field out."""
    fields: dict[str, Any] = {
        "whichSet": "train",
        "dbImageFns": cells(PITTS_DATABASE),
        "utmDb": DATABASE_UTM,
        "qImageFns": cells(PITTS_QUERIES),
        "utmQ": QUERY_UTM,
        "numImages": 6.0,
        "numQueries": 3.0,
        "posDistThr": 25.0,
        "posDistSqThr": 625.0,
        "nonTrivPosDistSqThr": 100.0,
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = {name: value for name, value in fields.items() if value is not None}
    scipy.io.savemat(path, {"dbStruct": struct}, do_compression=True)


@pytest.fixture
def pittsburgh(tmp_path: Path) -> Path:
    """As the archives unpack: ``000/``, ``queries_real/000/`` and ``datasets/``."""
    touch(tmp_path, PITTS_DATABASE)
    touch(tmp_path / "queries_real", PITTS_QUERIES)
    write_db_struct(tmp_path / "datasets" / "pitts30k_train.mat")
    return tmp_path


def test_pittsburgh_as_its_archives_unpack(pittsburgh: Path) -> None:
    dataset = load_pitts30k(pittsburgh, "train")
    assert dataset.name == "pitts30k_train"
    assert dataset.database == tuple(pittsburgh / name for name in PITTS_DATABASE)
    assert dataset.queries == tuple(pittsburgh / "queries_real" / name for name in PITTS_QUERIES)
    assert isinstance(dataset.truth, Positions)
    assert np.array_equal(dataset.truth.database, DATABASE_UTM.T)
    assert [known(dataset, query) for query in range(3)] == EXPECTED


def test_pittsburgh_as_netvlad_lays_it_out(tmp_path: Path) -> None:
    touch(tmp_path / "images", PITTS_DATABASE)
    touch(tmp_path / "queries", PITTS_QUERIES)
    write_db_struct(tmp_path / "pitts30k_val.mat")
    dataset = load_pitts30k(tmp_path, "val")
    assert dataset.database[0] == tmp_path / "images" / PITTS_DATABASE[0]
    assert dataset.queries[2] == tmp_path / "queries" / PITTS_QUERIES[2]


def test_radii_are_those_of_the_file(pittsburgh: Path) -> None:
    path = pittsburgh / "datasets" / "pitts30k_train.mat"
    write_db_struct(path, posDistThr=10.5, nonTrivPosDistSqThr=25.0)
    assert known(load_pitts30k(pittsburgh, "train"), 0) == ([0], [0, 1, 2])


def test_one_image_and_one_query_are_a_data_set(tmp_path: Path) -> None:
    touch(tmp_path, ["000/a.jpg", "queries_real/000/b.jpg"])
    write_db_struct(
        tmp_path / "pitts30k_test.mat",
        dbImageFns=cells(["000/a.jpg"]),
        qImageFns=cells(["000/b.jpg"]),
        utmDb=DATABASE_UTM[:, :1],
        utmQ=QUERY_UTM[:, :1],
    )
    assert known(load_pitts30k(tmp_path, "test"), 0) == ([0], [0])


def test_tokyo_lists_jpg_where_the_database_has_png(tmp_path: Path) -> None:
    names = [f"03814/3814{index}/pano{index}_012_000.jpg" for index in range(6)]
    touch(tmp_path, [name.replace(".jpg", ".png") for name in names])
    queries = ["00001.jpg", "00002.jpg", "00003.jpg"]
    touch(tmp_path / "247query_subset_v2", queries)
    write_db_struct(
        tmp_path / "datasets" / "tokyo247.mat",
        whichSet="test",
        dbImageFns=cells(names),
        qImageFns=cells(queries),
    )
    dataset = load_tokyo247(tmp_path)
    assert dataset.database[5] == tmp_path / "03814/38145/pano5_012_000.png"
    assert all(path.is_file() for path in dataset.database)
    assert dataset.queries[0] == tmp_path / "247query_subset_v2" / "00001.jpg"
    assert [known(dataset, query) for query in range(3)] == EXPECTED


def test_tokyo_without_its_queries_says_which_archive(tmp_path: Path) -> None:
    touch(tmp_path, PITTS_DATABASE)
    write_db_struct(tmp_path / "tokyo247.mat")
    with pytest.raises(SourceError, match=r"3 of 3 queries .*247query_subset_v2.*\.zip"):
        load_tokyo247(tmp_path)


def test_pittsburgh_without_its_files_says_which_archive(pittsburgh: Path) -> None:
    with pytest.raises(SourceError, match=r"pitts30k_test\.mat: unpack netvlad_v100_datasets"):
        load_pitts30k(pittsburgh, "test")
    (pittsburgh / PITTS_DATABASE[4]).unlink()
    with pytest.raises(SourceError, match=rf"1 of 6 .*{PITTS_DATABASE[4]}: unpack 000\.tar"):
        load_pitts30k(pittsburgh, "train")
    touch(pittsburgh, PITTS_DATABASE)
    (pittsburgh / "queries_real" / PITTS_QUERIES[0]).unlink()
    with pytest.raises(SourceError, match=r"1 of 3 queries.*queries_real\.tar"):
        load_pitts30k(pittsburgh, "train")


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("dbImageFns", None, r"is missing; there are whichSet, utmDb"),
        ("qImageFns", None, "is missing"),
        ("utmQ", None, "is missing"),
        ("posDistThr", None, "is missing"),
        ("utmDb", DATABASE_UTM.T, r"has shape \(6, 2\), should be numbers \(2, 6\)"),
        ("utmDb", np.where(DATABASE_UTM == EAST, np.nan, DATABASE_UTM), "not finite"),
        ("utmQ", QUERY_UTM[:, :2], r"\(2, 2\), should be numbers \(2, 3\)"),
        ("qImageFns", np.arange(3.0), "is no list of file names"),
        ("dbImageFns", np.empty((0, 0), object), "is no list of file names"),
        ("posDistThr", "far", "is no positive number"),
        ("nonTrivPosDistSqThr", -100.0, "is no positive number"),
    ],
)
def test_a_field_that_does_not_fit_is_named(
    pittsburgh: Path, field: str, value: Any, fault: str
) -> None:
    path = pittsburgh / "datasets" / "pitts30k_train.mat"
    write_db_struct(path, **{field: value})
    with pytest.raises(SourceError, match=rf"pitts30k_train\.mat: dbStruct\.{field} .*{fault}"):
        load_pitts30k(pittsburgh, "train")


def test_a_file_that_is_no_db_struct_is_refused(pittsburgh: Path) -> None:
    path = pittsburgh / "datasets" / "pitts30k_train.mat"
    whole = path.read_bytes()
    scipy.io.savemat(path, {"other": 1.0})
    with pytest.raises(SourceError, match=r"train\.mat holds no struct dbStruct"):
        load_pitts30k(pittsburgh, "train")
    scipy.io.savemat(path, {"dbStruct": np.arange(3.0)})
    with pytest.raises(SourceError, match="holds no struct dbStruct"):
        load_pitts30k(pittsburgh, "train")
    for damaged in (b"", b"not a MATLAB file at all" * 20, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"train\.mat cannot be read as a MATLAB file"):
            load_pitts30k(pittsburgh, "train")
    # The header of version 7.3, which is HDF5.
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(512))
    with pytest.raises(SourceError, match=r"MATLAB 7\.3 file: save it again with -v7"):
        load_pitts30k(pittsburgh, "train")


# Mapillary Street-Level Sequences

POSTPROCESSED = ",key,unique_cluster,easting,northing,night,control_panel,view_direction"
RAW = ",key,lon,lat,ca,captured_at,pano"


def write_msls(
    folder: Path, utm: np.ndarray, prefix: str, panoramas: Sequence[int] = ()
) -> list[str]:
    """One side of a city; ``raw.csv`` in another order than ``postprocessed.csv``."""
    keys = [f"{prefix}-{index}_Key" for index in range(utm.shape[1])]
    rows = [
        f"{index},{key},{index},{east},{north},False,False,Forward"
        for index, (key, (east, north)) in enumerate(zip(keys, utm.T, strict=True))
    ]
    write_table(folder / "postprocessed.csv", POSTPROCESSED, rows)
    raw = [
        f"{index},{key},144.9,-37.8,12.5,2018-02-03,{index in panoramas}"
        for index, key in enumerate(keys)
    ]
    write_table(folder / "raw.csv", RAW, raw[::-1])
    touch(folder / "images", [f"{key}.jpg" for key in keys])
    return keys


@pytest.fixture
def melbourne(tmp_path: Path) -> Path:
    """Image 1 of the database (10 m from query 0) and query 1 are panoramas."""
    city = tmp_path / "train_val" / "melbourne"
    write_msls(city / "database", DATABASE_UTM, "db", panoramas=[1])
    write_msls(city / "query", QUERY_UTM, "q", panoramas=[1])
    return tmp_path


def test_a_city_of_msls_without_its_panoramas(melbourne: Path) -> None:
    dataset = load_msls(melbourne, "melbourne")
    city = melbourne / "train_val" / "melbourne"
    assert dataset.name == "msls_melbourne"
    assert dataset.database == tuple(
        city / "database" / "images" / f"db-{index}_Key.jpg" for index in (0, 2, 3, 4, 5)
    )
    assert dataset.queries == tuple(city / "query" / "images" / f"q-{i}_Key.jpg" for i in (0, 2))
    # What was 0, 2 and 3 is now 0, 1 and 2.
    assert [known(dataset, query) for query in range(2)] == [([0], [0, 1, 2]), ([], [])]


def test_radii_of_msls_are_10_and_25_m(tmp_path: Path) -> None:
    city = tmp_path / "train_val" / "london"
    write_msls(city / "database", DATABASE_UTM, "db")
    write_msls(city / "query", QUERY_UTM, "q")
    dataset = load_msls(tmp_path, "london")
    assert isinstance(dataset.truth, Positions)
    assert np.array_equal(dataset.truth.database, DATABASE_UTM.T)
    assert [known(dataset, query) for query in range(3)] == EXPECTED


def test_msls_without_its_files_says_which_archive(melbourne: Path) -> None:
    with pytest.raises(SourceError, match=r"train_val/goa does not exist: unpack msls_metadata"):
        load_msls(melbourne, "goa")
    (melbourne / "test" / "miami").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"test/miami: MSLS publishes no positions"):
        load_msls(melbourne, "miami")
    city = melbourne / "train_val" / "melbourne"
    (city / "query" / "images" / "q-2_Key.jpg").unlink()
    with pytest.raises(SourceError, match=r"1 of 2 images.*q-2_Key\.jpg: unpack msls_images_vol"):
        load_msls(melbourne, "melbourne")
    (city / "database" / "raw.csv").unlink()
    with pytest.raises(SourceError, match=r"database/raw\.csv does not exist: unpack msls_meta"):
        load_msls(melbourne, "melbourne")


def _cut_column(path: Path, column: str) -> None:
    rows = list(csv.reader(path.open(newline="")))
    place = rows[0].index(column)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(row[:place] + row[place + 1 :] for row in rows)


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("postprocessed.csv", "key"),
        ("postprocessed.csv", "easting"),
        ("postprocessed.csv", "northing"),
        ("raw.csv", "key"),
        ("raw.csv", "pano"),
    ],
)
def test_a_column_that_msls_lacks_is_named(melbourne: Path, table: str, column: str) -> None:
    path = melbourne / "train_val" / "melbourne" / "query" / table
    _cut_column(path, column)
    with pytest.raises(SourceError, match=rf"query/{table} has no column {column}, only .*unpack"):
        load_msls(melbourne, "melbourne")


@pytest.mark.parametrize(
    ("table", "before", "after", "fault"),
    [
        ("raw.csv", "q-0_Key,144.9", "other,144.9", "pano does not say True or False of q-0_Key"),
        ("raw.csv", "2018-02-03,False", "2018-02-03,", "pano does not say True or False"),
        ("raw.csv", "2018-02-03,False", "2018-02-03,True", "lists panoramas only"),
        ("postprocessed.csv", "585990.0", "nan", r"postprocessed\.csv, line 3: easting is 'nan'"),
        ("postprocessed.csv", "585990.0", "", r"postprocessed\.csv, line 3: easting is ''"),
    ],
)
def test_a_row_of_msls_that_does_not_fit_is_named(
    melbourne: Path, table: str, before: str, after: str, fault: str
) -> None:
    path = melbourne / "train_val" / "melbourne" / "query" / table
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(SourceError, match=fault):
        load_msls(melbourne, "melbourne")


# Images of one's own


def test_images_with_poses(tmp_path: Path) -> None:
    rows = ["0,images/a.png,0,0", "1,images/b.png,6,8", "2,c.png,7,24", "3,c2.png,0,99"]
    table = write_table(tmp_path / "drive" / "poses.csv", "index,file,x,y", rows)
    touch(tmp_path / "drive", ["images/a.png", "images/b.png", "c.png", "c2.png"])
    dataset = load_posed_images(table)
    assert dataset.name == "drive" and dataset.queries == dataset.database
    assert dataset.database[1] == tmp_path / "drive" / "images" / "b.png"
    assert [known(dataset, query) for query in range(4)] == [
        ([1], [0, 1, 2]),
        ([0], [0, 1, 2]),
        ([], [0, 1, 2]),
        ([], [3]),
    ]
    assert known(load_places(table, 20, 30), 2) == ([1], [0, 1, 2])


def test_height_counts_where_there_is_one(tmp_path: Path) -> None:
    table = write_table(tmp_path / "poses.csv", "file,x,y,z", ["a.jpg,0,0,0", "b.jpg,6,8,1"])
    touch(tmp_path, ["a.jpg", "b.jpg"])
    assert known(load_posed_images(table), 0) == ([], [0, 1])


def test_images_of_named_places(tmp_path: Path) -> None:
    rows = ["a.jpg,1,noon", "b.jpg,01,noon", "c.jpg,1,night"]
    table = write_table(tmp_path / "places.csv", "file,place,when", rows)
    touch(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    dataset = load_place_images(table)
    assert [known(dataset, query) for query in range(3)] == [
        ([2], [0, 2]),
        ([], [1]),
        ([0], [0, 2]),
    ]
    assert dataset.queries_with_positives.tolist() == [0, 2]


def test_clips_know_their_neighbours(tmp_path: Path) -> None:
    rows = [f"{clip}{i}.jpg,{clip},{i}" for i in range(8) for clip in "ab"]
    table = write_table(tmp_path / "walk" / "frames.csv", "file,clip,order", rows)
    touch(tmp_path / "walk", [row.split(",")[0] for row in rows])
    first, second = load_sequences(table)
    assert (first.name, second.name) == ("walk/a", "walk/b")
    assert [path.name for path in second.queries] == [f"b{i}.jpg" for i in range(8)]
    assert known(first, 0) == ([1], [0, 1, 2, 3, 4, 5])
    assert known(first, 6) == ([5, 7], [1, 2, 3, 4, 5, 6, 7])
    assert known(load_sequences(table, 2, 3)[0], 6) == ([4, 5, 7], [3, 4, 5, 6, 7])


def test_a_recipe_names_a_data_set(pittsburgh: Path, tmp_path: Path) -> None:
    assert load_dataset({"pitts30k": str(pittsburgh), "split": "train"}).name == "pitts30k_train"
    touch(tmp_path / "own", ["a.jpg", "b.jpg"])
    places = write_table(tmp_path / "own" / "p.csv", "file,place", ["a.jpg,x", "b.jpg,x"])
    posed = write_table(tmp_path / "own" / "q.csv", "file,x,y", ["a.jpg,0,0", "b.jpg,99,0"])
    assert isinstance(load_dataset({"table": str(places)}).truth, PlaceIds)
    assert isinstance(load_dataset({"table": str(posed)}).truth, Positions)


@pytest.mark.parametrize(
    ("entry", "name"),
    [({"msls": "data", "city": "melbourne"}, "load_msls"), ({"tokyo247": "data"}, "load_tokyo247")],
)
def test_a_recipe_names_other_data_sets(
    entry: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(f"vpr_lite_ros.datasets.{name}", lambda *args: seen.append(args))
    load_dataset(entry)
    assert seen == [(Path("data"), *list(entry.values())[1:])]


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"pitts30k": "data"},
        {"pitts30k": "data", "split": "all"},
        {"msls": "data"},
        {"table": "a.csv", "split": "train"},
    ],
)
def test_an_entry_that_names_no_data_set_says_how(entry: dict[str, str]) -> None:
    with pytest.raises(SourceError, match=r"names no data set: write \{pitts30k: ROOT, split"):
        load_dataset(entry)


@pytest.mark.parametrize(
    ("load", "header", "rows", "fault"),
    [
        (load_posed_images, "file,x", ["a.jpg,1"], "table.csv has no column y, only file,x"),
        (load_posed_images, "frame,x,y", ["1,1,1"], "has no column file, only frame,x,y"),
        (load_posed_images, "file,x,y", [], "holds no rows"),
        (load_posed_images, "file,x,y", ["a.jpg,1,2", "b.jpg,1,inf"], "line 3: y is 'inf'"),
        (load_posed_images, "file,x,y,z", ["a.jpg,1,2,"], "line 2: z is ''"),
        (load_posed_images, "file,x,y", ["a.jpg,1,2", "a.jpg,1,2"], "line 3: 'a.jpg' is .*twice"),
        (load_posed_images, "file,x,y", ["d.jpg,1,2"], "1 of 1 images of .*first .*d.jpg: put"),
        (load_place_images, "file,location", ["a.jpg,1"], "has no column place"),
        (load_place_images, "file,place", ["a.jpg,1", "b.jpg,"], "line 3: place is empty"),
        (load_place_images, "file,place", ["d.jpg,1"], "1 of 1 images of .*d.jpg"),
    ],
)
def test_a_table_that_does_not_fit_is_named(
    tmp_path: Path,
    load: Callable[[Path], PlaceDataset],
    header: str,
    rows: list[str],
    fault: str,
) -> None:
    touch(tmp_path, ["a.jpg", "b.jpg"])
    with pytest.raises(SourceError, match=fault) as error:
        load(write_table(tmp_path / "table.csv", header, rows))
    assert str(tmp_path / "table.csv") in str(error.value)
    with pytest.raises(SourceError, match=r"absent\.csv does not exist"):
        load(tmp_path / "absent.csv")


# The training images at hand


def test_karlsruhe_is_a_drive_without_revisits(data_dir: Path) -> None:
    table = data_dir / "train" / "karlsruhe" / "poses.csv"
    dataset = load_posed_images(table)
    with table.open(newline="") as file:
        xyz = np.array([[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(file)])
    assert len(dataset.database) == 373
    distances = np.linalg.norm(xyz[:, None] - xyz, axis=2)
    for query in range(373):
        others = np.arange(373) != query
        near = np.flatnonzero((distances[query] <= 10) & others)
        assert dataset.positives(query).tolist() == near.tolist()
        # SOURCE.md: nothing within 10 m and more than 10 s (95 frames) apart.
        assert np.abs(near - query).max() <= 95
        near = np.flatnonzero(distances[query] <= 25)
        assert dataset.non_negatives(query).tolist() == near.tolist()


def test_webcam_and_grief_places_are_places_under_many_conditions(data_dir: Path) -> None:
    webcam = load_place_images(data_dir / "train" / "webcam" / "images.csv")
    assert len(webcam.database) == 250 and len(webcam.queries_with_positives) == 250
    for query, image in enumerate(webcam.queries):
        same = [i for i, other in enumerate(webcam.database) if other.parent == image.parent]
        assert webcam.non_negatives(query).tolist() == same
    grief = load_place_images(data_dir / "train" / "grief_places" / "places.csv")
    # 12 sessions × 5 places: each image has 11 partners, with the same last two digits.
    assert len(grief.database) == 60
    for query, image in enumerate(grief.queries):
        partners = [grief.database[index] for index in grief.positives(query)]
        assert len(partners) == 11 and image not in partners
        assert {partner.stem[2:] for partner in partners} == {image.stem[2:]}
