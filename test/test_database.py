"""Keyframes on a real disk, in real SQLite files that are closed, broken, killed and reopened."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keyframes import CAMERA, DIMENSION, PATCHES, POSE, SECOND, Open, describe, rounded
from numpy.typing import NDArray

from vpr_lite_ros import database as module
from vpr_lite_ros.database import DatabaseError, KeyframeDatabase, Pose
from vpr_lite_ros.descriptors import similarities
from vpr_lite_ros.inference import Description
from vpr_lite_ros.storage import SCHEMA_VERSION

# Storing and reopening


def test_keyframes_are_there_after_reopening(open_database: Open) -> None:
    database = open_database(robot_id=3)
    first = database.add(5 * SECOND, replace(describe(1), picture=b"picture"), POSE, CAMERA)
    second = database.add(6 * SECOND + 1, describe(2))
    assert len(database) == 2 and first != second
    database.close()

    database = open_database("tuesday", robot_id=4)
    assert len(database) == 2
    keyframe = database.keyframe(first)
    assert (keyframe.id, keyframe.robot_id, keyframe.session) == (first, 3, "monday")
    assert (keyframe.stamp_ns, keyframe.pose, keyframe.camera) == (5 * SECOND, POSE, CAMERA)
    assert np.array_equal(keyframe.centres, describe(1).centres)
    assert database.thumbnail(first) == b"picture"
    keyframe = database.keyframe(second)
    assert (keyframe.stamp_ns, keyframe.pose, keyframe.camera) == (6 * SECOND + 1, None, None)
    expected = np.stack([describe(2).tokens, describe(1).tokens])
    assert np.array_equal(database.tokens([second, first]), expected)
    assert database.tokens([first]).dtype == np.float16
    (best, similarity), _ = database.search(describe(2).descriptor, 2, 0, 0)
    assert best == second and similarity == pytest.approx(1, abs=0.01)  # one byte a number


def test_ids_go_on_after_reopening(open_database: Open) -> None:
    database = open_database()
    before = [database.add(i, describe(i)) for i in range(3)]
    database.close()
    after = [open_database().add(3, describe(3))]
    assert sorted({*before, *after}) == [*before, *after]


def test_two_sessions_share_a_file(open_database: Open) -> None:
    """What one process writes, another that is open sees when it opens anew, and no lock stays."""
    one, other = open_database("one"), open_database("other")
    ids = []
    for i in range(5):
        ids.append(one.add(i, describe(i)))
        ids.append(other.add(i, describe(100 + i)))
    assert len(set(ids)) == 10 and len(one) == len(other) == 5
    both = open_database("third")
    assert len(both) == 10
    assert [both.keyframe(i).session for i in ids] == ["one", "other"] * 5


def test_a_temporary_database_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    database = KeyframeDatabase(
        "", model_id="m", dimension=DIMENSION, max_patches=PATCHES, session="s"
    )
    keyframe_id = database.add(1, describe(1))
    assert np.array_equal(database.tokens([keyframe_id])[0], describe(1).tokens)
    database.close()
    assert list(tmp_path.iterdir()) == []


def test_save_brings_everything_into_the_one_file(open_database: Open, path: Path) -> None:
    """Then the file alone can be copied while the robot drives on."""
    database = open_database()
    for i in range(20):
        database.add(i, describe(i))
    database.save()
    copy = path.with_name("copy.db")
    copy.write_bytes(path.read_bytes())
    assert len(open_database(path=copy)) == 20


def test_reset_empties_file_and_memory(open_database: Open) -> None:
    database = open_database()
    ids = [database.add(i * SECOND, describe(i)) for i in range(10)]
    database.reset()
    assert len(database) == 0 and database.search(describe(1).descriptor, 5, 0, 0) == []
    with pytest.raises(KeyError, match=str(ids[0])):
        database.keyframe(ids[0])
    with pytest.raises(KeyError, match=str(ids[0])):
        database.tokens([ids[0]])
    kept = database.add(99 * SECOND, describe(50))
    assert [found for found, _ in database.search(describe(50).descriptor, 5, 0, 0)] == [kept]
    database.close()
    assert len(open_database()) == 1


def test_unknown_ids_are_named(open_database: Open, path: Path) -> None:
    database = open_database()
    assert database.thumbnail(77) == b""
    for ask in (database.keyframe, lambda i: database.tokens([i])):
        with pytest.raises(KeyError) as caught:
            ask(77)
        assert "77" in str(caught.value) and str(path) in str(caught.value)


def test_poses_come_in_order_with_their_sessions(open_database: Open) -> None:
    database = open_database()
    first = database.add(1, describe(1), POSE)
    database.add(2, describe(2))
    third = database.add(3, describe(3), Pose((9, 8, 7), (0, 0, 0, 1)))
    expected = [(first, "monday", POSE), (third, "monday", Pose((9, 8, 7), (0, 0, 0, 1)))]
    assert database.poses() == expected


def test_tokens_of_another_shape_are_refused(open_database: Open) -> None:
    database, wrong = open_database(), describe(1)
    wrong = Description(wrong.descriptor, wrong.tokens[:-1], wrong.centres)
    with pytest.raises(ValueError, match=r"\(4, 16\).*\(5, 16\)"):
        database.add(1, wrong)
    assert len(database) == 0


# Search


def _brute_force(
    stored: list[tuple[int, str, int, NDArray[np.float32]]],
    query: NDArray[np.float32],
    k: int,
    stamp_ns: int,
    min_gap_ns: int,
    session: str,
) -> list[tuple[int, float]]:
    found = [
        (keyframe_id, float(similarities(query, descriptor[None])[0]))
        for keyframe_id, of_session, stamp, descriptor in stored
        if of_session != session or abs(stamp - stamp_ns) >= min_gap_ns
    ]
    return sorted(found, key=lambda pair: -pair[1])[:k]


@pytest.mark.parametrize("reopened", [False, True])
def test_search_equals_brute_force(open_database: Open, reopened: bool) -> None:
    rng = np.random.default_rng(5)
    stored = []
    for session, count in (("old", 40), ("older", 23), ("monday", 70)):
        database = open_database(session)
        for _ in range(count):
            seed, stamp = int(rng.integers(1 << 30)), int(rng.integers(0, 100 * SECOND))
            keyframe_id = database.add(stamp, describe(seed))
            stored.append((keyframe_id, session, stamp, rounded(describe(seed).descriptor)))
        if session != "monday" or reopened:
            database.close()
            database = open_database(session)
    if not reopened:
        assert len(database) == len(stored)
    for _ in range(60):
        query = describe(int(rng.integers(1 << 30))).descriptor
        k = int(rng.choice([1, 3, 10, 1000]))
        stamp = int(rng.integers(-20 * SECOND, 120 * SECOND))
        gap = int(rng.choice([0, 1, 10 * SECOND, 200 * SECOND]))
        found = database.search(query, k, stamp, gap)
        expected = _brute_force(stored, query, k, stamp, gap, "monday")
        assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=1e-5)
        alike = dict(_brute_force(stored, query, len(stored), stamp, gap, "monday"))
        ids = [i for i, _ in found]  # of equals, any may come first
        assert [s for _, s in found] == pytest.approx([alike[i] for i in ids], abs=1e-5)
        assert len(set(ids)) == len(ids)


def test_the_gap_counts_from_exactly_there_and_both_ways(open_database: Open) -> None:
    """Also after a clock that jumped back, a picture just taken is no place seen before."""
    database = open_database()
    seconds = (60, 69, 70, 71, 130, 129, 131)
    ids = {second: database.add(second * SECOND, describe(second)) for second in seconds}
    found = database.search(describe(0).descriptor, 50, 100 * SECOND, 30 * SECOND)
    assert {i for i, _ in found} == {ids[second] for second in (60, 69, 70, 130, 131)}


def test_other_sessions_and_robots_are_never_too_recent(open_database: Open) -> None:
    mine = open_database("monday", robot_id=1)
    own = mine.add(0, describe(0))
    mine.close()
    other = open_database("monday", robot_id=2)
    theirs = other.add(0, describe(1))
    other.close()
    database = open_database("monday", robot_id=1)
    found = [i for i, _ in database.search(describe(0).descriptor, 10, 0, SECOND)]
    assert found == [theirs] and own not in found


def test_fewer_eligible_than_asked_for(open_database: Open) -> None:
    database = open_database()
    assert database.search(describe(0).descriptor, 10, 0, 0) == []
    for i in range(9):
        database.add(i * SECOND, describe(i))
    assert len(database.search(describe(0).descriptor, 10, 0, 0)) == 9
    assert len(database.search(describe(0).descriptor, 10, 0, 6 * SECOND)) == 3
    assert database.search(describe(0).descriptor, 10, 0, 9 * SECOND) == []


# Memory


def test_memory_holds_a_bounded_number_of_tokens(
    open_database: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = PATCHES * DIMENSION * 2
    monkeypatch.setattr(module, "TOKEN_CACHE_BYTES", 7 * each + each // 2)
    database = open_database()
    ids = [database.add(i, describe(i)) for i in range(30)]
    assert list(database._tokens) == ids[-7:]
    # Read once more, in any order and across the limit, all are the right ones.
    for chunk in (ids[:5], ids[3:13], [ids[29], ids[0], ids[29]], ids):
        found = database.tokens(chunk)
        expected = np.stack([describe(ids.index(i)).tokens for i in chunk])
        assert np.array_equal(found, expected)
        assert len(database._tokens) <= 7
        assert sum(tokens.nbytes for tokens in database._tokens.values()) <= 7 * each
    database.tokens([ids[4]])
    database.tokens(ids[10:16])  # the one used last stays, the one used longest ago goes
    assert list(database._tokens) == [ids[4], *ids[10:16]]
    database.close()
    assert len(open_database()._tokens) == 0, "loading reads no tokens"


def test_the_shipped_limit_holds_a_re_ranking_and_little_more() -> None:
    one_image = 1131 * 512 * 2
    assert module.TOKEN_CACHE_BYTES / one_image >= 20
    assert module.TOKEN_CACHE_BYTES <= 256 * 2**20


# Files that cannot be used


def _refused(open_database: Open, *words: str, **changes: Any) -> None:
    with pytest.raises(DatabaseError) as caught:
        open_database(**changes)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_another_model_is_refused_and_both_are_named(open_database: Open, path: Path) -> None:
    database = open_database()
    database.add(1, describe(1))
    database.close()
    before = path.read_bytes()
    _refused(open_database, str(path), "tiny-0123", "other-4567", model_id="other-4567")
    assert path.read_bytes() == before
    assert len(open_database()) == 1


def test_somebody_elses_sqlite_file_is_refused_and_left_alone(
    open_database: Open, path: Path
) -> None:
    with sqlite3.connect(path) as theirs:
        theirs.execute("CREATE TABLE recipes (name TEXT)")
        theirs.execute("INSERT INTO recipes VALUES ('soup')")
    theirs.close()
    before = path.read_bytes()
    _refused(open_database, str(path), "not made by vpr_lite_ros", "database_path")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [b"hello\n" * 1000, b"SQLite format 3\0" + b"\xff" * 5000],
    ids=["text", "broken"],
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(
    open_database: Open, path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    _refused(open_database, str(path), "vpr_lite_ros")
    assert path.read_bytes() == content


def test_a_newer_schema_is_refused_and_left_alone(open_database: Open, path: Path) -> None:
    database = open_database()
    database.add(1, describe(1))
    database.close()
    with sqlite3.connect(path) as file:
        file.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    file.close()
    before = path.read_bytes()
    _refused(
        open_database,
        str(path),
        f"schema {SCHEMA_VERSION + 1}",
        f"reads schema {SCHEMA_VERSION}",
    )
    assert path.read_bytes() == before


def test_a_folder_and_a_missing_folder_are_refused(open_database: Open, path: Path) -> None:
    path.mkdir()
    _refused(open_database, str(path))
    _refused(open_database, "nowhere", path=path / "nowhere" / "keyframes.db")


PARTS = 3 * 4 * DIMENSION
"""Bytes of a keyframe's descriptors."""


