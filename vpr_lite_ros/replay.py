"""The detector on a recording, without ROS: every frame, in order, the same result each time.

Three files are written while it runs, so that an interrupted run leaves what is finished:
``decisions.jsonl`` (every candidate, with what became of it), ``closures.jsonl`` and
``closures.csv`` (the accepted ones). They hold no clock time and no latency: the same recording
and parameters give the same bytes. ``summary.json`` is written at the end.
"""

from __future__ import annotations

import csv
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm.contrib.logging import logging_redirect_tqdm

from vpr_lite_ros.bags import Source, SourceError, open_source, read_pairs, read_poses
from vpr_lite_ros.bags.depth import DepthTrack
from vpr_lite_ros.bags.rosbag import is_bag
from vpr_lite_ros.camera_file import read_camera
from vpr_lite_ros.candidate import Candidate, Decision
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import DatabaseError, open_database
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.evaluation import GroundTruth, PairTruth, RadiusTruth
from vpr_lite_ros.inference import DEFAULT_BUNDLE, open_model
from vpr_lite_ros.matching import Camera, Status
from vpr_lite_ros.odometry import Odometry, read_odometry
from vpr_lite_ros.progress import progress
from vpr_lite_ros.relative_pose import PoseType, relative_pose_of
from vpr_lite_ros.summary import Record, dumps, judge, percentile, write_json

CLOSURE_FIELDS = (
    "query_stamp_ns",
    "query_frame",
    "query_name",
    "query_id",
    "match_stamp_ns",
    "match_frame",
    "match_name",
    "match_id",
    "match_session",
    "rank",
    "similarity",
    "match_score",
    "confidence",
    "num_matches",
    "num_inliers",
    "num_correlated",
    "zoom",
    "pose_type",
    "x",
    "y",
    "z",
    "qx",
    "qy",
    "qz",
    "qw",
)
"""Columns of the closures' files. Frames are numbered from 0 in the recording's order; frame and
name of a match are empty where it is a keyframe of another session, confidence where the model
is not calibrated. The last eight say where the body was at the match in the frame of the body at
the query, as ``LoopClosure.msg`` does, of a camera that looks forward; empty where not known.
``closures.jsonl`` also has ``covariance``, 36 numbers row by row."""

DECIMALS = 6


@dataclass
class Run:
    """What happened in a replay; frames are numbered from 0 in the recording's order."""

    stamps_ns: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """By frame number; 0 and "" for frames that could not be read."""
    frames: int = 0
    """Frames that were read."""
    keyframes: dict[int, int] = field(default_factory=dict)
    """Frame number by id of the keyframe, in the order of storing."""
    queries: list[int] = field(default_factory=list)
    """Frame numbers of keyframes, stored or, in mode localization, not."""
    closures: list[tuple[int, int]] = field(default_factory=list)
    """Frame numbers (query, match) of accepted closures; match -1: of another session."""
    held_back: list[tuple[int, int]] = field(default_factory=list)
    """The same of keyframes that were recognised too soon after a closure to be one."""
    statuses: Counter[str] = field(default_factory=Counter)
    """How many candidates came to which end."""
    latencies_ms: list[float] = field(default_factory=list)
    """Of each keyframe."""
    seconds: float = 0.0
    stopped: str = ""
    """Why the recording was not replayed to its end; empty if it was."""


