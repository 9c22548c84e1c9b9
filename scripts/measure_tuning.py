#!/usr/bin/env python3
"""Is what `vpr-lite tune` promises held where it was not tuned, and what does a long drive cost?

python scripts/measure_tuning.py halves ../shared/data     # real sequences, half by half
python scripts/measure_tuning.py long --keyframes 100000   # drawn scores: seconds and memory
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vpr_lite_ros.calibration import features
from vpr_lite_ros.config import Config
from vpr_lite_ros.evaluation import RadiusTruth
from vpr_lite_ros.inference import DEFAULT_BUNDLE, load_bundle, open_model
from vpr_lite_ros.reporting.decisions import (
    FALSE,
    TRUE,
    candidate_outcomes,
    decide,
    findable_keyframes,
    judged,
)
from vpr_lite_ros.reporting.figures import against_truth
from vpr_lite_ros.reporting.recorder import record
from vpr_lite_ros.reporting.recording import SCORES, STATE, read_recording
from vpr_lite_ros.reporting.truth import Truth, find_truth
from vpr_lite_ros.reporting.tuning import TuningError, tune

TARGETS = (0.9, 0.95, 0.99)
LAP = 2000
"""Drawn keyframes of a lap, 1 m and a second apart."""
CANDIDATES = 10


def two_traverses(first: Path, second: Path, folder: Path) -> Path:
    """Two folders of aligned images as one drive that comes back, with its list of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [sorted(one.glob("*.jpg")) for one in (first, second)]
    for number, file in enumerate([*files[0], *files[1]]):
        link = folder / f"{number:06}.jpg"
        if not link.exists():
            link.symlink_to(file.resolve())
    count = len(files[0])
    pairs = [
        f"{count + one},{other}"
        for one in range(len(files[1]))
        for other in range(max(0, one - 2), min(count, one + 3))
    ]
    (folder / "pairs.csv").write_text("\n".join(["query,match", *pairs]) + "\n")
    return folder


