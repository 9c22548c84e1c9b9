"""What needs an NVIDIA GPU: each backend on it answers as the CPU does, and its memory is in order.

Each check is a function of a model or a driver. Where there is no GPU it runs on what a CPU has, so
that the checks themselves are checked, and what needs a GPU is skipped with the reason.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dry_pycuda
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.inference import (
    ALIKE_COSINE,
    ALIKE_SCORE,
    DEFAULT_BUNDLE,
    MATCH_GRAPH,
    ONNXRUNTIME_CUDA,
    PLACE_GRAPH,
    TENSORRT,
    Arrays,
    BackendError,
    Description,
    OnnxRuntimeRunner,
    PlaceModel,
    Runner,
    load_bundle,
    open_model,
)

MakePicture = Callable[..., NDArray[np.uint8]]
CANDIDATES = 3


def runners_in_torch(bundle: Path, device: str) -> tuple[Runner, Runner]:
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no NVIDIA GPU")
    from vpr_lite_ros.models.graph import TorchRunner

    return TorchRunner(bundle / PLACE_GRAPH, device), TorchRunner(bundle / MATCH_GRAPH, device)


def open_here(bundle: Path, name: str) -> PlaceModel:
    """The bundle on a backend, or in torch on a device; skips where that cannot be."""
    if name.startswith("torch"):
        return PlaceModel(load_bundle(bundle), *runners_in_torch(bundle, name.split()[-1]))
    try:
        return open_model(bundle, name, most_candidates=CANDIDATES - 1)  # in parts
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which TensorRT's engines are kept for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vpr_lite_ros" / "engines"


def cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(axis=-1) / lengths


def assert_same_place(one: Description, other: Description) -> None:
    assert (cosines(one.descriptor, other.descriptor) >= ALIKE_COSINE).all()
    # The least salient patches may differ, and all may come in another order.
    where = {tuple(centre): index for index, centre in enumerate(one.centres.round(4).tolist())}
    pairs = [
        (where[tuple(centre)], index)
        for index, centre in enumerate(other.centres.round(4).tolist())
        if tuple(centre) in where
    ]
    mine, yours = np.array(pairs).T
    assert len(pairs) >= 0.95 * len(one.tokens)
    assert np.quantile(cosines(one.tokens[mine], other.tokens[yours]), 0.05) >= 0.99


def assert_answers_alike(
    reference: PlaceModel, model: PlaceModel, make_picture: MakePicture
) -> None:
    """``model`` says of new pictures and pairs what ``reference`` says."""
    size = reference.bundle.image_size
    pictures = [make_picture(seed, size) for seed in range(CANDIDATES)]
    wanted = [reference.describe(picture) for picture in pictures]
    found = [model.describe(picture) for picture in pictures]
    # Compared at the end: what was returned must not change with the next picture.
    for before, after in zip(wanted, found, strict=True):
        assert_same_place(before, after)
    assert (cosines(found[0].descriptor, found[1].descriptor) < ALIKE_COSINE).all()
    tokens = np.stack([one.tokens for one in wanted])
    asked = [(tokens[i], tokens[:count]) for count in (1, CANDIDATES, 1) for i in (0, 1)]
    answers = [model.match(*one) for one in asked]
    for (scores, assignments), one in zip(answers, asked, strict=True):
        wanted_scores, wanted_assignments = reference.match(*one)
        assert scores == pytest.approx(wanted_scores, abs=ALIKE_SCORE)
        assert assignments.shape == wanted_assignments.shape
        assert np.abs(assignments - wanted_assignments).max() < 0.1
    assert answers[0][0][0] > answers[1][0][0] + ALIKE_SCORE, "a picture fits itself best"


@pytest.mark.parametrize("bundle_name", ["shipped", "tiny"])
@pytest.mark.parametrize(
    "name", ["openvino", "torch on cpu", "torch on cuda", ONNXRUNTIME_CUDA, TENSORRT]
)
def test_a_backend_answers_as_onnx_runtime_does_on_the_cpu(
    name: str, bundle_name: str, tiny_bundle: Path, make_picture: MakePicture, engines: Path
) -> None:
    bundle = DEFAULT_BUNDLE if bundle_name == "shipped" else tiny_bundle
    if (name, bundle_name) == ("openvino", "tiny"):
        pytest.skip("bfloat16 spoils the tiny networks' third digit, see test_inference.py")
    model = open_here(bundle, name)
    assert_answers_alike(open_model(bundle, "onnxruntime"), model, make_picture)
    assert model.backend.split(",")[0] == name.split(" on ")[0]


@pytest.mark.parametrize("what", ["descriptor", "tokens", "centres", "scores", "assignment"])
def test_an_answer_that_differs_is_noticed(
    what: str, tiny_bundle: Path, make_picture: MakePicture
) -> None:
    class Off:
        """One number too high in each row, as if memory had been mixed up."""

        backend = "off"

        def __init__(self, runner: Runner) -> None:
            self._runner = runner

        def infer(self, inputs: Arrays) -> Arrays:
            out = self._runner.infer(inputs)
            return out | {what: out[what] + np.float16(0.5)} if what in out else out

    model = PlaceModel(
        load_bundle(tiny_bundle), *(Off(one) for one in runners_in_torch(tiny_bundle, "cpu"))
    )
    with pytest.raises((AssertionError, ValueError)):
        assert_answers_alike(open_model(tiny_bundle, "onnxruntime"), model, make_picture)


@pytest.fixture
def shaping_graph(tmp_path: Path) -> Path:
    """A graph that reckons with shapes, as those of trained attention do."""
    onnx = pytest.importorskip("onnx")
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
    make, node = onnx.helper, onnx.helper.make_node
    nodes = [
        node("Shape", ["candidates"], ["length"], end=1),
        node("Concat", ["length", "sides"], ["shape"], axis=0),
        node("Expand", ["query", "shape"], ["queries"]),
        node("Concat", ["queries", "candidates"], ["both"], axis=2),
        node("Gather", ["both", "chosen"], ["fewer"], axis=1),
        node("Cast", ["fewer"], ["wide"], to=onnx.TensorProto.FLOAT),
        node("LayerNormalization", ["wide", "scale"], ["out"], axis=-1),
    ]
    graph = make.make_graph(
        nodes,
        "shaping",
        [
            make.make_tensor_value_info("query", half, [1, 3, 4]),
            make.make_tensor_value_info("candidates", half, ["B", 3, 4]),
        ],
        [make.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["B", 2, 8])],
        [
            make.make_tensor("sides", whole, [2], [3, 4]),
            make.make_tensor("chosen", whole, [2], [2, 0]),
            make.make_tensor("scale", onnx.TensorProto.FLOAT, [8], range(8)),
        ],
    )
    opset = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "shaping.onnx")
    return tmp_path / "shaping.onnx"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_reckons_with_shapes(device: str, shaping_graph: Path) -> None:
    from vpr_lite_ros.models.graph import TorchRunner

    runners_in_torch(DEFAULT_BUNDLE, device)  # skips where there is none
    numbers = np.random.default_rng(0).random((5, 3, 4)).astype(np.float16)
    inputs = {"query": numbers[:1], "candidates": numbers}
    wanted = OnnxRuntimeRunner(shaping_graph, 1).infer(inputs)["out"]
    found = TorchRunner(shaping_graph, device).infer(inputs)["out"]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("graph", [PLACE_GRAPH, MATCH_GRAPH, "shaping"])
def test_nothing_in_torch_waits_for_the_device(graph: str, shaping_graph: Path) -> None:
    """What a CUDA graph forbids: numbers from the host, or back to it, while it is captured."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from vpr_lite_ros.models.graph import TorchRunner

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, given: Any = (), named: Any = None
        ) -> Any:
            out = function(*given, **(named or {}))
            # A scalar in the host's memory is passed with the call.
            tensors = [one for one in tree_leaves((given, named, out)) if hasattr(one, "device")]
            devices = {one.device.type for one in tensors if one.ndim or one.is_meta}
            assert len(devices) <= 1, (function, devices)
            return out

    bundle = load_bundle(DEFAULT_BUNDLE)
    width, height = bundle.image_size
    # A device without numbers, and so without a GPU; to read one is an error.
    on_device = {"device": "meta", "dtype": torch.half}
    inputs = {
        "shaping": {
            "query": torch.zeros(1, 3, 4, **on_device),
            "candidates": torch.zeros(5, 3, 4, **on_device),
        },
        PLACE_GRAPH: {"image": torch.zeros(1, height, width, 3, dtype=torch.uint8, device="meta")},
        MATCH_GRAPH: {
            "query": torch.zeros(1, bundle.max_patches, bundle.dimension, **on_device),
            "candidates": torch.zeros(2, bundle.max_patches, bundle.dimension, **on_device),
        },
    }[graph]
    runner = TorchRunner(shaping_graph if graph == "shaping" else DEFAULT_BUNDLE / graph, "meta")
    with OneDevice():
        out = runner._run(inputs)
    assert {one.device.type for one in out.values()} == {"meta"}


