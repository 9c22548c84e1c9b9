"""The file of keyframes: SQLite, on the disk soon after it is written, checked when it is read.

SQLite's write-ahead log keeps each transaction whole: a process that is killed loses none that was
committed. A machine that loses power loses what was not yet synchronised, so a thread does that,
at most a second behind, and ``durable_id`` says how far it has come. Each part of a keyframe
has a CRC-32, so that a damaged disk is noticed and not believed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.matching import Camera

SCHEMA_VERSION = 3
APPLICATION_ID = 0x5650524C
"""Marks the file as ours ("VPRL") in SQLite's header."""
SYNC_PERIOD_S = 0.5
"""From one synchronisation to the next; what comes between waits this long and for the disk."""
LOG_BYTES = 16 * 2**20
"""The log beside the file hardly becomes larger."""
PAGE_BYTES = 16384
"""Of new files. Tokens fill tens of pages; smaller ones make a cold file slow to load and thin."""

# Loading reads the index alone: some MB together, where keyframes lie half a MB apart.
_HEAD = "id, robot_id, session, stamp_ns, pose, camera, descriptor"
_ADDED_BY_SCHEMA_2 = f"""
CREATE INDEX heads ON keyframes ({_HEAD});
CREATE TABLE checksums (   -- CRC-32 of a keyframe's parts; NULL for those of schema 1
    id INTEGER PRIMARY KEY,
    head INTEGER,          -- everything up to the descriptor
    centres INTEGER,
    tokens INTEGER,
    thumbnail INTEGER
);
"""
# A table of its own: behind the tokens it could be read only with them.
_ADDED_BY_SCHEMA_3 = """
CREATE TABLE depths (      -- of the keyframes that have depth
    id INTEGER PRIMARY KEY,
    depth BLOB NOT NULL    -- N float16, metres at the centres; 0: not known
);
ALTER TABLE checksums ADD COLUMN depth INTEGER /* NULL: it has no depth */;
"""
_TABLES = ("keyframes", "checksums", "depths")
_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
CREATE TABLE model (
    model_id TEXT NOT NULL,
    dimension INTEGER NOT NULL,
    max_patches INTEGER NOT NULL
);
CREATE TABLE keyframes (
    id INTEGER PRIMARY KEY,
    robot_id INTEGER NOT NULL,
    session TEXT NOT NULL,
    stamp_ns INTEGER NOT NULL,
    pose TEXT,             -- JSON: x y z in metres, qx qy qz qw, odometry frame; if known
    camera TEXT,           -- JSON: intrinsics; if known
    descriptor BLOB NOT NULL,  -- V x D float32: of the whole image, then of parts of it
    centres BLOB NOT NULL,     -- N x 2 float32, fractions of width and height
    tokens BLOB NOT NULL,      -- N x D float16
    thumbnail BLOB NOT NULL    -- small JPEG; may be empty
);
"""


class DatabaseError(RuntimeError):
    """A database that cannot be used or written; the message names the file and why."""


class OldSchemaError(DatabaseError):
    """A file of an earlier release that is only read, and so cannot be brought up to date."""

    def __init__(self, seen: str, remedy: str) -> None:
        super().__init__(f"{seen}: {remedy}")
        self.seen = seen


class DamageError(DatabaseError):
    """What was read is not what was written."""


@dataclass(frozen=True)
class Pose:
    """Pose of the body in the odometry's frame: metres and a unit quaternion (x, y, z, w)."""

    position: tuple[float, float, float]
    quaternion: tuple[float, float, float, float]


@dataclass(frozen=True)
class Keyframe:
    """A stored keyframe without its descriptor and tokens."""

    id: int
    robot_id: int
    session: str
    stamp_ns: int
    pose: Pose | None
    camera: Camera | None
    centres: NDArray[np.float32]
    """(N, 2) patch centres, fractions of the image's width and height."""
    depth: NDArray[np.float16] | None = None
    """(N,) metres along the optical axis at each centre, 0 where not known; None without depth."""


class Head(NamedTuple):
    """What a search needs of a stored keyframe."""

    id: int
    robot_id: int
    session: str
    stamp_ns: int
    pose: Pose | None
    descriptor: NDArray[np.float32]


