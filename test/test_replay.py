"""Replay: the real detector over folders and bags that are written here."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.bags import Frame, SourceError, open_source, write_drive
from vpr_lite_ros.camera_file import read_camera
from vpr_lite_ros.config import Config, make_config
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.inference import open_model
from vpr_lite_ros.odometry import read_odometry
from vpr_lite_ros.replay import CLOSURE_FIELDS, replay, replay_recording
from vpr_lite_ros.simulation import simulate_drive
from vpr_lite_ros.summary import describe

MakePicture = Callable[..., NDArray[np.uint8]]
GAP_S = 5.0
PLACES = 8
FILES = ("closures.jsonl", "closures.csv", "decisions.jsonl")


@pytest.fixture
def config(tiny_bundle: Path) -> Config:
    """Of a model that has learned nothing: checks that it can pass."""
    return settings(tiny_bundle)


def settings(bundle: Path, **values: object) -> Config:
    return make_config(
        {
            "bundle": str(bundle),
            "backend": "onnxruntime",
            "threads": 1,
            "session_id": "replay",
            "min_time_gap_s": GAP_S,
            "min_matches": 4,
            "min_inliers": 0,
            "keyframe.max_similarity": 1.0,
            **values,
        }
    )


@pytest.fixture(scope="module")
def laps(tmp_path_factory: pytest.TempPathFactory, make_picture: MakePicture) -> Path:
    """A folder of pictures: PLACES places, twice, a second apart, 10 m apart; with poses."""
    folder = tmp_path_factory.mktemp("recordings") / "laps"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "poses.csv").open("w") as poses:
        print("frame,stamp_s,x,y", file=poses)
        for frame in range(2 * PLACES):
            picture = make_picture(frame % PLACES).astype(np.int16)
            picture += rng.integers(-4, 5, picture.shape, np.int16)
            cv2.imwrite(str(folder / "images" / f"{frame:03}.png"), picture.clip(0, 255))
            print(f"{frame},{frame},{10 * (frame % PLACES)},0", file=poses)
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_recording_gives_the_same_bytes(
    laps: Path, config: Config, tmp_path: Path
) -> None:
    first = replay_recording(laps, tmp_path / "first", config)
    replay_recording(laps, tmp_path / "second", config)
    assert first["closures"] > 0
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_files_agree_with_each_other(laps: Path, config: Config, tmp_path: Path) -> None:
    summary = replay_recording(laps, tmp_path, config, poses=laps / "poses.csv")
    closures, decisions = (
        read_lines(tmp_path / name) for name in ("closures.jsonl", "decisions.jsonl")
    )
    with (tmp_path / "closures.csv").open(newline="") as file:
        table = list(csv.DictReader(file))

    assert summary["frames"] == summary["keyframes"] == 2 * PLACES
    assert summary["closures"] == len(closures) == len(table) > 0
    accepted = [line for line in decisions if line["status"] == "ACCEPTED"]
    assert [{**line, "status": "ACCEPTED"} for line in closures] == accepted
    for line, row in zip(closures, table, strict=True):
        assert tuple(line) == tuple(row) == CLOSURE_FIELDS
        shown = {name: "" if value is None else str(value) for name, value in line.items()}
        assert row == shown and row["confidence"] == ""
    # Every candidate is accounted for, and every keyframe has at least one line.
    counted = {line["status"] for line in decisions}
    assert counted == set(summary["candidates"])
    assert sum(summary["candidates"].values()) == len(decisions)
    assert {line["query_frame"] for line in decisions} == set(range(2 * PLACES))
    # At a frame a second, the first ones have nothing old enough to be compared with.
    early = [line for line in decisions if line["query_frame"] < GAP_S]
    assert {line["status"] for line in early} == {"NO_CANDIDATE"}
    assert all(line["match_id"] is None for line in early)
    # What is written names the frames of the recording.
    for line in closures:
        assert 0 < line["num_correlated"] <= line["num_matches"] and abs(line["zoom"]) < 0.1
        assert line["query_name"] == f"{line['query_frame']:03}.png"
        assert line["match_name"] == f"{line['match_frame']:03}.png"
        assert line["query_stamp_ns"] == line["query_frame"] * 10**9
        assert line["query_stamp_ns"] - line["match_stamp_ns"] >= GAP_S * 1e9
    assert json.loads((tmp_path / "summary.json").read_text())["closures"] == len(closures)


def test_poses_and_pairs_judge_alike(laps: Path, config: Config, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    rows = [f"{place + PLACES},{place}" for place in range(PLACES)]
    pairs.write_text("\n".join(["query,match", *rows]))
    by_poses = replay_recording(laps, tmp_path / "a", config, poses=laps, radius_m=1.0)
    by_pairs = replay_recording(laps, tmp_path / "b", config, pairs=pairs)
    poses, listed = by_poses["evaluation"], by_pairs["evaluation"]
    assert poses["true_if"] == "taken within 1 m" and listed["true_if"] == "listed as a pair"
    assert poses["findable_keyframes"] == PLACES
    for name in ("true_closures", "findable_keyframes", "found_keyframes", "precision", "recall"):
        assert poses[name] == listed[name]
    # Work it out once more from the file.
    lines = read_lines(tmp_path / "a" / "closures.jsonl")
    true = [line for line in lines if line["match_frame"] + PLACES == line["query_frame"]]
    assert poses["true_closures"] == len(true)
    assert poses["precision"] == len(true) / len(lines)
    # Between two closures of one revisit, keyframes are recognised, too.
    said = read_lines(tmp_path / "a" / "decisions.jsonl")
    known = [line for line in said if line["status"] in ("ACCEPTED", "TOO_SOON")]
    right = [line for line in known if line["match_frame"] + PLACES == line["query_frame"]]
    assert len(right) > len(true) and poses["recall"] == len(right) / PLACES
    text = describe(by_poses)
    assert f"({len(true)} of {len(lines)} closures true)" in text
    assert "taken within 1 m, at least 5 s apart" in text


def test_unreadable_frames_keep_their_number(laps: Path, config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "holes"
    folder.mkdir()
    for file in (laps / "images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "002.png").write_bytes(b"")
    summary = replay_recording(folder, tmp_path / "out", config)
    assert summary["frames"] == 2 * PLACES - 1
    assert summary["skipped"] == {"empty image": 1}
    frames = {line["query_frame"] for line in read_lines(tmp_path / "out" / "decisions.jsonl")}
    assert frames == set(range(2 * PLACES)) - {2}


def test_poses_of_another_recording_are_refused(laps: Path, config: Config, tmp_path: Path) -> None:
    poses = tmp_path / "other.csv"
    poses.write_text("stamp_s,x,y\n1700000000,0,0\n1700000001,0,0\n")
    with pytest.raises(SourceError, match="pose for none of the keyframes"):
        replay_recording(laps, tmp_path / "out", config, poses=poses)


class _Breaks:
    """A source that fails after some frames, as a damaged bag or a user at the keyboard does."""

    def __init__(self, folder: Path, after: int, error: BaseException) -> None:
        self._source, self._after, self._error = open_source(folder), after, error
        self.skipped = self._source.skipped

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Frame]:
        for count, frame in enumerate(self._source):
            if count == self._after:
                raise self._error
            yield frame


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "interrupted"), (SourceError("bag cut short"), "bag cut short")],
)
def test_what_is_finished_is_kept(
    laps: Path,
    config: Config,
    tmp_path: Path,
    error: BaseException,
    said: str,
) -> None:
    whole = replay_recording(laps, tmp_path / "whole", config)
    # As many threads, too: in another order sums round otherwise.
    model = open_model(Path(config.bundle), config.backend, config.threads)
    database = KeyframeDatabase(
        "",
        model_id=model.bundle.model_id,
        dimension=model.bundle.dimension,
        max_patches=model.bundle.max_patches,
        session="replay",
    )
    detector = LoopDetector(config, model, database)
    source: Any = _Breaks(laps, 2 * PLACES - 2, error)
    run = replay(source, detector, tmp_path / "part")
    database.close()
    assert run.stopped == said
    assert run.frames == whole["frames"] - 2
    for name in FILES:
        part, full = ((tmp_path / which / name).read_text() for which in ("part", "whole"))
        assert full.startswith(part) and part.endswith("\n")


def test_localization_replays_against_a_map_and_leaves_it_alone(
    laps: Path, config: Config, tmp_path: Path
) -> None:
    map_file = tmp_path / "map.db"
    mapping = dataclasses.replace(config, database_path=str(map_file), session_id="mapping")
    mapped = replay_recording(laps, tmp_path / "mapping", mapping)
    before = map_file.read_bytes()
    reading = dataclasses.replace(mapping, mode="localization", session_id="reading")
    found = replay_recording(laps, tmp_path / "reading", reading)
    assert map_file.read_bytes() == before
    assert found["keyframes"] == mapped["keyframes"] and found["closures"] > mapped["closures"]
    first = json.loads((tmp_path / "reading" / "decisions.jsonl").read_text().splitlines()[0])
    assert first["query_id"] is None and first["match_session"] == "mapping"


def test_a_bag_brings_its_camera_and_its_odometry(tiny_bundle: Path, tmp_path: Path) -> None:
    drive = simulate_drive(image_size=(160, 120))
    few = slice(0, 40)
    drive = dataclasses.replace(
        drive,
        stamps_ns=drive.stamps_ns[few],
        poses=drive.poses[few],
        laps=drive.laps[few],
    )
    bag = write_drive(drive, tmp_path / "drive")
    config = settings(
        tiny_bundle, **{"keyframe.min_translation_m": 8.0, "keyframe.min_rotation_rad": 3.0}
    )
    summary = replay_recording(bag, tmp_path / "out", config, poses=bag)
    assert summary["epipolar_check"] and summary["odometry"] == "/odom"
    # With odometry, distance chooses the keyframes: some 8 s at up to 10 m/s.
    travelled = np.linalg.norm(np.diff(drive.poses[:, :2], axis=0), axis=1).sum()
    assert 3 <= summary["keyframes"] <= travelled / 8.0 + 1

    without = replay_recording(bag, tmp_path / "without", config, odom_topic="")
    assert without["odometry"] is None
    assert without["keyframes"] > summary["keyframes"]
    with pytest.raises(SourceError, match="no odometry topic '/wheels'"):
        replay_recording(bag, tmp_path / "wrong", config, odom_topic="/wheels")


def test_closures_say_where_the_match_lies(laps: Path, config: Config, tmp_path: Path) -> None:
    """What a back end needs: as in the message, in the body's frame."""
    replay_recording(laps, tmp_path / "blind", config)
    blind = read_lines(tmp_path / "blind" / "closures.jsonl")
    assert {line["pose_type"] for line in blind} == {"NONE"}
    assert all(line["x"] is None and line["qw"] is None for line in blind)

    camera = tmp_path / "camera.json"
    camera.write_text('{"fx": 120, "fy": 120, "cx": 80, "cy": 60, "width": 160, "height": 120}')
    replay_recording(laps, tmp_path / "seeing", config, camera_file=camera)
    seeing = read_lines(tmp_path / "seeing" / "closures.jsonl")
    # The second lap shows the first one's pictures again: nothing has moved, nothing has turned.
    still = [line for line in seeing if line["pose_type"] == "ROTATION"]
    assert still
    for line in still:
        assert (line["x"], line["y"], line["z"]) == (0, 0, 0)
        assert line["qw"] == pytest.approx(1, abs=1e-3)
    for line in seeing:
        turn = [line[name] for name in ("qx", "qy", "qz", "qw")]
        assert np.linalg.norm(turn) == pytest.approx(1, abs=1e-5)