# ONNX Runtime may leave operators to the CPU and say nothing.

SHAPES = {"Concat", "Gather", "Shape", "Slice", "Squeeze", "Unsqueeze"}
"""What is computed of shapes belongs on the CPU."""


def operators_by_provider(
    graph: Path, providers: list[str], inputs: Arrays, folder: Path
) -> dict[str, set[str]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, set[str]] = {}
    for event in events:
        about = event.get("args", {})
        if "provider" in about:
            found.setdefault(about["provider"], set()).add(about["op_name"])
    return found


@pytest.mark.parametrize("graph", [PLACE_GRAPH, MATCH_GRAPH])
@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CUDAExecutionProvider"])
def test_every_operator_runs_where_it_should(graph: str, provider: str, tmp_path: Path) -> None:
    bundle = load_bundle(DEFAULT_BUNDLE)
    if provider.startswith("CUDA"):
        open_here(DEFAULT_BUNDLE, ONNXRUNTIME_CUDA)
    width, height = bundle.image_size
    tokens = np.ones((2, bundle.max_patches, bundle.dimension), np.float16)
    inputs: Arrays = {"query": tokens[:1], "candidates": tokens}
    if graph == PLACE_GRAPH:
        inputs = {"image": np.zeros((1, height, width, 3), np.uint8)}
    found = operators_by_provider(DEFAULT_BUNDLE / graph, [provider], inputs, tmp_path)
    elsewhere = set().union(*(found[name] for name in found if name != provider))
    assert elsewhere <= SHAPES
    # The optimiser may have fused them.
    wanted = {"Conv", "FusedConv"} if graph == PLACE_GRAPH else {"MatMul", "FusedMatMul"}
    assert wanted & found[provider]


