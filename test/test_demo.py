"""The demo: a bag played over DDS into the real node, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vpr_lite_ros.bags import write_drive
from vpr_lite_ros.drawing import draw_trajectory
from vpr_lite_ros.simulation import simulate_drive

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

FRAMES = 60
NODE_PARAMETERS = {
    # Of a model that has learned nothing: checks that it can pass.
    "backend": "onnxruntime",
    "threads": 1,
    "min_time_gap_s": 3,
    "min_matches": 4,
    "min_inliers": 0,
    "min_agreeing_keyframes": 1,
    # The road goes straight on for these seconds: odometry would rule every closure out.
    "odometry.max_drift": 1000,
}


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve seconds of a drive."""
    drive = simulate_drive(image_size=(160, 120))
    few = slice(0, FRAMES)
    drive = dataclasses.replace(
        drive, stamps_ns=drive.stamps_ns[few], poses=drive.poses[few], laps=drive.laps[few]
    )
    return write_drive(drive, tmp_path_factory.mktemp("bags") / "short")


def start_demo(bag: Path, bundle: Path, output: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vpr_lite_ros.cli", "demo", "--bag", bag]
    command += ["--output", output, "--bundle", bundle, *options]
    for name, value in NODE_PARAMETERS.items():
        command += [f"--{name}", value]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
    )


def read_report(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def test_demo_plays_a_bag_and_reports(bag: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    process = start_demo(bag, tiny_bundle, tmp_path, "--speed", 3)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    report = read_report(tmp_path)

    assert report["frames"] == FRAMES
    # Every third image comes half a second after the last keyframe, and the robot always moves;
    # on a busy machine the one after it may be taken in its place.
    assert FRAMES / 4 <= report["keyframes"] <= FRAMES / 3
    assert report["dropped"] == sum(report["drops"].values()) < FRAMES / 4
    assert report["closures"] == report["candidates"]["ACCEPTED"] > 0
    assert out.count("closure ") == report["closures"]
    assert report["backend"] == "onnxruntime" and report["model_id"].startswith("tiny-")
    assert 0 < report["latency_ms_p50"] <= report["latency_ms_p95"]
    assert report["precision"] == report["true_closures"] / report["closures"]
    assert (tmp_path / "trajectory.png").stat().st_size > 10_000
    # The back end heard it all: a whole path came, and was measured against the truth.
    assert report["no_ate"] is None
    assert 0 < report["ate_odometry_m"] < 5 and report["ate_corrected_m"] > 0
    assert report["map"]["after"]["poses"] > 50
    assert f"odometry is {report['ate_odometry_m']:.2f} m off" in out
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert report["pictures"]
    for name in report["pictures"]:
        assert (tmp_path / name).stat().st_size > 1000
    assert report["stopped"] is None


def test_closures_that_come_after_the_last_diagnostics_are_waited_for() -> None:
    """As DDS may deliver them; it cannot be made to, so what the executor takes is made up."""
    from vpr_lite_ros.demo import NODE, Heard, Player

    player = object.__new__(Player)
    player.heard, player.processes = Heard(), []
    player._expected, player._interrupted = deque(), False
    player._diagnostics_heard = Counter({NODE: 1})
    player.heard.statuses["ACCEPTED"] = 2

    class Executor:
        taken = 0

        def spin_once(self, timeout_sec: float) -> None:
            self.taken += 1
            player._diagnostics_heard[NODE] += 1
            if self.taken in (5, 9):
                player.heard.closures.append(Any)

    player._executor = Executor()  # type: ignore[assignment]
    player.wait_for_last_words()
    assert len(player.heard.closures) == 2


def test_ctrl_c_leaves_what_is_finished(bag: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    process = start_demo(bag, tiny_bundle, tmp_path, "--speed", 1)
    assert process.stdout is not None
    # The first closure has been printed: play is well under way.
    while "closure " not in (line := process.stdout.readline()):
        assert line, "the demo ended before its first closure"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped early: interrupted" in out
    report = read_report(tmp_path)
    assert report["stopped"] == "interrupted"
    assert 0 < report["frames"] < FRAMES
    assert report["closures"] > 0


def test_a_node_that_cannot_start_is_an_error(bag: Path, tmp_path: Path) -> None:
    process = start_demo(bag, tmp_path / "no bundle", tmp_path / "out")
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no model bundle at" in err and "the node ended with exit code 1" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 30
    assert not (tmp_path / "out" / "report.json").exists()


def test_trajectory_in_any_frame(tmp_path: Path) -> None:
    turn = np.linspace(0, 6, 50)
    flat = np.stack([np.cos(turn), np.sin(turn), 0.01 * turn], axis=1)
    camera = flat[:, [0, 2, 1]]  # x right, y down, z forward: the ground is x z
    holes = np.where(turn[:, None] > 3, np.nan, flat)
    for name, xyz in (
        ("flat", flat),
        ("camera", camera),
        ("holes", holes),
        ("none", flat * np.nan),
    ):
        draw_trajectory(tmp_path / f"{name}.png", xyz, [(9, 1, True), (12, 3, False)], name)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
