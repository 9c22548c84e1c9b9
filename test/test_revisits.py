"""A revisit as the detector tells it: what odometry rules out, and how often it is said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.candidate import Decision
from vpr_lite_ros.config import make_config
from vpr_lite_ros.database import Pose
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.matching import Status

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
MakeDetector = Callable[..., LoopDetector]
SECOND = 1_000_000_000


def _pose(x: float, y: float = 0.0) -> Pose:
    return Pose((x, y, 0.0), (0.0, 0.0, 0.0, 1.0))


def _drive(
    detector: LoopDetector, make_picture: MakePicture, way: list[tuple[int, Pose | None]]
) -> list[Decision]:
    """A picture (by its seed) and a pose each second."""
    return [
        detector.process(make_picture(seed), second * SECOND, pose)
        for second, (seed, pose) in enumerate(way, start=100)
    ]


# Odometry


@pytest.mark.parametrize(
    ("max_drift", "radius_m", "back_at", "status"),
    [
        (0.1, 5.0, 0.0, Status.ACCEPTED),
        # 100 m out and back to 80 m: 120 m driven, 80 m apart.
        (0.1, 5.0, 80.0, Status.ODOMETRY),
        (0.5, 19.0, 80.0, Status.ODOMETRY),
        (0.5, 21.0, 80.0, Status.ACCEPTED),
        (1.0, 0.0, 80.0, Status.ACCEPTED),
    ],
)
def test_a_place_that_odometry_cannot_have_come_back_to_is_none(
    make_detector: MakeDetector,
    make_picture: MakePicture,
    max_drift: float,
    radius_m: float,
    back_at: float,
    status: Status,
) -> None:
    detector = make_detector(
        top_k=1, **{"odometry.max_drift": max_drift, "odometry.place_radius_m": radius_m}
    )
    way: list[tuple[int, Pose | None]] = [(0, _pose(0)), (1, _pose(50)), (2, _pose(100))]
    *_, decision = _drive(detector, make_picture, [*way, (0, _pose(back_at))])
    (candidate,) = decision.candidates
    assert candidate.keyframe.id == 1
    assert candidate.status is status
    assert (decision.closure is candidate) == (status is Status.ACCEPTED)


def test_what_odometry_turns_down_does_not_make_others_agree(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(
        top_k=1,
        min_agreeing_keyframes=2,
        **{"odometry.max_drift": 0.0, "odometry.place_radius_m": 5.0},
    )
    out = [(seed, _pose(10.0 * seed)) for seed in range(5)]
    decisions = _drive(detector, make_picture, [*out, (0, _pose(30)), (1, _pose(12))])
    assert [one.candidates[0].status for one in decisions[-2:]] == [
        Status.ODOMETRY,
        Status.NOT_CONSISTENT,
    ]


def test_odometry_says_nothing_of_an_earlier_session_or_where_it_is_not_known(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    gate = {"odometry.max_drift": 0.0, "odometry.place_radius_m": 1.0}
    first = make_detector(top_k=1, **gate)
    _drive(first, make_picture, [(0, _pose(0)), (1, None), (2, _pose(20))])
    second = make_detector("two", top_k=1, **gate)
    decision = second.process(make_picture(0), 500 * SECOND, _pose(900))
    assert decision.closure is not None  # another run's odometry began elsewhere
    # Keyframe 1 of this session was taken without odometry, this image is.
    assert first.process(make_picture(1), 501 * SECOND, _pose(900)).closure is not None
    assert first.process(make_picture(2), 502 * SECOND, None).closure is not None


def test_odometry_that_is_set_anew_is_not_compared_with_what_it_said_before(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(
        top_k=1, **{"odometry.max_drift": 0.01, "odometry.place_radius_m": 5.0}
    )
    out = [(seed, _pose(500.0 + 20 * seed)) for seed in range(4)]
    *_, decision = _drive(detector, make_picture, [*out, (5, _pose(0)), (2, _pose(10))])
    assert decision.closure is not None
    assert decision.closure.keyframe.id == 3


# One closure, not thirty


def test_one_closure_in_the_interval_while_a_revisit_lasts(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(top_k=1, min_time_gap_s=5.0, min_closure_interval_s=3.0)
    decisions = _drive(detector, make_picture, [(seed % 8, None) for seed in range(16)])
    statuses = [one.candidates[0].status for one in decisions[8:]]
    news, again = Status.ACCEPTED, Status.TOO_SOON
    assert statuses == [news, again, again, news, again, again, news, again]
    assert [one.closure is not None for one in decisions[8:]] == [it is news for it in statuses]
    assert all(one.recognised is one.candidates[0] for one in decisions[8:])


def test_the_interval_holds_for_images_that_come_out_of_order(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(top_k=1, min_time_gap_s=5.0, min_closure_interval_s=0.75)
    _drive(detector, make_picture, [(seed, None) for seed in range(8)])
    accepted = [
        detector.process(make_picture(seed), round(second * SECOND)).closure is not None
        for seed, second in ((0, 120.0), (1, 119.2), (2, 118.6), (3, 119.4))
    ]
    assert accepted == [True, True, False, False]


def test_another_place_is_news_at_once(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(top_k=1, min_time_gap_s=5.0, min_closure_interval_s=100.0)
    seen: list[tuple[int, Pose | None]] = [(seed, None) for seed in range(20)]
    back: list[tuple[int, Pose | None]] = [(0, None), (1, None), (12, None), (13, None)]
    decisions = _drive(detector, make_picture, [*seen, *back])
    assert [one.candidates[0].status for one in decisions[20:]] == [
        Status.ACCEPTED,
        Status.TOO_SOON,
        Status.ACCEPTED,
        Status.TOO_SOON,
    ]


def test_a_revisit_that_was_left_and_begun_again_is_news(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(
        top_k=1, min_time_gap_s=5.0, min_closure_interval_s=100.0, similarity_threshold=0.9
    )
    way: list[tuple[int, Pose | None]] = [(seed, None) for seed in range(8)]
    decisions = _drive(detector, make_picture, [*way, (0, None), (50, None), (1, None)])
    assert [one.closure is not None for one in decisions[8:]] == [True, False, True]


def test_parameters_change_between_two_images(
    make_detector: MakeDetector, make_picture: MakePicture
) -> None:
    detector = make_detector(similarity_threshold=0.5)
    _drive(detector, make_picture, [(0, None), (1, None)])
    strict = make_config({"similarity_threshold": 1.0, "min_inliers": 7, "min_time_gap_s": 0.0})
    detector.configure(strict)
    assert (detector.similarity_threshold, detector.min_inliers) == (1.0, 7)
    decision = detector.process((make_picture(0) * 0.8).astype(np.uint8), 200 * SECOND)
    assert {one.status for one in decision.candidates} == {Status.LOW_SIMILARITY}
