"""Tuning on recorded scores: what is promised must hold where it was not tuned."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from vpr_lite_ros.cli import main
from vpr_lite_ros.config import Config, make_config, read_yaml
from vpr_lite_ros.evaluation import Booleans, RadiusTruth
from vpr_lite_ros.inference import DEFAULT_BUNDLE, load_bundle, open_model
from vpr_lite_ros.reporting import trials
from vpr_lite_ros.reporting.decisions import (
    FALSE,
    NONE,
    TRUE,
    candidate_outcomes,
    decide,
    findable_keyframes,
    judged,
)
from vpr_lite_ros.reporting.parameter_file import caution, parameter_file
from vpr_lite_ros.reporting.recorder import record
from vpr_lite_ros.reporting.recording import Recording
from vpr_lite_ros.reporting.trials import try_all
from vpr_lite_ros.reporting.truth import Truth, find_truth
from vpr_lite_ros.reporting.tuning import TuningError, at_least, cut, predicted, share, tune

GAP_S = 30.0
LAP = 150
"""Keyframes a second and 2 m apart, so that within 5 m there are five of a lap."""
NO_MODEL: Any = SimpleNamespace(bundle=SimpleNamespace(card={}, calibration=None))


def drawn_scores(seed: int, laps: int = 4) -> tuple[Recording, Truth]:
    """Scores as a drive round a block gives them: errors come in stretches that look alike."""
    rng = np.random.default_rng(seed)
    count = LAP * laps
    rows: list[tuple[int, float, float]] = []
    first = [0]
    alike = rng.integers(0, LAP, LAP)  # where else each keyframe seems to be ...
    seems = np.repeat(rng.random(LAP // 10 + 1) < 0.3, 10)[:LAP]  # ... in stretches of ten
    for keyframe in range(count):
        place = keyframe % LAP
        if keyframe >= LAP:
            lap_before = keyframe - LAP
            true = rng.normal(0.55, 0.15)
            found = [(lap_before, max(0.0, true))]
            stretch = int(alike[place // 10 * 10]) + place % 10
            false = rng.normal(0.42 if seems[place] else 0.2, 0.1)
            found.append((stretch % LAP, max(0.0, false)))
            found += [(int(rng.integers(0, keyframe - LAP + 1)), abs(rng.normal(0.1, 0.05)))]
            unique = dict(found)
            rows += [(match, score, score) for match, score in unique.items()]
        first.append(len(rows))
    match, similarity, score = (np.array(column) for column in zip(*rows, strict=True))
    many = np.full(len(rows), 100)
    stamps = np.arange(count, dtype=np.int64) * 10**9
    recording = Recording(
        folder=Path("nowhere"), frames=count, total=count, skipped={}, stopped="", seconds=1.0,
        peak_memory_mb=1.0, camera=None, odometry="", frame=np.arange(count), stamp_ns=stamps,
        names=[""] * count, id=np.arange(count) + 1, first=np.array(first),
        match=match.astype(np.int64), similarity=similarity.astype(np.float32),
        match_score=score.astype(np.float32), num_matches=many, num_inliers=many, agreement=many,
        num_correlated=many,
        confidence=np.full(len(rows), np.nan), has_camera=np.zeros(len(rows), np.bool_),
        session=["recording"] * count, apart_m=np.full(len(rows), np.nan),
        travelled_m=np.full(len(rows), np.nan), timings_ms={},
    )  # fmt: skip
    angle = np.arange(count) % LAP * (2 * np.pi / LAP)
    radius = LAP * 2 / (2 * np.pi)
    xyz = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0 * angle], axis=1)
    return recording, Truth(RadiusTruth(xyz, 5.0), "drawn", xyz)


def precision_of(
    recording: Recording, truth: Truth, config: Config, model: Any, where: Booleans
) -> tuple[float, int]:
    """Of closures, and how many there are, by what the detector decides."""
    of_rows = candidate_outcomes(recording, truth)
    outcomes = judged(decide(recording, config, model), of_rows)[where]
    true, false = int((outcomes == TRUE).sum()), int((outcomes == FALSE).sum())
    return true / (true + false) if true + false else math.nan, true + false


def test_a_promise_holds_on_the_half_that_was_not_tuned_on() -> None:
    target, config = 0.95, Config(min_time_gap_s=GAP_S)
    within, found, precisions = 0, 0, []
    for seed in range(20):
        recording, truth = drawn_scores(seed)
        half = np.arange(len(recording)) < LAP * 2.5
        tuning = tune(recording, truth, config, NO_MODEL, target, queries=half)
        chosen = dataclasses.replace(config, **tuning.parameters)
        precision, closures = precision_of(recording, truth, chosen, NO_MODEL, ~half)
        assert closures > 0, "what finds nothing is always right"
        assert tuning.precision.low < tuning.precision.value <= tuning.precision.high
        within += tuning.precision.low <= precision <= tuning.precision.high + 1e-9
        precisions.append(precision)
        found += closures
    # Of 95% intervals 19 in 20 hold; two in 20 may miss by chance.
    assert within >= 18
    assert np.mean(precisions) >= target - 0.01
    assert found / 20 > 100, "and it finds half of what there is"


def test_settings_tried_together_decide_as_the_detector_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each check, with and without a camera, where a session begins, and from block to block."""
    monkeypatch.setattr(trials, "AT_A_TIME", 64)
    rng = np.random.default_rng(5)
    recording, truth = drawn_scores(7)
    rows, later = len(recording.match), len(recording) * 2 // 3
    sessions = ["recording"] * later + ["recording-2"] * (len(recording) - later)
    recording = dataclasses.replace(
        recording,
        session=sessions,
        num_matches=rng.integers(0, 40, rows),
        num_inliers=rng.integers(0, 40, rows),
        confidence=np.where(rng.random(rows) < 0.9, rng.random(rows), np.nan),
        has_camera=rng.random(rows) < 0.5,
        apart_m=np.where(rng.random(rows) < 0.5, 40 * rng.random(rows), np.nan),
        travelled_m=np.where(rng.random(rows) < 0.9, 100 * rng.random(rows), np.nan),
    )
    model = load_bundle(DEFAULT_BUNDLE)
    calibrated: Any = SimpleNamespace(bundle=model)
    settings = [
        make_config(
            {
                "similarity_threshold": float(rng.uniform(0, 0.5)),
                "match_threshold": float(rng.uniform(0, 0.5)),
                "min_matches": int(rng.integers(0, 20)),
                "min_inliers": int(rng.integers(0, 20)),
                "target_precision": float(rng.choice([0.0, 0.5, 0.8])),
                "min_agreeing_keyframes": int(rng.choice([1, 2, 3])),
                "odometry.place_radius_m": float(rng.uniform(0, 30)),
            }
        )
        for _ in range(20)
    ]
    of_rows = candidate_outcomes(recording, truth)
    for model in (NO_MODEL, calibrated):
        together = try_all(recording, of_rows, settings, model)
        assert {int(kind) for kind in np.unique(together)} >= {NONE, TRUE, FALSE}
        for setting, made in zip(settings, together, strict=True):
            alone = judged(decide(recording, setting, model), of_rows)
            np.testing.assert_array_equal(made, alone)


