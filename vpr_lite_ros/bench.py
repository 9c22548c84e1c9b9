"""How long each step of an image takes, and what it costs, on each backend that is here.

Figures of two machines, or of one at two times, cannot be compared: what counts are the ratios,
which are taken within one run.
"""

from __future__ import annotations

import itertools
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from vpr_lite_ros.config import make_config
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.image import Image, fit
from vpr_lite_ros.inference import (
    BACKENDS,
    MATCH_GRAPH,
    ONNXRUNTIME_CUDA,
    PLACE_GRAPH,
    TENSORRT,
    BackendError,
    Bundle,
    Description,
    PlaceModel,
    load_bundle,
    open_model,
)
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.measurement import OPEN
from vpr_lite_ros.simulation import simulate_drive
from vpr_lite_ros.summary import Record, write_json

IMAGE_SIZE = (1280, 720)
"""Width and height of the camera's images."""
SEARCHED = (1_000, 10_000, 100_000)
PAPER_TABLE_3 = {
    "Patch-NetVLAD, 4096-d": (625, 14557, 149.2, 94.1, 1100),
    "Patch-NetVLAD, 512-d": (78, 895, 31.6, 94.1, 184),
    "the paper's": (31, 438, 5.3 + 5.1, 8.5 + 5.3, 32 + 10),
}
"""Milliseconds to extract and to match 100 candidates (on the paper's GPU), million parameters,
billion operations, megabytes."""
MATCHED = 100
"""Candidates that table 3's matching time is of."""
GPU_RATIOS = {
    "extract": ("Patch-NetVLAD extract / extract, on the GPU", 21, 100),
    "match": ("Patch-NetVLAD match / match, on the GPU", 33, 100),
}
"""What each is called, the least that is asked for (the paper's claim), and what is aimed at."""


