"""P(same place): the curve, what the detector makes of it, and fitting it to real cases."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import cv2
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from vpr_lite_ros.benchmarks import Benchmark, ListedImages, find_benchmarks
from vpr_lite_ros.calibration import (
    FEATURES,
    LASTING,
    MOST_SUPPORT,
    NEUTRAL,
    Calibration,
    Curve,
    expected_calibration_error,
    features,
)
from vpr_lite_ros.calibration import (
    sequential as sequential_of,
)
from vpr_lite_ros.candidate import Candidate, features_of, sureness
from vpr_lite_ros.cli import main
from vpr_lite_ros.config import make_config
from vpr_lite_ros.database import Keyframe, KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.evaluation import PairTruth
from vpr_lite_ros.inference import CARD, DEFAULT_BUNDLE, BundleError, PlaceModel, open_model
from vpr_lite_ros.matching import Camera, Status
from vpr_lite_ros.measurement import OPEN, Answer, Found, detect, evaluate, look_up
from vpr_lite_ros.simulation import simulate_drive

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]

PRECISION = ((0.9, 0.2), (0.99, 0.6), (1.0, 0.8))
CURVE = Curve(-1.0, (2.0, 0.5, 1.5, 0.75, -4.0), PRECISION)
PLAIN = Curve(1.0, (3.0, 0.0, 0.0, 0.0, 0.0), PRECISION)


def sequential(confidence: float, before: float) -> float:
    return float(sequential_of(confidence, before))


# The curve


def test_confidence_by_hand() -> None:
    values = features(0.5, math.exp(-2), 0, 0, 0.0)
    assert values == pytest.approx([0.5, -2.0, 0.0, 0.0, 0.0])
    assert CURVE.confidence(values) == pytest.approx(1 / (1 + math.exp(1.0)))
    assert CURVE.confidence(features(0.5, math.exp(-2), 19, 0, 0.0)) == pytest.approx(
        1 / (1 + 20**-1.5 * math.exp(1.0))
    )
    assert CURVE.confidence(features(0.5, math.exp(-2), 0, 99, 0.0)) == pytest.approx(
        1 / (1 + 100**-0.75 * math.exp(1.0))
    )
    # Nearer and farther are the same, and much nearer is no more than nearer.
    for zoom in (0.25, -0.25):
        assert CURVE.confidence(features(0.5, math.exp(-2), 0, 0, zoom)) == pytest.approx(
            1 / (1 + math.exp(2.0))
        )
    assert features(0.5, 0.1, 0, 0, -0.31) == features(0.5, 0.1, 0, 0, 7.0)
    assert PLAIN.confidence(features(-1 / 3, 0.1, 500, 500, 0.3)) == pytest.approx(0.5)
    assert math.isfinite(features(0.0, 0.0, 0, 0, 0.0)[1])
    assert Curve(1e9, (0.0,) * 5, PRECISION).confidence(values) == pytest.approx(1.0)


def test_a_target_picks_the_threshold_that_reaches_it() -> None:
    found = [CURVE.threshold(target) for target in (0, 0.5, 0.9, 0.91, 0.99, 0.995, 1)]
    assert found == [0.0, 0.2, 0.2, 0.6, 0.6, 0.8, 0.8]
    assert Curve(0.0, (), ((0.9, 0.3),)).threshold(0.99) == 0.3


def test_a_card_gives_back_what_it_was_given() -> None:
    told = Calibration(CURVE, PLAIN).to_card()
    card = yaml.safe_load(yaml.safe_dump({"calibration": told}))
    assert Calibration.from_card(card) == Calibration(CURVE, PLAIN)
    assert list(told["with_camera"]["weights"]) == list(FEATURES)
    assert Calibration.from_card({}) is None


@pytest.mark.parametrize(
    "garble",
    [
        lambda entry: entry.pop("without_camera"),
        lambda entry: entry["with_camera"]["weights"].pop("agreement"),
        lambda entry: entry["with_camera"].update(bias=math.nan),
        lambda entry: entry["with_camera"].update(bias="much"),
        lambda entry: entry["with_camera"].update(precision=[]),
        lambda entry: entry["with_camera"].update(precision=[[0.9, 0.5], [0.99, 0.4]]),
        lambda entry: entry["with_camera"].update(precision=[[0.9, 0.5], [0.5, 0.6]]),
        lambda entry: entry.update(with_camera=3),
    ],
)
def test_a_garbled_calibration_is_refused(garble: Callable[[dict[str, Any]], Any]) -> None:
    entry = copy.deepcopy(Calibration(CURVE, PLAIN).to_card())
    garble(entry)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Calibration.from_card({"calibration": entry})


def test_a_bundle_with_a_garbled_calibration_is_refused(own_model: PlaceModel) -> None:
    card = own_model.bundle.path / CARD
    content = yaml.safe_load(card.read_text())
    card.write_text(yaml.safe_dump(content | {"calibration": {"with_camera": "yes"}}))
    with pytest.raises(BundleError, match=r"model\.yaml: the entry calibration is garbled"):
        open_model(own_model.bundle.path)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.05, 0.05, 0.92, 0.98, 1.0])
    true = np.array([False, True, True, True, False])
    # 0.0–0.1: 0.05 against one half; 0.9–1.0: a mean of 0.967 against two thirds.
    assert expected_calibration_error(confidence, true) == pytest.approx((0.9 + 0.9) / 5)
    assert expected_calibration_error(np.array([1.0]), np.array([True])) == 0
    assert math.isnan(expected_calibration_error(np.zeros(0), np.zeros(0, np.bool_)))


# In the detector


@pytest.fixture
def calibrated(tiny_model: PlaceModel, tmp_path: Path) -> Iterator[Callable[..., LoopDetector]]:
    """``calibrated(plain_curve, **parameters)``: a detector whose bundle has that curve."""
    bundle = tiny_model.bundle
    database = KeyframeDatabase(
        tmp_path / "keyframes.db",
        model_id=bundle.model_id,
        dimension=bundle.dimension,
        max_patches=bundle.max_patches,
        session="one",
    )

    def make(curve: Curve, **values: object) -> LoopDetector:
        known = replace(bundle, calibration=Calibration(CURVE, curve))
        model = PlaceModel(known, tiny_model._place, tiny_model._match)
        still: dict[str, object] = {
            "min_time_gap_s": 0.0,
            "min_agreeing_keyframes": 1,
            "keyframe.max_similarity": 1.0,
        }
        return LoopDetector(make_config({**OPEN, **still, **values}), model, database)

    yield make
    database.close()


def test_too_little_confidence_is_said(
    calibrated: Callable[..., LoopDetector], make_picture: MakePicture
) -> None:
    detector = calibrated(
        Curve(-40.0, (50.0, 0.0, 0.0, 0.0, 0.0), PRECISION), target_precision=0.99
    )
    for number in range(3):
        detector.process(make_picture(number), number * 10**9)
    again = (make_picture(1) * 0.9 + 5).astype(np.uint8)
    decision = detector.process(again, 9 * 10**9)
    assert decision.closure is not None and decision.closure.keyframe.id == 2
    assert decision.closure.confidence > 0.9 and decision.closure.status is Status.ACCEPTED
    others = [one for one in decision.candidates if one is not decision.closure]
    assert {one.status for one in others} == {Status.LOW_CONFIDENCE}
    assert all(one.confidence < 0.6 for one in others)
    # Whoever asks for less gets more.
    lax = calibrated(Curve(-40.0, (50.0, 0.0, 0.0, 0.0, 0.0), PRECISION), target_precision=0)
    statuses = [one.status for one in lax.query(again).candidates]
    assert Status.LOW_CONFIDENCE not in statuses


def test_a_place_that_is_not_sure_enough_may_be_at_the_next_keyframe(
    calibrated: Callable[..., LoopDetector], make_picture: MakePicture
) -> None:
    detector = calibrated(
        Curve(math.log(0.4 / 0.6), (0.0,) * 5, PRECISION),
        target_precision=0.99,  # 0.6
        min_time_gap_s=5.0,
    )
    found = []
    for second in [*range(4), *range(10, 13)]:
        picture = make_picture(second % 10)
        found.append(detector.process(picture, second * 10**9, None).candidates)
    lap_one, (first, second, third) = found[:4], (one[0] for one in found[4:])
    assert not any(lap_one)
    assert first.status is Status.LOW_CONFIDENCE and first.confidence == pytest.approx(0.4)
    assert second.confidence == pytest.approx(sequential(0.4, 0.4)) and second.confidence > 0.6
    assert third.confidence == pytest.approx(sequential(0.4, second.confidence))
    assert [one.confidence_alone for one in (first, second, third)] == pytest.approx([0.4] * 3)
    assert any(one.status is Status.ACCEPTED for one in found[5])
    # One image that is asked about stands alone, and so does one after a new start.
    asked = [one.confidence for one in detector.query(make_picture(2)).candidates]
    assert asked and asked == pytest.approx([0.4] * len(asked))
    detector.forget()
    alone = detector.process(make_picture(3), 20 * 10**9).candidates
    assert {one.status for one in alone} == {Status.LOW_CONFIDENCE}


def test_the_surest_candidate_wins_not_the_best_score(
    calibrated: Callable[..., LoopDetector], make_picture: MakePicture
) -> None:
    pictures = [make_picture(0), make_picture(1)]
    mixed = cv2.addWeighted(pictures[0], 0.7, pictures[1], 0.3, 0)
    by_similarity = calibrated(Curve(0.0, (5.0, 0.0, 0.0, 0.0, 0.0), PRECISION))
    for number, picture in enumerate(pictures):
        by_similarity.process(picture, number * 10**9)
    upside_down = calibrated(Curve(0.0, (-5.0, 0.0, 0.0, 0.0, 0.0), PRECISION))
    first, second = (one.query(mixed).closure for one in (by_similarity, upside_down))
    assert first is not None and second is not None
    assert (first.keyframe.id, second.keyframe.id) == (1, 2)


def test_matches_agree_with_a_camera_or_else_with_a_plane(
    calibrated: Callable[..., LoopDetector], make_picture: MakePicture
) -> None:
    camera = Camera(160, 128, (120.0, 0, 80, 0, 120, 64, 0, 0, 1))
    for known in (camera, None):
        detector = calibrated(PLAIN)
        detector.process(make_picture(1), 10**9, camera=known)
        decision = detector.query(make_picture(1), top_k=1, camera=known)
        (candidate,) = decision.candidates
        # The same picture: matches stay where they are, to some pixels, and that fits both.
        assert candidate.num_matches >= 10
        assert candidate.agreement >= (0.6 if known else 1) * candidate.num_matches
        assert candidate.num_inliers == (candidate.agreement if known else 0)
        assert candidate.zoom == pytest.approx(0.0, abs=0.02)
        curve = CURVE if known else PLAIN
        assert candidate.confidence == curve.confidence(features_of(candidate))
        detector.database.reset()


def test_whether_the_pictures_correlate_counts(
    calibrated: Callable[..., LoopDetector], make_picture: MakePicture
) -> None:
    """The same place, then another one; then the keyframe's picture is gone."""
    by_pictures = Curve(-3.0, (0.0, 0.0, 0.0, 1.0, 0.0), PRECISION)
    detector = calibrated(by_pictures)
    picture = cv2.resize(make_picture(1), (640, 512))
    detector.process(picture, 10**9)
    (same,) = detector.query(picture, top_k=1).candidates
    assert same.found is not None and same.num_correlated > 0.7 * same.num_matches >= 7
    (other,) = detector.query(cv2.resize(make_picture(2), (640, 512)), top_k=1).candidates
    assert other.num_correlated < 0.5 * same.num_correlated
    assert other.confidence < same.confidence == by_pictures.confidence(features_of(same))
    with sqlite3.connect(str(detector.database.path)) as file:
        file.execute("UPDATE keyframes SET thumbnail = x'00'")
    (gone,) = detector.query(picture, top_k=1).candidates
    assert gone.num_correlated == 0 and gone.num_matches == same.num_matches


