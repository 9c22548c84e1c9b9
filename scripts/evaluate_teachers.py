"""Measure the teacher networks as place descriptors, on the benchmarks of `make eval`.

`python scripts/evaluate_teachers.py DATA` prints a table, Recall@1 and PR AUC of each benchmark,
and writes build/eval/teachers.json. It shows what distillation can hand on. Features are pooled,
standardised by the database's mean and deviation (of one sequence: by all of its frames) and
compared by cosine; labels and figures are those of `vpr-lite evaluate`.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vpr_lite_ros.bags import Source, SourceError
from vpr_lite_ros.benchmarks import Benchmark, BenchmarkError, find_benchmarks, read_frames
from vpr_lite_ros.image import fit
from vpr_lite_ros.measurement import RECALL_KS, Answer, measure
from vpr_lite_ros.progress import progress
from vpr_lite_ros.summary import Record, write_json
from vpr_lite_ros.training.teachers import MobileNetV1, ResNet18

SIZE = (320, 224)
"""Width and height of the images, pixels."""
MIN_TIME_GAP_S = 30.0
"""In one sequence, as by default in `vpr-lite evaluate`."""
OUTPUT = Path("build/eval/teachers.json")

Row = tuple[str, str, str]
"""Network, layer and pooling."""
Features = dict[Row, NDArray[np.float32]]
"""(N, F) of N images."""


def pool(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """(1, C, H, W) to (C,) without position, and to (C * 20,) means over a grid of 4 x 5."""
    gem = features.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
    grid = F.adaptive_avg_pool2d(features, (4, 5))
    return {"GeM 3": gem.flatten(), "grid 4x5": grid.flatten()}


@torch.inference_mode()
def describe(
    source: Source, networks: dict[str, torch.nn.Module]
) -> tuple[Features, NDArray[np.int64]]:
    """Features of all images, each read once, and their (N,) stamps in nanoseconds."""
    rows: dict[Row, list[NDArray[np.float32]]] = {}
    stamps = []
    for frame in progress(read_frames(source), len(source), "frame", source.path.name):
        stamps.append(frame.stamp_ns)
        pixels = torch.from_numpy(fit(frame.image, SIZE)).permute(2, 0, 1)[None].float()
        for name, network in networks.items():
            for layer, features in network(pixels).items():
                for pooling, vector in pool(features).items():
                    rows.setdefault((name, layer, pooling), []).append(vector.numpy())
    return {row: np.stack(vectors) for row, vectors in rows.items()}, np.array(stamps)


def look_up(
    benchmark: Benchmark, features: NDArray[np.float32], stamps: NDArray[np.int64]
) -> list[Answer]:
    """An answer for each frame that is looked up.

    ``features`` (N, F) and ``stamps`` (N,) are of all frames, the database's first.
    """
    first, gap_ns = benchmark.first_query, benchmark.gap_ns(MIN_TIME_GAP_S)
    known = features[:first] if first else features
    deviation = known.std(axis=0)
    varied = deviation > 0  # of the others nothing can be told
    vectors = (features[:, varied] - known[:, varied].mean(axis=0)) / deviation[varied]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    answers = []
    for query in range(first, len(vectors)):
        before = np.arange(first or query)
        eligible = before[np.abs(stamps[before] - stamps[query]) >= gap_ns]
        similarity = vectors[eligible] @ vectors[query]
        best = np.argsort(-similarity, kind="stable")[: max(RECALL_KS)]
        score = float(similarity[best[0]]) if len(best) else math.nan
        answers.append(Answer(query, eligible[best].tolist(), score))
    return answers


def evaluate(data: Path) -> dict[Row, dict[str, dict[str, float]]]:
    """The figures of each row by the benchmark's name; benchmarks without queries are left out."""
    weights = data / "teachers"
    networks: dict[str, torch.nn.Module] = {
        "MobileNetV1": MobileNetV1(weights / "mobilenet_v1.npz", ("conv_pw_9", "conv_pw_12")),
        "ResNet18": ResNet18(weights / "resnet18_to_layer3.npz"),
    }
    table: dict[Row, dict[str, dict[str, float]]] = {}
    described: dict[Path, tuple[Features, NDArray[np.int64]]] = {}
    for benchmark in find_benchmarks(data / "eval"):
        could = benchmark.findable(MIN_TIME_GAP_S)
        if not could.any():
            continue
        for source in benchmark.sources:
            if source.path not in described:  # a traverse can be the database of two
                described[source.path] = describe(source, networks)
        parts = [described[source.path] for source in benchmark.sources]
        stamps = np.concatenate([part[1] for part in parts])
        for row in parts[0][0]:
            answers = look_up(benchmark, np.concatenate([part[0][row] for part in parts]), stamps)
            table.setdefault(row, {})[benchmark.name] = measure(answers, benchmark.truth, could)
    if not table:
        raise BenchmarkError(f"{data / 'eval'}: no frame has a true match; add images that have")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with eval/ and teachers/")
    try:
        table = evaluate(parser.parse_args().data)
    except (BenchmarkError, SourceError, OSError) as error:
        sys.exit(f"error: {error}")
    names = list(next(iter(table.values())))
    print("| network | layer | pooling |" + "".join(f" {name} |" for name in names))
    print("|---" * (3 + len(names)) + "|")
    records: list[Record] = []
    for row, found in table.items():
        cells = [f"{found[name]['recall_at_1']:.3f} / {found[name]['auc']:.3f}" for name in names]
        print("| " + " | ".join([*row, *cells]) + " |")
        entry = dict(zip(("network", "layer", "pooling"), row, strict=True))
        records.append({**entry, "benchmarks": found})
    write_json(OUTPUT, {"image_size": SIZE, "min_time_gap_s": MIN_TIME_GAP_S, "teachers": records})
    print(f"file: {OUTPUT}")


if __name__ == "__main__":
    main()