def halves(data: Path, work: Path) -> None:
    """Tune on each half of the revisits of each sequence; look at the other half."""
    model, config = open_model(DEFAULT_BUNDLE), Config()
    gardens = data / "eval" / "gardens_point"
    sequences = {
        "KITTI 00": data / "eval" / "kitti00",
        "corridor": data / "eval" / "corridor_two_laps",
    }
    for label, other in (("by day", "day_left"), ("by night", "night_right")):
        folder = work / f"day_right_{other}"
        sequences[f"Gardens Point, {label}"] = two_traverses(
            gardens / "day_right", gardens / other, folder
        )
    print("| sequence, half | target | expected | in the other half | recall there |")
    print("|---|---|---|---|---|")
    for label, source in sequences.items():
        recording = record(source, work / source.name, config, model)
        truth = find_truth(source, recording)
        of_rows = candidate_outcomes(recording, truth)
        could = findable_keyframes(recording, truth, config.min_time_gap_s)
        revisits = np.flatnonzero(could)
        first = np.arange(len(recording)) <= revisits[len(revisits) // 2]
        for which, half in (("first", first), ("second", ~first)):
            for target in TARGETS:
                head = f"| {label}, {which} ({int((could & half).sum())}) | {target} | "
                try:
                    tuning = tune(recording, truth, config, model, target, queries=half)
                except TuningError as error:
                    print(f"{head}{error} | | |")
                    continue
                chosen = dataclasses.replace(config, **tuning.parameters)
                made = judged(decide(recording, chosen, model), of_rows)[~half]
                true, false = int((made == TRUE).sum()), int((made == FALSE).sum())
                precision = true / (true + false) if true + false else float("nan")
                within = tuning.precision.low <= precision <= tuning.precision.high
                print(
                    f"{head}{tuning.precision.value:.3f} "
                    f"({tuning.precision.low:.2f} to {tuning.precision.high:.2f})"
                    f"{'' if tuning.reached else ', not reached'} | "
                    f"{precision:.3f} ({true} of {true + false})"
                    f"{'' if within else ', OUTSIDE'} | "
                    f"{float((made[could[~half]] == TRUE).mean()):.3f} |",
                    flush=True,
                )


def draw_long(folder: Path, count: int) -> Truth:
    """Scores of a drive round one block, with ten candidates a keyframe, as `report` keeps them."""
    rng = np.random.default_rng(0)
    curve = _calibration().curve(True)
    with (folder / SCORES).open("w", encoding="utf-8") as file:
        for keyframe in range(count):
            candidates = []
            if keyframe >= LAP:
                before = keyframe - LAP * int(rng.integers(1, keyframe // LAP + 1))
                matches = [before, *rng.integers(0, keyframe - LAP + 1, CANDIDATES - 1).tolist()]
                for rank, match in enumerate(dict.fromkeys(matches)):
                    true = rank == 0 and rng.random() < 0.8
                    similarity = float(rng.normal(0.6 if true else 0.3, 0.1))
                    score = float(np.clip(rng.normal(0.35 if true else 0.08, 0.05), 0.001, 1))
                    agreement = int(rng.poisson(60 if true else 8))
                    values = features(similarity, score, agreement, agreement // 2, 0.0)
                    candidates.append(
                        [match + 1, round(similarity, 6), round(score, 6), 2 * agreement,
                         agreement, agreement, agreement // 2, curve.confidence(values), 1,
                         None, None]
                    )  # fmt: skip
            line = {
                "frame": keyframe, "stamp_ns": keyframe * 10**9, "name": f"{keyframe:06}.jpg",
                "id": keyframe + 1, "session": "recording",
                "ms": {"resize": 2.0, "place": 40.0, "search": 1.0, "match": 20.0},
                "candidates": candidates,
            }  # fmt: skip
            print(json.dumps(line), file=file)
    state = {"frames": count, "total": count, "stopped": ""}
    (folder / STATE).write_text(json.dumps(state))
    angle = np.arange(count) % LAP * (2 * np.pi / LAP)
    radius = LAP / (2 * np.pi)
    xyz = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0 * angle], axis=1)
    return Truth(RadiusTruth(xyz, 5.0), "drawn", xyz)


def _calibration() -> Any:
    calibration = load_bundle(DEFAULT_BUNDLE).calibration
    assert calibration is not None
    return calibration


def long(count: int) -> None:
    """Seconds and memory to read, decide and tune; images and patches are never asked for."""
    model: Any = SimpleNamespace(bundle=load_bundle(DEFAULT_BUNDLE))
    with tempfile.TemporaryDirectory() as name:
        truth = draw_long(Path(name), count)
        size_mb = (Path(name) / SCORES).stat().st_size / 1e6

        def said(what: str, began: float) -> float:
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            spent = time.process_time() - began
            print(f"{what}: {spent:.1f} s of CPU, peak memory {peak_mb:.0f} MB", flush=True)
            return time.process_time()

        print(f"{count} keyframes, {size_mb:.0f} MB of scores")
        now = said("before", time.process_time())
        recording = read_recording(Path(name))
        now = said("read", now)
        decisions = decide(recording, Config(), model)
        now = said("decide", now)
        tuning = tune(recording, truth, Config(), model, 0.99)
        now = said(f"tune, {tuning.settings} settings", now)
        outcomes = judged(decisions, candidate_outcomes(recording, truth))
        could = findable_keyframes(recording, truth, Config().min_time_gap_s)
        against_truth(recording, decisions, truth, outcomes, could, Config())
        said("figures of a report", now)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    real = commands.add_parser("halves")
    real.add_argument("data", type=Path)
    real.add_argument("--work", type=Path, default=Path("build/tuning"))
    drawn = commands.add_parser("long")
    drawn.add_argument("--keyframes", type=int, default=100_000)
    args = parser.parse_args()
    if args.command == "halves":
        halves(args.data, args.work)
    else:
        long(args.keyframes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