def test_the_model_that_ships_tells_nearer_from_farther() -> None:
    model = open_model(DEFAULT_BUNDLE)
    (frame,) = simulate_drive(image_size=(640, 480)).part(40, 41).frames()
    database = KeyframeDatabase(
        "",
        model_id=model.bundle.model_id,
        dimension=model.bundle.dimension,
        max_patches=model.bundle.max_patches,
        session="one",
    )
    nearer = cv2.resize(frame.image[30:-30, 40:-40], (640, 480))
    with closing(database):
        detector = LoopDetector(make_config({**OPEN}), model, database)
        detector.process(frame.image, 10**9)
        same, larger = (detector.query(one).candidates[0] for one in (frame.image, nearer))
    assert same.zoom == pytest.approx(0, abs=0.005)
    assert larger.zoom == pytest.approx(math.log(640 / 560), abs=0.02)
    assert same.num_correlated > 0.9 * same.num_matches > 200
    assert larger.confidence_alone < same.confidence_alone


def test_without_calibration_the_match_score_ranks() -> None:
    keyframe = Keyframe(1, 0, "one", 0, None, None, np.zeros((0, 2), np.float32))
    uncalibrated = Candidate(keyframe, 0.9, 3, 0.4)
    assert sureness(uncalibrated) == (0.4, -3)
    assert sureness(Candidate(keyframe, 0.9, 3, 0.4, confidence=0.7)) == (0.7, -3)


