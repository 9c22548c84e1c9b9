"""What the network said of every frame of a recording, as it lies on disk and in arrays.

``recorder.py`` writes it: ``scores.jsonl`` with a line a keyframe, ``keyframes.sqlite`` with the
keyframes themselves, ``state.json`` with how far it came. Every candidate was matched and checked
as if no threshold were there, so that any thresholds can be tried on its scores.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.candidate import Candidate
from vpr_lite_ros.database import Keyframe, KeyframeDatabase
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.summary import Record

SESSION = "recording"
SCORES, KEYFRAMES, STATE = "scores.jsonl", "keyframes.sqlite", "state.json"
FIELDS = {"frame", "stamp_ns", "name", "id", "ms", "candidates", "session"}
_NO_CENTRES = np.zeros((0, 2), np.float32)


class RecordingError(RuntimeError):
    """Scores on disk that cannot be used; the message says which file and what to do."""


@dataclass
class Measured(Candidate):
    """A candidate whose matches were counted when it was recorded."""

    counted_matches: int = 0
    counted_inliers: int = 0

    @property
    def num_matches(self) -> int:
        return self.counted_matches

    @property
    def num_inliers(self) -> int:
        return self.counted_inliers


@dataclass(frozen=True)
class Recording:
    """Scores of K keyframes with M candidates in all. Keyframes are numbered from 0."""

    folder: Path
    frames: int
    """How many frames of the source were gone through, unreadable ones included."""
    total: int
    """How many the source has, as far as it knows."""
    skipped: dict[str, int]
    stopped: str
    """Why not all of the source was gone through; empty if it was."""
    seconds: float
    peak_memory_mb: float
    camera: Camera | None
    odometry: str
    """Topic that chose the keyframes; empty if appearance did."""
    frame: NDArray[np.int64]
    """(K,) number in the source, unreadable frames counted."""
    stamp_ns: NDArray[np.int64]
    session: list[str]
    """Another one begins where stamps go back."""
    names: list[str]
    id: NDArray[np.int64]
    """(K,) in the database."""
    first: NDArray[np.int64]
    """(K + 1,) where each keyframe's candidates begin in the arrays below."""
    match: NDArray[np.int64]
    """(M,) keyframes."""
    similarity: NDArray[np.float32]
    match_score: NDArray[np.float32]
    num_matches: NDArray[np.int64]
    num_inliers: NDArray[np.int64]
    agreement: NDArray[np.int64]
    num_correlated: NDArray[np.int64]
    confidence: NDArray[np.float64]
    """(M,) by the image alone."""
    has_camera: NDArray[np.bool_]
    apart_m: NDArray[np.float64]
    travelled_m: NDArray[np.float64]
    """(M,) by odometry; NaN where it does not know."""
    timings_ms: dict[str, NDArray[np.float32]]
    """(K,) by stage; NaN where a stage did not take place."""

    def __len__(self) -> int:
        return len(self.frame)

    @cached_property
    def keyframes(self) -> list[Keyframe]:
        """All keyframes, as far as decisions ask for them."""
        return [
            Keyframe(keyframe_id, 0, session, stamp_ns, None, None, _NO_CENTRES)
            for keyframe_id, session, stamp_ns in zip(
                self.id.tolist(), self.session, self.stamp_ns.tolist(), strict=True
            )
        ]

    @cached_property
    def number_of(self) -> dict[int, int]:
        """Keyframe number by id."""
        return {keyframe_id: number for number, keyframe_id in enumerate(self.id.tolist())}

    def rows(self, keyframe: int) -> slice:
        """Where the candidates of a keyframe are in the arrays (M,)."""
        return slice(int(self.first[keyframe]), int(self.first[keyframe + 1]))

    @property
    def sureness(self) -> NDArray[np.float64]:
        """(M,) what candidates are ranked by: see ``candidate.sureness``."""
        return np.where(np.isnan(self.confidence), self.match_score, self.confidence)

    def candidates(self, keyframe: int) -> list[Candidate]:
        """The candidates of a keyframe in order of retrieval, measured, not judged.

        Only what decisions are made by: what confidence was made of is in the arrays.
        """
        rows = self.rows(keyframe)
        columns = (
            self.match, self.similarity, self.match_score, self.num_matches, self.num_inliers,
            self.confidence, self.has_camera, self.apart_m, self.travelled_m,
        )  # fmt: skip
        found = zip(*(column[rows].tolist() for column in columns), strict=True)
        return [
            Measured(
                self.keyframes[match], similarity, rank, score,
                confidence_alone=confidence, has_camera=has_camera, apart_m=apart,
                travelled_m=travelled, counted_matches=matches, counted_inliers=inliers,
            )
            for rank, (
                match, similarity, score, matches, inliers, confidence, has_camera, apart,
                travelled,
            ) in enumerate(found)
        ]  # fmt: skip

    @property
    def bytes_on_disk(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())