def replay_recording(
    recording: Path,
    output: Path,
    config: Config,
    *,
    image_topic: str | None = None,
    odom_topic: str | None = None,
    depth_topic: str | None = None,
    rate_hz: float = 1.0,
    camera_file: Path | None = None,
    poses: Path | None = None,
    poses_topic: str | None = None,
    pairs: Path | None = None,
    radius_m: float = 5.0,
) -> Record:
    """Replay ``recording``, judge the closures and write all files to the folder ``output``.

    Parameters
    ----------
    recording
        rosbag2, ROS 1 bag, folder of images or video.
    image_topic, odom_topic
        Of a bag; needed where it has several. An empty ``odom_topic`` does without odometry.
    depth_topic
        Of a bag: depth in register with the images, so that closures are in metres.
    rate_hz
        Frames per second of images without stamps.
    camera_file
        Intrinsics for the epipolar check; None takes the recording's own, if it has any.
    poses, poses_topic, radius_m
        Ground truth: a closure is true if its images were taken within ``radius_m`` metres.
    pairs
        Ground truth as a list of frame numbers instead.

    Returns
    -------
    dict
        What ``summary.json`` holds.

    Raises
    ------
    SourceError, BundleError, BackendError, DatabaseError
        If something cannot be opened. A recording damaged on the way ends the replay as if it
        ended there; ``stopped`` in the summary says why.
    """
    known_poses = read_poses(poses, topic=poses_topic) if poses else None
    known_pairs = read_pairs(pairs) if pairs else None
    with ExitStack() as stack:
        source = stack.enter_context(
            open_source(recording, image_topic=image_topic, rate_hz=rate_hz)
        )
        camera = read_camera(camera_file) if camera_file else source_camera(source)
        odometry = read_odometry(recording, odom_topic)
        depth = None
        if depth_topic:
            if not is_bag(recording):
                raise SourceError(f"{recording} is no bag: it has no depth topic {depth_topic!r}")
            depth = stack.enter_context(DepthTrack(recording, depth_topic))
        bundle = Path(config.bundle) if config.bundle else DEFAULT_BUNDLE
        model = open_model(bundle, config.backend, config.threads)
        database = open_database(config, model.bundle, config.session_id)
        stack.callback(database.close)
        detector = LoopDetector(config, model, database)

        run = replay(source, detector, output, camera=camera, odometry=odometry, depth=depth)

        evaluation = None
        if known_poses is not None:
            # In a bag all frames bear the topic's name, which says nothing about a frame.
            names = None if is_bag(recording) else run.names
            xyz = known_poses.positions_for(run.stamps_ns, names)
            evaluation = _judge(run, RadiusTruth(xyz, radius_m), config)
        elif known_pairs is not None:
            evaluation = _judge(run, PairTruth(known_pairs), config)
        summary = {
            "source": str(recording),
            "output": str(output),
            "stopped": run.stopped or None,
            "frames": run.frames,
            "skipped": source.skipped,
            "keyframes": len(run.queries),
            "closures": len(run.closures),
            "candidates": dict(sorted(run.statuses.items())),
            "evaluation": evaluation,
            "model_id": model.bundle.model_id,
            "backend": model.backend,
            "epipolar_check": camera is not None,
            "odometry": odometry.topic if odometry else None,
            "depth": depth.topic if depth else None,
            "without_depth": depth.missing if depth else {},
            "latency_ms_p50": percentile(run.latencies_ms, 50),
            "latency_ms_p95": percentile(run.latencies_ms, 95),
            "seconds": round(run.seconds, 1),
            "similarity_threshold": detector.similarity_threshold,
            "match_threshold": detector.match_threshold,
            "parameters": asdict(config),
        }
    write_json(output / "summary.json", summary)
    return summary


def replay(
    source: Source,
    detector: LoopDetector,
    output: Path,
    *,
    camera: Camera | None = None,
    odometry: Odometry | None = None,
    depth: DepthTrack | None = None,
) -> Run:
    """Give every frame of ``source`` to ``detector``; write what comes out, as it comes.

    Ctrl-C and a damaged recording end the run early; what was found until then counts.
    """
    run = Run()
    began = time.perf_counter()
    with _Files(output) as files, logging_redirect_tqdm():
        try:
            frames = progress(source, len(source), "frame", "replaying")
            for number, frame in numbered(source, frames):
                pose = odometry.at(frame.stamp_ns) if odometry else None
                distances = None
                if depth and detector.is_due(frame.stamp_ns, pose):
                    size = frame.image.shape[1], frame.image.shape[0]
                    distances = depth.at(frame.stamp_ns, frame.frame_id, size)
                decision = detector.process(frame.image, frame.stamp_ns, pose, camera, distances)
                if decision.fault:
                    raise DatabaseError(decision.fault)
                _note(run, number, frame.stamp_ns, frame.name, decision)
                files.write(decision, _records(run, number, decision))
        except KeyboardInterrupt:
            run.stopped = "interrupted"
        except SourceError as error:
            run.stopped = str(error)
    run.seconds = time.perf_counter() - began
    return run


def numbered(source: Source, frames: Any) -> Iterator[tuple[int, Any]]:
    """Frames with their number in the recording, in which unreadable ones count too."""
    before = sum(source.skipped.values())
    for count, frame in enumerate(frames):
        yield count + sum(source.skipped.values()) - before, frame


