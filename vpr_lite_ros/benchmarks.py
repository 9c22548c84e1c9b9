"""Benchmarks: labelled images on disk, and how well a model finds places among them.

There are two kinds. In *one sequence* every frame is looked up among the frames before it that
are at least a time gap older, as the node does. With *two sequences* every frame of one is looked
up among all frames of the other, the database. Descriptors and tokens go through the node's own
``KeyframeDatabase``, so what is measured is the retrieval that runs on the robot.

What the figures mean is in ``evaluation.py``. *Queries* are the frames that have an eligible true
match: Recall@K is over these. The precision-recall curve is over all frames that were looked up,
because on a drive most frames show a new place and a match for one of these is a false loop;
its recall counts the queries, too.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.bags import Frame, Source, read_pairs, read_poses
from vpr_lite_ros.bags.pixels import UnusableImage, decode_file
from vpr_lite_ros.bags.sources import FolderSource
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.evaluation import (
    Booleans,
    GroundTruth,
    PairTruth,
    RadiusTruth,
    findable,
    precision_recall,
    recall_at,
)
from vpr_lite_ros.image import fit
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.progress import progress
from vpr_lite_ros.summary import Record, write_json

if TYPE_CHECKING:
    from vpr_lite_ros.datasets import PlaceDataset

log = logging.getLogger(__name__)

RECALL_KS = (1, 5, 10)
MATCH_BATCH = 10
"""Candidates matched in one call: of each, an N × N assignment comes back."""

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


@dataclass(frozen=True)
class Answer:
    """What was found for one frame."""

    frame: int
    matches: list[int]
    """Frame numbers, best first; empty if nothing was eligible."""
    score: float
    """How sure the first match is; NaN without matches."""


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
    return Benchmark(name, source, None, PairTruth(pairs), 0, "frames")


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
    return Benchmark(name, source, None, RadiusTruth(xyz, radius_m), radius_m, "m")


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


# -- measuring -----------------------------------------------------------------------------------


def evaluate(
    benchmark: Benchmark, model: PlaceModel, *, min_time_gap_s: float = 30.0, rerank: int = 0
) -> Record:
    """Look everything up and measure how good the answers are.

    Parameters
    ----------
    min_time_gap_s
        In one sequence, a frame is looked up among frames at least this much older.
    rerank
        This many candidates of each frame are also put in the order of their match scores.
        0: none, which is much faster.

    Returns
    -------
    dict
        ``queries``, ``looked_up`` and ``database`` (numbers of frames), ``query_sequence`` and
        ``database_sequence`` (names of folders), ``tolerance``, ``tolerance_unit``, ``true_if``,
        ``min_time_gap_s`` (None with two sequences), ``model_id``, ``backend``, and ``global``
        and, if asked for, ``reranked``: each ``recall_at_1``, ``recall_at_5``, ``recall_at_10``,
        ``auc``, ``recall_at_100_precision`` (NaN without queries); ``reranked`` also
        ``candidates``, the value of ``rerank``.

    Raises
    ------
    BenchmarkError
        If an image cannot be read: the figures would be those of another set of images.
    """
    could = benchmark.findable(min_time_gap_s)
    retrieved, reranked = _look_up(benchmark, model, benchmark.gap_ns(min_time_gap_s), rerank)
    report: Record = {
        "dataset": benchmark.name,
        "queries": int(could.sum()),
        "looked_up": sum(bool(answer.matches) for answer in retrieved),
        "database": len(benchmark.sources[0]),
        "query_sequence": benchmark.queries.path.resolve().name,
        "database_sequence": benchmark.sources[0].path.resolve().name,
        "tolerance": benchmark.tolerance,
        "tolerance_unit": benchmark.tolerance_unit,
        "true_if": benchmark.truth.definition,
        "min_time_gap_s": min_time_gap_s if benchmark.database is None else None,
        "model_id": model.bundle.model_id,
        "backend": model.backend,
        "global": measure(retrieved, benchmark.truth, could),
    }
    if rerank:
        figures = measure(reranked, benchmark.truth, could)
        report["reranked"] = {"candidates": rerank, **figures}
    return report


def measure(answers: Sequence[Answer], truth: GroundTruth, could: Booleans) -> dict[str, float]:
    """The figures of one ranking.

    Parameters
    ----------
    answers
        One for each frame that was looked up, with or without matches.
    could
        (len(answers),) which of these frames have an eligible true match.
    """
    ranks = [
        truth.same_place(answer.frame, np.array(answer.matches, np.int64)) for answer in answers
    ]
    recall = recall_at([rank for rank, can in zip(ranks, could, strict=True) if can], RECALL_KS)
    first = [
        (answer.score, bool(rank[0]))
        for answer, rank in zip(answers, ranks, strict=True)
        if len(rank)
    ]
    curve = precision_recall(
        np.array([score for score, _ in first]),
        np.array([true for _, true in first], np.bool_),
        int(could.sum()),
    )
    return {
        **{f"recall_at_{k}": value for k, value in recall.items()},
        "auc": curve.auc,
        "recall_at_100_precision": curve.recall_at_100_precision,
    }


def _look_up(
    benchmark: Benchmark, model: PlaceModel, min_gap_ns: int, rerank: int
) -> tuple[list[Answer], list[Answer]]:
    """Answers in the order of retrieval, and those in the order of match scores if wanted."""
    retrieved: list[Answer] = []
    reranked: list[Answer] = []
    bundle, first = model.bundle, benchmark.first_query
    keyframes = KeyframeDatabase(
        "",  # a temporary file: tokens of a long sequence do not fit into memory
        model_id=bundle.model_id,
        dimension=bundle.dimension,
        # Without re-ranking no tokens are stored: those of Tokyo 24/7 would take 30 GB.
        max_patches=bundle.max_patches if rerank else 0,
        session=benchmark.name,
    )
    frames = itertools.chain.from_iterable(map(read_frames, benchmark.sources))
    total = sum(map(len, benchmark.sources))
    number_of: dict[int, int] = {}  # frame number by id of the keyframe
    with closing(keyframes):
        for number, frame in enumerate(progress(frames, total, "frame", benchmark.name)):
            description = model.describe(fit(frame.image, bundle.image_size))
            if number >= first:
                depth = max(*RECALL_KS, rerank)
                found = keyframes.search(description.descriptor, depth, frame.stamp_ns, min_gap_ns)
                ids = [keyframe_id for keyframe_id, _ in found]
                numbers = [number_of[keyframe_id] for keyframe_id in ids]
                similarity = found[0][1] if found else math.nan
                retrieved.append(Answer(number, numbers, similarity))
                if rerank:
                    scores = _match_scores(model, description.tokens, keyframes, ids[:rerank])
                    reranked.append(reorder(retrieved[-1], scores))
            if benchmark.database is None or number < first:
                if not rerank:
                    description = replace(description, tokens=description.tokens[:0].copy())
                number_of[keyframes.add(frame.stamp_ns, description)] = number
    return retrieved, reranked


def _match_scores(
    model: PlaceModel, tokens: NDArray[np.float16], keyframes: KeyframeDatabase, ids: list[int]
) -> list[float]:
    scores: list[float] = []
    for start in range(0, len(ids), MATCH_BATCH):
        masses, _ = model.match(tokens, keyframes.tokens(ids[start : start + MATCH_BATCH]))
        scores += masses.tolist()
    return scores


def reorder(answer: Answer, scores: Sequence[float]) -> Answer:
    """``answer`` with its first ``len(scores)`` matches by falling score; the rest stay behind."""
    count = len(scores)
    # A stable sort: equal scores keep the order of retrieval.
    order = sorted(range(count), key=lambda rank: -scores[rank])
    matches = [answer.matches[rank] for rank in order] + answer.matches[count:]
    return Answer(answer.frame, matches, max(scores, default=math.nan))


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


# -- telling -------------------------------------------------------------------------------------


def evaluate_all(
    benchmarks: Sequence[Benchmark],
    model: PlaceModel,
    output: Path,
    *,
    min_time_gap_s: float = 30.0,
    rerank: int = 0,
) -> Iterator[tuple[Record, Path]]:
    """Evaluate one after the other; each report is in ``output/<name>.json`` when it is yielded."""
    for benchmark in benchmarks:
        report = evaluate(benchmark, model, min_time_gap_s=min_time_gap_s, rerank=rerank)
        path = output / f"{benchmark.name}.json"
        write_json(path, report)
        yield report, path


def describe(report: Record) -> str:
    """A report for people: what was asked, and a table of the figures."""
    gap = report["min_time_gap_s"]
    lines = [
        f"{report['dataset']}: {report['queries']} queries with a true match, "
        f"{report['looked_up']} frames of {report['query_sequence']} looked up among "
        f"{report['database']} of {report['database_sequence']}",
        f"  true: {report['true_if']}" + (f", at least {gap:g} s before" if gap else "")
        + f"; model {report['model_id']} on {report['backend']}",
    ]  # fmt: skip
    if not report["queries"]:
        return "\n".join([*lines, "  no frame has a true match: there is nothing to recall"])
    lines.append(f"  {'':10}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'PR AUC':>8}{'R@100%P':>9}")
    for name in ("global", "reranked"):
        if name in report:
            figures = report[name]
            recalls = "".join(f"{figures[f'recall_at_{k}']:8.3f}" for k in RECALL_KS)
            rest = f"{figures['auc']:8.3f}{figures['recall_at_100_precision']:9.3f}"
            lines.append(f"  {name:10}{recalls}{rest}")
    return "\n".join(lines)
