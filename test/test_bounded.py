"""A full database: what goes, what stays, and that nobody is told of what has gone."""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from keyframes import SECOND, Open, describe, rounded
from numpy.typing import NDArray

from vpr_lite_ros.database import DatabaseError, KeyframeDatabase, Pose
from vpr_lite_ros.descriptors import similarities
from vpr_lite_ros.inference import Description

FORWARD = (0.0, 0.0, 0.0, 1.0)


def _view(place: int, view: int, spread: float = 0.5) -> Description:
    """One of many views of a place, all much alike (cosine about 0.8)."""
    centre, noise = describe(place), describe(1_000_000 + 1000 * place + view)
    descriptor = centre.descriptor + spread * noise.descriptor
    descriptor /= np.linalg.norm(descriptor, axis=1, keepdims=True)
    return Description(descriptor.astype(np.float32), noise.tokens, noise.centres)


def _ids(database: KeyframeDatabase) -> list[int]:
    return sorted(i for i, _ in database.search(describe(0).descriptor, 10**6, 0, 0))


def _stored(path: Path) -> list[int]:
    """What the file holds, whatever the program believes."""
    with sqlite3.connect(path) as file:
        ids = [row[0] for row in file.execute("SELECT id FROM keyframes ORDER BY id")]
        assert [row[0] for row in file.execute("SELECT id FROM checksums ORDER BY id")] == ids
    file.close()
    return ids


def test_no_more_keyframes_than_allowed_in_memory_and_file(open_database: Open, path: Path) -> None:
    database = open_database(max_keyframes=100)
    descriptors: dict[int, NDArray[np.float32]] = {}
    for i in range(400):
        added = database.add(i * SECOND, _view(i % 37, i))
        assert added not in descriptors, "an id was given twice"
        descriptors[added] = _view(i % 37, i).descriptor
        assert len(database) <= 100
        assert added in {j for j, _ in database.search(descriptors[added], 1, 0, 0)}
    kept = _ids(database)
    assert len(kept) == len(database) > 95 and kept == _stored(path)
    # What is found is what is nearest of those that stayed, in memory and after loading.
    for reopened in (False, True):
        if reopened:
            database.close()
            database = open_database("tuesday")
        for seed in range(20):
            query = describe(seed).descriptor
            alike = similarities(query, rounded(np.stack([descriptors[i] for i in kept])))
            expected = [kept[row] for row in np.argsort(-alike)[:5]]
            assert [i for i, _ in database.search(query, 5, 0, 0)] == expected
            for keyframe_id in expected:
                view = keyframe_id - 1
                assert database.keyframe(keyframe_id).stamp_ns == view * SECOND
                assert np.array_equal(
                    database.tokens([keyframe_id])[0], _view(view % 37, view).tokens
                )


def test_what_was_deleted_is_unknown_to_all(open_database: Open) -> None:
    database = open_database(max_keyframes=20)
    held = [database.keyframe(database.add(i, _view(0, i))) for i in range(60)]
    gone = [keyframe for keyframe in held if keyframe.id not in _ids(database)]
    assert len(gone) >= 40
    for keyframe in gone:
        for ask in (database.keyframe, lambda i: database.tokens([i])):
            with pytest.raises(KeyError):
                ask(keyframe.id)
        assert database.thumbnail(keyframe.id) == b""
    # A detector may hold one that has gone since: how far apart two are can still be asked.
    assert database.steps_between(gone[0], held[-1]) <= 20


def test_every_place_stays_however_seldom_it_was_seen(open_database: Open) -> None:
    """Many views of a few places, long after the only views of the others."""
    places = 30
    database = open_database(max_keyframes=3 * places)
    place_of = {}
    stamp = 0
    for round_ in range(60):
        for place in range(places) if round_ == 0 else range(3):
            for view in range(2):
                stamp += SECOND
                place_of[database.add(stamp, _view(place, 2 * round_ + view))] = place
    kept = Counter(place_of[i] for i in _ids(database))
    assert len(kept) == places, f"{places - len(kept)} places are gone"
    assert kept.most_common(1)[0][1] < 40 < Counter(place_of.values())[0]


def test_standing_still_goes_first(open_database: Open) -> None:
    """As alike, but on many days: the views of one minute are the ones to spare."""
    database = open_database(max_keyframes=40)
    day = 86_400 * SECOND
    days = {database.add(i * day, _view(1, i)) for i in range(20)}
    minute = {database.add(30 * day + i * SECOND, _view(1, 100 + i)) for i in range(20)}
    for i in range(10):
        database.add((40 + i) * day, _view(2 + i, 0))
    kept = set(_ids(database))
    assert len(days & kept) > len(minute & kept) + 5