# pycuda, as tensorrt_runner.py uses it, with a kernel in TensorRT's place.

KERNEL = """
__global__ void twice_and_one(const float *in, float *out, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = 2 * in[i] + 1;
}
"""
Kernel = Callable[[Any, Any, int, Any], None]
"""Called with the addresses of what goes in and comes out, how many numbers, and the stream."""


def check_buffers(cuda: Any, compile_kernel: Callable[[], Kernel]) -> None:
    """Numbers go to the device and come back in time; all is freed before the context."""
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    try:
        stream, kernel = cuda.Stream(), compile_kernel()
        hosts = [cuda.pagelocked_empty((3, 1000), np.float32) for _ in range(2)]
        devices = [cuda.mem_alloc(host.nbytes) for host in hosts]
        for turn in range(3):
            hosts[0][...] = np.arange(3000).reshape(3, 1000) + turn
            hosts[1][...] = -1
            part = [host[: turn + 1] for host in hosts]
            cuda.memcpy_htod_async(devices[0], part[0], stream)
            kernel(devices[0], devices[1], part[0].size, stream)
            cuda.memcpy_dtoh_async(part[1], devices[1], stream)
            stream.synchronize()
            assert np.array_equal(part[1], 2 * part[0] + 1)
            assert (hosts[1][turn + 1 :] == -1).all()
        for memory in devices:
            memory.free()
        del hosts, part, stream, kernel
    finally:
        context.pop()
        context.detach()