def bench(bundle: Path, output: Path, *, top_k: int, repeats: int, with_baseline: bool) -> Record:
    """Measure, and write ``output`` (JSON).

    Parameters
    ----------
    top_k
        Candidates that an image is matched with.
    repeats
        Of each measurement, after three that do not count.
    with_baseline
        Also time Patch-NetVLAD's architecture, which takes ten seconds an image, and the bare
        backbone: needs torch. Where torch reaches an NVIDIA GPU, both systems are timed on that,
        too.

    Returns
    -------
    dict
        ``machine``, ``model_id``, ``costs`` (from the model card), ``backends`` (for each its
        stages in milliseconds: ``p50``, ``p95``, ``p99``; and ``peak_memory_mb``), ``search``,
        ``baseline``, ``gpu`` (if there is one: its ``name``, for each of ``systems`` the
        milliseconds to ``extract`` and to ``match`` 100 candidates, and why others are
        ``left_out``) and ``ratios``, each of medians.
    """
    card = load_bundle(bundle).card
    report: Record = {
        "machine": _machine(),
        "model_id": load_bundle(bundle).model_id,
        "repeats": repeats,
        "top_k": top_k,
        "costs": card.get("costs", {}),
        "backends": {},
    }
    for backend in (TENSORRT, *BACKENDS):
        # A process each: memory is counted by process, and never given back.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(_bench_backend, bundle, backend, top_k, repeats).result()
        if found:
            report["backends"][backend] = found
    report["search"] = _bench_search(load_bundle(bundle), repeats)
    report["baseline"] = _bench_baseline(max(2, repeats // 10)) if with_baseline else {}
    if with_baseline:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(_bench_gpu, bundle, "cuda", repeats).result()
        if found:
            report["gpu"] = found
    report["ratios"] = _ratios(report)
    write_json(output, report)
    return report


def _bench_backend(bundle: Path, backend: str, top_k: int, repeats: int) -> Record | None:
    """Stages of one backend; None if it is not here."""
    try:
        model = open_model(bundle, backend, most_candidates=top_k)
    except BackendError:
        return None
    images, camera = _images()
    size = model.bundle.image_size
    fitted = itertools.cycle([fit(image, size) for image in images])
    described = [model.describe(fit(image, size)) for image in images]
    query, others = described[0], (described * top_k)[1 : top_k + 1]
    tokens = np.stack([other.tokens for other in others])
    source = itertools.cycle(images)
    stages: dict[str, Callable[[], object]] = {
        "resize": lambda: fit(next(source), size),
        "describe": lambda: model.describe(next(fitted)),
        "match 1": lambda: model.match(query.tokens, tokens[:1]),
        f"match {top_k}": lambda: model.match(query.tokens, tokens),
    }
    found = {name: _milliseconds(run, repeats) for name, run in stages.items()}
    found[f"verify {top_k}"], found["total"] = _keyframe(model, images, camera, top_k, repeats)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"stages": found, "peak_memory_mb": round(memory)}


def _keyframe(
    model: PlaceModel, images: Sequence[Image], camera: Camera, top_k: int, repeats: int
) -> tuple[Record, Record]:
    """From assignments to confidences; and a keyframe from image to decision, all candidates
    matched, and stored."""
    with tempfile.TemporaryDirectory() as folder:
        database = KeyframeDatabase(
            str(Path(folder) / "keyframes.db"),
            model_id=model.bundle.model_id,
            dimension=model.bundle.dimension,
            max_patches=model.bundle.max_patches,
            session="bench",
        )
        with closing(database):
            config = make_config({**OPEN, "top_k": top_k, "keyframe.max_similarity": 1.0})
            detector = LoopDetector(config, model, database)
            stamps = itertools.count(0, 100 * 10**9)
            source = itertools.cycle(images)

            verified: list[float] = []

            def process() -> None:
                decision = detector.process(next(source), next(stamps), camera=camera)
                verified.append(decision.timings_ms.get("verify", 0.0))

            for _ in range(top_k):
                process()
            total = _milliseconds(process, repeats)
            return _percentiles(verified[-repeats:]), total


def _bench_search(bundle: Bundle, repeats: int) -> Record:
    """Milliseconds to search that many keyframes."""
    rng = np.random.default_rng(0)
    found: Record = {}
    database = KeyframeDatabase(
        "", model_id="bench", dimension=bundle.dimension, max_patches=0, session="bench"
    )
    nothing = Description(
        np.zeros((bundle.parts, bundle.dimension), np.float32),
        np.zeros((0, bundle.dimension), np.float16),
        np.zeros((0, 2), np.float32),
    )
    with closing(database):
        for count in SEARCHED:
            while len(database) < count:
                vectors = rng.standard_normal(nothing.descriptor.shape).astype(np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                database.add(len(database) * 10**9, replace(nothing, descriptor=vectors))

            search = partial(database.search, vectors, 10, count * 10**9, 30 * 10**9)
            found[f"{count} keyframes"] = _milliseconds(search, repeats)
    return found


def _bench_baseline(repeats: int) -> Record:
    """The bare backbone with its branches in ONNX Runtime, and Patch-NetVLAD in torch."""
    import torch

    from vpr_lite_ros.inference import OnnxRuntimeRunner
    from vpr_lite_ros.models import patch_netvlad
    from vpr_lite_ros.models.repvgg import RepVGGLite

    image = torch.rand(1, 3, 480, 640)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "backbone.onnx"
        torch.onnx.export(
            RepVGGLite().eval(), (image,), file, input_names=["image"], dynamo=True, verbose=False
        )
        runner = OnnxRuntimeRunner(file, 0)
        inputs = {"image": image.numpy()}
        backbone = _milliseconds(lambda: runner.infer(inputs), 10 * repeats)
        network = patch_netvlad.PatchNetVLAD().eval()
        extract = _milliseconds(lambda: network(image), repeats, warm_up=1)
        patches, others = network(image)[1], network(torch.rand(1, 3, 480, 640))[1]
        pair = _milliseconds(lambda: patch_netvlad.match(patches, others), 2 * repeats)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {
        "bare backbone, ONNX Runtime, float32": backbone,
        "Patch-NetVLAD extract": extract,
        "Patch-NetVLAD match 1": pair,
        "Patch-NetVLAD parameters": parameters,
    }


def _bench_gpu(
    bundle: Path, device: str, repeats: int, candidates: int = MATCHED, dimension: int = 4096
) -> Record | None:
    """Both systems on one GPU, from an image or tokens in the host's memory; None if none is there.

    Ours returns its results to the host. The baseline leaves its descriptors on the device, where
    it finds those of the candidates, too; it computes in float32, as published, with torch's own
    defaults. ``device``: as torch names it.
    """
    import torch

    from vpr_lite_ros.models import patch_netvlad

    if device == "cuda" and not torch.cuda.is_available():
        return None
    ours, left_out = {}, {}
    for name, make in _gpu_models(bundle, device, candidates).items():
        try:
            model = make()
            ours[model.backend] = _bench_ours(model, repeats, candidates)
            del model  # the GPU's memory, for the next
        except (BackendError, RuntimeError) as error:  # torch's are of the latter kind
            left_out[name] = str(error)

    def synchronised(run: Callable[[], object]) -> Callable[[], None]:
        def run_and_wait() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        return run_and_wait

    width, height = load_bundle(bundle).image_size
    cells = height // patch_netvlad.STRIDE, width // patch_netvlad.STRIDE
    with torch.inference_mode():
        network = patch_netvlad.PatchNetVLAD(dimension).eval().to(device)
        images = torch.rand(2, 1, 3, height, width)
        query, candidate = (network(image.to(device))[1] for image in images)

        def match() -> None:
            for _ in range(candidates):
                patch_netvlad.match(query, candidate, cells)

        baseline = {
            "extract": _milliseconds(synchronised(lambda: network(images[0].to(device))), repeats),
            "match": _milliseconds(synchronised(match), max(2, repeats // 10), warm_up=1),
        }
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else device,
        "candidates": candidates,
        "systems": {**ours, "Patch-NetVLAD": baseline},
        "left_out": left_out,
    }


def _gpu_models(bundle: Path, device: str, candidates: int) -> dict[str, Callable[[], PlaceModel]]:
    """What can run the bundle on a GPU, and in torch on any device."""

    def in_torch() -> PlaceModel:
        from vpr_lite_ros.models.graph import TorchRunner

        graphs = (bundle / graph for graph in (PLACE_GRAPH, MATCH_GRAPH))
        return PlaceModel(load_bundle(bundle), *(TorchRunner(graph, device) for graph in graphs))

    found: dict[str, Callable[[], PlaceModel]] = {"torch": in_torch}
    if device == "cuda":
        for backend in (TENSORRT, ONNXRUNTIME_CUDA):
            found[backend] = partial(open_model, bundle, backend, most_candidates=candidates)
    return found


def _bench_ours(model: PlaceModel, repeats: int, candidates: int) -> Record:
    """Milliseconds to extract, and to match that many candidates."""
    width, height = model.bundle.image_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, height, width, 3), np.uint8)
    described = [model.describe(image) for image in images]
    tokens = np.stack([described[i % len(described)].tokens for i in range(candidates)])
    source = itertools.cycle(images)
    return {
        "extract": _milliseconds(lambda: model.describe(next(source)), repeats),
        "match": _milliseconds(lambda: model.match(described[0].tokens, tokens), repeats),
    }


def _ratios(report: Record) -> Record:
    """What was asked of this package's speed, of the fastest backend's medians."""
    if not report["backends"]:
        return {}
    fastest = min(
        report["backends"].values(), key=lambda found: found["stages"]["describe"]["p50"]
    )["stages"]
    top_k, search = report["top_k"], report["search"]
    place = fastest["resize"]["p50"] + fastest["describe"]["p50"]
    match = fastest[f"match {top_k}"]["p50"] / top_k
    ratios = {"match of a candidate / place": match / place}
    for count in SEARCHED[1:]:
        ratios[f"search of {count} keyframes, ms"] = search[f"{count} keyframes"]["p50"]
    if baseline := report["baseline"]:
        backbone = baseline["bare backbone, ONNX Runtime, float32"]["p50"]
        ratios["place / bare backbone in ONNX Runtime"] = place / backbone
        ratios["Patch-NetVLAD extract / place"] = baseline["Patch-NetVLAD extract"]["p50"] / place
        pair = baseline["Patch-NetVLAD match 1"]["p50"]
        ratios["Patch-NetVLAD pair / match of a candidate"] = pair / match
    systems = dict(report.get("gpu", {}).get("systems", {}))
    theirs = systems.pop("Patch-NetVLAD", None)
    if systems:
        # One system for both, as on a robot: the one that is done first.
        ours = min(systems.values(), key=lambda one: one["extract"]["p50"] + one["match"]["p50"])
        for what, (name, _, _) in GPU_RATIOS.items():
            ratios[name] = theirs[what]["p50"] / ours[what]["p50"]
    return {name: round(value, 4) for name, value in ratios.items()}


def _milliseconds(run: Callable[[], object], repeats: int, warm_up: int = 3) -> Record:
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return _percentiles(times)


def _percentiles(milliseconds: Sequence[float]) -> Record:
    return {f"p{q}": round(float(np.percentile(milliseconds, q)), 3) for q in (50, 95, 99)}


def _images() -> tuple[list[Image], Camera]:
    """Twelve views of a drawn drive, some of them of one place."""
    drive = simulate_drive(image_size=IMAGE_SIZE)
    step = max(1, len(drive) // 12)
    part = drive.part(0, len(drive), step)
    images = [frame.image for frame in itertools.islice(part.frames(), 12)]
    return images, Camera(*IMAGE_SIZE, tuple(drive.camera_matrix.ravel().tolist()))


def _machine() -> Record:
    told: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    flags = set((told.get("flags") or told.get("Features") or "").split())
    known = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx_vnni", "asimd", "bf16"}
    return {
        "cpu": told.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "instructions": sorted(flags & known),
    }


def describe(report: Record) -> str:
    """As a table for people."""
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions'])}",
        f"{report['model_id']}, medians (p95, p99) of {report['repeats']}, milliseconds",
        "",
    ]
    for backend, found in report["backends"].items():
        lines.append(f"{backend}, peak memory {found['peak_memory_mb']} MB")
        lines += _rows(found["stages"])
    lines += ["search", *_rows(report["search"])]
    if baseline := report["baseline"]:
        lines += ["baselines", *_rows({k: v for k, v in baseline.items() if isinstance(v, dict)})]
    if gpu := report.get("gpu"):
        lines.append(f"{gpu['name']}, an image and {gpu['candidates']} candidates")
        for name, one in gpu["systems"].items():
            lines += _rows({f"{name} {what}": times for what, times in one.items()})
        lines += [f"  {name}: {why}" for name, why in gpu["left_out"].items()]
    asked = {name: f"  at least {least}, aim {aim}" for name, least, aim in GPU_RATIOS.values()}
    lines.append("ratios")
    for name, value in report["ratios"].items():
        lines.append(f"  {name:45} {value:10.4g}{asked.get(name, '')}")
    lines += ["", "as table 3 of the paper, whose times are of its GPU:"]
    lines.append("  extract ms | match 100 ms | parameters M | operations G | size MB")
    for name, row in PAPER_TABLE_3.items():
        lines.append(f"  {' | '.join(f'{value:g}' for value in row)}  {name}")
    costs = report["costs"]
    for backend, found in report["backends"].items():
        stages, top_k = found["stages"], report["top_k"]
        match = stages[f"match {top_k}"]["p50"] * MATCHED / top_k
        figures = [f"{stages['describe']['p50']:.0f}", f"{match:.0f}"]
        for entry, unit in (("parameters", 1e6), ("multiply_adds", 1e9), ("bytes", 1e6)):
            figures.append("+".join(f"{part[entry] / unit:.1f}" for part in costs.values()) or "?")
        lines.append(f"  {' | '.join(figures)}  this package, {backend}, here")
    return "\n".join(lines)


def _rows(stages: Record) -> list[str]:
    return [
        f"  {name:38} {one['p50']:9.2f} ({one['p95']:.2f}, {one['p99']:.2f})"
        for name, one in stages.items()
    ]