# What the detector as a whole would say


def found(frame: int, *candidates: tuple[int, float]) -> Found:
    """``candidates``: (keyframe, confidence)."""
    examined = [
        Candidate(
            Keyframe(number, 0, "one", 0, None, None, np.zeros((0, 2), np.float32)),
            0.9,
            rank,
            0.5,
            confidence_alone=confidence,
        )
        for rank, (number, confidence) in enumerate(candidates)
    ]
    return Found(Answer(frame, [number for number, _ in candidates], 0.9), examined)


def test_what_was_seen_before_makes_surer_and_fades() -> None:
    def odds(confidence: float) -> float:
        return confidence / (1 - confidence)

    # Nothing before, or what does not speak for the place: the image alone.
    for before in (0.0, 0.01, NEUTRAL):
        assert sequential(0.3, before) == pytest.approx(0.3)
    # Odds against the neutral ones, to the power that lasts, multiply.
    assert odds(sequential(0.3, 0.6)) == pytest.approx(
        odds(0.3) * (odds(0.6) / odds(NEUTRAL)) ** LASTING
    )
    assert sequential(0.3, 0.6) < sequential(0.3, 0.9) < sequential(0.4, 0.9) < 1
    # However long it goes on, confidence stays below a bound that one image sets.
    sure = 0.0
    for _ in range(1000):
        sure = sequential(0.5, sure)
    assert odds(sure) == pytest.approx(
        (odds(0.5) / odds(NEUTRAL)) ** (1 / (1 - LASTING)) * odds(NEUTRAL)
    )
    # However sure the keyframes before were, an image that speaks against the place is heard.
    assert odds(sequential(0.01, 1 - 1e-12)) == pytest.approx(odds(0.01) * math.exp(MOST_SUPPORT))
    assert math.isnan(sequential(math.nan, 0.5)) and 0 <= sequential(0.0, 1.0) <= 1
    assert sequential(1.0, 1.0) <= 1


