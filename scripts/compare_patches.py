"""How many patches an image needs: recall and time by `max_patches`.

`python scripts/compare_patches.py NETWORKS DATA [--patches 1131 800 ...]` exports the checkpoint
(`networks.safetensors` beside a bundle) once for each number, re-ranks ten candidates of each
frame of the benchmarks in DATA, and prints a table: Recall@1 of each benchmark, and milliseconds
(medians) to describe an image and to match ten candidates. Confidence is left out: it belongs to
one number of patches, so candidates are ranked by match score.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from vpr_lite_ros.benchmarks import find_benchmarks, read_frames
from vpr_lite_ros.export import export_bundle, load_networks
from vpr_lite_ros.image import fit
from vpr_lite_ros.inference import PlaceModel, open_model
from vpr_lite_ros.measurement import evaluate

CANDIDATES = 10
REPEATS = 15


def time_it(model: PlaceModel, folder: Path) -> tuple[float, float]:
    """Milliseconds to describe one image, and to match ``CANDIDATES``."""
    (benchmark, *_) = find_benchmarks(folder)
    frame = next(iter(read_frames(benchmark.queries)))
    image = fit(frame.image, model.bundle.image_size)
    candidates = np.repeat(model.describe(image).tokens[None], CANDIDATES, axis=0)
    describe, match = [], []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        tokens = model.describe(image).tokens
        described = time.perf_counter()
        model.match(tokens, candidates)
        describe.append(described - began)
        match.append(time.perf_counter() - described)
    # The first runs allocate.
    return 1e3 * float(np.median(describe[2:])), 1e3 * float(np.median(match[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--patches", type=int, nargs="+", default=[1131, 800, 400, 200, 100])
    args = parser.parse_args()
    names = [benchmark.name for benchmark in find_benchmarks(args.data)]
    print(f"| patches | {' | '.join(names)} | describe | match {CANDIDATES} |")
    print("|---" * (len(names) + 3) + "|")
    for patches in args.patches:
        with tempfile.TemporaryDirectory() as folder:
            place, match, about = load_networks(args.networks, patches)
            bundle = export_bundle(place, match, about, Path(folder) / "bundle", name="patches")
            model = open_model(bundle)
            times = time_it(model, args.data)
            found = []
            for benchmark in find_benchmarks(args.data):
                report = evaluate(benchmark, model, rerank=CANDIDATES)
                found.append(f"{report['reranked']['recall_at_1']:.3f}")
        row = [str(patches), *found, *(f"{milliseconds:.0f} ms" for milliseconds in times)]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