def test_places_that_only_look_alike_stay_apart(open_database: Open) -> None:
    """Odometry knows that two corridors are two; where it cannot know, it does not count."""
    database = open_database(max_keyframes=24)
    corridor_of = {}
    for i in range(60):  # standing in one, passing the other once
        corridor = 1 if i in (10, 11) else 0
        pose = Pose((40.0 * corridor, 0.01 * i, 0), FORWARD)
        # The way to the other one and back is short of what drift could explain.
        corridor_of[database.add(i * SECOND, _view(0, i, spread=0.1), pose)] = corridor
    kept = [corridor_of[i] for i in _ids(database)]
    assert kept.count(1) == 2, "the only views of a corridor are gone"


def test_another_robots_last_view_of_a_place_stays(open_database: Open) -> None:
    """However many views this robot has of the same place."""
    database = open_database(max_keyframes=32)
    theirs = [
        database.add(i, _view(place, i), robot_id=7, session="theirs")
        for i, place in enumerate((0, 1, 2, 0))
    ]
    for i in range(200):
        database.add(i * SECOND, _view(i % 3, 100 + i))
    kept = set(_ids(database))
    assert {theirs[1], theirs[2]} < kept and {theirs[0], theirs[3]} & kept


def test_the_same_stream_leaves_the_same_keyframes(open_database: Open, tmp_path: Path) -> None:
    """More than are compared at a time, so that chance plays a part."""
    left = []
    for name in ("one", "other"):
        database = open_database(path=tmp_path / name, max_keyframes=700)
        for i in range(760):
            database.add(i * SECOND, _view(i % 100, i))
        left.append(_ids(database))
    assert left[0] == left[1] and len(left[0]) <= 700


def test_blocks_in_which_descriptors_are_compared_change_nothing(
    open_database: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    for block in (7, 10**6):
        monkeypatch.setattr("vpr_lite_ros.thinning.BLOCK", block)
        database = open_database(path="", max_keyframes=40)
        for i in range(90):
            database.add(i * SECOND, _view(i % 13, i))
        left.append(_ids(database))
    assert left[0] == left[1]


def test_agreement_counts_the_keyframes_that_are_left(open_database: Open) -> None:
    database = open_database(max_keyframes=10)
    for i in range(200):
        database.add(i * SECOND, _view(i, 0))
        if i % 3 == 0:
            database.add(i, _view(500 + i, 0), robot_id=2, session="theirs")
    left = [database.keyframe(i) for i in _ids(database)]
    mine = [keyframe for keyframe in left if keyframe.robot_id == 0]
    assert len(mine) > 3 and mine[1].id - mine[0].id != 1
    assert [database.steps_between(mine[0], other) for other in mine] == list(range(len(mine)))
    assert database.steps_between(mine[2], mine[0]) == 2
    theirs = next(keyframe for keyframe in left if keyframe.robot_id == 2)
    assert database.steps_between(mine[0], theirs) == np.inf


def test_the_file_keeps_to_its_bytes_and_uses_them_again(open_database: Open, path: Path) -> None:
    limit = 1_000_000
    database = open_database(max_patches=500, max_bytes=limit)
    sizes = []
    for i in range(300):
        database.add(i * SECOND, replace(describe(i, 500), picture=bytes(3000)))
        sizes.append(len(database))
    database.save()
    assert path.stat().st_size <= limit
    assert path.stat().st_size > limit * 0.8, "most of the room is used"
    assert min(sizes[150:]) > 15
    database.close()
    # A limit that was lowered is kept from the first addition on; the file does not shrink.
    database = open_database(max_patches=500, max_bytes=limit // 2)
    database.add(9, describe(9, 500))
    assert database._file.used_bytes <= limit // 2
    assert len(database) < sizes[-1] and _stored(path) == _ids(database)


def test_limits_that_hold_nothing_are_named(open_database: Open) -> None:
    database = open_database(max_bytes=20_000)
    with pytest.raises(DatabaseError, match=r"database\.max_bytes 20000"):
        database.add(1, describe(1))
    assert len(database) == 0


def test_a_much_lower_limit_is_kept_at_once(open_database: Open, path: Path) -> None:
    database = open_database()
    for i in range(300):
        database.add(i * SECOND, _view(i % 20, i))
    database.close()
    database = open_database("tuesday", max_keyframes=25)
    assert len(database) == 300, "opening deletes nothing"
    database.add(301 * SECOND, _view(3, 999))
    assert len(database) <= 25 and _stored(path) == _ids(database)
    found = {database.keyframe(i).stamp_ns // SECOND % 20 for i in _ids(database)[:-1]}
    assert len(found) >= 18


def test_deletions_that_fail_change_nothing(open_database: Open, path: Path) -> None:
    database = open_database(max_keyframes=20)
    before = [database.add(i, describe(i)) for i in range(20)]
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")  # holds the only right to write
        database._file._sql.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(DatabaseError, match=r"not deleted.*locked"):
            database.add(99, describe(99))
        other.execute("ROLLBACK")
    other.close()
    assert _ids(database) == before == _stored(path)
    database.add(99, describe(99))
    assert len(database) == 20
