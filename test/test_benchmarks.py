"""Benchmarks: small labelled folders that are written here, worked out by hand."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.bags import SourceError
from vpr_lite_ros.benchmarks import BenchmarkError, aligned, find_benchmarks
from vpr_lite_ros.cli import main
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.evaluation import PairTruth
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.measurement import Answer, describe, evaluate, measure, reorder

MakePicture = Callable[..., NDArray[np.uint8]]
MakeImages = Callable[[Path, Iterable[int]], Path]
WritePictures = Callable[[Sequence[Path], Sequence[Path]], None]
FIGURES = {"recall_at_1", "recall_at_5", "recall_at_10", "auc", "recall_at_100_precision"}


@pytest.fixture
def make_images(make_picture: MakePicture) -> MakeImages:
    """``make_images(folder, seeds)``: the pictures of these seeds as 000.png, 001.png, …"""

    def make(folder: Path, seeds: Iterable[int]) -> Path:
        folder.mkdir(parents=True)
        for number, seed in enumerate(seeds):
            bgr = cv2.cvtColor(make_picture(seed), cv2.COLOR_RGB2BGR)
            cv2.imwrite(str(folder / f"{number:03}.png"), bgr)
        return folder

    return make


def write_poses(folder: Path, x: Sequence[float], stamps: Sequence[float] | None = None) -> None:
    rows = [f"{number:03}.png,{metres},0" for number, metres in enumerate(x)]
    header = "file,x,y"
    if stamps is not None:
        header += ",stamp_s"
        rows = [f"{row},{stamp}" for row, stamp in zip(rows, stamps, strict=True)]
    (folder / "poses.csv").write_text("\n".join([header, *rows]) + "\n")


def write_loops(folder: Path, *pairs: tuple[int, int]) -> None:
    rows = [f"{query},{match}" for query, match in pairs]
    (folder / "loops.csv").write_text("\n".join(["query,match", *rows]) + "\n")


# -- figures -------------------------------------------------------------------------------------


def test_recall_is_over_queries_and_the_curve_over_all_that_were_looked_up() -> None:
    # True: 10-0, 11-1, 12-2. Frame 13 shows a new place, frame 14 had nothing to be compared with.
    truth = PairTruth([(10, 0), (11, 1), (12, 2)])
    answers = [
        Answer(10, [0, 5], 0.9),
        Answer(13, [7, 8], 0.8),
        Answer(11, [5, 1], 0.7),
        Answer(12, [2, 5], 0.6),
        Answer(14, [], math.nan),
    ]
    figures = measure(answers, truth, np.array([True, False, True, True, False]))
    assert figures["recall_at_1"] == pytest.approx(2 / 3)
    assert figures["recall_at_5"] == figures["recall_at_10"] == 1.0
    # Falling thresholds give true, false (13), false (11), true: precision 1, 1/2, 1/3, 2/4.
    assert figures["auc"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 4)
    assert figures["recall_at_100_precision"] == pytest.approx(1 / 3)


def test_a_true_match_of_rank_5_counts_at_10_and_not_at_5() -> None:
    answers = [Answer(20, [9, 8, 7, 6, 5, 0], 0.5), Answer(21, [9, 8, 7, 6, 1], 0.4)]
    figures = measure(answers, PairTruth([(20, 0), (21, 1)]), np.array([True, True]))
    recalls = [figures[f"recall_at_{k}"] for k in (1, 5, 10)]
    assert recalls == [0.0, 0.5, 1.0]
    assert figures["auc"] == figures["recall_at_100_precision"] == 0.0


def test_without_queries_no_figure_is_defined() -> None:
    figures = measure([Answer(3, [0], 0.5)], PairTruth([]), np.array([False]))
    assert set(figures) == FIGURES and all(math.isnan(value) for value in figures.values())


def test_reorder_sorts_the_first_and_keeps_the_rest() -> None:
    answer = Answer(9, [4, 5, 6, 7], 0.99)
    assert reorder(answer, [0.2, 0.5, 0.2]) == Answer(9, [5, 4, 6, 7], 0.5)
    assert reorder(answer, [0.2]) == Answer(9, [4, 5, 6, 7], 0.2)
    nothing = reorder(Answer(9, [], math.nan), [])
    assert nothing.matches == [] and math.isnan(nothing.score)


# -- one sequence --------------------------------------------------------------------------------


def test_one_sequence_with_poses(
    make_images: MakeImages, make_picture: MakePicture, tiny_model: PlaceModel, tmp_path: Path
) -> None:
    # Four places, then: place 0 again, a new place, place 1 again, and place 2, which has come
    # to look like place 0.
    images = make_images(tmp_path / "walk" / "images", [0, 1, 2, 3, 0, 9, 1, 2])
    mixed = cv2.addWeighted(make_picture(0), 0.75, make_picture(2), 0.25, 0)
    cv2.imwrite(str(images / "007.png"), cv2.cvtColor(mixed, cv2.COLOR_RGB2BGR))
    write_poses(tmp_path / "walk", [0, 10, 20, 30, 0.5, 100, 10, 20], stamps=range(8))
    (benchmark,) = find_benchmarks(tmp_path / "walk", radius_m=1.0)
    assert benchmark.findable(3.0).tolist() == [False] * 4 + [True, False, True, True]
    report = evaluate(benchmark, tiny_model, min_time_gap_s=3.0)
    # Frame 3 is the first that has one 3 s older.
    assert (report["dataset"], report["queries"], report["looked_up"]) == ("walk", 3, 5)
    assert report["query_sequence"] == report["database_sequence"] == "walk"
    assert report["database"] == 8 and report["min_time_gap_s"] == 3.0
    assert (report["tolerance"], report["tolerance_unit"]) == (1.0, "m")
    assert report["true_if"] == "taken within 1 m"
    assert report["model_id"] == tiny_model.bundle.model_id
    assert "reranked" not in report
    # The two that look the same are found first and surest; place 2 is found below place 0.
    figures = report["global"]
    assert figures["recall_at_1"] == pytest.approx(2 / 3)
    assert figures["recall_at_5"] == figures["recall_at_10"] == 1.0
    assert figures["auc"] == figures["recall_at_100_precision"] == pytest.approx(2 / 3)


def test_the_gap_keeps_neighbours_out(
    make_images: MakeImages, tiny_model: PlaceModel, tmp_path: Path
) -> None:
    # The robot stands still: without a gap each frame finds the one before it.
    make_images(tmp_path / "still", [1, 1, 1, 1])
    write_poses(tmp_path / "still", [0, 0, 0, 0])
    (benchmark,) = find_benchmarks(tmp_path / "still")
    assert evaluate(benchmark, tiny_model, min_time_gap_s=1.0)["queries"] == 3
    assert evaluate(benchmark, tiny_model, min_time_gap_s=3.0)["queries"] == 1
    report = evaluate(benchmark, tiny_model, min_time_gap_s=4.0)
    assert (report["queries"], report["looked_up"]) == (0, 0)
    assert "there is nothing to recall" in describe(report)
    # At 2 Hz the four frames span 1.5 s.
    (faster,) = find_benchmarks(tmp_path / "still", rate_hz=2.0)
    assert faster.findable(1.5).sum() == 1 and faster.findable(1.6).sum() == 0


def test_one_sequence_with_listed_pairs(
    make_images: MakeImages, tiny_model: PlaceModel, tmp_path: Path
) -> None:
    make_images(tmp_path / "hall" / "images", [0, 1, 2, 0, 1, 2])
    write_loops(tmp_path / "hall", (3, 0), (4, 1), (5, 1))  # the last is not what it looks like
    (benchmark,) = find_benchmarks(tmp_path / "hall")
    report = evaluate(benchmark, tiny_model, min_time_gap_s=2.0)
    assert report["queries"] == 3 and report["true_if"] == "listed as a pair"
    assert (report["tolerance"], report["tolerance_unit"]) == (0, "frames")
    assert report["global"]["recall_at_1"] == pytest.approx(2 / 3)
    assert report["global"]["recall_at_5"] == 1.0


# -- two sequences -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerance", "recalls"), [(0, [0, 5 / 6, 1]), (1, [5 / 6, 1, 1]), (5, [1, 1, 1])]
)
def test_two_sequences_with_a_shift_of_one(
    make_images: MakeImages,
    tiny_model: PlaceModel,
    tmp_path: Path,
    tolerance: int,
    recalls: list[float],
) -> None:
    # Query i shows what frame i + 1 of the database shows, the last one what frame 0 shows.
    database = make_images(tmp_path / "before", [0, 1, 2, 3, 4, 5])
    queries = make_images(tmp_path / "after", [1, 2, 3, 4, 5, 0])
    benchmark = aligned("shift", queries, database, tolerance)
    report = evaluate(benchmark, tiny_model, min_time_gap_s=30.0)
    assert report["queries"] == report["looked_up"] == report["database"] == 6
    assert (report["tolerance"], report["tolerance_unit"]) == (tolerance, "frames")
    assert report["min_time_gap_s"] is None
    figures = report["global"]
    assert figures["recall_at_1"] == pytest.approx(recalls[0])
    assert figures["recall_at_10"] == recalls[2]
    if tolerance:
        assert figures["recall_at_5"] == recalls[1]


def test_gardens_point_looks_up_in_day_right(make_images: MakeImages, tmp_path: Path) -> None:
    root = tmp_path / "gardens"
    for traverse in ("day_left", "day_right", "night_right"):
        make_images(root / traverse, range(3))
    day, night = find_benchmarks(root)
    assert (day.name, night.name) == ("gardens_day", "gardens_night")
    assert day.queries.path.name == "day_left" and night.queries.path.name == "night_right"
    assert [one.database.path.name for one in (day, night) if one.database] == ["day_right"] * 2
    assert day.tolerance == 2 and day.truth.definition == "frame numbers at most 2 apart"


def test_night_alone_is_enough(make_images: MakeImages, tmp_path: Path) -> None:
    for traverse in ("day_right", "night_right"):
        make_images(tmp_path / "gardens" / traverse, range(2))
    assert [one.name for one in find_benchmarks(tmp_path / "gardens")] == ["gardens_night"]


# -- data sets in their published layouts --------------------------------------------------------

# Metres east. The second image of the database is exactly 25 m from the first two queries, the
# third a millimetre more. All else is far apart.
DATABASE_EAST = [300, 25, 25.001, 900]
QUERY_EAST = [0, 0, 5000]


@pytest.fixture
def write_pictures(make_picture: MakePicture) -> WritePictures:
    """Draw a database of pictures 0 to 3, and three queries.

    The first shows picture 1, which is true. The second shows picture 2, mostly, which is a
    millimetre too far off, the third picture 3, mostly, though it was taken elsewhere.
    """

    def write(database: Sequence[Path], queries: Sequence[Path]) -> None:
        pictures = [make_picture(seed) for seed in range(4)]
        asked = [pictures[1]] + [
            cv2.addWeighted(pictures[seed], 0.8, make_picture(9), 0.2, 0) for seed in (2, 3)
        ]
        for file, picture in zip([*database, *queries], [*pictures, *asked], strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
            file.write_bytes(data.tobytes())  # whatever its suffix says

    return write


def check_published(report: dict[str, Any]) -> None:
    """What the pictures of ``write_pictures`` come to."""
    assert (report["queries"], report["looked_up"], report["database"]) == (2, 3, 4)
    assert (report["tolerance"], report["tolerance_unit"]) == (25.0, "m")
    assert report["true_if"] == "taken within 25 m" and report["min_time_gap_s"] is None
    figures = report["global"]
    assert figures["recall_at_1"] == 0.5
    assert figures["recall_at_5"] == figures["recall_at_10"] == 1.0
    # The surest answer is the only true one, and there were two to find.
    assert figures["auc"] == figures["recall_at_100_precision"] == 0.5


def write_db_struct(path: Path, database: Sequence[str], queries: Sequence[str]) -> None:
    io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = {
        "dbImageFns": np.array([[name] for name in database], object),
        "utmDb": np.array([DATABASE_EAST, [0] * 4], np.float64),
        "qImageFns": np.array([[name] for name in queries], object),
        "utmQ": np.array([QUERY_EAST, [0] * 3], np.float64),
        "posDistThr": 25.0,
        "nonTrivPosDistSqThr": 100.0,
    }
    io.savemat(path, {"dbStruct": struct})


@pytest.mark.parametrize(
    ("specification", "database_folder", "query_folder", "suffix"),
    [
        ("datasets/pitts30k_test.mat", ".", "queries_real", ".jpg"),
        ("pitts30k_test.mat", "images", "queries", ".jpg"),
        ("datasets/tokyo247.mat", ".", "247query_subset_v2", ".png"),
        ("tokyo247.mat", "images", "query", ".jpg"),
    ],
)
def test_pittsburgh_and_tokyo(
    write_pictures: WritePictures,
    tiny_model: PlaceModel,
    tmp_path: Path,
    specification: str,
    database_folder: str,
    query_folder: str,
    suffix: str,
) -> None:
    root = tmp_path / "set"
    database, queries = [f"{i // 2:03}/{i}.jpg" for i in range(4)], [f"{i}.jpg" for i in range(3)]
    write_db_struct(root / specification, database, queries)
    write_pictures(
        [(root / database_folder / name).with_suffix(suffix) for name in database],
        [root / query_folder / name for name in queries],
    )
    (benchmark,) = find_benchmarks(root)
    assert benchmark.name == Path(specification).stem
    report = evaluate(benchmark, tiny_model)
    check_published(report)
    assert (report["query_sequence"], report["database_sequence"]) == (query_folder, "set")
    assert [one.name for one in find_benchmarks(tmp_path)] == [benchmark.name]


def test_of_netvlads_lists_the_set_with_queries_is_meant(
    write_pictures: WritePictures, tmp_path: Path
) -> None:
    # The archive brings the lists of both.
    for name in ("pitts30k_test", "tokyo247"):
        write_db_struct(tmp_path / "datasets" / f"{name}.mat", list("abcd"), list("xyz"))
    with pytest.raises(SourceError, match=r"4 of 4 database images .* unpack 000\.tar"):
        find_benchmarks(tmp_path)
    write_pictures(
        [tmp_path / name for name in "abcd"],
        [tmp_path / "247query_subset_v2" / name for name in "xyz"],
    )
    assert [one.name for one in find_benchmarks(tmp_path)] == ["tokyo247"]


@pytest.fixture
def msls(write_pictures: WritePictures, tmp_path: Path) -> Path:
    """Three cities, of which one is for training; the second query of each is a panorama."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    for name in ("melbourne", "goa", "amman"):
        files: list[list[Path]] = []
        for side, east in (("database", DATABASE_EAST), ("query", [*QUERY_EAST, 0])):
            folder = tmp_path / "train_val" / name / side
            folder.mkdir(parents=True)
            rows = [f"{side}{i},{x},0" for i, x in enumerate(east)]
            (folder / "postprocessed.csv").write_text(
                "\n".join(["key,easting,northing", *rows]) + "\n"
            )
            rows = [f"{side}{i},{side == 'query' and i == 3}" for i in range(len(east))]
            (folder / "raw.csv").write_text("\n".join(["key,pano", *rows]) + "\n")
            files.append([folder / "images" / f"{side}{i}.jpg" for i in range(len(east))])
        write_pictures(files[0], files[1][:3])
    return tmp_path