def test_a_longer_drive_takes_a_byte_more_for_each_setting() -> None:
    """And some for each keyframe, but not the candidates as objects: these would be kilobytes."""
    settings = [make_config({"match_threshold": level / 100}) for level in range(60)]
    peaks, lengths = [], []
    for laps in (8, 20):  # both longer than what is judged at a time
        recording, truth = drawn_scores(3, laps)
        of_rows = candidate_outcomes(recording, truth)
        tracemalloc.start()
        try_all(recording, of_rows, settings, NO_MODEL)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        lengths.append(len(recording))
    assert (peaks[1] - peaks[0]) / (lengths[1] - lengths[0]) < len(settings) + 500


def part_of(recording: Recording, count: int) -> Recording:
    """The first ``count`` keyframes."""
    rows = int(recording.first[count])
    changes: dict[str, Any] = {"frames": count, "total": count}
    for field in dataclasses.fields(Recording):
        value = getattr(recording, field.name)
        if isinstance(value, (np.ndarray, list)):
            whole = len(recording)
            length = {whole: count, whole + 1: count + 1}.get(len(value), rows)
            changes[field.name] = value[:length]
    return dataclasses.replace(recording, **changes)


def test_few_revisits_make_nobody_braver() -> None:
    """Without a single error: twenty revisits prove little, four hundred much."""
    recording, truth = drawn_scores(0)
    right = dataclasses.replace(
        recording, match_score=np.where(candidate_outcomes(recording, truth) == TRUE, 0.5, 0.01)
    )
    config = Config(min_time_gap_s=GAP_S, match_threshold=0.1)
    few = tune(part_of(right, LAP + 20), truth, config, NO_MODEL, 0.95)
    assert few.parameters["min_agreeing_keyframes"] >= config.min_agreeing_keyframes
    assert few.parameters["match_threshold"] >= config.match_threshold
    assert few.reached and not few.promised and few.precision.low < 0.95
    assert few.needed == 60 * 5  # as many spans as have three errors at a precision of 0.95
    assert f"some {few.needed}, none of them false" in caution(few)
    many = tune(right, truth, config, NO_MODEL, 0.95)
    assert many.parameters["min_agreeing_keyframes"] == 1 and many.promised
    assert many.recall.value > few.recall.value and not caution(many)
    certain = tune(right, truth, config, NO_MODEL, 1.0)
    assert "No recording can promise" in caution(certain)


