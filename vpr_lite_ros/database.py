"""Keyframes: SQLite on disk, FAISS in memory.

The file holds everything; memory holds the descriptors, in a FAISS index that is built on
loading, and the tokens of the keyframes matched last. Each keyframe is its own transaction, so
a process that dies loses none that ``add`` returned from.
"""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.inference import Description
from vpr_lite_ros.matching import Camera

SCHEMA_VERSION = 1
APPLICATION_ID = 0x5650524C
"""Marks the file as ours ("VPRL") in SQLite's header."""
TOKEN_CACHE_BYTES = 64 * 2**20

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
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
    descriptor BLOB NOT NULL,  -- D float32
    centres BLOB NOT NULL,     -- N x 2 float32, fractions of width and height
    tokens BLOB NOT NULL,      -- N x D float16
    thumbnail BLOB NOT NULL    -- small JPEG, for people; may be empty
);
"""


class DatabaseError(RuntimeError):
    """A database that cannot be used or written; the message names the file and why."""


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


class KeyframeDatabase:
    """All keyframes ever stored in one file, by whatever session and robot.

    Parameters
    ----------
    path
        SQLite file, made if missing. Empty: a temporary file that is gone after ``close``.
    model_id, dimension, max_patches
        Of the model whose descriptors are stored. Descriptors of two models cannot be compared.
    session, robot_id
        Stored with every keyframe that is added.

    Raises
    ------
    DatabaseError
        If the file cannot be opened, is no such database, has another schema or was made with
        another model. The file is left as it is.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model_id: str,
        dimension: int,
        max_patches: int,
        session: str,
        robot_id: int = 0,
    ) -> None:
        self.path = str(path)
        self.model_id, self.session, self.robot_id = model_id, session, robot_id
        self.dimension, self.max_patches = dimension, max_patches
        self._index = faiss.IndexFlatIP(dimension)
        # Row r of the index is keyframe _ids[r], seen at _stamps[r] in session _sessions[r].
        self._ids, self._stamps, self._sessions = array("q"), array("q"), array("q")
        self._session_numbers: dict[tuple[int, str], int] = {}
        self._tokens: OrderedDict[int, NDArray[np.float16]] = OrderedDict()
        try:
            # The detector's owner sees to it that one thread at a time is in here.
            self._sql = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, timeout=5
            )
            try:
                self._open()
            except BaseException:
                self._sql.close()
                raise
        except sqlite3.Error as error:
            raise DatabaseError(
                f"database {self.path}: {error}. Is it a database of vpr_lite_ros, and may this "
                "user write it and its folder?"
            ) from error

    def __len__(self) -> int:
        return len(self._ids)

    def _open(self) -> None:
        application, version = (
            self._sql.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        empty = self._sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if empty:
            self._log_ahead()
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._sql.execute(statement)
                model = (self.model_id, self.dimension, self.max_patches)
                self._sql.execute("INSERT INTO model VALUES (?, ?, ?)", model)
            return
        if application != APPLICATION_ID:
            raise DatabaseError(
                f"database {self.path} was not made by vpr_lite_ros: pass another database_path"
            )
        if version != SCHEMA_VERSION:
            raise DatabaseError(
                f"database {self.path} has schema {version}, this release reads schema "
                f"{SCHEMA_VERSION}: use the release that made it, or another database_path"
            )
        row = self._sql.execute("SELECT model_id FROM model").fetchone()
        if row is None:
            raise DatabaseError(
                f"database {self.path} does not say which model made it: it is damaged. Restore "
                "it from a copy, or pass another database_path"
            )
        (stored,) = row
        if stored != self.model_id:
            raise DatabaseError(
                f"database {self.path} was made with model {stored}, but model {self.model_id} is "
                "running: their descriptors cannot be compared. Pass the bundle it was made "
                "with, or another database_path"
            )
        self._log_ahead()
        rows = self._sql.execute(
            "SELECT id, robot_id, session, stamp_ns, descriptor FROM keyframes ORDER BY id"
        )
        while batch := rows.fetchmany(1024):
            descriptors = np.stack([self._descriptor(row[0], row[4]) for row in batch])
            self._index.add(descriptors)
            for keyframe_id, robot_id, session, stamp_ns, _ in batch:
                self._remember(keyframe_id, robot_id, session, stamp_ns)

    def _log_ahead(self) -> None:
        """Only once the file is known to be ours: the mode is written into it."""
        self._sql.execute("PRAGMA journal_mode = WAL")
        self._sql.execute("PRAGMA synchronous = NORMAL")

    def _descriptor(self, keyframe_id: int, blob: bytes) -> NDArray[np.float32]:
        whole = len(blob) == 4 * self.dimension
        descriptor = np.frombuffer(blob if whole else b"", np.float32)
        if not whole or not np.isfinite(descriptor).all():
            raise DatabaseError(
                f"database {self.path}: the descriptor of keyframe {keyframe_id} is damaged. "
                "Restore the file from a copy, or pass another database_path"
            )
        return descriptor

    def _remember(self, keyframe_id: int, robot_id: int, session: str, stamp_ns: int) -> None:
        numbers = self._session_numbers
        self._ids.append(keyframe_id)
        self._stamps.append(stamp_ns)
        self._sessions.append(numbers.setdefault((robot_id, session), len(numbers)))

    def _transaction(self) -> _Transaction:
        return _Transaction(self._sql)

    def add(
        self,
        stamp_ns: int,
        description: Description,
        pose: Pose | None = None,
        camera: Camera | None = None,
        thumbnail: bytes = b"",
    ) -> int:
        """Store a keyframe and return its id.

        Raises
        ------
        DatabaseError
            If it cannot be written (disk full, read-only); what is stored stays as it is.
        ValueError
            If the description has another shape than the database's or is not finite.
        """
        tokens = np.ascontiguousarray(description.tokens, np.float16)
        expected = (self.max_patches, self.dimension)
        if tokens.shape != expected:
            raise ValueError(f"tokens have shape {tokens.shape}, expected {expected}")
        descriptor = np.ascontiguousarray(description.descriptor, np.float32)
        if descriptor.shape != (self.dimension,) or not np.isfinite(descriptor).all():
            raise ValueError(
                f"descriptor of shape {descriptor.shape} is not {self.dimension} finite numbers"
            )
        centres = np.ascontiguousarray(description.centres, np.float32)
        pose_text = json.dumps([*pose.position, *pose.quaternion]) if pose else None
        camera_text = camera.to_json() if camera else None
        try:
            cursor = self._sql.execute(
                "INSERT INTO keyframes (robot_id, session, stamp_ns, pose, camera, descriptor, "
                "centres, tokens, thumbnail) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self.robot_id,
                    self.session,
                    stamp_ns,
                    pose_text,
                    camera_text,
                    descriptor.tobytes(),
                    centres.tobytes(),
                    tokens.tobytes(),
                    thumbnail,
                ),
            )
        except sqlite3.Error as error:
            raise DatabaseError(
                f"database {self.path}: keyframe not stored: {error}. Is the disk full or "
                "read-only?"
            ) from error
        keyframe_id = cursor.lastrowid
        assert keyframe_id is not None
        self._index.add(descriptor[None])
        self._remember(keyframe_id, self.robot_id, self.session, stamp_ns)
        self._cache(keyframe_id, tokens)
        return keyframe_id

    def search(
        self, descriptor: NDArray[np.float32], k: int, stamp_ns: int, min_gap_ns: int
    ) -> list[tuple[int, float]]:
        """The ``k`` most similar keyframes, best first, as (id, cosine).

        Keyframes of the running session within ``min_gap_ns`` of ``stamp_ns``, before or after,
        are left out by a FAISS selector; there are ``k`` results whenever ``k`` are eligible.
        """
        if not self._ids:
            return []
        ours = self._session_numbers.get((self.robot_id, self.session), -1)
        stamps = np.frombuffer(self._stamps, np.int64)
        recent = np.abs(stamps - stamp_ns) < min_gap_ns
        eligible = ~(recent & (np.frombuffer(self._sessions, np.int64) == ours))
        bitmap = np.packbits(eligible, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(eligible), faiss.swig_ptr(bitmap))
        found = min(k, int(eligible.sum()))
        if found == 0:
            return []
        similarities, rows = self._index.search(
            np.ascontiguousarray(descriptor[None], np.float32),
            found,
            params=faiss.SearchParameters(sel=selector),
        )
        return [
            (self._ids[row], float(similarity))
            for row, similarity in zip(rows[0].tolist(), similarities[0].tolist(), strict=True)
        ]

    def keyframe(self, keyframe_id: int) -> Keyframe:
        """The stored keyframe ``keyframe_id``; ``KeyError`` if there is none."""
        row = self._sql.execute(
            "SELECT robot_id, session, stamp_ns, pose, camera, centres FROM keyframes WHERE id = ?",
            (keyframe_id,),
        ).fetchone()
        if row is None:
            raise KeyError(f"database {self.path} has no keyframe {keyframe_id}")
        robot_id, session, stamp_ns, pose_text, camera_text, centres = row
        pose = _pose(pose_text) if pose_text else None
        camera = Camera.from_json(camera_text) if camera_text else None
        return Keyframe(
            keyframe_id,
            robot_id,
            session,
            stamp_ns,
            pose,
            camera,
            np.frombuffer(centres, np.float32).reshape(-1, 2),
        )

    def tokens(self, ids: list[int]) -> NDArray[np.float16]:
        """Tokens (B, N, D) of the keyframes ``ids``; ``KeyError`` if one is missing."""
        found = []
        for keyframe_id in ids:
            tokens = self._tokens.get(keyframe_id)
            if tokens is None:
                row = self._sql.execute(
                    "SELECT tokens FROM keyframes WHERE id = ?", (keyframe_id,)
                ).fetchone()
                if row is None:
                    raise KeyError(f"database {self.path} has no keyframe {keyframe_id}")
                tokens = np.frombuffer(row[0], np.float16).reshape(-1, self.dimension)
            self._cache(keyframe_id, tokens)
            found.append(tokens)
        return np.stack(found)

    def thumbnail(self, keyframe_id: int) -> bytes:
        """The keyframe's small JPEG; empty if there is none."""
        row = self._sql.execute(
            "SELECT thumbnail FROM keyframes WHERE id = ?", (keyframe_id,)
        ).fetchone()
        return bytes(row[0]) if row else b""

    def poses(self) -> list[tuple[int, str, Pose]]:
        """(id, session, pose) of all keyframes whose pose is known, in order of insertion."""
        rows = self._sql.execute(
            "SELECT id, session, pose FROM keyframes WHERE pose IS NOT NULL ORDER BY id"
        )
        return [(row[0], row[1], _pose(row[2])) for row in rows]

    def _cache(self, keyframe_id: int, tokens: NDArray[np.float16]) -> None:
        """Keep ``tokens`` as those used last; let go of the ones used longest ago."""
        self._tokens[keyframe_id] = tokens
        self._tokens.move_to_end(keyframe_id)
        while len(self._tokens) * tokens.nbytes > TOKEN_CACHE_BYTES:
            self._tokens.popitem(last=False)

    def save(self) -> None:
        """Bring everything from SQLite's log into the file itself, and on to the disk."""
        try:
            self._sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise DatabaseError(f"database {self.path}: not saved: {error}") from error

    def reset(self) -> None:
        """Delete all keyframes, of every session."""
        try:
            with self._transaction():
                self._sql.execute("DELETE FROM keyframes")
        except sqlite3.Error as error:
            raise DatabaseError(f"database {self.path}: not emptied: {error}") from error
        self._index.reset()
        self._ids, self._stamps, self._sessions = array("q"), array("q"), array("q")
        self._session_numbers.clear()
        self._tokens.clear()

    def close(self) -> None:
        """Write what is left and let the file go."""
        self._sql.close()


def _pose(text: str) -> Pose:
    x, y, z, qx, qy, qz, qw = json.loads(text)
    return Pose((x, y, z), (qx, qy, qz, qw))


class _Transaction:
    """``with`` block that is committed as a whole or not at all."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._sql = connection

    def __enter__(self) -> None:
        self._sql.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._sql.execute("ROLLBACK" if kind else "COMMIT")