def test_the_detector_gets_surer_from_keyframe_to_keyframe(tiny_model: PlaceModel) -> None:
    frames = [
        found(50, (10, 0.7), (30, 0.9)),
        found(51, (11, 0.8), (90, 0.95)),  # 90 is surer, but nothing led to it
        found(52, (12, 0.7)),
        found(53),
        found(54, (14, 0.9)),
    ]

    def answers(min_agreeing: int) -> list[tuple[list[int], float]]:
        return [(one.matches, one.score) for one in detect(frames, tiny_model, min_agreeing)]

    second = sequential(0.8, 0.7)
    third = sequential(0.7, second)
    assert min(second, third) > 0.95
    assert answers(1) == [([30], 0.9), ([11], second), ([12], third), ([], ANY), ([14], 0.9)]
    # An image without candidates breaks the chain.
    assert answers(2) == [([], ANY), ([11], second), ([12], third), ([], ANY), ([], ANY)]
    assert answers(3) == [([], ANY), ([], ANY), ([12], third), ([], ANY), ([], ANY)]
    # Asking changes nothing: each image alone is as sure as before.
    assert [one.confidence_alone for one in frames[1].candidates] == [0.8, 0.95]


# Fitting it


def test_the_precision_table_by_hand() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vpr_lite_ros.training.calibrate import TARGETS, _precision_table

    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    table = dict(_precision_table(confidence, np.array([True, True, False, True, True])))
    # All five: 0.8; the first two: 1.0.
    assert table == {target: 0.5 if target <= 0.8 else 0.8 for target in TARGETS}
    # The surest is false: nothing reaches more than what all of them reach.
    table = dict(_precision_table(confidence, np.array([False, True, True, True, True])))
    assert table == {target: 0.5 if target <= 0.8 else 1.0 for target in TARGETS}