class KeyframeFile:
    """One SQLite file of keyframes that one model described.

    Every method raises ``DatabaseError`` if the file cannot be read or written, and leaves what is
    stored as it is.

    Parameters
    ----------
    path
        Made if missing, brought to this release's schema if it is older. Empty: a temporary file.
    model_id, dimension, max_patches
        Of the model.
    read_only
        Nothing is written, and a read-only medium will do.
    """

    def __init__(
        self, path: str, *, model_id: str, dimension: int, max_patches: int, read_only: bool
    ) -> None:
        self.path, self.read_only = path, read_only
        self._dimension = dimension
        self.parts = 0
        """V: descriptors of each keyframe. 0 while there is no keyframe."""
        self._last_id = 0
        self._syncer: _Syncer | None = None
        self._synced_id: int | None = None  # where there is no thread for it
        right = "read" if read_only else "write"
        hint = f"Is it a database of vpr_lite_ros, and may this user {right} it and its folder?"
        if not read_only:
            hint += " With mode: localization, read-only will do."
        with self._explaining("cannot be used", hint):
            self._refuse_cut()
            self._sql = self._open_read_only() if read_only else _connect(path)
            try:
                self._open((model_id, dimension, max_patches))
            except BaseException:
                self.close()
                raise

    @property
    def durable_id(self) -> int:
        """Power may fail: keyframes up to this id are on the disk. 0 while there is none."""
        return self._syncer.durable_id if self._syncer else self._synced_id or 0

    @property
    def fault(self) -> str:
        """Why keyframes are not getting onto the disk; empty while they are."""
        return self._syncer.fault if self._syncer else ""

    @property
    def used_bytes(self) -> int:
        """Bytes of the file that hold something; the rest is free for what comes."""
        with self._explaining("cannot be read"):
            total, free, size = (
                self._sql.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (total - free) * size

    # -- opening -------------------------------------------------------------------------------

    def _refuse_cut(self) -> None:
        """Refuse a file that ends within a page, which SQLite would fill with zeros."""
        file, log = Path(self.path), Path(f"{self.path}-wal")
        if not self.path or not file.is_file() or (log.is_file() and log.stat().st_size):
            return  # what the log holds may be half in the file
        try:
            with file.open("rb") as opened:
                page_bytes = int.from_bytes(opened.read(18)[16:], "big")
        except OSError:
            return  # SQLite will say why
        if file.stat().st_size % max(512, page_bytes if page_bytes > 1 else 65536):
            raise DamageError(
                f"database {self.path} is no database of vpr_lite_ros, or its end is missing: "
                "restore it from a copy, or pass another database_path"
            )

    def _open_read_only(self) -> sqlite3.Connection:
        if not Path(self.path).is_file():
            raise DatabaseError(
                f"database {self.path or '(no database_path)'} is missing: mode localization "
                "reads a database that mode mapping has made"
            )
        uri = Path(self.path).absolute().as_uri()
        connection = _connect(f"{uri}?mode=ro", uri=True)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            # A log needs a file beside it that readers write to: not so on a read-only medium.
            connection.close()
            log = Path(f"{self.path}-wal")
            if log.exists() and log.stat().st_size > 0:
                raise DatabaseError(
                    f"database {self.path} was not closed, or is in use: part of it is in "
                    f"{log.name}, which cannot be read in a read-only folder ({error}). Call "
                    "~/save or end the node that writes it, then copy it again"
                ) from error
            connection = _connect(f"{uri}?immutable=1", uri=True)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _open(self, model: tuple[str, int, int]) -> None:
        self._sql.execute("PRAGMA cell_size_check = ON")
        self._sql.execute("PRAGMA secure_delete = OFF")  # else deleting writes as much as adding
        application, version = (
            self._sql.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        empty = self._sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if empty and not self.read_only:
            self._sql.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            # The map of pages that this keeps spares a deletion from reading all of them.
            self._sql.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._write_ahead()
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._sql.execute(statement)
                self._sql.execute("INSERT INTO model VALUES (?, ?, ?)", model)
                self._migrate(1)
        else:
            self._refuse_others(application, version, model[0])
            if not self.read_only:
                self._write_ahead()
                if version < SCHEMA_VERSION:
                    with self._transaction():
                        self._migrate(version)

    def _refuse_others(self, application: int, version: int, model_id: str) -> None:
        if application != APPLICATION_ID:
            raise DatabaseError(
                f"database {self.path} was not made by vpr_lite_ros: pass another database_path"
            )
        if 1 <= version < SCHEMA_VERSION and self.read_only:
            raise OldSchemaError(
                f"database {self.path} has schema {version}, this release reads schema "
                f"{SCHEMA_VERSION}",
                "open it once in mode mapping, which brings it there",
            )
        if not 1 <= version <= SCHEMA_VERSION:
            raise DatabaseError(
                f"database {self.path} has schema {version}, this release reads schema "
                f"{SCHEMA_VERSION}: use the release that made it, or another database_path"
            )
        row = self._sql.execute("SELECT model_id FROM model").fetchone()
        if row is None:
            raise DamageError(
                f"database {self.path} does not say which model made it: it is damaged. Restore "
                "it from a copy, or pass another database_path"
            )
        if row[0] != model_id:
            raise DatabaseError(
                f"database {self.path} was made with model {row[0]}, but model {model_id} is "
                "running: their descriptors cannot be compared. Pass the bundle it was made "
                "with, or another database_path"
            )

    def _write_ahead(self) -> None:
        """Only once the file is known to be ours: the mode is written into it."""
        (mode,) = self._sql.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode == "wal":
            self._sql.execute("PRAGMA synchronous = NORMAL")
            # The thread copies the log into the file, and it begins anew once all is copied. When
            # keyframes come so fast that this never is, writing waits for it here.
            (page_bytes,) = self._sql.execute("PRAGMA page_size").fetchone()
            self._sql.execute(f"PRAGMA wal_autocheckpoint = {LOG_BYTES // page_bytes}")
            self._sql.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
            self._syncer = _Syncer(self.path)
        elif self.path:  # a file system without shared memory: each commit waits for the disk
            self._sql.execute("PRAGMA synchronous = FULL")
            self._synced_id = 0

    def _migrate(self, version: int) -> None:
        """Add what the schemas after ``version`` have over it."""
        for number, added in ((2, _ADDED_BY_SCHEMA_2), (3, _ADDED_BY_SCHEMA_3)):
            if number > version:
                for statement in added.split(";\n"):
                    self._sql.execute(statement)
        if version < 2:
            self._sql.execute("INSERT INTO checksums (id) SELECT id FROM keyframes")
        self._sql.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    # -- reading -------------------------------------------------------------------------------

    def heads(self) -> Iterator[Head]:
        """What a search needs of each keyframe, ids ascending."""
        with self._explaining("cannot be read"):
            self._last_id = 0
            expected = dict(self._sql.execute("SELECT id, head FROM checksums"))
            query = f"SELECT {_HEAD} FROM keyframes INDEXED BY heads ORDER BY id"
            for row in self._sql.execute(query):
                if row[0] not in expected:
                    raise self._damaged(f"keyframe {row[0]} appears from nowhere")
                yield self._check_head(row, expected.pop(row[0]))
                self._last_id = row[0]
            if expected:
                raise self._damaged(f"keyframe {min(expected)} is missing")
        self._wrote()

    def keyframe(self, keyframe_id: int) -> Keyframe:
        """The stored keyframe ``keyframe_id``; ``KeyError`` if there is none."""
        row, expected = self._row(keyframe_id, f"{_HEAD}, centres", "head, centres, depth")
        camera, centres = row[5], row[7]
        head = self._check_head(row[:7], expected[0])
        self._check(keyframe_id, "centres", centres, expected[1])
        return Keyframe(
            *head[:5],
            Camera.from_json(camera) if camera else None,
            np.frombuffer(centres, np.float32).reshape(-1, 2),
            self._depth(keyframe_id, expected[2]) if expected[2] is not None else None,
        )

    def descriptor(self, keyframe_id: int) -> NDArray[np.float32]:
        """Descriptors (V, D) of one keyframe; ``KeyError`` if there is none."""
        row, expected = self._row(keyframe_id, _HEAD, "head")
        return self._check_head(row, expected[0]).descriptor

    def _depth(self, keyframe_id: int, expected: object) -> NDArray[np.float16]:
        with self._explaining(f"keyframe {keyframe_id} cannot be read"):
            row = self._sql.execute(
                "SELECT depth FROM depths WHERE id = ?", (keyframe_id,)
            ).fetchone()
        blob = row[0] if row else b""
        self._check(keyframe_id, "depth", blob, expected)
        return np.frombuffer(blob, np.float16)

    def tokens(self, keyframe_id: int) -> NDArray[np.float16]:
        """Tokens (N, D) of one keyframe; ``KeyError`` if there is none."""
        blob = self._blob(keyframe_id, "tokens")
        return np.frombuffer(blob, np.float16).reshape(-1, self._dimension)

    def thumbnail(self, keyframe_id: int) -> bytes:
        """The keyframe's small JPEG; ``KeyError`` if there is no such keyframe."""
        return self._blob(keyframe_id, "thumbnail")

    def _row(
        self, keyframe_id: int, columns: str, checksums: str
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        with self._explaining(f"keyframe {keyframe_id} cannot be read"):
            row, expected = (
                self._sql.execute(
                    f"SELECT {names} FROM {table} WHERE id = ?", (keyframe_id,)
                ).fetchone()
                for names, table in ((columns, "keyframes"), (checksums, "checksums"))
            )
        if row is None:
            raise KeyError(f"database {self.path} has no keyframe {keyframe_id}")
        if expected is None:
            raise self._damaged(f"keyframe {keyframe_id} appears from nowhere")
        return row, expected

    def _blob(self, keyframe_id: int, part: str) -> bytes:
        (blob,), (expected,) = self._row(keyframe_id, part, part)
        self._check(keyframe_id, part, blob, expected)
        return blob

    def _check(self, keyframe_id: int, part: str, blob: object, expected: object) -> None:
        if not isinstance(blob, bytes) or expected not in (None, zlib.crc32(blob)):
            raise self._damaged(f"the {part} of keyframe {keyframe_id} are not what was stored")

    def _check_head(self, row: tuple[Any, ...], expected: object) -> Head:
        try:
            if expected not in (None, _head_checksum(row)):
                raise ValueError("its checksum is another")
            descriptor = np.frombuffer(row[6], np.float32).reshape(-1, self._dimension)
            parts = self.parts or max(1, len(descriptor))
            if len(descriptor) != parts or not np.isfinite(descriptor).all():
                raise ValueError(f"not {parts} x {self._dimension} finite numbers")
            self.parts = parts
            pose = _pose(row[4]) if row[4] is not None else None
        except (ValueError, TypeError, AttributeError, struct.error) as error:
            raise self._damaged(f"the descriptor of keyframe {row[0]} ({error})") from error
        return Head(row[0], row[1], row[2], row[3], pose, descriptor)

    def _damaged(self, what: str) -> DamageError:
        return DamageError(
            f"database {self.path} is damaged: {what}. Restore the file from a copy, or pass "
            "another database_path"
        )

    # -- writing -------------------------------------------------------------------------------

    def insert(
        self,
        robot_id: int,
        session: str,
        stamp_ns: int,
        pose: Pose | None,
        camera: Camera | None,
        descriptor: NDArray[np.float32],
        centres: NDArray[np.float32],
        tokens: NDArray[np.float16],
        thumbnail: bytes,
        depth: NDArray[np.float16] | None,
    ) -> int:
        """Store a keyframe and return its id, which is higher than any before."""
        pose_text = json.dumps([*pose.position, *pose.quaternion]) if pose else None
        camera_text = camera.to_json() if camera else None
        blobs = centres.tobytes(), tokens.tobytes(), thumbnail
        hint = "Is the disk full or read-only?"
        with self._explaining("keyframe not stored", hint), self._transaction():
            (highest,) = self._sql.execute("SELECT max(id) FROM keyframes").fetchone()
            # Never the id of a keyframe that was deleted: somebody may still speak of it.
            head = (
                max(highest or 0, self._last_id) + 1,
                robot_id,
                session,
                stamp_ns,
                pose_text,
                camera_text,
                descriptor.tobytes(),
            )
            self._sql.execute(
                f"INSERT INTO keyframes ({_HEAD}, centres, tokens, thumbnail) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*head, *blobs),
            )
            depth_blob = depth.tobytes() if depth is not None else None
            if depth_blob is not None:
                self._sql.execute("INSERT INTO depths VALUES (?, ?)", (head[0], depth_blob))
            self._sql.execute(
                "INSERT INTO checksums VALUES (?, ?, ?, ?, ?, ?)",
                (
                    head[0],
                    _head_checksum(head),
                    *map(zlib.crc32, blobs),
                    zlib.crc32(depth_blob) if depth_blob is not None else None,
                ),
            )
        self._last_id, self.parts = head[0], len(descriptor)
        self._wrote()
        return head[0]

    def delete(self, ids: list[int]) -> None:
        """Delete these keyframes, all or none; the file keeps its size and reuses the room."""
        with self._explaining("keyframes not deleted"), self._transaction():
            for table in _TABLES:
                self._sql.executemany(f"DELETE FROM {table} WHERE id = ?", [(i,) for i in ids])
        self._wrote()

    def clear(self) -> None:
        """Delete all keyframes; ids begin anew."""
        with self._paused(), self._explaining("not emptied"), self._transaction():
            for table in _TABLES:
                self._sql.execute(f"DELETE FROM {table}")
            self._last_id = 0
            if self._syncer is not None:
                self._syncer.durable_id = 0
        self._wrote()

    def save(self) -> None:
        """Bring everything from SQLite's log into the file itself, and on to the disk."""
        if self._syncer is None:
            return
        with self._paused(), self._explaining("not saved", "Is the disk full?"):
            busy, _, _ = self._sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise DatabaseError(
                    f"database {self.path}: not saved: another program is using it. End that and "
                    "save again; what was stored is safe in its log"
                )
            self._syncer.durable_id = self._last_id

    def close(self) -> None:
        """Bring what is left onto the disk and let the file go."""
        if self._syncer is not None:
            self._syncer.stop()
        self._sql.close()

    def _wrote(self) -> None:
        if self._syncer is not None:
            self._syncer.wrote(self._last_id)
        elif self._synced_id is not None:
            self._synced_id = self._last_id

    def _paused(self) -> AbstractContextManager[object]:
        """Meanwhile the thread synchronises nothing."""
        return self._syncer.busy if self._syncer is not None else nullcontext()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """``with`` block that is committed as a whole or not at all."""
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._sql.execute("COMMIT")
        except BaseException:
            if self._sql.in_transaction:  # a full disk may have ended it already
                self._sql.execute("ROLLBACK")
            raise

    @contextmanager
    def _explaining(self, what: str, hint: str = "") -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise DatabaseError(f"database {self.path}: {what}: {error}. {hint}".strip()) from error
        except sqlite3.Error as error:
            # SQLITE_CORRUPT and SQLITE_NOTADB are no OperationalError.
            raise DamageError(f"database {self.path}: {what}: {error}. {hint}".strip()) from error


class _Syncer:
    """A thread that brings what was committed onto the disk, at most a second behind.

    It copies SQLite's log into the file, which synchronises both, so that the thread that adds
    keyframes never waits for the disk.
    """

    def __init__(self, path: str) -> None:
        self.durable_id = 0
        self.fault = ""
        self._path = path
        self._last_id = 0
        self._pending = self._stopping = False
        self._wakes = threading.Condition()
        self.busy = threading.Lock()
        """Held while it synchronises. SQLite turns one checkpoint away while another runs."""
        self._thread = threading.Thread(target=self._work, name="database", daemon=True)
        self._thread.start()

    def wrote(self, last_id: int) -> None:
        with self._wakes:
            self._last_id, self._pending = last_id, True
            self._wakes.notify()

    def stop(self) -> None:
        with self._wakes:
            self._stopping = True
            self._wakes.notify()
        self._thread.join()

    def _work(self) -> None:
        connection = _connect(self._path)
        try:
            while True:
                with self._wakes:
                    self._wakes.wait_for(lambda: self._pending or self._stopping)
                    if not self._pending:
                        return
                try:
                    with self.busy:
                        with self._wakes:
                            last_id, self._pending = self._last_id, False
                        self._sync(connection)
                        self.durable_id, self.fault = last_id, ""
                except (sqlite3.Error, OSError) as error:
                    self.fault = (
                        f"database {self._path}: keyframes after {self.durable_id} would be lost "
                        f"if power failed now: {error}. Is the disk full?"
                    )
                with self._wakes:
                    if self._stopping and (self.fault or not self._pending):
                        return
                    self._pending |= bool(self.fault)
                    self._wakes.wait_for(lambda: self._stopping, timeout=SYNC_PERIOD_S)
        finally:
            connection.close()

    def _sync(self, connection: sqlite3.Connection) -> None:
        busy, log, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if busy or copied < log:
            # Another program still reads what was there before: the log itself will do.
            descriptor = os.open(f"{self._path}-wal", os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _connect(path: str, uri: bool = False) -> sqlite3.Connection:
    # The database's owner sees to it that one thread at a time uses a connection.
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5, uri=uri)


def _pose(text: str) -> Pose:
    x, y, z, qx, qy, qz, qw = json.loads(text)
    return Pose((x, y, z), (qx, qy, qz, qw))


def _head_checksum(head: tuple[Any, ...]) -> int:
    keyframe_id, robot_id, session, stamp_ns, pose, camera, descriptor = head
    texts = "\0".join((session, pose or "", camera or "")).encode()
    checksum = zlib.crc32(texts, zlib.crc32(struct.pack("<qqq", keyframe_id, robot_id, stamp_ns)))
    return zlib.crc32(descriptor, checksum)