def test_what_is_proven_worked_by_hand() -> None:
    # Without an error n / (n + 1.6449 ** 2); n must be 268 for 0.99.
    proven = at_least(np.array([1.0, 1.0, 0.0, 0.5]), np.array([268.0, 267.0, 10.0, 0.0]))
    assert proven[0] >= 0.99 > proven[1]
    assert proven[2] == pytest.approx(0, abs=1e-12) and proven[3] == pytest.approx(0, abs=1e-4)
    # 90 of 100: (0.9 + 0.01353 - 0.05117) / 1.02706.
    assert at_least(np.array([0.9]), np.array([100.0]))[0] == pytest.approx(0.8396, abs=1e-4)


def test_a_stricter_target_finds_less() -> None:
    recording, truth = drawn_scores(100)
    config = Config(min_time_gap_s=GAP_S)
    loose, strict = (tune(recording, truth, config, NO_MODEL, at) for at in (0.7, 1.0))
    assert loose.fitted_recall > strict.fitted_recall > 0
    assert strict.fitted_precision == 1.0 and loose.fitted_precision >= 0.7
    assert loose.findable == int(findable_keyframes(recording, truth, GAP_S).sum()) >= 3 * LAP
    # What is said of the whole recording is what the detector does with these parameters.
    chosen = dataclasses.replace(config, **strict.parameters)
    everywhere = np.ones(len(recording), np.bool_)
    assert precision_of(recording, truth, chosen, NO_MODEL, everywhere) == (1.0, strict.closures)


def test_nothing_to_tune_on_is_said() -> None:
    recording, truth = drawn_scores(0)
    with pytest.raises(TuningError, match=r"lower --min_time_gap_s, or raise --radius"):
        tune(recording, truth, Config(min_time_gap_s=1e6), NO_MODEL, 0.9)
    far = Truth(RadiusTruth(np.cumsum(np.full((len(recording), 3), 9.0), axis=0), 5.0), "line")
    with pytest.raises(TuningError, match="no keyframe that shows a place seen"):
        tune(recording, far, Config(min_time_gap_s=GAP_S), NO_MODEL, 0.9)


def test_blocks_are_stretches_with_as_many_revisits_each() -> None:
    could = np.zeros(100, np.bool_)
    could[50:] = True
    blocks = cut(could, np.ones(100, np.bool_))
    assert [int(could[block].sum()) for block in blocks] == [10] * 5
    assert np.concatenate(blocks).tolist() == list(range(100))
    few = np.zeros(10, np.bool_)
    few[[3, 7]] = True
    assert np.concatenate(cut(few, ~np.zeros(10, np.bool_))).tolist() == list(range(10))


