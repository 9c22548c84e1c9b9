"""TensorRT: what its bindings and its parser know, and the change from the CPU to it.

Nothing here runs an engine: the first part asks the real bindings of three releases, see
``dry_tensorrt.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from vpr_lite_ros.inference import (
    ALIKE_COSINE,
    DEFAULT_BUNDLE,
    Arrays,
    BackendError,
    OnnxRuntimeRunner,
    PlaceModel,
    open_model,
)

ROOT = Path(__file__).parents[1]
BINDINGS = ROOT / "build" / "tensorrt"
RELEASES = ("10.0.1", "10.16.1.11", "11.4.0.106")
MakePicture = Callable[..., NDArray[np.uint8]]


@pytest.fixture
def dry(tiny_bundle: Path, tmp_path: Path) -> Callable[..., str]:
    """``dry(release, case, old, new)``: what a dry run says."""

    def run(release: str, case: str = "plain", *replacement: str) -> str:
        folder = BINDINGS / release
        if not (folder / "made").exists():
            pytest.skip(f"no bindings of TensorRT {release}: run scripts/tensorrt_bindings.sh")
        environment = dict(os.environ)
        here = str(Path(__file__).parent)  # for dry_pycuda
        for variable, added in (
            ("LD_LIBRARY_PATH", [str(folder / "lib")]),
            ("PYTHONPATH", [str(folder), here]),
        ):
            before = environment.get(variable, "")
            environment[variable] = os.pathsep.join(filter(None, [*added, before]))
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        command = [sys.executable, str(Path(__file__).with_name("dry_tensorrt.py"))]
        command += [str(tiny_bundle), case, *replacement]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert f"release {release}" in done.stdout, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def engines(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "vpr_lite_ros" / "engines").glob("*.engine"))


def assert_sound(said: str, release: str, tmp_path: Path) -> None:
    """All that a dry run with an empty folder of engines must show."""
    assert "building place-" in said and "building match-" in said and "Building: 50%" in said
    assert "Traceback" not in said
    # Everything came from where it should, in time, and stays as it was.
    assert "described 3 303.0 303.0\ndescribed 5 505.0 505.0\ntokens float16 (20, 64)" in said
    # Ten candidates, four at a time.
    assert f"scores {list(range(200, 210))} (10, 20, 20) float32" in said and "one (1,)" in said
    # Two models share a thread; the memory of one goes with it.
    assert "threads 1\nkept 8 8\nof 16 on tensorrt\n" in said
    freed = " ".join(["IExecutionContext ICudaEngine"] * 4)
    assert f"freed {freed} Runtime problems []" in said
    files = engines(tmp_path)
    assert [file.name.split("-")[0] for file in files] == ["match", "place"]
    assert all(f"trt{release}-Dry_GPU_8_GB_" in file.name for file in files)
    assert said.count("writes .tmp") == said.count("writes ") == 4


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_exists_with_that_signature(
    dry: Callable[..., str], release: str, tmp_path: Path
) -> None:
    first = dry(release)
    assert_sound(first, release, tmp_path)
    used = set(first.split("\nused ")[1].split())
    assert {"OnnxParser.parse", "Builder.build_serialized_network"} <= used
    assert {"IOptimizationProfile.set_shape", "ITimingCache.serialize"} <= used
    assert {"IExecutionContext.set_tensor_address", "IExecutionContext.execute_async_v3"} <= used
    second = dry(release)
    assert "building" not in second and "scores" in second


BREAKS = {
    "another address": ("int(self._device[name])", "int(self._device[self._inputs[0]])"),
    "not waited for": ("        stream.synchronize()\n", ""),
    "another length": ("(name, host.shape)", "(name, self._host[name].shape)"),
    "another type": ("trt.nptype(self._engine.get_tensor_dtype(name))", "np.float32"),
    "another thread": (
        "self._gpu.run(partial(self._engine.infer, part))",
        "self._engine.infer(part)",
    ),
    "engine freed first": (
        "self._execution = None\n        self._engine = None",
        "self._engine = None\n        self._execution = None",
    ),
    "freed by another thread": ("gpu.release, self._engine", "self._engine.free"),
    "freed after the context": ("self._engines.pop().free()", "self._engines.pop()"),
    "memory not the caller's": ("array.copy()", "array"),
    "memory not pinned": ("cuda.pagelocked_empty", "np.empty"),
    "file of any GPU": ("-{re.sub(r'[^A-Za-z0-9]+', '_', gpu_name)}", ""),
    "file not renamed": ('file.with_name(f"{file.name}.{os.getpid()}.tmp")', "file"),
    "a thread for each model": ("@functools.cache\n", ""),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_is_noticed(dry: Callable[..., str], what: str, tmp_path: Path) -> None:
    said = dry(RELEASES[1], "plain", *BREAKS[what])
    with pytest.raises(AssertionError):
        assert_sound(said, RELEASES[1], tmp_path)


def test_a_name_of_one_release_only_is_noticed(dry: Callable[..., str]) -> None:
    flag = "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED", "trt.NetworkDefinitionCreationFlag."
    old = flag[0], f"{flag[1]}EXPLICIT_BATCH"
    assert "AttributeError" not in dry("10.16.1.11", "plain", *old)
    assert "has no attribute 'EXPLICIT_BATCH'" in dry("11.4.0.106", "plain", *old)
    limit = "config.progress_monitor = monitor"
    for release, name in (("10.0.1", "l2_limit_for_tiling"), ("11.4.0.106", "int8_calibrator")):
        assert name in dry(release, "plain", limit, f"{limit}; config.{name} = 1")


def test_arguments_that_do_not_fit_are_noticed(dry: Callable[..., str]) -> None:
    call = "execution.execute_async_v3(stream.handle)"
    assert "does not take" in dry(RELEASES[-1], "plain", call, "execution.execute_async_v3(stream)")
    call = "set_timing_cache(cache, ignore_mismatch=False)"
    assert "does not take" in dry(RELEASES[0], "plain", call, "set_timing_cache(cache)")


def test_a_damaged_engine_is_built_anew(dry: Callable[..., str], tmp_path: Path) -> None:
    dry(RELEASES[1])
    place = engines(tmp_path)[1]
    whole = place.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        place.write_bytes(damage)
        said = dry(RELEASES[1])
        assert f"{place} is damaged: made anew" in said and "building place-" in said
        assert "scores" in said and place.read_bytes() == whole
    # Without the check TensorRT would be given it.
    place.write_bytes(damage)
    unchecked = "hashlib.sha256(payload).digest()", "content[len(_MAGIC) : head]"
    assert "is damaged" not in dry(RELEASES[1], "plain", *unchecked)
    assert not list(place.parent.glob("*.tmp"))


def test_what_tensorrt_refuses_is_said(dry: Callable[..., str], tmp_path: Path) -> None:
    release = RELEASES[1]
    said = dry(release, "parse")
    assert f"refused TensorRT {release} does not understand" in said
    assert "no such operator; no such operator" in said
    assert f"refused TensorRT {release} built no engine" in dry(release, "build_serialized_network")
    assert not engines(tmp_path)
    dry(release)
    # A file that this release or GPU cannot read is built anew, once.
    said = dry(release, "deserialize_cuda_engine")
    assert "cannot be used here" in said and "building place-" in said
    assert "refused TensorRT cannot read its own engine" in said


@pytest.mark.parametrize("name", ["Runtime", "Builder", "OnnxParser"])
def test_tensorrt_that_does_not_start_is_said(dry: Callable[..., str], name: str) -> None:
    said = dry(RELEASES[1], name)
    assert f"TensorRT {RELEASES[1]} does not start: pybind11::init()" in said
    assert "kept 0 0" in said and "problems []" in said and "Traceback" not in said


def test_a_full_gpu_is_said_and_emptied(dry: Callable[..., str]) -> None:
    said = dry(RELEASES[1], "full")
    assert "refused Dry GPU (8 GB) has no room for match.onnx: cuMemAlloc failed" in said
    assert "kept 0 0" in said and "problems []" in said and "Traceback" not in said
    assert "kept 4 4" in dry(RELEASES[1], "full", "            del done\n", "            pass\n")


def test_engines_that_are_not_used_are_freed(dry: Callable[..., str]) -> None:
    # What the stand-ins compute is not what the CPU does.
    said = dry(RELEASES[1], "behind")
    assert "then openvino tensorrt describes an image otherwise" in said
    assert "kept 0 0" in said and "problems []" in said and "Traceback" not in said


def test_timings_that_do_not_fit_cost_no_engine(dry: Callable[..., str]) -> None:
    for call in ("create_timing_cache", "set_timing_cache", "get_timing_cache"):
        said = dry(RELEASES[1], call)
        assert "scores [200, 201" in said and "Traceback" not in said


def test_without_tensorrt_the_cpu_is_used_and_the_reason_given(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if open_model(tiny_bundle).backend == "tensorrt":
        pytest.skip("this machine has TensorRT")
    with caplog.at_level("INFO", "vpr_lite_ros"):
        assert open_model(tiny_bundle, behind=True).backend == "openvino"
    assert "on the CPU, with openvino" in caplog.text
    with pytest.raises(BackendError, match=r"no TensorRT|TensorRT cannot be used|no NVIDIA GPU"):
        open_model(tiny_bundle, "tensorrt")


# The graphs, against what TensorRT's ONNX parser says that it supports: docs/operators.md of
# onnx/onnx-tensorrt, release 10.0 (96e7811): opsets 9 to 20.

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
NUMBERS = FLOATS | {TensorProto.INT32, TensorProto.INT64}
ANY = NUMBERS | {TensorProto.BOOL}
SUPPORTED = {
    **dict.fromkeys(("Clip", "Conv", "Exp", "Gemm", "LayerNormalization", "MatMul"), FLOATS),
    **dict.fromkeys(("AveragePool", "Pow", "Softmax", "Sqrt"), FLOATS),
    **dict.fromkeys(("Add", "Div", "Mul", "ReduceL2", "ReduceMean", "ReduceSum"), NUMBERS),
    **dict.fromkeys(("Relu", "Sub", "TopK"), NUMBERS),
    **dict.fromkeys(("Concat", "Expand", "Gather", "GatherND", "Reshape", "Shape", "Slice"), ANY),
    **dict.fromkeys(("Transpose", "Unsqueeze"), ANY),
    "Cast": ANY | {TensorProto.UINT8},
}
FIXED_INPUTS = {"ReduceL2": 1, "ReduceMean": 1, "ReduceSum": 1, "Slice": 3, "TopK": 1}
"""Which input must be known in advance: axes, or how many."""


@pytest.fixture(params=["tiny", "trained", "shipped"])
def bundle(
    request: pytest.FixtureRequest, tiny_bundle: Path, tiny_networks: Any, tmp_path: Path
) -> Path:
    if request.param == "tiny":
        return tiny_bundle
    if request.param == "shipped":
        return DEFAULT_BUNDLE
    import copy

    import torch

    from vpr_lite_ros.export import export_bundle

    place, match = copy.deepcopy(tiny_networks)
    for last in (place.self_attention.residual.out, match.cross.residual.out, match.project):
        torch.nn.init.normal_(last.weight, 0, 0.02)
    return export_bundle(place, match, {}, tmp_path / "trained", name="trained")


@pytest.mark.parametrize("file", ["place.onnx", "match.onnx"])
def test_tensorrts_parser_supports_the_graphs(bundle: Path, file: str) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle / file), data_prop=True)
    graph = model.graph
    assert all(9 <= opset.version <= 20 for opset in model.opset_import if not opset.domain)
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    for node in graph.node:
        assert node.op_type in SUPPORTED, node.op_type
        for name in filter(None, (*node.input, *node.output)):
            assert types[name] in SUPPORTED[node.op_type], (node.op_type, name, types[name])
        if (fixed := FIXED_INPUTS.get(node.op_type)) is not None and len(node.input) > fixed:
            assert node.input[fixed] in constants, node.name
        if node.op_type == "TopK":
            assert onnx.numpy_helper.to_array(constants[node.input[1]]).item() < 3840
            assert all(a.i == 1 for a in node.attribute if a.name in ("sorted", "largest"))
    # place is static; of match only the number of candidates varies.
    for value in values:
        shape = value.type.tensor_type.shape.dim
        varies = [axis for axis, side in enumerate(shape) if not side.HasField("dim_value")]
        if file == "place.onnx" or value.name == "query":
            assert not varies, value.name
        elif value in (*graph.input, *graph.output):
            assert varies == [0], value.name


# Changing over from the CPU


class Runner:
    """ONNX Runtime under another name, and perhaps with another answer."""

    backend = "other"

    def __init__(self, graph: Path, change: Callable[[Arrays], None] = lambda _: None) -> None:
        self._runner, self._change = OnnxRuntimeRunner(graph, 2), change

    def infer(self, inputs: Arrays) -> Arrays:
        out = {name: array.copy() for name, array in self._runner.infer(inputs).items()}
        self._change(out)
        return out


def worsen(name: str, value: float) -> Callable[[Arrays], None]:
    def change(out: Arrays) -> None:
        if name in out:
            out[name].reshape(-1)[0] = value

    return change


@pytest.fixture
def model(tiny_bundle: Path) -> PlaceModel:
    return open_model(tiny_bundle, "onnxruntime", threads=2)


def changed(
    model: PlaceModel, image: NDArray[np.uint8], change: Callable[[Arrays], None]
) -> PlaceModel:
    """After an image was described by both."""
    graphs = [model.bundle.path / graph for graph in ("place.onnx", "match.onnx")]
    model.change_over(lambda: (Runner(graphs[0], change), Runner(graphs[1], change))).join()
    assert model.backend == "onnxruntime", "an image is described first"
    model.describe(image)
    return model


def test_the_networks_change_over_once_answers_agree(
    model: PlaceModel, make_picture: MakePicture
) -> None:
    before = model.describe(make_picture(1))
    assert changed(model, make_picture(2), lambda _: None).backend == "other"
    assert not model.fault
    after = model.describe(make_picture(1))
    assert np.array_equal(before.descriptor, after.descriptor)
    scores, _ = model.match(after.tokens, before.tokens[None])
    assert scores[0] > 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (worsen("descriptor", 1.0), rf"cosine .* should be {ALIKE_COSINE}"),
        (worsen("descriptor", float("nan")), "cosine nan"),
        (worsen("scores", 0.1), r"match score with itself 0\.100"),
    ],
)
def test_a_backend_that_answers_otherwise_is_not_used(
    model: PlaceModel, make_picture: MakePicture, change: Callable[[Arrays], None], said: str
) -> None:
    changed(model, make_picture(2), change)
    assert model.backend == "onnxruntime"
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(model.fault)
    assert "go on running on onnxruntime" in model.fault
    assert np.isfinite(model.describe(make_picture(3)).descriptor).all()


def test_a_backend_that_breaks_is_not_used(model: PlaceModel, make_picture: MakePicture) -> None:
    def refuse() -> Any:
        raise BackendError("the engine cannot be built")

    model.change_over(refuse).join()
    assert "the engine cannot be built; the networks go on running on" in model.fault

    def fail(_: Arrays) -> None:
        raise RuntimeError("out of memory")

    assert changed(model, make_picture(1), fail).backend == "onnxruntime"
    assert "other failed on its first image: out of memory" in model.fault