def in_a_thread(job: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(job).result()


@pytest.mark.filterwarnings("error")  # pycuda warns of what could not be freed
def test_buffers_and_streams_of_pycuda() -> None:
    cuda = pytest.importorskip(
        "pycuda.driver", reason="pycuda is not installed", exc_type=ImportError
    )
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc, which compiles kernels for pycuda, is not on the PATH")
    try:
        cuda.init()
        assert cuda.Device.count()
    except (cuda.Error, AssertionError) as error:
        pytest.skip(f"no NVIDIA GPU can be used: {error}")

    def compile_kernel() -> Kernel:
        from pycuda.compiler import SourceModule

        function = SourceModule(KERNEL).get_function("twice_and_one")

        def start(given: Any, out: Any, count: int, stream: Any) -> None:
            grid = ((count + 255) // 256, 1)
            function(given, out, np.int32(count), block=(256, 1, 1), grid=grid, stream=stream)

        return start

    in_a_thread(lambda: check_buffers(cuda, compile_kernel))


def test_buffers_and_streams_of_the_stand_in() -> None:
    driver = dry_pycuda.make_driver()

    def compile_kernel() -> Kernel:
        def start(given: Any, out: Any, count: int, stream: Any) -> None:
            def work() -> None:
                numbers, results = (
                    dry_pycuda.memory_at(int(one), 4 * count).view(np.float32)
                    for one in (given, out)
                )
                results[:] = 2 * numbers + 1

            stream.waiting.append(work)

        return start

    in_a_thread(lambda: check_buffers(driver, compile_kernel))
    assert not dry_pycuda.PROBLEMS


# TensorRT


def check_change_over(model: PlaceModel, bundle: Path, make_picture: MakePicture) -> None:
    """It answers at once, then on the other backend, and alike."""
    before, picture = model.backend, make_picture(0, model.bundle.image_size)
    first = model.describe(picture)
    for thread in threading.enumerate():
        if thread.name == "change over":
            thread.join()
    assert_same_place(first, model.describe(picture))
    assert not model.fault and model.backend != before
    assert_answers_alike(open_model(bundle, "onnxruntime"), model, make_picture)


def test_the_networks_change_over_to_torch(tiny_bundle: Path, make_picture: MakePicture) -> None:
    model = open_model(tiny_bundle, "onnxruntime")
    model.change_over(lambda: runners_in_torch(tiny_bundle, "cpu"))
    check_change_over(model, tiny_bundle, make_picture)


def test_the_networks_change_over_to_tensorrt(make_picture: MakePicture, engines: Path) -> None:
    try:
        model = open_model(DEFAULT_BUNDLE, TENSORRT, most_candidates=CANDIDATES, behind=True)
    except BackendError as error:
        pytest.skip(str(error))
    check_change_over(model, DEFAULT_BUNDLE, make_picture)
    assert model.backend == TENSORRT


def test_a_damaged_engine_is_built_anew_on_the_gpu(
    tiny_bundle: Path, make_picture: MakePicture, engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_here(tiny_bundle, TENSORRT)
    files = sorted(engines.glob("*.engine"))
    assert len(files) == 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    model = open_here(tiny_bundle, TENSORRT)
    assert all(f"{file} is damaged: made anew" in caplog.text for file in files)
    assert_answers_alike(open_model(tiny_bundle, "onnxruntime"), model, make_picture)
    caplog.clear()
    open_here(tiny_bundle, TENSORRT)
    assert "made anew" not in caplog.text
