"""What the network says of every frame of a recording, worked out once and kept on disk.

Every candidate is matched and checked as if no threshold were there, so that any thresholds can
be tried on its scores afterwards. ``scores.jsonl`` grows by a line a keyframe, ``keyframes.sqlite``
by the keyframe itself; a run that was interrupted goes on where it ended.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.contrib.logging import logging_redirect_tqdm

from vpr_lite_ros.bags import Source, SourceError, open_source
from vpr_lite_ros.benchmarks import CAMERA_FILES
from vpr_lite_ros.camera_file import read_camera
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import Keyframe, KeyframeDatabase
from vpr_lite_ros.detector import Candidate, Decision, LoopDetector
from vpr_lite_ros.image import fit
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.measurement import OPEN
from vpr_lite_ros.odometry import Odometry, read_odometry
from vpr_lite_ros.progress import progress
from vpr_lite_ros.replay import numbered, source_camera
from vpr_lite_ros.summary import Record, dumps, write_json

FORMAT = 2
SESSION = "recording"
SCORES, KEYFRAMES, STATE, SETTINGS = (
    "scores.jsonl", "keyframes.sqlite", "state.json", "settings.json",
)  # fmt: skip
DECIDES_WHAT_IS_RECORDED = ("top_k", "min_time_gap_s", "epipolar_tolerance_px")
"""With the group ``keyframe`` and the model: another value of these is another recording."""
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
        """(M,) what candidates are ranked by: see ``detector.sureness``."""
        return np.where(np.isnan(self.confidence), self.match_score, self.confidence)

    def candidates(self, keyframe: int) -> list[Candidate]:
        """The candidates of a keyframe in order of retrieval, measured, not judged."""
        rows = self.rows(keyframe)
        columns = (
            self.match, self.similarity, self.match_score, self.num_matches, self.num_inliers,
            self.agreement, self.confidence, self.has_camera, self.apart_m, self.travelled_m,
        )  # fmt: skip
        found = zip(*(column[rows].tolist() for column in columns), strict=True)
        return [
            Measured(
                self.keyframes[match], similarity, rank, score,
                agreement=agreement, confidence_alone=confidence, has_camera=has_camera,
                apart_m=apart, travelled_m=travelled,
                counted_matches=matches, counted_inliers=inliers,
            )
            for rank, (
                match, similarity, score, matches, inliers, agreement, confidence, has_camera,
                apart, travelled,
            ) in enumerate(found)
        ]  # fmt: skip

    @property
    def bytes_on_disk(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())


def record(
    source_path: Path,
    work: Path,
    config: Config,
    model: PlaceModel,
    *,
    image_topic: str | None = None,
    odom_topic: str | None = None,
    rate_hz: float = 1.0,
    camera_file: Path | None = None,
) -> Recording:
    """Run the network over a recording, or go on with that, or read what is finished.

    Parameters
    ----------
    source_path, image_topic, odom_topic, rate_hz, camera_file
        As in ``replay.replay_recording``; without ``camera_file`` a calibration beside the
        images serves, too.
    work
        Folder to keep recordings in; each combination of source and settings has its own.

    Raises
    ------
    SourceError, RecordingError, DatabaseError
        If something cannot be opened. A source that is damaged on the way ends as if it ended
        there, as does Ctrl-C; ``stopped`` says so.
    """
    with open_source(source_path, image_topic=image_topic, rate_hz=rate_hz) as source:
        camera = _camera(source_path, source, camera_file)
        odometry = read_odometry(source_path, odom_topic)
        settings = {
            "format": FORMAT,
            "source": str(source_path.resolve()),
            "content": _fingerprint(source_path),
            "image_topic": image_topic,
            "rate_hz": rate_hz,
            "odometry": odometry.topic if odometry else "",
            "camera": json.loads(camera.to_json()) if camera else None,
            "model_id": model.bundle.model_id,
            "keyframe": asdict(config.keyframe),
            **{name: getattr(config, name) for name in DECIDES_WHAT_IS_RECORDED},
        }
        key = hashlib.sha256(dumps(settings).encode()).hexdigest()[:10]
        folder = work / f"recording-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
        state = _read_state(folder)
        if state.get("stopped") != "":
            _drop_half(folder)
            with closing(open_keyframes(folder, model)) as database:
                last = _mend(folder, database)
                detector = LoopDetector(replace(config, **OPEN), model, database)
                _go_on(source, detector, folder, state, last, camera, odometry)
    return read_recording(folder, camera, odometry.topic if odometry else "")


def open_keyframes(folder: Path, model: PlaceModel) -> KeyframeDatabase:
    """The database of a recording, which the caller closes."""
    return KeyframeDatabase(
        folder / KEYFRAMES,
        model_id=model.bundle.model_id,
        dimension=model.bundle.dimension,
        max_patches=model.bundle.max_patches,
        session=SESSION,
    )


def _go_on(
    source: Source,
    detector: LoopDetector,
    folder: Path,
    state: Record,
    last: int,
    camera: Camera | None,
    odometry: Odometry | None,
) -> None:
    """Give the frames after ``last`` to the detector; write what comes out, as it comes."""
    size = detector.model.bundle.image_size
    began, before = time.perf_counter(), float(state.get("seconds", 0.0))
    stopped, done = "", last + 1
    with (
        (folder / SCORES).open("a", encoding="utf-8", newline="\n", buffering=1) as file,
        logging_redirect_tqdm(),
    ):
        try:
            frames = progress(source, len(source), "frame", f"recording {source.path.name}")
            for number, frame in numbered(source, frames):
                if number < last:
                    continue
                pose = odometry.at(frame.stamp_ns) if odometry else None
                if number == last:
                    # The next frame is compared with this one, as it was before the break.
                    description = detector.model.describe(fit(frame.image, size))
                    detector.resume(frame.stamp_ns, pose, description)
                    continue
                decision = detector.process(frame.image, frame.stamp_ns, pose, camera)
                if decision.keyframe_id is not None:
                    line = _line(number, frame.name, decision)
                    line["session"] = detector.database.session
                    print(dumps(line), file=file)
                done = number + 1
        except KeyboardInterrupt:
            stopped = "interrupted"
        except SourceError as error:
            stopped = str(error)
    state = {
        "frames": max(done, int(state.get("frames", 0))),
        "total": max(len(source), done),
        "skipped": source.skipped,
        "stopped": stopped,
        "seconds": before + time.perf_counter() - began,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    write_json(folder / STATE, state)


def _line(number: int, name: str, decision: Decision) -> Record:
    return {
        "frame": number,
        "stamp_ns": decision.stamp_ns,
        "name": name,
        "id": decision.keyframe_id,
        "ms": {stage: round(spent, 3) for stage, spent in decision.timings_ms.items()},
        "candidates": [
            [
                one.keyframe.id, _short(one.similarity), _short(one.match_score), one.num_matches,
                one.num_inliers, one.agreement, one.confidence_alone, int(bool(one.has_camera)),
                one.apart_m, one.travelled_m,
            ]
            for one in decision.candidates
        ],
    }  # fmt: skip


def _short(value: float) -> float:
    """The fewest digits that give the same 32-bit number again."""
    return float(str(np.float32(value)))


# -- what is on disk -----------------------------------------------------------------------------


def read_recording(folder: Path, camera: Camera | None = None, odometry: str = "") -> Recording:
    """All scores in ``folder``, as arrays: 50 bytes a candidate."""
    state = _read_state(folder)
    columns = [array(code) for code in "qffqqqdbdd"]
    frame, stamp_ns, ids, first = (array("q") for _ in range(4))
    names: list[str] = []
    sessions: list[str] = []
    timings: dict[str, array[float]] = {}
    first.append(0)
    number_of: dict[int, int] = {}
    for line in _lines(folder):
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
        match, similarity, score, matches, inliers, agreement, confidence, has_camera, apart,
        travelled,
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
        confidence=np.array(confidence, np.float64),
        has_camera=np.array(has_camera, np.bool_),
        apart_m=np.array(apart, np.float64),
        travelled_m=np.array(travelled, np.float64),
        timings_ms={stage: np.array(row, np.float32) for stage, row in timings.items()},
    )


def _read_state(folder: Path) -> Record:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a run that was killed leaves none, or an older one
    return state if isinstance(state, dict) else {}


def _lines(folder: Path) -> Iterator[Record]:
    path = folder / SCORES
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
                if not line.keys() >= FIELDS:
                    raise ValueError("fields are missing")
            except (ValueError, AttributeError) as error:
                raise RecordingError(
                    f"{path}, line {number}: {error}. Remove {folder} to record anew"
                ) from error
            yield line


def _drop_half(folder: Path) -> None:
    """Begin anew where a run was killed before it had written both files."""
    scores, keyframes = folder / SCORES, folder / KEYFRAMES
    if not scores.is_file() or not keyframes.is_file():
        for file in [scores, *folder.glob(f"{KEYFRAMES}*"), folder / STATE]:
            file.unlink(missing_ok=True)


def _mend(folder: Path, database: KeyframeDatabase) -> int:
    """Drop what file and database do not share; return the last frame that is left, or -1.

    A run that was killed may have left half a line, or a keyframe without its line.
    """
    scores = folder / SCORES
    text = scores.read_bytes() if scores.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1]
    scores.write_bytes(whole)
    frame, last_id, count = -1, 0, 0
    for line in _lines(folder):
        if line["id"] > database.last_id:
            break
        frame, last_id, count = line["frame"], line["id"], count + 1
    database.delete_after(last_id)
    scores.write_bytes(b"".join(whole.splitlines(keepends=True)[:count]))
    return frame


def _fingerprint(path: Path) -> str:
    """Says whether a source is still the one that was recorded: names, sizes, times."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        about = file.stat()
        digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _camera(path: Path, source: Source, camera_file: Path | None) -> Camera | None:
    """Intrinsics: as the user says, as the source says, or from a file beside the images."""
    if camera_file is not None:
        return read_camera(camera_file)
    if (camera := source_camera(source)) is not None or not path.is_dir():
        return camera
    folders = [path, path.parent] if path.name == "images" else [path]
    beside = [folder / name for folder in folders for name in CAMERA_FILES]
    found = next((file for file in beside if file.is_file()), None)
    return read_camera(found) if found else None
