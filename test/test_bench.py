"""The benchmark runs, and its ratios are what their names say. Times themselves are not tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vpr_lite_ros import bench
from vpr_lite_ros.cli import main
from vpr_lite_ros.inference import load_bundle


def stage(milliseconds: float) -> dict[str, float]:
    return {"p50": milliseconds, "p95": 2 * milliseconds, "p99": 3 * milliseconds}


def test_each_backend_that_is_here_is_timed(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SEARCHED", (20, 50, 100))
        output = tmp_path / "bench.json"
        command = ["bench", "--bundle", str(tiny_bundle), "--output", str(output)]
        assert main([*command, "--repeats", "3", "--top_k", "4"]) == 0
    report = json.loads(output.read_text())
    assert {"openvino", "onnxruntime"} <= set(report["backends"])
    for found in report["backends"].values():
        names = {"resize", "describe", "match 1", "match 4", "verify 4", "total"}
        assert set(found["stages"]) == names
        for one in found["stages"].values():
            assert 0 < one["p50"] <= one["p95"] <= one["p99"]
        assert 50 < found["peak_memory_mb"] < 5000
    assert set(report["search"]) == {"20 keyframes", "50 keyframes", "100 keyframes"}
    assert not any("Patch-NetVLAD" in name for name in report["ratios"])
    text = capsys.readouterr().out
    assert "625 | 14557 | 149.2 | 94.1 | 1100" in text and str(output) in text
    assert f"{report['model_id']}, medians" in text


def test_ratios_are_of_the_fastest_backend() -> None:
    def stages(describe: float, match: float) -> dict[str, Any]:
        return {
            "stages": {"resize": stage(2), "describe": stage(describe), "match 10": stage(match)}
        }

    report = {
        "top_k": 10,
        "backends": {"slow": stages(100, 200), "fast": stages(48, 25)},
        "search": {f"{count} keyframes": stage(count / 1e5) for count in bench.SEARCHED},
        "baseline": {
            "bare backbone, ONNX Runtime, float32": stage(40),
            "Patch-NetVLAD extract": stage(5000),
            "Patch-NetVLAD match 1": stage(100),
        },
    }
    assert bench._ratios(report) == {
        "match of a candidate / place": 0.05,
        "search of 10000 keyframes, ms": 0.1,
        "search of 100000 keyframes, ms": 1.0,
        "place / bare backbone in ONNX Runtime": 1.25,
        "Patch-NetVLAD extract / place": 100,
        "Patch-NetVLAD pair / match of a candidate": 40,
    }
    assert bench._ratios({"backends": {}}) == {}
    # On a GPU, of the system that is done first with both.
    report["gpu"] = {
        "systems": {
            "torch": {"extract": stage(1), "match": stage(20)},
            "tensorrt": {"extract": stage(2), "match": stage(10)},
            "Patch-NetVLAD": {"extract": stage(50), "match": stage(1000)},
        }
    }
    ratios = bench._ratios(report)
    assert ratios["Patch-NetVLAD extract / extract, on the GPU"] == 25
    assert ratios["Patch-NetVLAD match / match, on the GPU"] == 100


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_systems_are_timed_on_one_device(tiny_bundle: Path, device: str) -> None:
    import torch

    found = bench._bench_gpu(tiny_bundle, device, 2, candidates=3, dimension=32)
    if device == "cuda" and not torch.cuda.is_available():
        assert found is None, "without a GPU nothing is said of one"
        pytest.skip(f"torch {torch.__version__} finds no NVIDIA GPU")
    assert found is not None and found["candidates"] == 3
    assert {name.split(",")[0] for name in found["systems"]} >= {"torch", "Patch-NetVLAD"}
    for system in found["systems"].values():
        assert set(system) == {"extract", "match"}
        assert all(0 < one["p50"] <= one["p95"] for one in system.values())
    stages = {name: stage(1) for name in ("resize", "describe", "match 10")}
    report: dict[str, Any] = {
        "machine": {"cpu": "a CPU", "cores": 2, "instructions": []},
        **{"model_id": "tiny", "repeats": 2, "top_k": 10, "costs": {}, "baseline": {}},
        "backends": {"openvino": {"stages": stages, "peak_memory_mb": 1}},
        "search": {f"{count} keyframes": stage(1) for count in bench.SEARCHED},
        "gpu": found | {"name": "NVIDIA GPU of the test", "left_out": {"tensorrt": "no TensorRT"}},
    }
    report["ratios"] = bench._ratios(report)
    text = bench.describe(report)
    assert "NVIDIA GPU of the test, an image and 3 candidates" in text
    assert "\n  tensorrt: no TensorRT\n" in text
    for name, least in (("extract / extract", 21), ("match / match", 33)):
        assert f"at least {least}, aim 100" in next(
            line for line in text.splitlines() if f"Patch-NetVLAD {name}, on the GPU" in line
        )


def test_patch_netvlad_is_as_large_as_the_paper_says() -> None:
    import torch

    from vpr_lite_ros.models import patch_netvlad

    with torch.device("meta"):
        network = patch_netvlad.PatchNetVLAD()
        whole, patches = network(torch.zeros(1, 3, 480, 640))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(149.2e6, rel=0.002)
    assert whole.shape == (1, 4096)
    assert [len(patch) for patch in patches] == [29 * 39, 26 * 36, 23 * 33]
    # A picture's patches match themselves, and not those of noise.
    generator = torch.Generator().manual_seed(0)
    one, other = (
        [torch.randn(len(patch), 32, generator=generator) for patch in patches] for _ in range(2)
    )
    assert patch_netvlad.match(one, one) > 0.99
    assert patch_netvlad.match(one, other) < 0.1


def test_costs_are_those_of_the_graphs(tiny_bundle: Path, tiny_networks: Any) -> None:
    place, _ = tiny_networks
    costs = load_bundle(tiny_bundle).card["costs"]
    wanted = sum(p.numel() for p in place.backbone.folded().parameters())
    wanted += sum(p.numel() for part in (place.vlad, place.whole) for p in part.parameters())
    assert costs["place"]["parameters"] == pytest.approx(wanted, rel=1e-3)
    # Of the first convolution alone: 3 x 3 x 3 terms, 48 channels, half of the image's sides.
    width, height = place.image_size
    assert costs["place"]["multiply_adds"] > 27 * 48 * width * height // 4
    patches, dimension = place.max_patches, place.vlad.dimension
    assert costs["match"]["multiply_adds"] == patches * patches * dimension
    for name in ("place", "match"):
        assert costs[name]["bytes"] == (tiny_bundle / f"{name}.onnx").stat().st_size
