"""What the node counts and times: worked by hand, forgotten in time, bounded in memory."""

from __future__ import annotations

import psutil
import pytest

from vpr_lite_ros import tally
from vpr_lite_ros.tally import ERROR_LASTS_S, TIMINGS_KEPT, Tally, resident_mb


def test_counts_are_there_before_anything_was_counted() -> None:
    counted = Tally()
    assert counted.values() == {"images": "0", "odometry": "0", "last_error": ""}
    assert [counted.count("images") for _ in range(3)] == [1, 2, 3]
    counted.count("dropped: busy")
    assert counted.images == 3
    assert counted.values() | {"last_error": ""} == {
        "images": "3",
        "odometry": "0",
        "dropped: busy": "1",
        "last_error": "",
    }


def test_timings_are_of_the_latest_images() -> None:
    counted = Tally()
    for milliseconds in range(101):
        counted.took({"place": float(milliseconds)})
    found = counted.values()
    assert (found["place_ms_p50"], found["place_ms_p95"]) == ("50.0", "95.0")
    for _ in range(TIMINGS_KEPT):
        counted.took({"place": 7.0, "match": 1.0})
    found = counted.values()
    assert (found["place_ms_p50"], found["place_ms_p95"]) == ("7.0", "7.0"), "none of before"
    assert found["match_ms_p50"] == "1.0"


def test_an_error_is_news_for_a_while_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(tally.time, "monotonic", lambda: now)
    counted = Tally()
    assert counted.recent_error == ""
    now = 100.0
    counted.failed("the disk is full")
    counted.failed("the disk is gone")
    now += ERROR_LASTS_S - 1
    assert counted.recent_error == "the disk is gone"
    now += 2
    assert counted.recent_error == ""
    assert counted.values()["last_error"] == "the disk is gone"


def test_memory_is_that_of_this_process() -> None:
    held = psutil.Process().memory_info().rss / 2**20
    assert resident_mb() == pytest.approx(held, rel=0.1)
