"""Reports by the command, from each kind of recording and by each ground truth there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from test_bags import (
    ROS1,
    SECOND,
    Item,
    camera_info1,
    encoded,
    header,
    jpeg,
    raw,
    transform,
    where_it_was,
    write_bag,
    write_bag1,
)
from test_report import GAP_S, PLACES, options, report

from vpr_lite_ros.cli import main
from vpr_lite_ros.config import make_config, read_yaml

Picture = NDArray[np.uint8]
START = 1_000_000_000
"""Seconds; files named by such stamps need no table of them."""


@pytest.fixture(scope="module")
def pictures(make_picture: Callable[..., Picture]) -> list[Picture]:
    """Two laps of the same places, a second apart; places are 10 m apart."""
    rng = np.random.default_rng(1)
    laps = [make_picture(frame % PLACES).astype(np.int16) for frame in range(2 * PLACES)]
    noisy = (picture + rng.integers(-5, 6, picture.shape) for picture in laps)
    return [picture.clip(0, 255).astype(np.uint8) for picture in noisy]


def at(frame: int) -> tuple[float, int]:
    """Where it was, metres, and when, nanoseconds."""
    return 10.0 * (frame % PLACES), (START + frame) * SECOND


def check(figures: dict[str, Any], source: str) -> None:
    """Every second lap is found, and judged by what ``source`` says."""
    assert source in figures["truth"]["source"]
    evaluation = figures["evaluation"]
    assert evaluation["findable_keyframes"] == PLACES
    assert evaluation["precision"] == 1.0 and evaluation["recall"] >= 0.8
    assert figures["truth"]["known_keyframes"] == figures["keyframes"] == 2 * PLACES


def write_recording(path: Path, pictures: Sequence[Picture], kind: str, storage: str) -> Path:
    items: list[Item] = []
    for frame, picture in enumerate(pictures):
        x, now = at(frame)
        items.append(("/camera/image", now, raw(picture, "rgb8", now)))
        topic, message = where_it_was(kind, x, now)
        items.append((topic, now, message))
    return write_bag(path, items, storage)


@pytest.mark.parametrize(
    ("kind", "topic", "storage"),
    [
        ("odometry", "/odom (nav_msgs/msg/Odometry)", "sqlite3"),
        ("pose", "/pose (geometry_msgs/msg/PoseStamped)", "mcap"),
        ("point", "/leica (geometry_msgs/msg/PointStamped)", "sqlite3"),
        ("transform", "/vicon (geometry_msgs/msg/TransformStamped)", "mcap"),
        ("tf", "/tf (map to base_link)", "sqlite3"),
        ("fix", "/fix (sensor_msgs/msg/NavSatFix)", "mcap"),
    ],
)
def test_what_a_bag_says_of_where_it_was(
    pictures: list[Picture], tiny_bundle: Path, tmp_path: Path, kind: str, topic: str, storage: str
) -> None:
    bag = write_recording(tmp_path / "bag", pictures, kind, storage)
    chosen = [*options(tiny_bundle), "--radius", "1", "--odom-topic", ""]
    figures = report(bag, tmp_path / "out", *chosen)
    check(figures, topic)
    caveat = figures["truth"]["caveat"] or ""
    assert ("Odometry drifts" in caveat) is (kind == "odometry")


def rows(line: Callable[[int, float, int], str]) -> str:
    return "".join(f"{line(frame, *at(frame))}\n" for frame in range(2 * PLACES))


FILES = {
    "--poses tum.txt": rows(lambda n, x, ns: f"{ns // SECOND}.0 {x} 0 0 0 0 0 1"),
    "--poses kitti.txt": rows(lambda n, x, ns: f"1 0 0 {x} 0 1 0 0 0 0 1 0"),
    "--poses euroc.csv": "#timestamp, p_RS_R_x [m], p_RS_R_y [m], p_RS_R_z [m]\n"
    + rows(lambda n, x, ns: f"{ns},{x},0,0"),
    "--poses table.csv": "file,x,y\n" + rows(lambda n, x, ns: f"{ns}.png,{x},0"),
    "--pairs pairs.csv": "query,match\n"
    + "".join(f"{place + PLACES},{place}\n" for place in range(PLACES)),
}


def test_files_that_say_where_it_was(
    pictures: list[Picture], tiny_bundle: Path, tmp_path: Path
) -> None:
    """TUM, KITTI, EuRoC, a table, a list of pairs; the network runs for the first one only."""
    folder = tmp_path / "drive"
    folder.mkdir()
    for frame, picture in enumerate(pictures):
        file = folder / f"{at(frame)[1]}.png"
        assert cv2.imwrite(str(file), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    # KITTI's lines are those of frames 0, 1, …, which these are called in the other folder.
    numbered = tmp_path / "numbered"
    numbered.mkdir()
    for frame, file in enumerate(sorted(folder.iterdir())):
        (numbered / f"{frame:06}.png").symlink_to(file)
    for option, text in FILES.items():
        flag, name = option.split()
        (tmp_path / name).write_text(text)
        source = numbered if name == "kitti.txt" else folder
        chosen = [*options(tiny_bundle), "--radius", "1", flag, str(tmp_path / name)]
        check(report(source, tmp_path / "out", *chosen), name)
    assert len(list((tmp_path / "out").glob("recording-*"))) == 2


@pytest.mark.parametrize("kind", ["tf2_msgs/msg/TFMessage", "tf/msg/tfMessage"])
def test_a_ros1_bag_from_recording_to_parameters(
    pictures: list[Picture], tiny_bundle: Path, tmp_path: Path, kind: str
) -> None:
    """As `rosbag record -j` leaves it: compressed, JPEG, calibrated, with tf of either name."""
    items: list[Item] = [("/cam/camera_info", START * SECOND, camera_info1(120.0))]
    info = items[0][2]
    info.width, info.height = 160, 128
    info.K[2], info.K[5] = 80, 64
    for frame, picture in enumerate(pictures):
        x, now = at(frame)
        image = jpeg(encoded(picture), now, ROS1)
        items.append(("/cam/image_raw/compressed", now, image))
        moved = transform("map", "base_link", x, now)
        moved.header = header(now, ROS1)
        moved.header.frame_id = "map"
        items.append(("/tf", now, ROS1.types[kind](transforms=[moved])))
    bag = write_bag1(tmp_path / "old.bag", items, compressed=True)
    chosen = [*options(tiny_bundle), "--radius", "1"]
    figures = report(bag, tmp_path / "out", *chosen)
    check(figures, "/tf (map to base_link)")
    assert figures["epipolar_check"]

    file = tmp_path / "my.yaml"
    command = ["tune", str(bag), "-o", str(file), "--target-precision", "0.9"]
    assert main([*command, "--work", str(tmp_path / "out"), *chosen]) == 0
    assert len(list((tmp_path / "out").glob("recording-*"))) == 1, "the network ran once"
    assert make_config(read_yaml(file)).min_time_gap_s == GAP_S


def test_a_video_with_its_truth_beside_it_and_without(
    pictures: list[Picture], tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 1.0, (160, 128))
    for picture in pictures:
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    writer.release()
    chosen = [*options(tiny_bundle), "--radius", "1"]
    figures = report(path, tmp_path / "out", *chosen)
    assert figures["frames"] == 2 * PLACES and figures["evaluation"] is None
    assert "without ground truth. Pass --poses FILE" in figures["no_truth"]
    assert any("Precision, recall" in one for one in figures["cannot"])
    path.with_suffix(".txt").write_text(FILES["--poses kitti.txt"])
    check(report(path, tmp_path / "out", *chosen), "drive.txt")