def _note(run: Run, number: int, stamp_ns: int, name: str, decision: Decision) -> None:
    while len(run.stamps_ns) < number:
        run.stamps_ns.append(0)
        run.names.append("")
    run.stamps_ns.append(stamp_ns)
    run.names.append(name)
    run.frames += 1
    if not decision.is_keyframe:
        return
    run.queries.append(number)
    if decision.keyframe_id is not None:
        run.keyframes[decision.keyframe_id] = number
    run.latencies_ms.append(decision.latency_ms)
    run.statuses.update(candidate.status.name for candidate in decision.candidates)
    if not decision.candidates:
        run.statuses[Status.NO_CANDIDATE.name] += 1
    if (recognised := decision.recognised) is not None:
        pairs = run.closures if decision.closure else run.held_back
        pairs.append((number, run.keyframes.get(recognised.keyframe.id, -1)))


def _records(run: Run, number: int, decision: Decision) -> list[Record]:
    """One record for each candidate, in order of rank; one of NO_CANDIDATE if there is none."""
    if not decision.is_keyframe:
        return []
    query: Record = dict.fromkeys((*CLOSURE_FIELDS, "status"))
    query |= {
        "query_stamp_ns": decision.stamp_ns,
        "query_frame": number,
        "query_name": run.names[number],
        "query_id": decision.keyframe_id,
        "status": Status.NO_CANDIDATE.name,
    }
    records = []
    for candidate in decision.candidates:
        keyframe = candidate.keyframe
        frame = run.keyframes.get(keyframe.id)
        records.append(
            query
            | {
                "match_stamp_ns": keyframe.stamp_ns,
                "match_frame": frame,
                "match_name": None if frame is None else run.names[frame],
                "match_id": keyframe.id,
                "match_session": keyframe.session,
                "rank": candidate.rank,
                "similarity": round(candidate.similarity, DECIMALS),
                "match_score": _rounded(candidate.match_score),
                "confidence": _rounded(candidate.confidence),
                "num_matches": candidate.num_matches,
                "num_inliers": candidate.num_inliers,
                "num_correlated": candidate.num_correlated,
                "zoom": _rounded(candidate.zoom),
                "status": candidate.status.name,
            }
            | _relative_pose(candidate)
        )
    return records or [query]


def _relative_pose(candidate: Candidate) -> Record:
    known = relative_pose_of(candidate.motion, candidate.metric)
    if known.pose_type is PoseType.NONE:
        return {"pose_type": known.pose_type.name}
    values = dict(zip(("x", "y", "z"), known.translation, strict=True))
    values |= dict(zip(("qx", "qy", "qz", "qw"), known.quaternion, strict=True))
    pose: Record = {name: round(value, DECIMALS) for name, value in values.items()}
    pose["covariance"] = [float(f"{value:.12g}") for value in known.covariance.ravel()]
    return {"pose_type": known.pose_type.name} | pose


def _rounded(value: float) -> float | None:
    """What is not a number is nothing: null in JSON, empty in CSV."""
    return None if math.isnan(value) else round(value, DECIMALS)


class _Files:
    """The three files that grow while a replay runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._decisions = stack.enter_context(_create(folder / "decisions.jsonl"))
            self._closures = stack.enter_context(_create(folder / "closures.jsonl"))
            table = stack.enter_context(_create(folder / "closures.csv"))
            self._table = csv.DictWriter(
                table, CLOSURE_FIELDS, extrasaction="ignore", lineterminator="\n"
            )
            self._table.writeheader()
            self._open = stack.pop_all()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, decision: Decision, records: list[Record]) -> None:
        for record in records:
            print(dumps(record), file=self._decisions)
        if decision.closure is not None:
            closure = records[decision.candidates.index(decision.closure)]
            kept = {key: closure[key] for key in (*CLOSURE_FIELDS, "covariance") if key in closure}
            print(dumps(kept), file=self._closures)
            self._table.writerow(closure)


def _create(path: Path) -> TextIO:
    # Line by line, so that a killed run leaves whole lines; the same line ends everywhere.
    return path.open("w", encoding="utf-8", newline="\n", buffering=1)


def _judge(run: Run, truth: GroundTruth, config: Config) -> Record:
    gap_s = config.min_time_gap_s
    return judge(truth, run.closures, run.queries, run.stamps_ns, gap_s, run.held_back)


def source_camera(source: Source) -> Camera | None:
    """Intrinsics that the recording itself carries, if any."""
    if source.camera_matrix is None or source.image_size is None:
        return None
    width, height = source.image_size
    return Camera(width, height, tuple(source.camera_matrix.ravel().tolist()))
