"""The way of an image through the detector, on a real model and a real database."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.candidate import Candidate, Decision
from vpr_lite_ros.database import DatabaseError, Pose
from vpr_lite_ros.detector import AGREEMENT_WINDOW, LoopDetector
from vpr_lite_ros.image import ImageError
from vpr_lite_ros.inference import PlaceModel
from vpr_lite_ros.matching import Camera, Status

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]

SECOND = 1_000_000_000
MakeDetector = Callable[..., LoopDetector]


def _in_another_light(picture: Image) -> Image:
    return (picture * 0.8 + 10).astype(np.uint8)


def _statuses(decision: Decision) -> list[Status]:
    return [candidate.status for candidate in decision.candidates]


def _candidate(decision: Decision, keyframe_id: int | None) -> Candidate:
    (found,) = (c for c in decision.candidates if c.keyframe.id == keyframe_id)
    return found


def _pose(x: float = 0.0, yaw: float = 0.0) -> Pose:
    return Pose((x, 0.0, 0.0), (0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2)))


# Which images become keyframes


def test_no_keyframe_sooner_than_the_interval(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(**{"keyframe.min_interval_s": 2.0})
    stored = {}
    for index, second in enumerate((10.0, 11.0, 11.9, 12.0, 13.5, 14.0, 20.0)):
        decision = detector.process(make_picture(index), round(second * SECOND))
        stored[second] = decision.keyframe_id is not None
    assert [second for second, kept in stored.items() if kept] == [10.0, 12.0, 14.0, 20.0]
    assert len(detector.database) == 4


def test_a_clock_that_jumps_back_does_not_stop_keyframes(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(**{"keyframe.min_interval_s": 2.0})
    assert detector.process(make_picture(0), 100 * SECOND).keyframe_id is not None
    assert detector.process(make_picture(1), 5 * SECOND).keyframe_id is not None
    assert detector.process(make_picture(2), 6 * SECOND).keyframe_id is None
    assert detector.process(make_picture(3), 7 * SECOND).keyframe_id is not None


def test_with_odometry_keyframes_come_by_distance_and_turn(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(
        **{"keyframe.min_translation_m": 1.0, "keyframe.min_rotation_rad": 0.5}
    )
    picture = make_picture(0)  # always the same: appearance must not matter
    drive = [
        (_pose(0), True),  # the first
        (_pose(0), False),  # stands still
        (_pose(0.99), False),
        (_pose(1.0), True),
        (_pose(1.5), False),
        (_pose(0.0), True),  # back again
        (_pose(0, 0.49), False),
        (_pose(0, -0.51), True),  # turned right
        (_pose(0, -0.51 + 2 * math.pi), False),  # a full turn is none
    ]
    for second, (pose, kept) in enumerate(drive):
        decision = detector.process(picture, second * SECOND, pose)
        assert (decision.keyframe_id is not None) is kept, second
        assert decision.keyframe_id is None or decision.timings_ms["place"] > 0
        assert kept or decision.timings_ms == {}, "work was done for an image not needed"


def test_a_quaternion_and_its_negative_are_one_orientation(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector()
    pose = _pose(0, 1.0)
    negative = Pose(pose.position, tuple(-q for q in pose.quaternion))  # type: ignore[arg-type]
    assert detector.process(make_picture(0), 0, pose).keyframe_id is not None
    assert detector.process(make_picture(1), SECOND, negative).keyframe_id is None


def test_without_odometry_keyframes_come_by_appearance(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(**{"keyframe.max_similarity": 0.9})
    stored = [
        detector.process(picture, second * SECOND).keyframe_id is not None
        for second, picture in enumerate(
            [
                make_picture(0),
                make_picture(0),
                _in_another_light(make_picture(0)),
                make_picture(1),
                make_picture(0),  # not like the last keyframe
            ]
        )
    ]
    assert stored == [True, False, False, True, True]


def test_similarity_1_keeps_every_image(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    """Also one whose cosine with itself is, by rounding, a little more than 1."""
    detector = make_detector(**{"keyframe.max_similarity": 1.0})
    for second in range(0, 40, 2):
        for again in range(2):
            decision = detector.process(make_picture(second), (second + again) * SECOND)
            assert decision.keyframe_id is not None, second


def test_when_odometry_comes_late_the_next_image_is_a_keyframe(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector()
    assert detector.process(make_picture(0), 0).keyframe_id is not None
    assert detector.process(make_picture(0), SECOND, _pose(5)).keyframe_id is not None
    assert detector.process(make_picture(0), 2 * SECOND, _pose(5)).keyframe_id is None
    assert detector.process(make_picture(0), 3 * SECOND).keyframe_id is None  # lost: looks alike


def test_forget_starts_anew(make_detector: MakeDetector, make_picture: MakePicture) -> None:
    detector = make_detector(min_agreeing_keyframes=2, **{"keyframe.min_interval_s": 10.0})
    detector.process(make_picture(0), 0)
    detector.process(make_picture(1), 10 * SECOND)
    detector.forget()
    decision = detector.process(make_picture(1), 11 * SECOND)
    assert decision.keyframe_id is not None
    assert decision.closure is None and Status.NOT_CONSISTENT in _statuses(decision)


# What is looked up


def test_what_was_seen_just_now_is_no_closure(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(min_time_gap_s=30.0)
    ids = [
        detector.process(make_picture(i), second * SECOND).keyframe_id
        for i, second in enumerate((0, 10, 20, 29, 31))
    ]
    decision = detector.process(_in_another_light(make_picture(2)), 45 * SECOND)
    assert {candidate.keyframe.id for candidate in decision.candidates} == set(ids[:2])
    decision = detector.process(_in_another_light(make_picture(2)), 50 * SECOND)
    assert decision.candidates == [], "not a keyframe: too like the last"
    decision = detector.process(make_picture(9), 50 * SECOND)
    assert {candidate.keyframe.id for candidate in decision.candidates} == set(ids[:3])


def test_another_session_counts_at_once(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    before = make_detector("one", min_time_gap_s=30.0).process(make_picture(0), 100 * SECOND)
    detector = make_detector("two", min_time_gap_s=30.0)
    decision = detector.process(_in_another_light(make_picture(0)), 100 * SECOND)
    assert decision.closure is not None
    assert decision.closure.keyframe.id == before.keyframe_id
    assert decision.closure.keyframe.session == "one"


def test_top_k_bounds_the_candidates_and_ranks_count_from_0(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(top_k=3)
    for i in range(6):
        detector.process(make_picture(i), i * SECOND)
    decision = detector.process(make_picture(50), 9 * SECOND)
    assert [candidate.rank for candidate in decision.candidates] == [0, 1, 2]
    similarities = [candidate.similarity for candidate in decision.candidates]
    assert similarities == sorted(similarities, reverse=True)
    assert len(detector.query(make_picture(50), top_k=5).candidates) == 5
    assert len(detector.query(make_picture(50)).candidates) == 3


def test_thresholds_are_the_bundles_where_the_user_gives_none(
    make_detector: MakeDetector, tiny_model: PlaceModel
) -> None:
    unset = {"similarity_threshold": math.nan, "match_threshold": math.nan, "min_inliers": -1}

    def thresholds(**values: float) -> tuple[float, float, int]:
        detector = make_detector(**{**unset, **values})
        return detector.similarity_threshold, detector.match_threshold, detector.min_inliers

    card = tiny_model.bundle.card
    assert "thresholds" not in card
    assert thresholds() == (-1.0, 0.0, 0)
    try:
        card["thresholds"] = {"similarity": 0.45, "match": 0.3, "inliers": 30}
        assert thresholds() == (0.45, 0.3, 30)
        assert thresholds(similarity_threshold=0.1, match_threshold=0.2) == (0.1, 0.2, 30)
        assert thresholds(min_inliers=0) == (0.45, 0.3, 0)
    finally:
        del card["thresholds"]


# Each status, from the check that gives it and from no other

CAMERA = Camera(160, 128, (100.0, 0, 80.0, 0, 100.0, 64.0, 0, 0, 1))


def _two_places(detector: LoopDetector, make_picture: MakePicture) -> tuple[int, int]:
    """Two keyframes: of picture 0 and of picture 1."""
    first = detector.process(make_picture(0), 0, camera=CAMERA).keyframe_id
    second = detector.process(make_picture(1), 100 * SECOND, camera=CAMERA).keyframe_id
    assert first is not None and second is not None
    return first, second


def test_with_all_checks_off_the_best_is_accepted_and_the_others_are_not_best(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector()
    same, other = _two_places(detector, make_picture)
    decision = detector.process(_in_another_light(make_picture(0)), 200 * SECOND)
    assert decision.closure is _candidate(decision, same)
    assert decision.closure.status is Status.ACCEPTED
    assert decision.closure.match_score > 0.5
    assert _candidate(decision, other).status is Status.NOT_BEST
    assert decision.keyframe_id is not None and decision.keyframe_id > other


def test_low_similarity(make_detector: MakeDetector, make_picture: MakePicture) -> None:
    detector = make_detector(similarity_threshold=0.8)
    same, other = _two_places(detector, make_picture)
    decision = detector.process(_in_another_light(make_picture(0)), 200 * SECOND)
    rejected = _candidate(decision, other)
    assert rejected.status is Status.LOW_SIMILARITY and rejected.similarity < 0.8
    assert math.isnan(rejected.match_score) and rejected.num_matches == 0
    assert _candidate(decision, same).status is Status.ACCEPTED
    decision = detector.process(make_picture(77), 300 * SECOND)
    assert set(_statuses(decision)) == {Status.LOW_SIMILARITY} and decision.closure is None
    assert "match" not in decision.timings_ms, "pairs were matched in vain"


def test_low_score(make_detector: MakeDetector, make_picture: MakePicture) -> None:
    detector = make_detector(match_threshold=0.5)
    same, other = _two_places(detector, make_picture)
    decision = detector.process(_in_another_light(make_picture(0)), 200 * SECOND)
    rejected = _candidate(decision, other)
    assert rejected.status is Status.LOW_SCORE and rejected.match_score < 0.5
    assert _candidate(decision, same).status is Status.ACCEPTED


def test_few_matches(make_detector: MakeDetector, make_picture: MakePicture) -> None:
    detector = make_detector(min_matches=12)
    same, other = _two_places(detector, make_picture)
    decision = detector.process(_in_another_light(make_picture(0)), 200 * SECOND)
    rejected = _candidate(decision, other)
    assert rejected.status is Status.FEW_MATCHES and rejected.num_matches < 12
    accepted = _candidate(decision, same)
    assert accepted.status is Status.ACCEPTED and accepted.num_matches >= 12


def test_geometry(make_detector: MakeDetector, make_picture: MakePicture) -> None:
    settings = {"min_inliers": 8, "epipolar_tolerance_px": 2.0}
    detector = make_detector(**settings)
    same, other = _two_places(detector, make_picture)
    picture = np.roll(make_picture(0), 16, axis=1)  # one cell to the right
    decision = detector.process(picture, 200 * SECOND, camera=CAMERA)
    rejected = _candidate(decision, other)
    assert rejected.status is Status.GEOMETRY and rejected.num_inliers < 8
    accepted = _candidate(decision, same)
    assert accepted.status is Status.ACCEPTED and accepted.fit is not None
    assert 8 <= accepted.num_inliers <= accepted.num_matches


def test_geometry_is_checked_only_where_both_cameras_are_known(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(min_inliers=1000)
    known = detector.process(make_picture(0), 0, camera=CAMERA).keyframe_id
    unknown = detector.process(make_picture(1), SECOND).keyframe_id
    decision = detector.process(make_picture(2), 2 * SECOND)
    assert Status.GEOMETRY not in _statuses(decision)
    decision = detector.process(make_picture(3), 3 * SECOND, camera=CAMERA)
    assert _candidate(decision, known).status is Status.GEOMETRY
    assert _candidate(decision, unknown).status in (Status.ACCEPTED, Status.NOT_BEST)
    assert _candidate(decision, unknown).fit is None


def test_no_matches_at_all_are_no_crash(
    make_detector: MakeDetector, make_picture: MakePicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = make_detector(min_matches=0, min_inliers=1)
    _two_places(detector, make_picture)
    # No share reaches this, so that every pair has 0 matches.
    monkeypatch.setattr("vpr_lite_ros.matching.mutual_matches.__defaults__", (2.0,))
    decision = detector.process(make_picture(2), 200 * SECOND, camera=CAMERA)
    assert set(_statuses(decision)) == {Status.GEOMETRY}
    assert {candidate.num_matches for candidate in decision.candidates} == {0}


def test_not_consistent(make_detector: MakeDetector, make_picture: MakePicture) -> None:
    """A closure needs as many keyframes in a row as configured; one gap starts anew."""
    detector = make_detector(
        min_agreeing_keyframes=3, similarity_threshold=0.8, min_time_gap_s=50.0
    )
    for i in range(8):
        detector.process(make_picture(i), i * SECOND)
    lap = [0, 1, 2, 3, 99, 4, 5, 6]
    accepted, agreeing = [], []
    for second, seed in enumerate(lap, start=100):
        decision = detector.process(_in_another_light(make_picture(seed)), second * SECOND)
        assert decision.keyframe_id is not None
        accepted.append(decision.closure is not None)
        passed = [c for c in decision.candidates if c.status is not Status.LOW_SIMILARITY]
        agreeing.append(max((candidate.agreeing for candidate in passed), default=0))
        if passed and not accepted[-1]:
            assert {candidate.status for candidate in passed} == {Status.NOT_CONSISTENT}
    assert agreeing == [1, 2, 3, 4, 0, 1, 2, 3]
    assert accepted == [False, False, True, True, False, False, False, True]


def test_keyframes_that_point_to_different_stretches_do_not_agree(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(
        min_agreeing_keyframes=2, similarity_threshold=0.8, min_time_gap_s=50.0
    )
    count = AGREEMENT_WINDOW + 3
    for i in range(count):
        detector.process(make_picture(i), i * SECOND)

    def agreeing(first: int, second: int, start: int) -> int:
        detector.process(_in_another_light(make_picture(first)), start * SECOND)
        picture = _in_another_light(make_picture(second))
        decision = detector.process(picture, (start + 1) * SECOND)
        return max(candidate.agreeing for candidate in decision.candidates)

    assert agreeing(0, AGREEMENT_WINDOW, 100) == 2  # just near enough
    detector.forget()
    assert agreeing(0, AGREEMENT_WINDOW + 1, 140) == 1
    detector.forget()
    assert agreeing(AGREEMENT_WINDOW, 0, 180) == 2  # driving it the other way round


def test_keyframes_of_different_sessions_do_not_agree(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    """The end of one session and the start of the next have neighbouring numbers, no more."""
    make_detector("one").process(make_picture(0), 0)
    make_detector("two").process(make_picture(1), 0)
    detector = make_detector("three", min_agreeing_keyframes=2, similarity_threshold=0.8)
    detector.process(_in_another_light(make_picture(0)), 100 * SECOND)
    decision = detector.process(_in_another_light(make_picture(1)), 101 * SECOND)
    assert decision.closure is None
    assert Status.NOT_CONSISTENT in _statuses(decision)


def test_an_image_that_is_no_keyframe_keeps_the_streak(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(
        min_agreeing_keyframes=2,
        similarity_threshold=0.8,
        min_time_gap_s=50.0,
        **{"keyframe.min_interval_s": 1.0},
    )
    for i in range(2):
        detector.process(make_picture(i), i * SECOND)
    detector.process(_in_another_light(make_picture(0)), 100 * SECOND)
    assert detector.process(make_picture(70), 100 * SECOND + 1).keyframe_id is None
    decision = detector.process(_in_another_light(make_picture(1)), 101 * SECOND)
    assert decision.closure is not None


def test_the_first_image_has_no_candidates(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    decision = make_detector().process(make_picture(0), 7 * SECOND)
    assert decision.candidates == [] and decision.closure is None
    assert decision.stamp_ns == 7 * SECOND and decision.keyframe_id is not None
    assert {"resize", "place", "search", "store"} <= decision.timings_ms.keys()
    assert decision.latency_ms == pytest.approx(sum(decision.timings_ms.values()))


# Asking without storing


def test_query_stores_nothing_and_disturbs_nothing(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(min_agreeing_keyframes=2, similarity_threshold=0.8)
    same, _ = _two_places(detector, make_picture)
    for _ in range(2):
        decision = detector.query(_in_another_light(make_picture(0)))
        assert decision.keyframe_id is None
        assert decision.closure is not None and decision.closure.keyframe.id == same
        assert decision.closure.status is Status.ACCEPTED
    assert len(detector.database) == 2
    decision = detector.process(_in_another_light(make_picture(0)), 200 * SECOND)
    assert decision.closure is None, "queries count for no streak"
    assert detector.query(make_picture(88)).closure is None


def test_query_with_a_stamp_leaves_out_what_is_too_recent(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(min_time_gap_s=30.0)
    first, second = _two_places(detector, make_picture)
    found = detector.query(make_picture(1), stamp_ns=110 * SECOND).candidates
    assert [candidate.keyframe.id for candidate in found] == [first]
    found = detector.query(make_picture(1)).candidates
    assert [candidate.keyframe.id for candidate in found] == [second, first]


# Faults


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (np.zeros((0, 0, 3), np.uint8), "empty image"),
        (np.zeros((128, 160), np.uint8), "not RGB"),
        (np.zeros((128, 160, 3), np.float32), "not RGB"),
    ],
)
def test_a_bad_image_is_refused_and_the_next_one_is_not(
    make_detector: MakeDetector, make_picture: MakePicture, image: Any, cause: str
) -> None:
    detector = make_detector(min_agreeing_keyframes=2, similarity_threshold=0.8)
    _two_places(detector, make_picture)
    detector.process(_in_another_light(make_picture(0)), 200 * SECOND)
    with pytest.raises(ImageError) as caught:
        detector.process(image, 201 * SECOND)
    assert caught.value.cause == cause and len(detector.database) == 3
    with pytest.raises(ImageError):
        detector.query(image)
    decision = detector.process(_in_another_light(make_picture(1)), 202 * SECOND)
    assert decision.closure is not None, "the streak goes on as if nothing had come"


def test_a_keyframe_that_cannot_be_stored_costs_no_closure(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector()
    detector.process(make_picture(0), 0)
    detector.process(make_picture(1), SECOND)
    add = detector.database.add
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: object, **__: object) -> int:
            raise DatabaseError(f"database {detector.database.path}: the disk is full")

        patch.setattr(detector.database, "add", fail)
        decision = detector.process(make_picture(0), 60 * SECOND)
    assert decision.closure is not None and decision.is_keyframe
    assert decision.keyframe_id is None and "keyframes.db: the disk is full" in decision.fault
    assert detector.database.add == add
    assert detector.process(make_picture(2), 70 * SECOND).keyframe_id == 3


def test_odd_sizes_are_no_trouble(make_detector: MakeDetector) -> None:
    detector = make_detector()
    rng = np.random.default_rng(0)
    for second, shape in enumerate([(1, 1, 3), (480, 640, 3), (45, 900, 3), (900, 45, 3)]):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        assert detector.process(image, second * SECOND).keyframe_id is not None


def test_the_same_images_give_the_same_decisions(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    """However many candidates are checked at once; and no thread outlasts its image."""

    def run(session: str, threads: int) -> list[tuple[object, ...]]:
        detector = make_detector(session, min_time_gap_s=4.0, threads=threads)
        detector.database.reset()
        seen: list[tuple[object, ...]] = []
        for second in range(12):
            decision = detector.process(make_picture(second % 5), second * SECOND, camera=CAMERA)
            assert not [one for one in threading.enumerate() if one.name.startswith("check")]
            for c in decision.candidates:
                counts = c.num_matches, c.num_inliers, c.num_correlated
                seen.append((c.keyframe.id, c.similarity, c.match_score, *counts, c.zoom, c.status))
                same = c.keyframe.stamp_ns // SECOND % 5 == second % 5
                assert (c.num_correlated > 0) == same, "each with its own picture"
        return seen

    assert run("one", 1) == run("two", 4) != []


@pytest.mark.parametrize(("threads", "used"), [(1, 1), (3, 3), (9, 4)])
def test_threads_bounds_how_many_candidates_are_checked_at_once(
    make_detector: MakeDetector,
    make_picture: MakePicture,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    used: int,
) -> None:
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, name: str) -> None:
            asked.append(workers)
            super().__init__(workers, name)

    monkeypatch.setattr("vpr_lite_ros.detector.ThreadPoolExecutor", Pool)
    detector = make_detector(threads=threads)
    detector.process(make_picture(0), 0)
    detector.process(make_picture(1), 100 * SECOND)
    assert asked == [used]


def test_localization_decides_as_mapping_does_and_stores_nothing(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    """Agreement over keyframes in a row needs no keyframe of the robot's own."""
    mapping = make_detector()
    ids = [mapping.process(make_picture(i), i * SECOND).keyframe_id for i in range(6)]
    mapping.database.close()
    detector = make_detector("one", read_only=True, min_agreeing_keyframes=3, top_k=1)
    closures = []
    for i in range(6):
        decision = detector.process(_in_another_light(make_picture(i)), i * SECOND)
        assert decision.is_keyframe and decision.keyframe_id is None
        assert [c.agreeing for c in decision.candidates] == [i + 1]
        closures.append(decision.closure.keyframe.id if decision.closure else None)
        assert "store" not in decision.timings_ms
    assert closures == [None, None, *ids[2:]]
    assert not detector.process(make_picture(5), 5 * SECOND).is_keyframe
    assert len(detector.database) == 6


def test_agreement_outlasts_a_thinned_map(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    """Of a stretch only every seventh keyframe is left: farther apart by number than by place."""
    mapping = make_detector()
    ids = [mapping.process(make_picture(i), i * SECOND).keyframe_id for i in range(22)]
    mapping.database._file.delete([i for i in ids if i is not None and i % 7 != 1])
    mapping.database.close()
    detector = make_detector("two", min_agreeing_keyframes=3, top_k=1)
    found = [
        detector.process(_in_another_light(make_picture(i)), i * SECOND) for i in (0, 7, 14, 21)
    ]
    assert [d.candidates[0].keyframe.id for d in found] == [1, 8, 15, 22]
    assert [d.candidates[0].agreeing for d in found] == [1, 2, 3, 4]