def test_neither_units_nor_how_many_sequences_there_are_change_what_is_learned(
    walks: Sequence[Benchmark],
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vpr_lite_ros.training.calibrate import Cases, _regress

    rng = np.random.default_rng(0)
    true = rng.random(400) < 0.3
    values = rng.standard_normal((400, 5)) + 0.5 * true[:, None]
    values[:, 2:] += 3.0
    values[:, 4] = 3.0
    units = np.array([1.0, 1e-3, 1e3, 1.0, 1.0])
    frame = np.arange(400)
    cases = Cases(walks[0], [], values, frame, true)
    plain, twice = _regress([cases]), _regress([cases, cases])
    scaled = _regress([replace(cases, values=values * units)])
    assert twice.weights == pytest.approx(plain.weights, rel=1e-3)
    expected = [plain.confidence(row) for row in values.tolist()]
    assert np.mean(expected) == pytest.approx(true.mean(), abs=1e-3)
    in_other_units = [scaled.confidence(row) for row in (values * units).tolist()]
    assert in_other_units == pytest.approx(expected, abs=1e-4)
    assert plain.weights[4] == 0  # it never varies
    assert all(weight > 0.1 for weight in plain.weights[:4])


def test_precision_is_that_of_closures_that_agree(tiny_model: PlaceModel) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vpr_lite_ros.training.calibrate import Cases

    frames = [found(50, (10, 0.0)), found(51, (11, 0.0), (90, 0.0)), found(52, (12, 0.0))]
    truth = PairTruth([(50, 10), (51, 11), (52, 12)])
    images = ListedImages(Path(), [])
    benchmark = Benchmark("three", images, None, truth, 0, "frames")
    nothing = np.zeros(4)
    cases = Cases(benchmark, frames, nothing[:, None], nothing.astype(np.int64), nothing > 0)
    confidence = np.array([0.6, 0.8, 0.95, 0.7])
    # A single one: 90 is surest in its frame, and false. Three in a row lead past it.
    confidence[1] = 0.1  # and does not gain by what led to it
    third = sequential(0.7, sequential(0.1, 0.6))
    assert cases.closures(confidence, tiny_model, 1) == ([0.6, 0.95, third], [True, False, True])
    assert cases.closures(confidence, tiny_model, 3) == ([third], [True])


def test_a_drawn_town_is_a_labelled_sequence_with_a_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpr_lite_ros.training import town

    monkeypatch.setattr(town, "TOWN_STEP", 12)
    folder = town.draw_town(3, tmp_path / "town 3")
    (benchmark,) = find_benchmarks(folder, radius_m=20.0)
    images = sorted(folder.glob("*.png"))
    height, width = cv2.imread(str(images[0])).shape[:2]
    assert len(benchmark.queries) == len(images) > 20
    assert benchmark.camera is not None
    assert (benchmark.camera.width, benchmark.camera.height) == (width, height)
    # The second lap comes past the first: half a minute later, at the same positions.
    could = benchmark.findable(30.0)
    assert could.sum() > 5 and could[len(images) // 2 :].mean() > could[: len(images) // 2].mean()


@pytest.fixture
def walks(make_picture: MakePicture, tmp_path: Path) -> list[Benchmark]:
    """Three walks: ten places, then seven of them again in another light and three new ones."""
    folders = []
    for walk in range(3):
        folder = tmp_path / f"walk{walk}"
        folder.mkdir()
        rows = ["file,x,y"]
        rng = np.random.default_rng(walk)
        for frame in range(20):
            place = 100 * walk + (frame - 10 if 10 <= frame < 17 else frame)
            picture = make_picture(place).astype(float)
            if frame >= 10:
                picture = picture * rng.uniform(0.7, 1) + rng.normal(0, 12, picture.shape)
            bgr = cv2.cvtColor(picture.clip(0, 255).astype(np.uint8), cv2.COLOR_RGB2BGR)
            cv2.imwrite(str(folder / f"{frame:03}.png"), bgr)
            rows.append(f"{frame:03}.png,{place * 20},0")
        (folder / "poses.csv").write_text("\n".join(rows) + "\n")
        folders.append(folder)
    return [one for folder in folders for one in find_benchmarks(folder)]


@pytest.fixture
def own_model(tiny_model: PlaceModel, tmp_path: Path) -> PlaceModel:
    """The tiny model in a bundle of its own, to write to."""
    shutil.copytree(tiny_model.bundle.path, tmp_path / "bundle")
    return open_model(tmp_path / "bundle")


def test_calibrating_a_bundle(own_model: PlaceModel, walks: Sequence[Benchmark]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vpr_lite_ros.export import amend_card
    from vpr_lite_ros.training.calibrate import calibrate_bundle

    before = own_model.bundle.model_id
    picture = own_model.bundle.path / "pictures" / "calibration.png"
    amend_card(own_model.bundle.path, {"thresholds": {"match": 0.9, "measured_on": "others"}})
    text = calibrate_bundle(
        own_model, walks, top_k=5, min_time_gap_s=8.0, min_agreeing=1, picture=picture
    )
    assert cv2.imread(str(picture)).std() > 10
    assert "calibrated on 3 sequences" in text and "walk1" in text
    model = open_model(own_model.bundle.path)
    assert model.bundle.model_id == before, "stored keyframes can still be used"
    card = model.bundle.card
    assert set(card["thresholds"]) == {"similarity", "match", "inliers"}
    assert card["thresholds"]["inliers"] == 0 and card["thresholds"]["match"] < 0.9
    # No walk has a camera: nothing tells what its motion adds.
    told = card["calibration"]
    assert told["with_camera"] == told["without_camera"]
    assert list(told["expected_calibration_error"]) == ["walk0", "walk1", "walk2"]
    errors = [one["without_camera"] for one in told["expected_calibration_error"].values()]
    assert all(0 <= error < 0.35 for error in errors)
    assert told["fitted_to"]["walk0"].startswith("7 of ")
    report = evaluate(walks[0], model, min_time_gap_s=8.0, rerank=5, min_agreeing=1)
    assert report["reranked"]["recall_at_1"] > 0.8
    assert report["detector_recall_at_100_precision"] > 0.5
    assert report["expected_calibration_error_alone"] < 0.35 and not report["epipolar_check"]
    # What one image after the other says of a walk is surer than what each says alone.
    found = list(look_up(walks[0], model, min_time_gap_s=8.0, examine=5))
    assert any(candidate.num_correlated for one in found for candidate in one.candidates)
    alone = [one.reranked().score for one in found if one.candidates]
    grown = [answer.score for answer in detect(found, model, 1) if answer.matches]
    assert np.mean(grown) > np.mean(alone) + 0.01
    assert report["expected_calibration_error"] < 0.35
    assert report["expected_calibration_error"] != report["expected_calibration_error_alone"]


def test_a_camera_beside_the_images_brings_geometry(
    own_model: PlaceModel, walks: Sequence[Benchmark]
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vpr_lite_ros.training.calibrate import calibrate_bundle

    folders = [walk.queries.path for walk in walks]
    for folder in folders[:2]:
        camera = {"width": 160, "height": 128, "fx": 120, "fy": 120, "cx": 80, "cy": 64}
        (folder / "calib.json").write_text(json.dumps(camera))
    again = [one for folder in folders for one in find_benchmarks(folder)]
    assert [walk.camera is not None for walk in again] == [True, True, False]
    picture = own_model.bundle.path / "calibration.png"
    text = calibrate_bundle(
        own_model, again, top_k=5, min_time_gap_s=8.0, min_agreeing=1, picture=picture
    )
    model = open_model(own_model.bundle.path)
    told = model.bundle.card["calibration"]
    assert told["with_camera"] != told["without_camera"]
    line = {row.split()[0]: row for row in text.splitlines()}
    assert "with camera" in line["walk1"] and "with camera" not in line["walk2"]
    assert evaluate(again[0], model, min_time_gap_s=8.0, rerank=5)["epipolar_check"]


def test_what_cannot_be_calibrated_on_is_named(
    own_model: PlaceModel,
    walks: Sequence[Benchmark],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    bundle = str(own_model.bundle.path)
    first = walks[0].queries.path
    assert main(["calibrate", str(first), "--bundle", bundle]) == 1
    assert "two or more labelled sequences, got 1" in capsys.readouterr().err
    (first / "poses.csv").write_text(
        "file,x,y\n" + "".join(f"{number:03}.png,{number * 50},0\n" for number in range(20))
    )
    assert main(["calibrate", str(first), str(first), "--bundle", bundle]) == 1
    assert "two sequences are called walk0" in capsys.readouterr().err
    others = [str(walk.queries.path) for walk in walks[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert main(["calibrate", *others, "--bundle", bundle]) == 1
    assert "cannot be written: copy the bundle" in capsys.readouterr().err
    command = ["calibrate", str(first), *others, "--bundle", bundle, "--min_time_gap_s", "8"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "walk0: each of its" in error and "is false" in error and "labels" in error
    assert "calibration" not in open_model(own_model.bundle.path).bundle.card


def test_the_command_says_what_it_found(
    own_model: PlaceModel,
    walks: Sequence[Benchmark],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    folders = [str(walk.queries.path) for walk in walks]
    bundle = own_model.bundle.path
    command = ["calibrate", *folders, "--bundle", str(bundle), "--picture", str(bundle / "a.png")]
    assert main([*command, "--min_time_gap_s", "8"]) == 0
    out = capsys.readouterr().out
    assert "calibration error, fitted to the others" in out and "walk2" in out
    assert "confidence by target_precision" in out
