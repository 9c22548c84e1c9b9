"""Runs of this robot and of others in one database, and clocks that jump."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from keyframes import CAMERA, POSE, SECOND, Open, describe

from vpr_lite_ros.database import KeyframeDatabase

MINUTE = 60 * SECOND


def _found(database: KeyframeDatabase, stamp_ns: int, gap_ns: int = MINUTE) -> set[int]:
    return {i for i, _ in database.search(describe(0).descriptor, 1000, stamp_ns, gap_ns)}


# A clock that jumps


@pytest.mark.parametrize("jump_s", [-300, -5, 0, 100_000])
def test_no_time_passes_at_a_jump(open_database: Open, jump_s: int) -> None:
    """Forward or back: a keyframe is as old as both sessions together have lasted since.

    Besides, stamps that come twice must not be mistaken for each other.
    """
    database = open_database("run")
    ids = [database.add(i * SECOND, describe(i)) for i in range(0, 600, 10)]
    stamps = {keyframe_id: 10 * SECOND * i for i, keyframe_id in enumerate(ids)}

    def without_twins(found: set[int], stamp_ns: int) -> set[int]:
        return {i for i in found if abs(stamps.get(i, -MINUTE) - stamp_ns) >= MINUTE}

    now = 590 + jump_s
    assert database.begin_session("run") == "run-2"
    # Before the new session has a keyframe, and with its first one.
    first = without_twins(set(ids[:-6]), now * SECOND)
    assert _found(database, now * SECOND) == first
    new = [database.add(now * SECOND, describe(1000))]
    assert _found(database, now * SECOND) == first
    for i in range(1, 30):
        stamp = (now + 10 * i) * SECOND
        expected = {*ids[: len(ids) - 6 + i], *new[: max(0, i - 5)]}
        found = without_twins(expected, stamp)
        assert _found(database, stamp) == found, f"{10 * i} s after the jump"
        new.append(database.add(stamp, describe(1000 + i)))
    assert database.keyframe(new[0]).session == "run-2"
    assert database.keyframe(ids[0]).session == "run"


def test_a_query_about_another_time_does_not_set_the_clock(open_database: Open) -> None:
    database = open_database("run")
    ids = [database.add(i * SECOND, describe(i)) for i in range(0, 100, 10)]
    database.begin_session("after")
    _found(database, 0, 0)
    _found(database, 10**6 * SECOND)
    database.add(10**6 * SECOND, describe(50))
    assert _found(database, 10**6 * SECOND) == set(ids[:4])


def test_a_bag_that_loops_thrice(open_database: Open) -> None:
    """Each loop begins, as far as anybody can tell, when the one before ended; but images with
    the same stamp are one image, and no closure.
    """
    database = open_database("bag")
    seen: list[tuple[int, int, int]] = []  # seconds since the first image, stamp, id
    for loop in range(3):
        if loop:
            assert database.begin_session("bag") == f"bag-{loop + 1}"
        for i in range(0, 100, 10):
            now = 90 * loop + i
            expected = {
                keyframe_id
                for then, stamp, keyframe_id in seen
                if now - then >= 60 and abs(stamp - i) >= 60
            }
            assert _found(database, i * SECOND) == expected
            seen.append((now, i, database.add(i * SECOND, describe(100 * loop + i))))


def test_a_session_of_before_is_never_too_recent_whatever_its_stamps(open_database: Open) -> None:
    database = open_database("yesterday")
    old = {database.add(i * SECOND, describe(i)) for i in range(10)}
    database.close()
    database = open_database("today")
    assert _found(database, 5 * SECOND) == old
    assert database.begin_session("yesterday") == "yesterday-2", "they are told apart"
    database.add(5 * SECOND, describe(99))
    assert _found(database, 5 * SECOND) == old


def test_sessions_add_up_and_are_told_apart(open_database: Open) -> None:
    for name in ("one", "two", "three"):
        database = open_database(name)
        database.add(1, describe(1))
        database.begin_session(name)
        database.add(1, describe(1))
        database.close()
    database = open_database("four")
    names = [database.keyframe(i).session for i in sorted(_found(database, 0))]
    assert names == ["one", "one-2", "two", "two-2", "three", "three-2"]


def test_after_a_reset_nothing_is_too_recent(open_database: Open) -> None:
    database = open_database("run")
    database.add(500 * SECOND, describe(1))
    database.begin_session("run")
    database.reset()
    assert database.session == "run-2"
    first = database.add(10 * SECOND, describe(2))
    assert _found(database, 10 * SECOND) == set()
    assert _found(database, 200 * SECOND) == {first}


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    open_database: Open, tmp_path: Path
) -> None:
    """Wherever it was interrupted, also just before and just after its clock jumps."""
    stamps = [*range(0, 200, 10), *range(50, 150, 10), *range(1000, 1100, 10), *range(0, 60, 10)]

    def step(database: KeyframeDatabase, number: int) -> tuple[object, ...]:
        now = stamps[number] * SECOND
        if number and stamps[number] < stamps[number - 1]:
            database.begin_session(database.run)
        found = database.search(describe(0).descriptor, 50, now, MINUTE)
        keyframe_id = database.add(now, describe(number), POSE)
        return database.session, found, keyframe_id, database.travelled_since(1, now, POSE)

    def opened(name: str) -> KeyframeDatabase:
        return open_database("run", path=tmp_path / name, resume=True)

    whole = opened("whole.db")
    expected = [step(whole, number) for number in range(len(stamps))]
    assert [session for session, *_ in expected][::20] == ["run", "run-2", "run-3"]
    for cut in range(1, len(stamps)):
        before = opened(f"{cut}.db")
        for number in range(cut):
            step(before, number)
        before.close()
        after = opened(f"{cut}.db")
        # What came after the last line that is whole is dropped.
        dropped = min(cut, 3)
        after.delete_after(cut - dropped)
        seen = [step(after, number) for number in range(cut - dropped, len(stamps))]
        assert repr(seen) == repr(expected[cut - dropped :]), f"interrupted after {cut}"
        after.close()


# Another robot


def test_another_robots_keyframe_is_found_at_once(open_database: Open) -> None:
    database = open_database("mine", robot_id=1)
    own = database.add(100 * SECOND, describe(1))
    theirs = database.add(
        100 * SECOND,
        replace(describe(2), picture=b"jpg"),
        POSE,
        CAMERA,
        robot_id=2,
        session="theirs",
    )
    assert _found(database, 100 * SECOND) == {theirs} != {own}
    keyframe = database.keyframe(theirs)
    assert (keyframe.robot_id, keyframe.session) == (2, "theirs")
    assert (keyframe.pose, keyframe.camera) == (POSE, CAMERA)
    assert database.thumbnail(theirs) == b"jpg"
    database.begin_session("next")
    later = database.add(0, describe(3), robot_id=2, session="theirs")
    assert _found(database, 0) == {theirs, later}, "their clock does not set this robot's"


def test_what_arrives_again_is_not_stored_again(open_database: Open) -> None:
    def store(database: KeyframeDatabase, stamp_ns: int, robot_id: int, session: str) -> int:
        return database.add(stamp_ns, describe(stamp_ns), robot_id=robot_id, session=session)

    database = open_database("mine", robot_id=1)
    origins = [(5, 2, "a"), (6, 2, "a"), (5, 2, "b"), (5, 3, "a")]
    ids = [store(database, *origin) for origin in origins]
    assert len(set(ids)) == 4
    assert [store(database, *origin) for origin in origins] == ids
    database.close()
    database = open_database("mine", robot_id=1)
    assert [store(database, *origin) for origin in origins] == ids
    assert len(database) == 4


def test_two_robots_of_one_name_are_noticed(open_database: Open) -> None:
    """Else one robot's pictures of now would be taken for the other's of before."""
    database = open_database("mine", robot_id=1)
    database.begin_session("mine")
    for session in ("mine", "mine-2"):
        with pytest.raises(ValueError, match=f"robot_id 1, session {session}"):
            database.add(1, describe(1), robot_id=1, session=session)
    database.add(1, describe(1), robot_id=1, session="another run of its own")
    assert len(database) == 1


def test_one_file_serves_two_robots(open_database: Open, path: Path) -> None:
    one, other = open_database("s", robot_id=1), open_database("s", robot_id=2)
    ids = [one.add(1, describe(1)), other.add(1, describe(2)), one.add(2, describe(3))]
    assert ids == [1, 2, 3]
    both = open_database("s", robot_id=1)
    assert _found(both, 1) == {2}