def test_intervals_worked_by_hand() -> None:
    # One success of one, then one more: Beta(1.5, 0.5) has mean 0.75, so both ends are possible.
    assert predicted(1.0, 1) == (0.0, 1.0)
    # After 20 of 20 the chances of 20, 19, 18 and 17 of 20 more are 0.709, 0.180, 0.066 and 0.027:
    # 1.8% are below 17, 4.5% below 18.
    assert predicted(1.0, 20) == (17 / 20, 1.0)
    low, high = predicted(0.5, 100)
    assert low == pytest.approx(1 - high) and 0.35 < low < 0.38
    # Of 100 right ones in spans of five there are 20 observations.
    assert share(np.ones(100, np.bool_)).low == 17 / 20
    # Two runs of eight errors: as if there were 80 / 8 observations.
    right = np.ones(80, np.bool_)
    right[8:16] = right[40:48] = False
    found = share(right)
    assert found.value == 0.8 and (found.low, found.high) == predicted(0.8, 10)
    # The same errors one by one say more.
    alone = np.ones(80, np.bool_)
    alone[::5] = False
    assert alone.mean() == 0.8 and share(alone).low > found.low
    empty = share(np.zeros(0, np.bool_))
    assert math.isnan(empty.value) and (empty.low, empty.high) == (0.0, 1.0)


def test_the_file_goes_straight_into_params_file(tmp_path: Path) -> None:
    recording, truth = drawn_scores(3)
    settings = {"min_time_gap_s": GAP_S, "keyframe.min_interval_s": 0.25, "session_id": "today"}
    config = make_config(settings)
    tuning = tune(recording, truth, config, NO_MODEL, 0.9)
    file = tmp_path / "my.yaml"
    file.write_text(parameter_file(config, tuning, "odd\nname: [x"))
    values = read_yaml(file)
    read = make_config(values)
    assert read == dataclasses.replace(config, session_id="", **tuning.parameters)
    assert values["keyframe.min_interval_s"] == 0.25
    assert set(tuning.parameters) <= set(values) and "session_id" not in values
    # As rclpy reads it: one wildcard node, then its parameters.
    assert list(yaml.safe_load(file.read_text())) == ["/**"]
    assert f"# Expected precision: {tuning.precision.value:.3f}" in file.read_text()


def test_a_real_recording_and_the_real_model(
    corridor: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, then each half of the second lap by what the other half chose."""
    folder, work = corridor
    file = tmp_path / "my.yaml"
    command = ["tune", str(folder), "--target-precision", "0.99", "--work", str(work)]
    assert main([*command, "-o", str(file)]) == 0
    assert "expected precision" in capsys.readouterr().out
    tuned = make_config(read_yaml(file))

    model = open_model(DEFAULT_BUNDLE)
    recording = record(folder, work, Config(), model)  # is there, and is not made again
    truth = find_truth(folder, recording)
    everywhere = np.ones(len(recording), np.bool_)
    precision, closures = precision_of(recording, truth, tuned, model, everywhere)
    assert precision >= 0.99 and closures >= 20
    second_lap = np.flatnonzero(findable_keyframes(recording, truth, GAP_S))
    early = np.arange(len(recording)) <= second_lap[len(second_lap) // 2]
    for half, target in itertools.product((early, ~early), (0.9, 0.99)):
        tuning = tune(recording, truth, Config(), model, target, queries=half)
        chosen = dataclasses.replace(Config(), **tuning.parameters)
        precision, closures = precision_of(recording, truth, chosen, model, ~half)
        assert closures >= 5
        assert tuning.precision.low <= precision <= tuning.precision.high + 1e-9
        assert precision >= target


def test_a_target_out_of_reach_writes_no_file(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], places: Path
) -> None:
    """Every image has two true partners by the file, but it is a liar."""
    folder = places.parent
    rows = places.read_text().splitlines()
    stamped = [f"{rows[0]},stamp_s"] + [f"{row},{20 * n}" for n, row in enumerate(rows[1:])]
    mixed = np.random.default_rng(0).permutation(12)
    files = [row.split(",", 1)[0] for row in stamped[1:]]
    rest = [row.split(",", 1)[1].split(",") for row in stamped[1:]]
    lies = [",".join([file, *rest[mixed[n]][:2], rest[n][2]]) for n, file in enumerate(files)]
    places.write_text("\n".join([stamped[0], *lies]) + "\n")
    file = tmp_path / "my.yaml"
    options = ["--bundle", str(tiny_bundle), "--backend", "onnxruntime", "--min_matches", "0"]
    options += ["--keyframe.max_similarity", "1.0", "--min_time_gap_s", "15", "--radius", "4"]
    command = ["tune", str(folder), "-o", str(file), "--work", str(tmp_path / "work"), *options]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "out of reach" in message and "--target-precision" in message
    assert not file.exists()
