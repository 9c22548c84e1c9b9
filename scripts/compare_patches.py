"""How many patches an image needs: recall and time by `max_patches`.

`python scripts/compare_patches.py NETWORKS [--patches 1131 800 ...] [--towns 8]` exports the
checkpoint (`networks.safetensors` beside a bundle) once for each number and drives each through
drawn towns, whose camera is known. It prints Recall@1 of ten candidates by match score and by
confidence, fitted to the other towns; what three keyframes in a row recall at a precision of 0.98
and 0.95; and milliseconds (medians) to describe an image, and to match and verify ten candidates.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from vpr_lite_ros.benchmarks import Benchmark, find_benchmarks, read_frames
from vpr_lite_ros.calibration import FEATURES
from vpr_lite_ros.config import make_config
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.evaluation import precision_recall
from vpr_lite_ros.export import export_bundle, load_networks
from vpr_lite_ros.inference import PlaceModel, open_model
from vpr_lite_ros.measurement import OPEN
from vpr_lite_ros.training.calibrate import Cases, find_cases, fit_curve
from vpr_lite_ros.training.town import draw_town

CANDIDATES = 10
MIN_TIME_GAP_S = 30.0
AGREEING = 3
RADIUS_M = 5.0
PRECISIONS = 0.98, 0.95
STAGES = "place", "match", "verify"


def time_it(model: PlaceModel, benchmark: Benchmark) -> list[str]:
    """Medians of each of ``STAGES``, in milliseconds, over the frames with ten candidates."""
    bundle = model.bundle
    keyframes = KeyframeDatabase(
        "",
        model_id=bundle.model_id,
        dimension=bundle.dimension,
        max_patches=bundle.max_patches,
        session=benchmark.name,
    )
    config = make_config({**OPEN, "keyframe.max_similarity": 1.0, "top_k": CANDIDATES})
    taken = []
    with closing(keyframes):
        detector = LoopDetector(config, model, keyframes)
        for frame in read_frames(benchmark.queries):
            decision = detector.process(frame.image, frame.stamp_ns, camera=benchmark.camera)
            if len(decision.candidates) == CANDIDATES:
                taken.append([decision.timings_ms[stage] for stage in STAGES])
    return [f"{milliseconds:.0f} ms" for milliseconds in np.median(np.array(taken), axis=0)]


def measure(towns: Sequence[Cases], model: PlaceModel) -> list[str]:
    """Recall@1 by match score and by confidence, and what closures recall at two precisions."""
    fitted = fit_curve(towns, model, AGREEING)
    findable = sum(int(town.benchmark.findable(MIN_TIME_GAP_S).sum()) for town in towns)
    # A true candidate is of a frame that has one.
    match = FEATURES.index("match")
    by_score = sum(int(town.true[town.best(town.values[:, match])].sum()) for town in towns)
    found = precision_recall(fitted.closures, fitted.closures_true, findable)
    at = [found.recall[found.precision >= target].max(initial=0.0) for target in PRECISIONS]
    recall = (by_score / findable, fitted.true.sum() / findable, *at)
    return [f"{value:.3f}" for value in recall]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", type=Path)
    parser.add_argument("--patches", type=int, nargs="+", default=[1131, 800, 480, 400, 200, 100])
    parser.add_argument("--towns", type=int, default=8)
    args = parser.parse_args()
    print(f"| patches | score | confidence | {' | '.join(map(str, (*PRECISIONS, *STAGES)))} |")
    print("|---" * (3 + len(PRECISIONS) + len(STAGES)) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        drawn = [
            draw_town(seed, Path(folder) / f"town {seed}") for seed in range(1, args.towns + 1)
        ]
        benchmarks = [one for town in drawn for one in find_benchmarks(town, radius_m=RADIUS_M)]
        for patches in args.patches:
            place, match, about = load_networks(args.networks, patches)
            bundle = export_bundle(place, match, about, Path(folder) / "bundle", name="patches")
            model = open_model(bundle)
            towns = [
                find_cases(model, one, top_k=CANDIDATES, min_time_gap_s=MIN_TIME_GAP_S)
                for one in benchmarks
            ]
            row = [str(patches), *measure(towns, model), *time_it(model, benchmarks[0])]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