@pytest.mark.parametrize(
    "blob",
    [b"", bytes(PARTS - 1), bytes(PARTS + 4), bytes(PARTS // 3), b"\xff" * PARTS],
    ids=["empty", "cut", "longer", "whole alone", "nan"],
)
def test_a_damaged_descriptor_is_named(open_database: Open, path: Path, blob: bytes) -> None:
    database = open_database()
    damaged = [database.add(i, describe(i)) for i in range(3)][1]
    database.close()
    with sqlite3.connect(path) as file:
        file.execute("UPDATE keyframes SET descriptor = ? WHERE id = ?", (blob, damaged))
    file.close()
    _refused(open_database, str(path), f"keyframe {damaged}", "damaged")


def test_a_file_without_its_model_is_refused(open_database: Open, path: Path) -> None:
    open_database().close()
    with sqlite3.connect(path) as file:
        file.execute("DELETE FROM model")
    file.close()
    _refused(open_database, str(path))


def test_keyframes_of_wholes_alone_are_found(open_database: Open) -> None:
    """As of a bundle that an earlier release made: their files hold one descriptor a keyframe."""
    database = open_database()
    views = [describe(i) for i in range(5)]
    for i, view in enumerate(views):
        database.add(i, replace(view, descriptor=view.descriptor[:1]))
    query = describe(9).descriptor[:1]
    wholes = rounded(np.stack([view.descriptor[:1] for view in views]))[:, 0] @ query[0]
    for _ in range(2):
        found = database.search(query, 5, 9, 0)
        assert [i - 1 for i, _ in found] == np.argsort(-wholes).tolist()
        with pytest.raises(ValueError, match=f"not 1 x {DIMENSION} finite numbers"):
            database.add(9, describe(9))
        database.close()
        database = open_database("tuesday")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_descriptor_that_is_no_number_is_not_stored(open_database: Open, value: float) -> None:
    """Stored, it would make the whole file unreadable the next time."""
    database, bad = open_database(), describe(1)
    bad.descriptor[1, 3] = value
    database.add(1, describe(1))
    with pytest.raises((ValueError, DatabaseError)):
        database.add(2, bad)
    database.close()
    assert len(open_database()) == 1


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """File permissions do not bind root: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_file_is_refused(
    open_database: Open, path: Path, request: pytest.FixtureRequest
) -> None:
    database = open_database()
    database.add(1, describe(1))
    database.close()
    folders = [path.parent, *path.parent.parents]
    modes = {folder: folder.stat().st_mode for folder in folders[:4]}
    try:
        for folder in modes:  # pytest keeps its folders to their owner
            if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
                folder.chmod(modes[folder] | 0o055)
        path.parent.chmod(0o555)
        path.chmod(0o444)
        request.getfixturevalue("ordinary_user")
        _refused(open_database, str(path), "readonly", "write")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


def test_a_full_disk_loses_nothing_that_was_stored(open_database: Open, path: Path) -> None:
    """A real limit on file size stands for the full disk."""
    database = open_database()
    stored = [database.add(i, describe(i)) for i in range(3)]
    used = path.with_name(path.name + "-wal").stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (used + 100, limits[1]))
        with pytest.raises(DatabaseError) as caught:
            for i in range(3, 2000):
                database.add(i, describe(i))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(path) in str(caught.value) and "not stored" in str(caught.value)
    assert len(database) == len(stored), "memory holds what the disk holds"
    stored.append(database.add(3000, describe(3000)))  # room again: it goes on
    database.close()
    database = open_database()
    found = {i for i, _ in database.search(describe(0).descriptor, 100, 0, 0)}
    assert found == set(stored)


_WRITER = """
import sys
import numpy as np
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.inference import Description
database = KeyframeDatabase(
    sys.argv[1], model_id="tiny-0123", dimension=16, max_patches=5, session="killed"
)
for stamp in range(10**9):
    descriptor = np.full((3, 16), 0.25, np.float32)
    tokens = np.full((5, 16), stamp % 1000, np.float16)
    print(database.add(stamp, Description(descriptor, tokens, np.zeros((5, 2), np.float32))),
          flush=True)
"""


@pytest.mark.parametrize("after", [1, 40, 300])
def test_a_killed_process_loses_nothing(open_database: Open, path: Path, after: int) -> None:
    command = [sys.executable, "-c", _WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = [int(process.stdout.readline()) for _ in range(after)]
        process.kill()
        # What was on its way through the pipe had been stored, too; a last line may be cut.
        rest = process.stdout.read().split("\n")[:-1]
    assert process.returncode == -signal.SIGKILL
    printed += [int(line) for line in rest]
    assert len(printed) >= after
    database = open_database()
    assert len(database) >= len(printed)
    for stamp, keyframe_id in enumerate(printed):
        assert database.keyframe(keyframe_id).stamp_ns == stamp
    assert (database.tokens(printed[-3:])[-1] == (len(printed) - 1) % 1000).all()
    database.add(10, describe(10))
