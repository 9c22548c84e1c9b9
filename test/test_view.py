"""``vpr-lite view`` of a replay, in a terminal and in a log file."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.cli import main
from vpr_lite_ros.view import Pair, Tally, ViewError, view_replay

MakePicture = Callable[..., NDArray[np.uint8]]
WriteImages = Callable[..., list[Path]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def replayed(
    tmp_path: Path, tiny_bundle: Path, make_picture: MakePicture, write_images: WriteImages
) -> Path:
    """The folder of a real replay: six places, then the second one again."""
    write_images(tmp_path / "seen", [make_picture(n) for n in (0, 1, 2, 3, 4, 5, 1)])
    command = ["replay", tmp_path / "seen", "--output", tmp_path / "out", "--bundle", tiny_bundle]
    command += ["--backend", "onnxruntime", "--min_time_gap_s", 3, "--keyframe.max_similarity", 1]
    command += ["--similarity_threshold", 0.9, "--match_threshold", 0, "--min_matches", 3]
    command += ["--min_agreeing_keyframes", 1]
    assert main([str(one) for one in command]) == 0
    return tmp_path / "out"


def test_a_finished_replay(replayed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["view", str(replayed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("closure 1: 6.000 s is where 1.000 s was (+5.0 s): similarity 1.00")
    assert lines[0].endswith("ACCEPTED") and "confidence unknown" in lines[0]
    summary = json.loads((replayed / "summary.json").read_text())
    down = {
        name: count
        for name, count in summary["candidates"].items()
        if name not in ("ACCEPTED", "NO_CANDIDATE")
    }
    assert lines[-1].startswith("7 keyframes, 1 closures; candidates turned down: ")
    for name, count in down.items():
        assert f"{name} {count}" in lines[-1]
    assert lines[-1].endswith(f"without a candidate: {summary['candidates']['NO_CANDIDATE']}")


def test_a_running_replay_is_followed_to_its_end(replayed: Path, tmp_path: Path) -> None:
    done = (replayed / "decisions.jsonl").read_text()
    running = tmp_path / "running"
    running.mkdir()
    file = running / "decisions.jsonl"
    half = len(done) // 2  # in the middle of a line
    file.write_text(done[:half])
    tally = Tally(io.StringIO())
    follower = threading.Thread(target=view_replay, args=(running, tally))
    follower.start()
    with file.open("a") as stream:
        stream.write(done[half:])
    (running / "summary.json").write_text("{}")
    follower.join(30)
    assert not follower.is_alive()
    assert (tally.keyframes, tally.closures) == (7, 1)


def test_a_terminal_shows_one_line_of_counts_below(replayed: Path) -> None:
    terminal = Terminal()
    tally = Tally(terminal)
    view_replay(replayed, tally)
    tally.end()
    text = terminal.getvalue()
    assert "\r\x1b[Kclosure 1: " in text, "the counts make way for a line"
    assert text.count("\n") == 2, "one line a closure, and the counts at the end"


def test_what_is_no_replay_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path)]) == 1
    assert "decisions.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "decisions.jsonl").write_text('{"status": "ACCEPTED"}\n')
    with pytest.raises(ViewError, match="line 1 is no decision"):
        view_replay(tmp_path, Tally(io.StringIO()))


def test_a_pair_of_another_session_says_so() -> None:
    pair = Pair(2 * 10**9, 10**9, "ACCEPTED", 0.9, 0.5, float("nan"), 30, 20, "monday")
    assert "1.000 s of session monday was" in pair.line()
    assert "confidence unknown" in pair.line() and "20 of 30 matches agree" in pair.line()
