#!/usr/bin/env python3
"""What closures are worth to a map: odometry is made to drift, closures take the error out again.

    vpr-lite replay SEQUENCE --camera CALIB --poses POSES --output build/replay/sequence
    scripts/measure_backend.py build/replay/sequence POSES --of-camera

The odometry is the truth with a drift of its own for each seed: a constant rotation bias about
each axis (radians per metre), a constant scale error and noise on each step. ATE is the root mean
square distance to the truth, by evo: with nothing aligned but the first pose ("start"), and after
the best rigid alignment ("aligned").
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from vpr_lite_ros.backend.accuracy import compare
from vpr_lite_ros.backend.graph import Closure
from vpr_lite_ros.backend.offline import correct, read_closures, read_trajectory, to_body
from vpr_lite_ros.bags import Poses, read_poses
from vpr_lite_ros.relative_pose import PoseType, quaternion, rotation_matrix
from vpr_lite_ros.summary import Record, write_json

ROTATION_BIAS = 2e-4  # radians per metre, standard deviation for each axis
SCALE = 0.01  # standard deviation
NOISE = 0.02  # of each step, standard deviation for each axis
GAP_NS = 30 * 10**9  # between the images of a false closure, at least


def drifted(truth: Poses, seed: int, *, flat: bool = False) -> Poses:
    """``truth`` as an odometry would have it; ``flat`` keeps a flat drive flat."""
    assert truth.quaternions is not None
    rng = np.random.default_rng(seed)
    bias, scale = rng.normal(0, ROTATION_BIAS, 3), 1 + rng.normal(0, SCALE)
    if flat:
        bias[:2] = 0
    turns = [rotation_matrix(*turn) for turn in truth.quaternions]
    at, turn = truth.xyz[0], turns[0]
    xyz, quaternions = [at], [truth.quaternions[0]]
    for row in range(1, len(truth)):
        step = turns[row - 1].T @ (truth.xyz[row] - truth.xyz[row - 1])
        way = float(np.linalg.norm(step))
        noise = rng.normal(0, NOISE * way, 3) * (1, 1, 0 if flat else 1)
        at = at + turn @ (scale * step + noise)
        turn = turn @ turns[row - 1].T @ turns[row] @ _turn(bias * way)
        xyz.append(at)
        quaternions.append(np.array(quaternion(turn)))
    return replace(truth, xyz=np.array(xyz), quaternions=np.array(quaternions))


def perfect(closures: list[Closure], truth: Poses) -> list[Closure]:
    """The same pairs with their true rotation, and nothing said of the way between."""
    assert truth.quaternions is not None and truth.stamps_ns is not None
    out = []
    for one in closures:
        rows = np.searchsorted(truth.stamps_ns, (one.query_ns, one.match_ns))
        query, match = (rotation_matrix(*truth.quaternions[row]) for row in rows)
        turn = quaternion(query.T @ match)
        out.append(
            replace(one, pose_type=PoseType.ROTATION, translation=(0, 0, 0), quaternion=turn)
        )
    return out


def with_false(closures: list[Closure], truth: Poses, share: float, seed: int) -> list[Closure]:
    """``closures`` and others between moments drawn at random, ``share`` of all that come out."""
    assert truth.stamps_ns is not None
    rng = np.random.default_rng([seed, 1])
    out = list(closures)
    first = truth.stamps_ns[0] + GAP_NS
    for _ in range(math.ceil(len(closures) * share / (1 - share))):
        late = truth.stamps_ns[truth.stamps_ns > first]
        query = int(rng.choice(late))
        match = int(rng.choice(truth.stamps_ns[truth.stamps_ns <= query - GAP_NS]))
        # A false one looks as the true ones do.
        out.append(replace(rng.choice(np.array(closures)), query_ns=query, match_ns=match))
    return out


def measure(truth: Poses, closures: list[Closure], seeds: int, *, flat: bool) -> list[Record]:
    """ATE of each seed: before, and after with each kind of closures."""
    rows = []
    for seed in range(seeds):
        odometry = drifted(truth, seed, flat=flat)
        cases = {
            "detector": closures,
            "detector, 10% false": with_false(closures, truth, 0.1, seed),
            "perfect": perfect(closures, truth),
        }
        row: Record = {"seed": seed, "before": compare(odometry, truth).figures}
        for name, given in cases.items():
            row[name] = compare(correct(odometry, given).trajectory, truth).figures
        rows.append(row)
        print(_line(str(seed), [row]), flush=True)
    return rows


def _line(name: str, rows: list[Record]) -> str:
    cells = []
    for kind in ("ate_start_m", "ate_m"):
        for case in rows[0]:
            if case != "seed":
                cells.append(f"{np.mean([row[case][kind] for row in rows]):.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def _turn(vector: np.ndarray) -> np.ndarray:
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle * math.sin(angle / 2) if angle else vector
    return rotation_matrix(x, y, z, math.cos(angle / 2))


def main() -> int:
    """Measure as the command line asks; print a table, write a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("closures", type=Path, help="folder that vpr-lite replay has written")
    parser.add_argument("poses", type=Path, help="true poses with orientations")
    parser.add_argument(
        "--of-camera", action="store_true", help="poses are of a camera, as KITTI's"
    )
    parser.add_argument("--flat", action="store_true", help="the drive is in a plane")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/backend.json"))
    args = parser.parse_args()

    truth = read_poses(args.poses)
    if truth.quaternions is None or truth.stamps_ns is None:
        # Says what is missing.
        truth = read_trajectory(args.poses)
    if args.of_camera:
        truth = to_body(truth)
    closures = read_closures(
        args.closures / "closures.jsonl" if args.closures.is_dir() else args.closures
    )
    cases = "before | detector | 10% false | perfect"
    print(f"{len(closures)} closures; ATE in metres, start: 4 columns, aligned: 4 columns")
    print(f"| seed | {cases} | {cases} |\n|{'---|' * 9}")
    rows = measure(truth, closures, args.seeds, flat=args.flat)
    print(_line("mean", rows))
    write_json(args.output, {"closures": len(closures), "seeds": rows})
    print(f"file: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