def test_odometry_takes_the_nearest_pose_that_is_near(tmp_path: Path) -> None:
    drive = simulate_drive(image_size=(64, 48))
    few = slice(0, 20)
    drive = dataclasses.replace(
        drive, stamps_ns=drive.stamps_ns[few], poses=drive.poses[few], laps=drive.laps[few]
    )
    odometry = read_odometry(write_drive(drive, tmp_path / "drive"))
    assert odometry is not None
    samples = drive.odometry()
    middle = samples[40]
    pose = odometry.at(middle.stamp_ns + 3_000_000)
    assert pose is not None
    assert pose.position == pytest.approx((*middle.pose[:2], 0.0))
    assert pose.quaternion[3] == pytest.approx(np.cos(middle.pose[2] / 2))
    assert odometry.at(samples[-1].stamp_ns + 200_000_000) is not None
    assert odometry.at(samples[-1].stamp_ns + 200_000_001) is None
    assert odometry.at(samples[0].stamp_ns - 200_000_001) is None


def test_odometry_of_what_is_no_bag(laps: Path) -> None:
    assert read_odometry(laps) is None
    with pytest.raises(SourceError, match="is no bag"):
        read_odometry(laps, "/odom")


CAMERA_INFO_YAML = """
image_width: 640
image_height: 480
camera_name: front
camera_matrix: {rows: 3, cols: 3, data: [400, 0, 320, 0, 410, 240, 0, 0, 1]}
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [0.1, -0.2, 0, 0, 0]}
projection_matrix: {rows: 3, cols: 4, data: [390, 0, 320, 0, 0, 390, 240, 0, 0, 0, 1, 0]}
"""


