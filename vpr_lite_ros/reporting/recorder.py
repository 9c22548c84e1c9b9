"""Runs the network over every frame of a recording, once; what was interrupted goes on there.

However often it was interrupted, and wherever, the scores are the same as without.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from vpr_lite_ros.bags import Source, SourceError, open_source
from vpr_lite_ros.camera_file import camera_beside, read_camera
from vpr_lite_ros.candidate import Decision
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import DatabaseError, KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.measurement import OPEN
from vpr_lite_ros.odometry import Odometry, read_odometry
from vpr_lite_ros.progress import progress
from vpr_lite_ros.replay import numbered, source_camera
from vpr_lite_ros.reporting.recording import (
    KEYFRAMES,
    SCORES,
    STATE,
    Recording,
    open_keyframes,
    read_lines,
    read_recording,
    read_state,
)
from vpr_lite_ros.summary import Record, dumps, write_json

FORMAT = 3
SETTINGS = "settings.json"
DECIDES_WHAT_IS_RECORDED = ("top_k", "min_time_gap_s", "epipolar_tolerance_px")
"""With the group ``keyframe`` and the model: another value of these is another recording."""


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
            "content": _fingerprint(source_path, work),
            "image_topic": image_topic,
            "rate_hz": rate_hz,
            "odometry": odometry.topic if odometry else "",
            "camera": json.loads(camera.to_json()) if camera else None,
            "model_id": model.bundle.model_id,
            "calibration": model.bundle.card.get("calibration"),
            "keyframe": asdict(config.keyframe),
            **{name: getattr(config, name) for name in DECIDES_WHAT_IS_RECORDED},
        }
        key = hashlib.sha256(dumps(settings).encode()).hexdigest()[:10]
        folder = work / f"recording-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
        state = read_state(folder)
        if state.get("stopped") != "":
            _drop_half(folder)
            with closing(open_keyframes(folder, model)) as database:
                last = _mend(folder, database)
                detector = LoopDetector(replace(config, **OPEN), model, database)
                _go_on(source, detector, folder, state, last, camera, odometry)
    return read_recording(folder, camera, odometry.topic if odometry else "")


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
    began, before = time.perf_counter(), float(state.get("seconds", 0.0))
    if last >= 0:
        detector.resume()
    stopped, done = "", last + 1
    with (
        (folder / SCORES).open("a", encoding="utf-8", newline="\n", buffering=1) as file,
        logging_redirect_tqdm(),
    ):
        try:
            frames = progress(source, len(source), "frame", f"recording {source.path.name}")
            for number, frame in numbered(source, frames):
                if number <= last:
                    continue
                pose = odometry.at(frame.stamp_ns) if odometry else None
                decision = detector.process(frame.image, frame.stamp_ns, pose, camera)
                if decision.fault:
                    raise DatabaseError(decision.fault)
                if decision.keyframe_id is not None:
                    session = detector.database.session
                    print(dumps(_line(number, frame.name, session, decision)), file=file)
                done = number + 1
            done = max(done, len(source))  # there may be no image in the last of them
        except KeyboardInterrupt:
            stopped = "interrupted"
        except SourceError as error:
            stopped = str(error)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    state = {
        "frames": max(done, int(state.get("frames", 0))),
        "total": max(len(source), done),
        "skipped": source.skipped,
        "stopped": stopped,
        "seconds": before + time.perf_counter() - began,
        "peak_memory_mb": max(peak_mb, float(state.get("peak_memory_mb", 0.0))),
    }
    write_json(folder / STATE, state)


def _line(number: int, name: str, session: str, decision: Decision) -> Record:
    return {
        "frame": number,
        "stamp_ns": decision.stamp_ns,
        "name": name,
        "id": decision.keyframe_id,
        "session": session,
        "ms": {stage: round(spent, 3) for stage, spent in decision.timings_ms.items()},
        "candidates": [
            [
                one.keyframe.id, _short(one.similarity), _short(one.match_score), one.num_matches,
                one.num_inliers, one.agreement, one.num_correlated, one.confidence_alone,
                int(bool(one.has_camera)), one.apart_m, one.travelled_m,
            ]
            for one in decision.candidates
        ],
    }  # fmt: skip


def _short(value: float) -> float:
    """The fewest digits that give the same 32-bit number again."""
    return float(str(np.float32(value)))


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
    scores.touch()
    frame, last_id, count = -1, 0, 0
    for line in read_lines(folder):
        if line["id"] > database.last_id:
            break
        frame, last_id, count = line["frame"], line["id"], count + 1
    database.delete_after(last_id)
    with scores.open("rb") as file:
        kept = sum(len(file.readline()) for _ in range(count))
    os.truncate(scores, kept)
    return frame


def _fingerprint(path: Path, work: Path) -> str:
    """Says whether a source is still the one that was recorded: names, sizes, times.

    Results in ``work`` may lie in the same folder, and do not count.
    """
    files = [path]
    if path.is_dir():
        results = work.resolve()
        files = sorted(
            file
            for file in path.resolve().rglob("*")
            if file.is_file() and results not in file.parents
        )
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
    found = camera_beside(path)
    return read_camera(found) if found else None
