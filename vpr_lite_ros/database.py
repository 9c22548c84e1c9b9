"""Keyframes: a file on disk, FAISS in memory.

The file holds everything; memory holds the descriptors, in a FAISS index that is built on
loading, and the tokens of the keyframes matched last. What is on disk, and from when on, is
``storage.py``'s; which keyframes go when the database is full, ``thinning.py``'s.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.config import Config
from vpr_lite_ros.descriptors import DescriptorIndex
from vpr_lite_ros.inference import Bundle, Description
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.storage import (
    PAGE_BYTES,
    DamageError,
    DatabaseError,
    Head,
    Keyframe,
    KeyframeFile,
    Pose,
)
from vpr_lite_ros.thinning import densest

__all__ = ["DatabaseError", "Keyframe", "KeyframeDatabase", "Pose", "open_database"]

TOKEN_CACHE_BYTES = 64 * 2**20
LOADED_AT_ONCE = 1024
MOST_AT_ONCE = 64
"""Keyframes deleted at a time when the database is full, or one in so many if there are fewer."""

FASTEST_M_PER_S = 60.0
"""Odometry that moves faster has been set anew ..."""
FAR_M = 1e9
"""... which counts as a way so long that nothing is known of what lies beyond."""
_ROW = np.dtype(
    [
        ("id", np.int64),
        ("drive", np.int32),  # number of (robot, session)
        ("robot", np.int32),
        ("stamp", np.int64),
        ("this_run", np.bool_),
        ("moment", np.int64),  # of this run: nanoseconds on a clock that does not jump
        ("pose", np.float64, 7),  # NaN if not known
        ("travelled", np.float64),  # metres, in its drive
    ]
)


class KeyframeDatabase:
    """All keyframes ever stored in one file, by whatever session and robot.

    Parameters
    ----------
    path
        SQLite file, made if missing. Empty: a temporary file that is gone after ``close``.
    model_id, dimension, max_patches
        Of the model whose descriptors are stored. Descriptors of two models cannot be compared.
    session, robot_id
        Stored with every keyframe that is added. A session of that name that the file already
        has is continued.
    resume
        All that the file holds is one run that was interrupted and now goes on: in its last
        session, as if nothing had happened.
    read_only
        Nothing is written; a read-only medium will do.
    max_keyframes, max_bytes
        When ``add`` would exceed them, the keyframes that are densest in place and time are
        deleted first. Bytes are those of the file, without its log. 0: no limit.

    Raises
    ------
    DatabaseError
        If the file cannot be opened, is no such database, has a newer schema, is damaged or was
        made with another model. The file is left as it is.
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
        resume: bool = False,
        read_only: bool = False,
        max_keyframes: int = 0,
        max_bytes: int = 0,
    ) -> None:
        self.path = str(path)
        self.model_id, self.session, self.robot_id = model_id, session, robot_id
        self.run = session
        """Name of the first session of this run; of those after it ``begin_session`` makes more."""
        self._resume = resume
        self.dimension, self.max_patches = dimension, max_patches
        self.read_only = read_only
        self.max_keyframes, self.max_bytes = max_keyframes, max_bytes
        self._tokens: OrderedDict[int, NDArray[np.float16]] = OrderedDict()
        self._clear_memory()
        self._file = KeyframeFile(
            self.path,
            model_id=model_id,
            dimension=dimension,
            max_patches=max_patches,
            read_only=read_only,
        )
        try:
            self._load()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return self._count

    @property
    def durable_id(self) -> int:
        """Keyframes up to this id are on the disk, should power fail: at most a second behind
        ``add``. 0 while there is none, and in a temporary database."""
        return self._file.durable_id

    @property
    def last_id(self) -> int:
        """Of the keyframe that was stored last; 0 if there is none."""
        return int(self._rows["id"][self._count - 1]) if self._count else 0

    @property
    def fault(self) -> str:
        """Why stored keyframes are not getting onto the disk, or are not used; empty if all is
        well."""
        return self._file.fault or self._fault

    @property
    def bytes_on_disk(self) -> int:
        """Size of the file and its log."""
        files = (Path(self.path + suffix) for suffix in ("", "-wal"))
        return sum(file.stat().st_size for file in files if self.path and file.is_file())

    @property
    def bytes_in_memory(self) -> int:
        """Of descriptors, cached tokens and what is known of each keyframe."""
        tokens = sum(tokens.nbytes for tokens in self._tokens.values())
        return self._count * self._index.bytes_each + tokens + self._rows.nbytes

    def _clear_memory(self) -> None:
        self._index = DescriptorIndex(self.dimension)
        self._rows = np.zeros(0, _ROW)  # the first _count rows are those of the index
        self._count = 0
        self._drives: dict[tuple[int, str], int] = {}
        self._drives_of_this_run = {(self.robot_id, self.session)}
        self._last_in_drive: dict[int, NDArray[np.void]] = {}
        self._jump_ns: int | None = 0
        self._last_moment: int | None = None
        self._fault = ""
        self._tokens.clear()

    def _load(self) -> None:
        waiting: list[NDArray[np.float32]] = []
        for head in self._file.heads():
            waiting.append(head.descriptor)
            if self._resume and head.session != self.session:
                self._continue_in(head.session)
            # What a localising robot finds in the file is none of its own run.
            self._remember(head, not self.read_only)
            if len(waiting) == LOADED_AT_ONCE:
                self._index.add(np.stack(waiting))
                waiting.clear()
        if waiting:
            self._index.add(np.stack(waiting))

    def _remember(self, head: Head, may_be_this_run: bool) -> None:
        """Keep a row of a keyframe whose descriptor goes into the index."""
        if self._count == len(self._rows):
            more = np.zeros(max(64, self._count), _ROW)
            self._rows = np.concatenate([self._rows, more])
        row = self._rows[self._count]
        drive = head.robot_id, head.session
        row["id"], row["robot"], row["stamp"] = head.id, head.robot_id, head.stamp_ns
        row["drive"] = number = self._drives.setdefault(drive, len(self._drives))
        pose = head.pose
        row["pose"] = (*pose.position, *pose.quaternion) if pose else math.nan
        if may_be_this_run and drive in self._drives_of_this_run:
            row["this_run"], row["moment"] = True, self._moment(head.stamp_ns)
            self._last_moment = max(row["moment"], self._last_moment or row["moment"])
        before = self._last_in_drive.get(number)
        last = row.copy()
        if before is not None:
            row["travelled"] = last["travelled"] = before["travelled"] + _way(before, row)
            if np.isnan(row["pose"][0]):  # the next step goes on from where the pose was known
                last["pose"], last["stamp"] = before["pose"], before["stamp"]
        self._last_in_drive[number] = last
        self._count += 1

    # -- sessions ------------------------------------------------------------------------------

    def begin_session(self, name: str) -> str:
        """Begin another session, as when the clock jumps or a bag begins anew; keyframes stay.

        Returns the session's name: ``name``, or ``name-2`` and so on where the robot already has
        a session of that name. The gap of ``search`` goes on across the jump, for which no time at
        all is counted, whatever the stamps say: a keyframe taken 10 s before the last one of the
        session that ended is 15 s old when the first one of the new session is 5 s old.
        """
        taken, number = name, 1
        while (self.robot_id, name) in self._drives | dict.fromkeys(self._drives_of_this_run, 0):
            number += 1
            name = f"{taken}-{number}"
        self._continue_in(name)
        return name

    def _continue_in(self, session: str) -> None:
        self.session = session
        self._drives_of_this_run.add((self.robot_id, session))
        if self._last_moment is not None:
            self._jump_ns = None

    def _moment(self, stamp_ns: int) -> int:
        """``stamp_ns`` on this run's clock, which goes on where it was when a session begins."""
        if self._jump_ns is None:
            assert self._last_moment is not None
            self._jump_ns = self._last_moment - stamp_ns
        return stamp_ns + self._jump_ns

    # -- adding --------------------------------------------------------------------------------

    def add(
        self,
        stamp_ns: int,
        description: Description,
        pose: Pose | None = None,
        camera: Camera | None = None,
        *,
        robot_id: int | None = None,
        session: str | None = None,
    ) -> int:
        """Store a keyframe and return its id. Once that is known, only a power failure can lose it,
        and from ``durable_id`` on not even that.

        Parameters
        ----------
        robot_id, session
            Of another robot whose keyframe it is, both or neither. One that is already stored
            (same robot, session and stamp) is not stored again: its id is returned.

        Raises
        ------
        DatabaseError
            If it cannot be written (disk full, read-only); what is stored stays as it is.
        ValueError
            If the description has another shape than the database's or is not finite, or if
            another robot's keyframe says that it is of a session of this run.
        """
        if self.read_only:
            raise DatabaseError(f"database {self.path} is only read in mode localization")
        tokens = np.ascontiguousarray(description.tokens, np.float16)
        expected = (self.max_patches, self.dimension)
        if tokens.shape != expected:
            raise ValueError(f"tokens have shape {tokens.shape}, expected {expected}")
        descriptor = np.ascontiguousarray(description.descriptor, np.float32)
        parts = self._file.parts or max(1, len(descriptor))
        if descriptor.shape != (parts, self.dimension) or not np.isfinite(descriptor).all():
            raise ValueError(
                f"descriptor of shape {descriptor.shape} is not {parts} x {self.dimension} finite "
                "numbers"
            )
        if robot_id is None or session is None:
            robot_id, session = self.robot_id, self.session
        else:
            stored = self._stored(robot_id, session, stamp_ns)
            if stored is not None:
                return stored
        centres = np.ascontiguousarray(description.centres, np.float32)
        depth = description.depth
        if depth is not None:
            if depth.shape != (self.max_patches,):
                raise ValueError(f"depth has shape {depth.shape}, expected {(self.max_patches,)}")
            depth = np.ascontiguousarray(depth, np.float16)
        content = sum(
            part.nbytes for part in (tokens, centres, descriptor, depth) if part is not None
        )
        picture = description.picture
        self._make_room(content + len(picture))
        keyframe_id = self._file.insert(
            robot_id, session, stamp_ns, pose, camera, descriptor, centres, tokens, picture, depth
        )
        self._index.add(descriptor[None])
        self._remember(Head(keyframe_id, robot_id, session, stamp_ns, pose, descriptor), True)
        self._cache(keyframe_id, tokens)
        return keyframe_id

    def _stored(self, robot_id: int, session: str, stamp_ns: int) -> int | None:
        """Id of another robot's keyframe, if it is there."""
        if (robot_id, session) in self._drives_of_this_run:
            raise ValueError(
                f"a keyframe of another robot says robot_id {robot_id}, session {session}, which "
                "is this robot's: give each robot a robot_id of its own"
            )
        rows = self._rows[: self._count]
        same = (rows["stamp"] == stamp_ns) & (
            rows["drive"] == self._drives.get((robot_id, session), -1)
        )
        found = np.flatnonzero(same)
        return int(rows["id"][found[0]]) if len(found) else None

    def _make_room(self, content_bytes: int) -> None:
        """Delete what is densest until one more keyframe fits."""
        while (excess := self._excess(content_bytes)) > 0:
            if self._count < 2:
                raise DatabaseError(
                    f"database {self.path}: keyframe not stored: it does not fit into "
                    f"database.max_keyframes {self.max_keyframes} and database.max_bytes "
                    f"{self.max_bytes}. Raise them, or 0 for no limit"
                )
            rows = self._rows[: self._count]
            chosen = densest(
                self._index,
                rows["robot"],
                rows["drive"],
                rows["stamp"],
                rows["pose"][:, :3],
                rows["travelled"],
                max(excess, min(MOST_AT_ONCE, self._count // MOST_AT_ONCE)),
                seed=int(rows["id"][-1]),
            )
            self._file.delete(rows["id"][chosen].tolist())
            self._forget(chosen)

    def _excess(self, content_bytes: int) -> int:
        """How many keyframes must go before one with so many bytes of content is added."""
        excess = self._count + 1 - self.max_keyframes if self.max_keyframes else 0
        if self.max_bytes:
            used = self._file.used_bytes
            room = content_bytes + 4 * PAGE_BYTES
            if used + room > self.max_bytes:
                over = used + room - self.max_bytes
                excess = max(excess, math.ceil(over * self._count / used), 1)
        return excess

    def _forget(self, chosen: NDArray[np.int64]) -> None:
        """Drop rows from memory, so that no search names them."""
        for keyframe_id in self._rows["id"][chosen].tolist():
            self._tokens.pop(keyframe_id, None)
        self._index.remove(chosen)
        self._rows = np.delete(self._rows, chosen)
        self._count -= len(chosen)

    # -- finding -------------------------------------------------------------------------------

    def search(
        self, descriptor: NDArray[np.float32], k: int, stamp_ns: int, min_gap_ns: int
    ) -> list[tuple[int, float]]:
        """The ``k`` keyframes most similar to ``descriptor`` (V, D), best first: (id, similarity).

        What that is, ``descriptors.py`` says.

        Keyframes of this run within ``min_gap_ns`` of ``stamp_ns``, before or after, are left out
        before the search, be it by their stamp or by the time that has passed; there are ``k``
        results whenever ``k`` are eligible. This run's are those of the running session and of
        those before it that ``begin_session`` ended.
        """
        if not self._count:
            return []
        rows = self._rows[: self._count]
        # Before a new session's first keyframe, its clock stands where the one before stopped.
        now = self._last_moment if self._jump_ns is None else stamp_ns + self._jump_ns
        recent = np.abs(rows["moment"] - (now or 0)) < min_gap_ns
        # Where the clock went back, stamps come twice: who is told one must know which is meant.
        recent |= np.abs(rows["stamp"] - stamp_ns) < min_gap_ns
        eligible = ~(rows["this_run"] & recent)
        found = self._index.search(descriptor, k, eligible)
        return [(int(rows["id"][row]), similarity) for row, similarity in found]

    def travelled_since(self, keyframe_id: int, stamp_ns: int, pose: Pose) -> float:
        """Metres driven by odometry from a keyframe to ``pose`` at ``stamp_ns``, both of the
        running session; NaN where that is not known."""
        drive = self._drives.get((self.robot_id, self.session), -1)
        rows, number = self._rows[: self._count], self._row_of(keyframe_id)
        if number is None or rows["drive"][number] != drive or np.isnan(rows["pose"][number][0]):
            return math.nan
        here = np.zeros((), _ROW)
        here["stamp"], here["pose"] = stamp_ns, (*pose.position, *pose.quaternion)
        last = self._last_in_drive[drive]
        return float(last["travelled"] + _way(last, here) - rows["travelled"][number])

    def steps_between(self, one: Keyframe, other: Keyframe) -> float:
        """How many stored keyframes of their drive one comes after the other; infinity if they
        are of two robots or sessions. Those deleted since, even these two, do not count."""
        drive = self._drives.get((one.robot_id, one.session), -1)
        if (one.robot_id, one.session) != (other.robot_id, other.session):
            return math.inf
        rows = self._rows[: self._count]
        first, last = np.searchsorted(rows["id"], sorted((one.id, other.id)))
        return int((rows["drive"][first:last] == drive).sum())

    def keyframe(self, keyframe_id: int) -> Keyframe:
        """The stored keyframe ``keyframe_id``; ``KeyError`` if there is none.

        ``DatabaseError`` if it is damaged; searches no longer name it then. The same goes for
        ``tokens``.
        """
        with self._leaving_out_damage(keyframe_id):
            return self._file.keyframe(keyframe_id)

    def descriptor(self, keyframe_id: int) -> NDArray[np.float32]:
        """Global descriptors (V, D) of a keyframe; ``KeyError`` if there is none."""
        with self._leaving_out_damage(keyframe_id):
            return self._file.descriptor(keyframe_id)

    def _row_of(self, keyframe_id: int) -> int | None:
        ids = self._rows["id"][: self._count]
        row = int(np.searchsorted(ids, keyframe_id))
        return row if row < self._count and ids[row] == keyframe_id else None

    def tokens(self, ids: Sequence[int]) -> NDArray[np.float16]:
        """Tokens (B, N, D) of the keyframes ``ids``; ``KeyError`` if one is missing."""
        found = []
        for keyframe_id in ids:
            tokens = self._tokens.get(keyframe_id)
            if tokens is None:
                with self._leaving_out_damage(keyframe_id):
                    tokens = self._file.tokens(keyframe_id)
            self._cache(keyframe_id, tokens)
            found.append(tokens)
        return np.stack(found)

    def thumbnail(self, keyframe_id: int) -> bytes:
        """The keyframe's small JPEG; empty if there is none."""
        try:
            return self._file.thumbnail(keyframe_id)
        except KeyError:
            return b""

    def poses(self) -> list[tuple[int, str, Pose]]:
        """(id, session, pose) of all keyframes whose pose is known, in order of insertion."""
        rows = self._rows[: self._count]
        rows = rows[~np.isnan(rows["pose"][:, 0])]
        sessions = [session for _, session in self._drives]
        poses = (Pose((x, y, z), (*q,)) for x, y, z, *q in rows["pose"].tolist())
        numbers = rows["drive"].tolist()
        return list(zip(rows["id"].tolist(), [sessions[n] for n in numbers], poses, strict=True))

    @contextmanager
    def _leaving_out_damage(self, keyframe_id: int) -> Iterator[None]:
        """A keyframe that cannot be read must not spoil every image of its place."""
        try:
            yield
        except (DamageError, KeyError) as error:
            row = np.flatnonzero(self._rows["id"][: self._count] == keyframe_id)
            if len(row):
                self._fault = f"{error.args[0]}. Keyframe {keyframe_id} is not used any more"
                self._forget(row)
            raise

    def _cache(self, keyframe_id: int, tokens: NDArray[np.float16]) -> None:
        """Keep ``tokens`` as those used last; let go of the ones used longest ago."""
        self._tokens[keyframe_id] = tokens
        self._tokens.move_to_end(keyframe_id)
        while len(self._tokens) * tokens.nbytes > TOKEN_CACHE_BYTES:
            self._tokens.popitem(last=False)

    # -- the file ------------------------------------------------------------------------------

    def save(self) -> None:
        """Bring everything from SQLite's log into the file itself, and on to the disk."""
        self._file.save()

    def delete_after(self, keyframe_id: int) -> None:
        """Delete what was stored after this keyframe, as if it had never been; 0 deletes all."""
        ids = self._rows["id"][: self._count]
        self._file.delete(ids[ids > keyframe_id].tolist())
        self.session = self.run
        self._clear_memory()
        self._load()

    def reset(self) -> None:
        """Delete all keyframes, of every session."""
        if self.read_only:
            raise DatabaseError(f"database {self.path} is only read in mode localization")
        self._file.clear()
        self._clear_memory()

    def close(self) -> None:
        """Write what is left and let the file go."""
        self._file.close()


def _way(before: NDArray[np.void], after: NDArray[np.void]) -> float:
    """Metres between two rows of one drive, by odometry; 0 where it is not known."""
    metres = float(np.linalg.norm(after["pose"][:3] - before["pose"][:3]))
    if math.isnan(metres):
        return 0.0
    seconds = abs(int(after["stamp"]) - int(before["stamp"])) / 1e9
    return FAR_M if metres > FASTEST_M_PER_S * max(1.0, seconds) else metres


def open_database(config: Config, bundle: Bundle, session: str) -> KeyframeDatabase:
    """The database that the parameters ask for, of the bundle's model; see its errors."""
    return KeyframeDatabase(
        config.database_path,
        model_id=bundle.model_id,
        dimension=bundle.dimension,
        max_patches=bundle.max_patches,
        session=session,
        robot_id=config.robot_id,
        read_only=config.mode == "localization",
        max_keyframes=config.database.max_keyframes,
        max_bytes=config.database.max_bytes,
    )