@pytest.mark.parametrize(
    ("name", "text", "focal", "distortion"),
    [
        (
            "calib.json",
            '{"fx": 400, "fy": 410,\t"cx": 320, "cy": 240, "width": 640, "height": 480}',
            400,
            (),
        ),
        ("front.yaml", CAMERA_INFO_YAML, 400, (0.1, -0.2, 0, 0, 0)),
        (
            "echo.yaml",
            "height: 480\nwidth: 640\ndistortion_model: plumb_bob\nd: [0.5]\n"
            "k: [400, 0, 320, 0, 410, 240, 0, 0, 1]\n---\nheight: 1\n",
            400,
            (0.5,),
        ),
        (
            "rectified.json",
            '{"P": [[390, 0, 320, 0], [0, 390, 240, 0], [0, 0, 1, 0]], '
            '"width": 640, "height": 480}',
            390,
            (),
        ),
    ],
)
def test_camera_files(
    tmp_path: Path, name: str, text: str, focal: float, distortion: tuple[float, ...]
) -> None:
    (tmp_path / name).write_text(text)
    camera = read_camera(tmp_path / name)
    assert (camera.width, camera.height) == (640, 480)
    assert camera.matrix[0] == focal and camera.matrix[2] == 320
    assert camera.distortion == distortion


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("width: 640\nheight: 480\nfoo: 1", "lacks fx, fy, cx, cy, camera_matrix, K or P; it has"),
        ("K: [1, 0, 0, 0, 1, 0, 0, 0, 1]", "lacks width"),
        ("width: 640\nheight: 480\nK: [1, 2]", "K has 2 numbers"),
        ("width: 640\nheight: 480\nk: [0, 0, 0, 0, 0, 0, 0, 0, 0]", "lacks fx"),
        ("just words", "holds no fields"),
        ("{", "neither JSON nor YAML"),
        ("", "holds no fields"),
    ],
)
def test_camera_files_that_will_not_do(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "camera.yaml"
    path.write_text(text)
    with pytest.raises(SourceError, match=complaint) as caught:
        read_camera(path)
    assert str(path) in str(caught.value)


def test_real_images_with_pairs(data_dir: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """A sequence as it is published: the folder, its list of loops, nothing else."""
    folder = data_dir / "eval" / "corridor_two_laps"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    config = settings(tiny_bundle, min_time_gap_s=30.0)
    summary = replay_recording(folder, tmp_path, config, pairs=folder / "loops.csv")
    assert summary["frames"] == 84
    # Every frame is a keyframe here; 40…83 have a partner at least 30 frames before.
    assert summary["evaluation"]["findable_keyframes"] == 44