# -- what is on disk -----------------------------------------------------------------------------


def open_keyframes(folder: Path, model: PlaceModel) -> KeyframeDatabase:
    """The database of a recording, which the caller closes."""
    return KeyframeDatabase(
        folder / KEYFRAMES,
        model_id=model.bundle.model_id,
        dimension=model.bundle.dimension,
        max_patches=model.bundle.max_patches,
        session=SESSION,
        resume=True,
    )


def read_recording(folder: Path, camera: Camera | None = None, odometry: str = "") -> Recording:
    """All scores in ``folder``, as arrays: 60 bytes a candidate."""
    state = read_state(folder)
    columns = [array(code) for code in "qffqqqqdbdd"]
    frame, stamp_ns, ids, first = (array("q") for _ in range(4))
    names: list[str] = []
    sessions: list[str] = []
    timings: dict[str, array[float]] = {}
    first.append(0)
    number_of: dict[int, int] = {}
    for line in read_lines(folder):
        for stage in {*timings, *line["ms"]}:
            if stage not in timings:
                timings[stage] = array("f", [np.nan] * len(frame))
            timings[stage].append(line["ms"].get(stage, np.nan))
        for candidate in line["candidates"]:
            candidate[0] = number_of[candidate[0]]
            candidate = [np.nan if value is None else value for value in candidate]
            for column, value in zip(columns, candidate, strict=True):
                column.append(value)
        number_of[line["id"]] = len(frame)
        frame.append(line["frame"])
        stamp_ns.append(line["stamp_ns"])
        ids.append(line["id"])
        names.append(line["name"])
        sessions.append(line["session"])
        first.append(len(columns[0]))
    (
        match, similarity, score, matches, inliers, agreement, correlated, confidence, has_camera,
        apart, travelled,
    ) = columns  # fmt: skip
    return Recording(
        folder=folder,
        frames=int(state.get("frames", 0)),
        total=int(state.get("total", 0)),
        skipped=dict(state.get("skipped", {})),
        stopped=str(state.get("stopped", "interrupted")),
        seconds=float(state.get("seconds", 0.0)),
        peak_memory_mb=float(state.get("peak_memory_mb", 0.0)),
        camera=camera,
        odometry=odometry,
        frame=np.array(frame, np.int64),
        stamp_ns=np.array(stamp_ns, np.int64),
        session=sessions,
        names=names,
        id=np.array(ids, np.int64),
        first=np.array(first, np.int64),
        match=np.array(match, np.int64),
        similarity=np.array(similarity, np.float32),
        match_score=np.array(score, np.float32),
        num_matches=np.array(matches, np.int64),
        num_inliers=np.array(inliers, np.int64),
        agreement=np.array(agreement, np.int64),
        num_correlated=np.array(correlated, np.int64),
        confidence=np.array(confidence, np.float64),
        has_camera=np.array(has_camera, np.bool_),
        apart_m=np.array(apart, np.float64),
        travelled_m=np.array(travelled, np.float64),
        timings_ms={stage: np.array(row, np.float32) for stage, row in timings.items()},
    )


def read_state(folder: Path) -> Record:
    """How far a recording came; empty if nothing says so."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a run that was killed leaves none, or an older one
    return state if isinstance(state, dict) else {}


def read_lines(folder: Path) -> Iterator[Record]:
    """Whole lines of scores, one a keyframe.

    Raises
    ------
    RecordingError
        If one is not what was written.
    """
    path = folder / SCORES
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                return  # a run that was killed may leave half a line
            try:
                line = json.loads(text)
                if not line.keys() >= FIELDS:
                    raise ValueError("fields are missing")
            except (ValueError, AttributeError) as error:
                raise RecordingError(
                    f"{path}, line {number}: {error}. Remove {folder} to record anew"
                ) from error
            yield line
