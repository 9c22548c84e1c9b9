"""What is stored stays: processes killed, disks filled, files damaged, media read-only."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from keyframes import CAMERA, DIMENSION, PATCHES, POSE, SECOND, Open, describe

from vpr_lite_ros import storage
from vpr_lite_ros.database import DatabaseError, KeyframeDatabase
from vpr_lite_ros.storage import SCHEMA_VERSION


def _holds(database: KeyframeDatabase, keyframe_id: int, stamp_ns: int, seed: int) -> bool:
    """Whether a keyframe is there, whole, as ``describe(seed)`` made it."""
    expected = describe(seed, database.max_patches)
    keyframe = database.keyframe(keyframe_id)
    return (
        keyframe.stamp_ns == stamp_ns
        and np.array_equal(keyframe.centres, expected.centres)
        and np.array_equal(database.tokens([keyframe_id])[0], expected.tokens)
    )


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Killed

# Imports once and forks, for each line "path session max_keyframes" that it reads, a process that
# stores keyframes until it is killed. Of each it prints the id, and up to which all are durable.
_WRITERS = """
import os, sys, time
from keyframes import DIMENSION, PATCHES, describe
from vpr_lite_ros.database import KeyframeDatabase
for line in sys.stdin:
    path, session, max_keyframes = line.split()
    child = os.fork()
    if child == 0:
        database = KeyframeDatabase(
            path, model_id="tiny-0123", dimension=DIMENSION, max_patches=PATCHES,
            session=session, max_keyframes=int(max_keyframes),
        )
        for stamp in range(10**9):
            keyframe_id = database.add(stamp, describe(stamp))
            os.write(1, f"{keyframe_id} {database.durable_id}\\n".encode())
            time.sleep(0.002)  # else thousands are stored until the kill arrives
    os.write(1, f"{child} killable\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"0 killed\\n")
"""


class _Writers:
    """Processes that store keyframes and are killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout

    def kill_one(self, path: Path, session: str, after: int, max_keyframes: int = 0) -> list[int]:
        """Ids that a process said it had stored before kill -9 hit it after ``after`` of them."""
        print(path, session, max_keyframes, file=self._in, flush=True)
        child, stored, durable = 0, list[int](), 0
        while len(stored) < after or not child:
            number, rest = self._out.readline().split()
            if rest == "killable":
                child = int(number)
            else:
                stored.append(int(number))
                durable = max(durable, int(rest))
        os.kill(child, signal.SIGKILL)
        while (line := self._out.readline().split()) != ["0", "killed"]:
            stored.append(int(line[0]))
        assert durable <= stored[-1]
        return stored


@pytest.fixture(scope="module")
def writers() -> Iterator[_Writers]:
    command = [sys.executable, "-c", _WRITERS]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        yield _Writers(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 0


def test_fifty_kills_lose_nothing(open_database: Open, path: Path, writers: _Writers) -> None:
    rng = np.random.default_rng(11)
    known: dict[int, int] = {}
    for number in range(50):
        stored = writers.kill_one(path, f"run-{number}", int(rng.integers(1, 30)))
        known |= {keyframe_id: stamp for stamp, keyframe_id in enumerate(stored)}
        database = open_database("reader")
        # One more may have been stored and not been spoken of.
        assert len(known) <= len(database) <= len(known) + number + 1
        for stamp, keyframe_id in enumerate(stored):
            assert database.keyframe(keyframe_id).session == f"run-{number}"
            assert _holds(database, keyframe_id, stamp, stamp)
        database.close()
    database = open_database("reader")
    assert all(_holds(database, i, stamp, stamp) for i, stamp in known.items())


def test_kills_amid_deletions_leave_whole_keyframes(
    open_database: Open, path: Path, writers: _Writers
) -> None:
    for number in range(15):
        stored = writers.kill_one(path, f"run-{number}", 20 + 2 * number, max_keyframes=16)
        database = open_database("reader")
        assert 0 < len(database) <= 16
        newest = stored[-1]
        assert _holds(database, newest, len(stored) - 1, len(stored) - 1), "the newest one stays"
        for keyframe_id, _ in database.search(describe(0).descriptor, 100, 0, 0):
            stamp = database.keyframe(keyframe_id).stamp_ns
            assert _holds(database, keyframe_id, stamp, stamp)
        database.close()


# On the disk


def test_what_is_durable_is_in_the_file_itself(open_database: Open, path: Path) -> None:
    """Then a power failure that loses the log's last pages does not lose it."""
    database = open_database()
    assert database.durable_id == 0
    for round_ in range(3):
        for i in range(10):
            last = database.add(i, describe(10 * round_ + i))
        _until(lambda last=last: database.durable_id == last)  # type: ignore[misc]
        copy = path.with_name(f"copy-{round_}.db")
        shutil.copy(path, copy)  # without its log
        other = open_database(path=copy)
        assert len(other) == 10 * (round_ + 1)
        assert _holds(other, last, 9, 10 * round_ + 9)
    database.close()
    database = open_database()
    _until(lambda: database.durable_id == last)
    assert database.fault == ""


def test_another_reader_holds_nothing_up(open_database: Open, path: Path) -> None:
    database = open_database()
    database.add(1, describe(1))
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM keyframes").fetchone() == (1,)
    last = database.add(2, describe(2))
    _until(lambda: database.durable_id == last)
    database._file._sql.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(DatabaseError, match="another program"):
        database.save()
    assert reader.execute("SELECT count(*) FROM keyframes").fetchone() == (1,)
    reader.close()
    database.save()


def test_the_log_stays_small_however_fast_keyframes_come(
    open_database: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LOG_BYTES", 2**20)
    database = open_database(max_patches=2000)
    log, most, one = path.with_name(f"{path.name}-wal"), 0, describe(1, 2000)
    for i in range(400):  # 26 MB
        database.add(i, one)
        most = max(most, log.stat().st_size)
    assert most < 8 * 2**20


def test_a_temporary_database_promises_nothing(open_database: Open) -> None:
    database = open_database(path="")
    database.add(1, describe(1))
    database.save()
    assert (database.durable_id, database.bytes_on_disk, database.fault) == (0, 0, "")


def test_a_full_disk_stores_on_when_there_is_room(
    open_database: Open, mount: Callable[[str], Path]
) -> None:
    disk = mount("size=3m")
    ballast = disk / "somebody elses.log"
    ballast.write_bytes(bytes(2**20))
    path = disk / "keyframes.db"
    database = open_database(path=path, max_patches=500)
    stored: list[int] = []
    with pytest.raises(DatabaseError) as caught:
        for i in range(10_000):
            stored.append(database.add(i, describe(i, 500)))
    for word in (str(path), "not stored", "full"):
        assert word in str(caught.value)
    with pytest.raises(OSError) as full:
        (disk / "more").write_bytes(bytes(2**20))
    assert full.value.errno == errno.ENOSPC, "this disk is not full, so nothing was tested"
    (disk / "more").unlink()
    assert len(database) == len(stored) > 10, "memory holds what the disk holds"
    assert all(_holds(database, keyframe_id, i, i) for i, keyframe_id in enumerate(stored))

    ballast.unlink()
    stored.append(database.add(len(stored), describe(len(stored), 500)))
    _until(lambda: database.durable_id == stored[-1])
    assert database.fault == ""
    database.close()
    database = open_database(path=path, max_patches=500)
    assert len(database) == len(stored)
    assert all(_holds(database, keyframe_id, i, i) for i, keyframe_id in enumerate(stored))


def test_a_disk_that_cannot_take_what_the_log_holds_is_a_fault(
    open_database: Open, mount: Callable[[str], Path]
) -> None:
    """It is said, durable_id stays behind, and both catch up when there is room."""
    disk = mount("size=2m")
    database = open_database(path=disk / "keyframes.db", max_patches=500)
    _until(lambda: (disk / "keyframes.db").stat().st_size > 0)
    ballast = disk / "ballast"
    last = database.add(0, describe(0, 500))
    _until(lambda: database.durable_id == last)
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    # The log has room of its own from before, the file has to grow.
    last = database.add(1, describe(1, 500))
    _until(lambda: database.fault != "")
    assert "full" in database.fault and database.durable_id < last
    ballast.unlink()
    _until(lambda: database.durable_id == last)
    assert database.fault == ""


# Only read


@pytest.fixture
def written(open_database: Open, path: Path) -> list[int]:
    """Ids of twelve keyframes in the file of ``path``, which is closed."""
    database = open_database(max_patches=100)
    ids = [
        database.add(i * SECOND, replace(describe(i, 100), picture=bytes([i]) * 900), POSE, CAMERA)
        for i in range(12)
    ]
    database.close()
    return ids


def _read_only(open_database: Open, path: Path) -> KeyframeDatabase:
    return open_database("tuesday", path=path, max_patches=100, read_only=True)


def test_localization_reads_and_writes_nothing(
    open_database: Open, path: Path, written: list[int]
) -> None:
    before = path.read_bytes()
    database = _read_only(open_database, path)
    assert _holds(database, written[3], 3 * SECOND, 3)
    ((best, _),) = database.search(describe(5).descriptor, 1, 5 * SECOND, 100 * SECOND)
    assert best in written
    for write in (database.reset, lambda: database.add(1, describe(1, 100))):
        with pytest.raises(DatabaseError, match="localization"):
            write()
    database.save()
    database.close()
    assert path.read_bytes() == before


def test_localization_takes_no_keyframe_for_its_own(
    open_database: Open, path: Path, written: list[int]
) -> None:
    """A bag that is replayed under the same name finds the places it has stored."""
    database = open_database("monday", max_patches=100, read_only=True)
    assert len(database.search(describe(5).descriptor, 99, 5 * SECOND, 100 * SECOND)) == 12
    assert database.begin_session("monday") == "monday-2"


def test_localization_needs_a_file(open_database: Open, path: Path) -> None:
    for missing in (path, ""):
        with pytest.raises(DatabaseError, match="missing: mode localization"):
            _read_only(open_database, Path(missing) if missing else missing)  # type: ignore[arg-type]
    assert not path.exists()
    path.touch()
    with pytest.raises(DatabaseError, match="not made by vpr_lite_ros"):
        _read_only(open_database, path)


def test_localization_sees_what_a_mapping_robot_adds_until_then(
    open_database: Open, path: Path, written: list[int]
) -> None:
    mapping = open_database("wednesday", max_patches=100)
    new = mapping.add(99, describe(99, 100))
    database = _read_only(open_database, path)
    assert len(database) == 13 and _holds(database, new, 99, 99)
    mapping.add(100, describe(100, 100))
    assert len(database) == 13


@pytest.mark.parametrize("killed", [False, True])
def test_a_read_only_medium(
    open_database: Open, mount: Callable[[str], Path], written: list[int], path: Path, killed: bool
) -> None:
    disk = mount("size=4m")
    copy = disk / "robot #1?.db"
    shutil.copy(path, copy)
    if killed:
        mapping = open_database(path=copy, max_patches=100)
        mapping.add(99, describe(99, 100))
        shutil.copy(disk / f"{copy.name}-wal", disk / "log")
        mapping.close()
        (disk / "log").rename(disk / f"{copy.name}-wal")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    if killed:
        with pytest.raises(DatabaseError, match="not closed"):
            _read_only(open_database, copy)
        return
    with pytest.raises(DatabaseError, match="mode: localization, read-only will do"):
        open_database(path=copy, max_patches=100)
    database = _read_only(open_database, copy)
    assert len(database) == 12
    assert all(_holds(database, i, n * SECOND, n) for n, i in enumerate(written))


# Damaged


def _examine(open_database: Open, path: Path, ids: list[int], writing: bool = True) -> bool:
    """Whether the damage was noticed. Whatever is read without an error must be right."""
    try:
        database = open_database("tuesday", path=path, max_patches=100, read_only=not writing)
    except DatabaseError as error:
        assert str(path) in str(error)
        return True
    noticed = False
    assert len(database) == len(ids), "keyframes are missing, and nobody said so"
    for number, keyframe_id in enumerate(ids):
        try:
            ((best, similarity),) = database.search(describe(number, 100).descriptor, 1, 0, 0)
            if best == keyframe_id:
                assert similarity == pytest.approx(1, abs=0.01)  # one byte a number
            keyframe = database.keyframe(keyframe_id)
            assert (keyframe.session, keyframe.pose, keyframe.camera) == ("monday", POSE, CAMERA)
            assert _holds(database, keyframe_id, number * SECOND, number)
            assert database.thumbnail(keyframe_id) == bytes([number]) * 900
        except DatabaseError as error:
            assert str(path) in str(error)
            noticed = True
    if not writing:
        database.close()
        return noticed
    try:
        new = database.add(99, describe(99, 100))
        assert _holds(database, new, 99, 99)
        database.save()
    except DatabaseError:
        noticed = True
    database.close()
    return noticed


def test_a_truncated_file_is_noticed(open_database: Open, path: Path, written: list[int]) -> None:
    whole = path.read_bytes()
    copy = path.with_name("copy.db")
    rng = np.random.default_rng(3)
    lengths = {1, 99, 100, 512, len(whole) - 1, *rng.integers(1, len(whole), 40).tolist()}
    for length in sorted(lengths):
        copy.write_bytes(whole[:length])
        assert _examine(open_database, copy, written), f"{length} of {len(whole)} bytes"
        assert copy.read_bytes() == whole[:length], "what can still be rescued was changed"


def test_a_flipped_bit_is_noticed_or_does_no_harm(
    open_database: Open, path: Path, written: list[int]
) -> None:
    whole = path.read_bytes()
    copy = path.with_name("copy.db")
    rng = np.random.default_rng(4)
    # The header, where each page begins, where there is text, and anywhere.
    places = [
        *range(0, 100, 3),
        *(page + i for page in range(0, len(whole), 16384) for i in (0, 5)),
    ]
    places += [whole.index(text) for text in (b"CREATE TABLE keyframes", b"tiny-0123", b"monday")]
    places += rng.integers(0, len(whole), 100).tolist()
    noticed = 0
    for number, place in enumerate(places):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        for left in path.parent.glob("copy.db*"):
            left.unlink()
        copy.write_bytes(broken)
        noticed += _examine(open_database, copy, written, writing=number % 4 == 0)
    assert noticed > len(places) // 4, "hardly anything is checked"


@pytest.mark.parametrize("lost", ["keyframes", "checksums"])
def test_a_keyframe_that_is_lost_is_noticed(
    open_database: Open, path: Path, written: list[int], lost: str
) -> None:
    """As when a damaged page of SQLite's names another in place of its own."""
    with sqlite3.connect(path) as file:
        file.execute(f"DELETE FROM {lost} WHERE id = ?", (written[6],))
    file.close()
    with pytest.raises(DatabaseError, match=f"keyframe {written[6]}"):
        open_database(max_patches=100)


def test_a_damaged_keyframe_spoils_no_other(
    open_database: Open, path: Path, written: list[int]
) -> None:
    """It is said once, and searches go on without it."""
    with sqlite3.connect(path) as file:
        file.execute(
            "UPDATE keyframes SET tokens = zeroblob(length(tokens)) WHERE id = ?", (written[4],)
        )
    file.close()
    database = open_database(max_patches=100)
    query = describe(4, 100).descriptor
    assert database.search(query, 1, 0, 0)[0][0] == written[4]
    with pytest.raises(DatabaseError, match=f"keyframe {written[4]}"):
        database.tokens([written[4]])
    found = [i for i, _ in database.search(query, 99, 0, 0)]
    assert sorted(found) == [i for i in written if i != written[4]]
    assert len(database.tokens(found)) == 11
    assert f"keyframe {written[4]}" in database.fault


# An older release's


SCHEMA_1 = """
PRAGMA application_id = 0x5650524C;
PRAGMA user_version = 1;
CREATE TABLE model (model_id TEXT NOT NULL, dimension INTEGER NOT NULL,
    max_patches INTEGER NOT NULL);
CREATE TABLE keyframes (id INTEGER PRIMARY KEY, robot_id INTEGER NOT NULL,
    session TEXT NOT NULL, stamp_ns INTEGER NOT NULL, pose TEXT, camera TEXT,
    descriptor BLOB NOT NULL, centres BLOB NOT NULL, tokens BLOB NOT NULL,
    thumbnail BLOB NOT NULL);
"""
SCHEMA_2 = """
PRAGMA user_version = 2;
CREATE INDEX heads ON keyframes (id, robot_id, session, stamp_ns, pose, camera, descriptor);
CREATE TABLE checksums (id INTEGER PRIMARY KEY, head INTEGER, centres INTEGER, tokens INTEGER,
    thumbnail INTEGER);
"""


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_schema_is_migrated_and_its_keyframes_stay(
    open_database: Open, path: Path, version: int
) -> None:
    with sqlite3.connect(path) as file:
        file.executescript(SCHEMA_1 + SCHEMA_2 * (version - 1))
        file.execute("INSERT INTO model VALUES ('tiny-0123', ?, ?)", (DIMENSION, PATCHES))
        for i in range(5):
            old = describe(i)
            blobs = (old.descriptor.tobytes(), old.centres.tobytes(), old.tokens.tobytes(), b"jpg")
            pose = "[1.5, -2.25, 0.125, 0.0, 0.0, 0.6, 0.8]"
            file.execute(
                "INSERT INTO keyframes VALUES (?, 3, 'old', ?, ?, NULL, ?, ?, ?, ?)",
                (10 + i, i, pose, *blobs),
            )
            if version == 2:
                checksums = (None, *map(zlib.crc32, blobs[1:]))
                file.execute("INSERT INTO checksums VALUES (?, ?, ?, ?, ?)", (10 + i, *checksums))
    file.close()
    before = path.read_bytes()
    with pytest.raises(
        DatabaseError, match=f"schema {version}, this release reads schema {SCHEMA_VERSION}"
    ):
        open_database(read_only=True)
    assert path.read_bytes() == before
    for _ in range(2):
        database = open_database()
        depth = np.arange(PATCHES).astype(np.float16)
        new = database.add(5, replace(describe(5), depth=depth))
        for i in range(5):
            assert _holds(database, 10 + i, i, i)
            assert database.keyframe(10 + i).pose == POSE and database.thumbnail(10 + i) == b"jpg"
            assert database.keyframe(10 + i).depth is None
        assert _holds(database, new, 5, 5)
        stored = database.keyframe(new).depth
        assert stored is not None and stored.tobytes() == depth.tobytes()
        database.close()
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    file.close()
    assert len(open_database(read_only=True)) == 7


@pytest.mark.parametrize("damage", ["UPDATE depths SET depth = zeroblob(10)", "DELETE FROM depths"])
def test_damaged_depth_is_not_believed(open_database: Open, path: Path, damage: str) -> None:
    database = open_database()
    depth = np.linspace(1, 20, PATCHES).astype(np.float16)
    damaged = database.add(1, replace(describe(1), depth=depth))
    whole = database.add(2, describe(2))
    database.close()
    with sqlite3.connect(path) as file:
        file.execute(damage)
    file.close()
    database = open_database()
    with pytest.raises(DatabaseError, match=f"the depth of keyframe {damaged}"):
        database.keyframe(damaged)
    assert [i for i, _ in database.search(describe(1).descriptor, 9, 0, 0)] == [whole]
    with pytest.raises(ValueError, match="depth has shape"):
        database.add(3, replace(describe(3), depth=depth[1:]))


def test_depth_goes_with_its_keyframe(open_database: Open, path: Path) -> None:
    database = open_database()
    depth = np.ones(PATCHES, np.float16)
    for i in range(3):
        database.add(i, replace(describe(i), depth=depth))
    database.delete_after(1)
    database.close()
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT id FROM depths").fetchall() == [(1,)]
    file.close()
    database = open_database()
    database.reset()
    database.close()
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT id FROM depths").fetchall() == []
    file.close()