def test_cities_of_msls(
    msls: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two that the figures are given for, in the order in which they are.
    assert [one.name for one in find_benchmarks(msls)] == ["msls_amman", "msls_goa"]
    options = ("--bundle", tiny_bundle, "--backend", "onnxruntime", "--output", tmp_path / "out")
    monkeypatch.chdir(msls / "train_val" / "melbourne")
    for folder in (".", msls / "train_val" / "goa"):
        assert run("evaluate", folder, *options) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["msls_goa.json", "msls_melbourne.json"]
    for file in files:
        report = json.loads(file.read_text())
        check_published(report)
        assert (report["query_sequence"], report["database_sequence"]) == ("query", "database")
        assert report["model_id"].startswith("tiny-")


def test_a_listed_image_that_cannot_be_read_ends_it(
    msls: Path, tiny_model: PlaceModel, caplog: pytest.LogCaptureFixture
) -> None:
    city = msls / "train_val" / "goa"
    (city / "query" / "images" / "query1.jpg").write_bytes(b"")
    (benchmark,) = find_benchmarks(city)
    with pytest.raises(BenchmarkError, match=r"goa/query cannot be used \(empty image"):
        evaluate(benchmark, tiny_model)
    assert "empty image at images/query1.jpg" in caplog.text


def test_without_scipy_only_published_sets_fail(
    make_images: MakeImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "vpr_lite_ros.datasets", raising=False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    write_loops(make_images(tmp_path / "hall", [0, 1]), (1, 0))
    assert len(find_benchmarks(tmp_path)) == 1
    (tmp_path / "tokyo").mkdir()
    (tmp_path / "tokyo" / "tokyo247.mat").write_bytes(b"")
    assert run("evaluate", tmp_path) == 1
    err = capsys.readouterr().err
    assert "tokyo holds tokyo247, and reading that needs scipy (" in err
    assert "pip install -r requirements/train.txt" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("rerank", [0, 1])
def test_tokens_are_stored_for_reranking_only(
    make_images: MakeImages,
    tiny_model: PlaceModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rerank: int,
) -> None:
    stored: list[NDArray[np.float16]] = []
    add = KeyframeDatabase.add

    def keep(database: KeyframeDatabase, stamp_ns: int, description: Any, **more: Any) -> int:
        stored.append(description.tokens)
        return add(database, stamp_ns, description, **more)

    monkeypatch.setattr(KeyframeDatabase, "add", keep)
    before, after = (make_images(tmp_path / name, [0, 1]) for name in ("before", "after"))
    evaluate(aligned("same", after, before), tiny_model, rerank=rerank)
    count = tiny_model.bundle.max_patches if rerank else 0
    assert [len(tokens) for tokens in stored] == [count, count]
    # An empty view would keep all of an image's tokens in memory.
    assert rerank or all(tokens.base is None for tokens in stored)


# -- re-ranking ----------------------------------------------------------------------------------


class _Oracle(PlaceModel):
    """Describes as the model does, and knows which picture goes with which."""

    def __init__(
        self, model: PlaceModel, pictures: list[NDArray[np.uint8]], partners: Sequence[int]
    ) -> None:
        super().__init__(model.bundle, model._place, model._match)
        self._tokens = np.stack([model.describe(picture).tokens for picture in pictures])
        self._partners = partners
        self.calls: list[int] = []

    def _picture(self, tokens: NDArray[np.float16]) -> int:
        # The nearest: two runs on several threads differ in their last digits.
        return int(np.abs(self._tokens - tokens).sum(axis=(1, 2), dtype=np.float64).argmin())

    def match(self, query: Any, candidates: Any) -> tuple[NDArray[np.float32], Any]:
        self.calls.append(len(candidates))
        wanted = self._partners[self._picture(query)]
        found = [self._picture(tokens) == wanted for tokens in candidates]
        count = self.bundle.max_patches
        return np.array(found, np.float32), np.zeros((len(found), count, count), np.float32)


def test_reranking_follows_the_match_scores(
    make_images: MakeImages,
    make_picture: MakePicture,
    tiny_model: PlaceModel,
    tmp_path: Path,
) -> None:
    # As above with a tolerance of none: looks mislead every query, matching leads to the truth.
    database = make_images(tmp_path / "before", [0, 1, 2, 3, 4])
    queries = make_images(tmp_path / "after", [1, 2, 3, 4, 0])
    pictures = [make_picture(seed) for seed in range(5)]
    oracle = _Oracle(tiny_model, pictures, partners=[4, 0, 1, 2, 3])
    benchmark = aligned("shift", queries, database, tolerance=0)

    report = evaluate(benchmark, oracle, rerank=5)
    assert oracle.calls == [5] * 5
    assert report["global"]["recall_at_1"] == 0.0
    assert report["reranked"] == {"candidates": 5, **dict.fromkeys(FIGURES, 1.0)}
    lines = describe(report).splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["global", "reranked", "detector,"]
    assert "without epipolar check" in lines[-1] and "not calibrated" in lines[-1]

    # What looks best is false: one candidate leaves nothing to choose from.
    report = evaluate(benchmark, oracle, rerank=1)
    assert report["reranked"]["recall_at_1"] == 0.0
    assert report["reranked"]["recall_at_5"] == 1.0
    assert oracle.calls[5:] == [1] * 5


def test_more_candidates_than_ten_are_retrieved_for_reranking(
    make_images: MakeImages, make_picture: MakePicture, tiny_model: PlaceModel, tmp_path: Path
) -> None:
    database = make_images(tmp_path / "before", range(12))
    queries = make_images(tmp_path / "after", range(12))
    oracle = _Oracle(tiny_model, [make_picture(seed) for seed in range(12)], range(12))
    evaluate(aligned("same", queries, database), oracle, rerank=12)
    assert oracle.calls == [12] * 12


# -- what will not do ----------------------------------------------------------------------------


def test_what_is_no_benchmark_is_named(make_images: MakeImages, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"nowhere does not exist\. Pass a folder of images"):
        find_benchmarks(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="file is no folder"):
        find_benchmarks(tmp_path / "file")
    make_images(tmp_path / "bare" / "images", [0])
    with pytest.raises(BenchmarkError, match=r"bare is no benchmark .* loops.csv .* --queries A"):
        find_benchmarks(tmp_path / "bare")


def test_labels_must_fit_the_images(make_images: MakeImages, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "walk", range(3))
    write_loops(folder, (2, 0), (3, 1))
    with pytest.raises(BenchmarkError, match="lists the pair 3,1, but the 3 images are numbered 0"):
        find_benchmarks(folder)
    (folder / "loops.csv").unlink()
    write_poses(folder, [0, 1])
    with pytest.raises(BenchmarkError, match=r"no pose for 1 of 3 images, the first is 002\.png"):
        find_benchmarks(folder)
    write_poses(folder, [0, 1], stamps=[0, 1])
    with pytest.raises(BenchmarkError, match=r"no stamp for 002\.png"):
        find_benchmarks(folder)
    (folder / "poses.csv").write_text("stamp_s,x,y\n0,0,0\n1,0,0\n2,0,0\n")
    with pytest.raises(BenchmarkError, match="add a column file or frame"):
        find_benchmarks(folder)


def test_sequences_must_be_as_long_as_one_another(make_images: MakeImages, tmp_path: Path) -> None:
    three, two = make_images(tmp_path / "three", range(3)), make_images(tmp_path / "two", range(2))
    with pytest.raises(BenchmarkError, match=r"three has 3 images, .*two has 2"):
        aligned("x", three, two)
    with pytest.raises(BenchmarkError, match="none is no folder of images"):
        aligned("x", three, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty holds no images"):
        aligned("x", three, tmp_path / "empty")


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_image_that_cannot_be_read_ends_it(
    make_images: MakeImages, tiny_model: PlaceModel, tmp_path: Path, broken: int
) -> None:
    folder = make_images(tmp_path / "walk", range(3))
    write_loops(folder, (2, 0))
    (folder / f"{broken:03}.png").write_bytes(b"")
    (benchmark,) = find_benchmarks(folder)
    with pytest.raises(BenchmarkError, match=r"walk cannot be used \(empty image"):
        evaluate(benchmark, tiny_model)


# -- the command ---------------------------------------------------------------------------------


def run(*argv: object) -> int:
    return main([str(one) for one in argv])


def test_evaluate_writes_a_file_for_each_set(
    make_images: MakeImages,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sets = tmp_path / "sets"
    for traverse in ("day_left", "day_right"):
        make_images(sets / "gardens" / traverse, range(4))
    make_images(sets / "walk" / "images", [0, 1, 2])
    write_poses(sets / "walk", [0, 10, 20])
    (sets / "notes").mkdir()
    command = ["evaluate", sets, "--output", tmp_path / "out", "--bundle", tiny_bundle]
    assert run(*command, "--backend", "onnxruntime", "--threads", 1, "--rerank", 2) == 0
    assert [record.args for record in caplog.records] == [(sets / "notes",)]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["gardens_day.json", "walk.json"]

    day = json.loads((tmp_path / "out" / "gardens_day.json").read_text())
    assert day["queries"] == 4 and day["tolerance"] == 2 and day["backend"] == "onnxruntime"
    assert day["model_id"].startswith("tiny-")
    assert set(day["global"]) == FIGURES and set(day["reranked"]) == {"candidates", *FIGURES}
    assert day["global"] == dict.fromkeys(FIGURES, 1.0)
    # What is not defined is null: NaN is no JSON.
    walk = json.loads((tmp_path / "out" / "walk.json").read_text())
    assert walk["queries"] == 0 and walk["global"] == dict.fromkeys(FIGURES)
    assert walk["min_time_gap_s"] == 30.0 and walk["tolerance"] == 5.0

    printed = capsys.readouterr().out
    assert "gardens_day: 4 queries with a true match, 4 frames of day_left looked up" in printed
    assert str(tmp_path / "out" / "walk.json") in printed


def test_evaluate_takes_two_folders_and_its_options(
    make_images: MakeImages, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "night", [1, 0])
    make_images(tmp_path / "day", [0, 1])
    options = ("--bundle", tiny_bundle, "--backend", "onnxruntime", "--tolerance", 0)
    assert run("evaluate", "--queries", "night", "--database", "day", *options) == 0
    report = json.loads((tmp_path / "build" / "eval" / "night_from_day.json").read_text())
    assert report["tolerance"] == 0 and report["global"]["recall_at_1"] == 0.0
    assert (report["query_sequence"], report["database_sequence"]) == ("night", "day")

    folder = make_images(tmp_path / "walk", [0, 1, 0])
    write_poses(folder, [0, 50, 8])
    assert run("evaluate", folder, *options, "--radius", 8, "--min_time_gap_s", 2) == 0
    report = json.loads((tmp_path / "build" / "eval" / "walk.json").read_text())
    assert report["tolerance"] == 8.0 and report["queries"] == 1
    assert report["global"]["recall_at_1"] == 1.0
    assert run("evaluate", folder, *options, "--radius", 8, "--rate", 0.05) == 0
    report = json.loads((tmp_path / "build" / "eval" / "walk.json").read_text())
    assert report["min_time_gap_s"] == 30.0 and report["queries"] == 1  # 40 s apart


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "pass either DATASET or both --queries and --database"),
        (["--queries", "a"], "pass either DATASET or both"),
        (["a", "--queries", "a"], "pass either DATASET or both"),
        (["a", "--queries", "a", "--database", "b"], "pass either DATASET or both"),
        (["a", "--rerank", "-1"], "argument --rerank: -1 is less than 0"),
        (["a", "--tolerance", "-1"], "argument --tolerance: -1 is less than 0"),
        (["a", "--top_k", "3"], "unknown option --top_k"),
        (["a", "--backend", "abacus"], "parameter backend: 'abacus' is unknown"),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run("evaluate", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and complaint in err


def test_a_missing_dataset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "nowhere") == 1
    err = capsys.readouterr().err
    assert "dataset nowhere does not exist" in err and len(err.splitlines()) == 1


# -- the published sets --------------------------------------------------------------------------


def test_the_published_sets_have_the_queries_their_sources_name(data_dir: Path) -> None:
    folder = data_dir / "eval"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    queries = {one.name: int(one.findable(30.0).sum()) for one in find_benchmarks(folder)}
    assert queries == {
        "campus_walk": 0,
        "corridor_two_laps": 44,
        "gardens_point_day": 200,
        "gardens_point_night": 200,
        "kitti00": 41,
    }
