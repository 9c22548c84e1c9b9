"""Bundles: exported, checked, and the same answer from torch, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import copy
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
import yaml
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from vpr_lite_ros import inference
from vpr_lite_ros.export import CheckpointError, export_bundle, load_networks, save_networks
from vpr_lite_ros.inference import (
    BACKENDS,
    DEFAULT_BUNDLE,
    BackendError,
    BundleError,
    Description,
    PlaceModel,
    load_bundle,
    open_model,
)
from vpr_lite_ros.models.matcher import PairMatcher
from vpr_lite_ros.models.place import PlaceNetwork

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
Networks = tuple[PlaceNetwork, PairMatcher]

# OpenVINO multiplies in bfloat16 where the CPU can: three digits, and 22 layers to spoil them. In
# the tiny networks, whose identities outweigh the rest, they spoil more than in trained ones.
SMALLEST_COSINE = {"onnxruntime": 0.9999, "openvino": 0.998}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def model(request: pytest.FixtureRequest, tiny_bundle: Path) -> PlaceModel:
    pytest.importorskip(request.param)
    return open_model(tiny_bundle, request.param, threads=2)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, free to be broken."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def _edit_card(bundle: Path, **entries: Any) -> None:
    card = yaml.safe_load((bundle / "model.yaml").read_text())
    card |= entries
    (bundle / "model.yaml").write_text(
        yaml.safe_dump({k: v for k, v in card.items() if v is not None})
    )


def _describe_in_torch(place: PlaceNetwork, image: Image) -> Description:
    with torch.no_grad():
        descriptor, tokens, centres = place(torch.from_numpy(image[None]))
    return Description(
        descriptor[0].numpy(), tokens[0].numpy().astype(np.float16), centres[0].numpy()
    )


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _by_centre(description: Description) -> dict[tuple[float, ...], NDArray[np.float16]]:
    """Tokens by where they are: top-k may order them differently on another backend."""
    keys = [tuple(centre) for centre in np.round(description.centres, 4).tolist()]
    return dict(zip(keys, description.tokens, strict=True))


def _assert_same(one: Description, other: Description, smallest_cosine: float) -> None:
    assert one.descriptor.dtype == other.descriptor.dtype == np.float32
    assert one.tokens.dtype == other.tokens.dtype == np.float16
    assert one.tokens.shape == other.tokens.shape
    assert one.descriptor.shape == other.descriptor.shape
    for part, same_part in zip(one.descriptor, other.descriptor, strict=True):
        assert np.linalg.norm(same_part) == pytest.approx(1, abs=1e-3)
        assert _cosine(part, same_part) >= smallest_cosine
    mine, yours = _by_centre(one), _by_centre(other)
    shared = sorted(mine.keys() & yours.keys())
    # Patches of nearly the same salience may change places at the end of the list.
    assert len(shared) >= 0.8 * len(mine)
    for key in shared:
        assert _cosine(mine[key], yours[key]) >= 1 - 10 * (1 - smallest_cosine)


def test_backends_describe_as_torch_does(
    model: PlaceModel, tiny_networks: Networks, make_picture: MakePicture
) -> None:
    place, _ = tiny_networks
    for seed in range(6):
        image = make_picture(seed)
        smallest = SMALLEST_COSINE[model.backend]
        _assert_same(_describe_in_torch(place, image), model.describe(image), smallest)


def test_backends_describe_dim_pictures_as_torch_does(
    model: PlaceModel, tiny_networks: Networks, make_picture: MakePicture
) -> None:
    """By night the contrast is small against the mean, whose rounding then weighs most."""
    place, _ = tiny_networks
    for seed in range(6):
        image = (make_picture(seed) * 0.15 + 60).astype(np.uint8)
        smallest = SMALLEST_COSINE[model.backend]
        _assert_same(_describe_in_torch(place, image), model.describe(image), smallest)


@pytest.mark.parametrize("value", [0, 90, 255])
def test_a_picture_of_nothing_is_described_without_nan(model: PlaceModel, value: int) -> None:
    width, height = model.bundle.image_size
    description = model.describe(np.full((height, width, 3), value, np.uint8))
    assert np.isfinite(description.descriptor).all() and np.isfinite(description.tokens).all()
    scores, assignment = model.match(description.tokens, description.tokens[None])
    assert np.isfinite(scores).all() and np.isfinite(assignment).all()


def test_the_shipped_bundle_describes_alike_on_both_backends(make_picture: MakePicture) -> None:
    """The trained networks, whose float32 answers on ONNX Runtime are torch's (see above)."""
    pytest.importorskip("openvino")
    if not DEFAULT_BUNDLE.is_dir():
        pytest.skip(f"no bundle at {DEFAULT_BUNDLE}")
    runtime, openvino = (open_model(DEFAULT_BUNDLE, backend) for backend in SMALLEST_COSINE)
    for seed in range(2):
        picture = make_picture(seed, runtime.bundle.image_size)
        for image in (picture, (picture * 0.15 + 30).astype(np.uint8)):
            wanted, found = runtime.describe(image), openvino.describe(image)
            assert _cosine(wanted.descriptor.ravel(), found.descriptor.ravel()) >= 0.999


def test_backends_describe_real_images_as_torch_does(
    model: PlaceModel, tiny_networks: Networks, data_dir: Path
) -> None:
    place, _ = tiny_networks
    files = sorted((data_dir / "train" / "grief_places").rglob("*.jpg"))[::15]
    assert files, f"no images under {data_dir / 'train' / 'grief_places'}"
    for file in files:
        picture = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        image = cv2.resize(picture, place.image_size, interpolation=cv2.INTER_AREA)
        image = np.asarray(image, np.uint8)
        smallest = SMALLEST_COSINE[model.backend]
        _assert_same(_describe_in_torch(place, image), model.describe(image), smallest)


@pytest.mark.parametrize("candidates", [1, 5])
def test_backends_match_as_torch_does(
    model: PlaceModel, tiny_networks: Networks, make_picture: MakePicture, candidates: int
) -> None:
    place, match = tiny_networks
    # The first candidate is the query's picture in another light, so that mass does flow.
    pictures = [(make_picture(0) * 0.7).astype(np.uint8), *map(make_picture, range(1, 5))]
    query = _describe_in_torch(place, make_picture(0)).tokens
    tokens = np.stack([_describe_in_torch(place, p).tokens for p in pictures[:candidates]])
    with torch.no_grad():
        wanted, wanted_assignment = match(
            torch.from_numpy(query[None].astype(np.float32)),
            torch.from_numpy(tokens.astype(np.float32)),
        )
    scores, assignment = model.match(query, tokens)
    tolerance = 1e-4 if model.backend == "onnxruntime" else 0.03
    assert scores.shape == (candidates,)
    assert assignment.shape == (candidates, place.max_patches, place.max_patches)
    assert scores == pytest.approx(wanted.numpy(), abs=tolerance)
    assert np.abs(assignment - wanted_assignment.numpy()).max() <= 3 * tolerance
    assert wanted[0] > 0.5
    agree = assignment[0].argmax(axis=1) == wanted_assignment[0].argmax(dim=1).numpy()
    assert agree.mean() >= 0.9


def test_attention_is_exported_once_it_is_trained(
    tiny_networks: Networks, tiny_bundle: Path, make_picture: MakePicture, tmp_path: Path
) -> None:
    place, match = copy.deepcopy(tiny_networks)
    for last in (place.self_attention.residual.out, match.cross.residual.out):
        torch.nn.init.normal_(last.weight, 0, 0.02)
    trained = export_bundle(place, match, {}, tmp_path / "trained", name="trained")

    def softmaxes(bundle: Path) -> list[int]:
        graphs = [onnx.load(bundle / graph).graph for graph in ("place.onnx", "match.onnx")]
        return [sum(node.op_type == "Softmax" for node in graph.node) for graph in graphs]

    # The shares of NetVLAD, at both resolutions; one more of self-attention; both directions of
    # cross-attention.
    assert (softmaxes(tiny_bundle), softmaxes(trained)) == ([2, 0], [3, 2])
    picture, other = make_picture(0), (make_picture(0) * 0.7).astype(np.uint8)
    query, candidate = (_describe_in_torch(place, image) for image in (picture, other))
    model = open_model(trained, "onnxruntime", threads=2)
    _assert_same(query, model.describe(picture), SMALLEST_COSINE["onnxruntime"])
    with torch.no_grad():
        tokens = [
            torch.from_numpy(one.tokens[None].astype(np.float32)) for one in (query, candidate)
        ]
        wanted, _ = match(*tokens)
    scores, _ = model.match(query.tokens, candidate.tokens[None])
    assert scores == pytest.approx(wanted.numpy(), abs=1e-3)


def test_results_belong_to_the_caller(model: PlaceModel, make_picture: MakePicture) -> None:
    first = model.describe(make_picture(1))
    before: list[NDArray[Any]] = [first.descriptor, first.tokens, first.centres]
    before = [array.copy() for array in before]
    scores, _ = model.match(first.tokens, first.tokens[None])
    score = float(scores[0])
    other = model.describe(make_picture(2))
    model.match(first.tokens, other.tokens[None])
    after: list[NDArray[Any]] = [first.descriptor, first.tokens, first.centres]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert scores[0] == score


def test_a_bundle_replaces_another(
    tiny_networks: Networks, tiny_model: PlaceModel, make_picture: MakePicture, bundle_copy: Path
) -> None:
    place, match = tiny_networks
    (bundle_copy / "match.onnx").write_bytes(b"broken")
    (bundle_copy / "leftover").touch()
    path = export_bundle(place, match, {"dataset": "new"}, bundle_copy, name="tiny")
    assert path == bundle_copy and not (path / "leftover").exists()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    again = open_model(path, "onnxruntime", threads=2)
    assert again.bundle.card["dataset"] == "new"
    assert again.bundle.model_id == tiny_model.bundle.model_id
    # What is folded, left out or halved is a copy.
    assert place.backbone.state_dict().keys() == PlaceNetwork().backbone.state_dict().keys()
    assert {weight.dtype for weight in place.parameters()} == {torch.float32}
    assert not match.cross.skipped
    picture = make_picture(3)
    _assert_same(tiny_model.describe(picture), again.describe(picture), 0.9999)


def test_graphs_say_where_they_compute_in_float16(tiny_bundle: Path) -> None:
    for file in ("place.onnx", "match.onnx"):
        graph = onnx.shape_inference.infer_shapes(onnx.load(tiny_bundle / file)).graph
        types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
        types |= {value.name: value.type.tensor_type.elem_type for value in graph.output}
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        assert TensorProto.DOUBLE not in types.values()
        for node in graph.node:
            if node.op_type == "Conv":
                assert {types[name] for name in node.output} == {TensorProto.FLOAT16}
            if node.op_type in ("Exp", "ReduceSum", "ReduceL2", "ReduceMean", "Softmax"):
                assert {types[name] for name in node.output} == {TensorProto.FLOAT}, node.name
    place = onnx.load(tiny_bundle / "place.onnx").graph
    # 21 blocks, one convolution each, for the image and for half its resolution; their weights are
    # there once.
    convolutions = [node for node in place.node if node.op_type == "Conv"]
    assert len(convolutions) == 42 and len({node.input[1] for node in convolutions}) == 21


def test_a_weight_that_overflows_float16_is_named(tiny_networks: Networks, tmp_path: Path) -> None:
    place, match = copy.deepcopy(tiny_networks)
    with torch.no_grad():
        place.vlad.pca.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"vlad\.pca overflows float16"):
        export_bundle(place, match, {}, tmp_path / "bundle", name="tiny")


def test_the_card_says_what_the_graphs_take(tiny_bundle: Path, tiny_networks: Networks) -> None:
    place, _ = tiny_networks
    bundle = load_bundle(tiny_bundle)
    assert bundle.image_size == place.image_size
    assert (bundle.dimension, bundle.max_patches) == (place.vlad.dimension, place.max_patches)
    assert bundle.card["training"].startswith("none")
    assert bundle.model_id.startswith("tiny-")
    inputs = onnx.load(tiny_bundle / "place.onnx").graph.input
    shape = [side.dim_value for side in inputs[0].type.tensor_type.shape.dim]
    assert shape == [1, place.image_size[1], place.image_size[0], 3]
    assert sorted(path.name for path in tiny_bundle.iterdir()) == [
        "match.onnx",
        "model.yaml",
        "place.onnx",
    ]


def test_weights_are_stored_at_half_size(tiny_bundle: Path, tiny_networks: Networks) -> None:
    place, _ = tiny_networks
    count = sum(parameter.numel() for parameter in place.parameters())
    assert (tiny_bundle / "place.onnx").stat().st_size < 2.2 * count


@pytest.mark.parametrize("missing", ["model.yaml", "place.onnx", "match.onnx"])
def test_a_missing_file_is_named(bundle_copy: Path, missing: str) -> None:
    (bundle_copy / missing).unlink()
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle_copy)
    assert missing in str(caught.value) and str(bundle_copy) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        open_model(tmp_path / "nowhere")


@pytest.mark.parametrize("graph", ["place.onnx", "match.onnx"])
def test_a_changed_graph_is_refused(bundle_copy: Path, graph: str) -> None:
    content = bytearray((bundle_copy / graph).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / graph).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        open_model(bundle_copy)
    assert graph in str(caught.value) and "SHA-256" in str(caught.value)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_is_refused(bundle_copy: Path, version: object) -> None:
    _edit_card(bundle_copy, format=version)
    with pytest.raises(BundleError, match=rf"format {version!r}.*reads format 2.*vpr-lite export"):
        load_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("format: [1", "YAML"),
        ("\x00\x01", "YAML"),
        ("just words", "format None"),
        ("", "format None"),
    ],
)
def test_a_garbled_card_is_refused(bundle_copy: Path, text: str, complaint: str) -> None:
    (bundle_copy / "model.yaml").write_text(text)
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle_copy)
    assert "model.yaml" in str(caught.value) and complaint in str(caught.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"sha256": None},
        {"sha256": {"place.onnx": "0"}},
        {"image_size": [640]},
        {"image_size": "large"},
        {"dimension": "many"},
        {"parts": 2},
        {"max_patches": None},
        {"name": None},
    ],
)
def test_a_card_that_lacks_an_entry_is_refused(bundle_copy: Path, entries: dict[str, Any]) -> None:
    _edit_card(bundle_copy, **entries)
    with pytest.raises(BundleError, match=r"model\.yaml lacks or garbles"):
        load_bundle(bundle_copy)


def test_an_unknown_backend_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError) as caught:
        open_model(tiny_bundle, "abacus")
    assert "'abacus'" in str(caught.value)
    assert all(backend in str(caught.value) for backend in ("auto", *BACKENDS))


def test_auto_takes_the_first_backend_that_can_be_used(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(inference, "_engines", _refuse)
    assert open_model(tiny_bundle).backend == "openvino"
    # A GPU on which no engine can be built.
    monkeypatch.setattr(inference, "_engines", lambda *_: _refuse)
    assert open_model(tiny_bundle).backend == "openvino"
    with pytest.raises(BackendError, match="of no use here"):
        open_model(tiny_bundle, "tensorrt")
    # Installed, but of no use.
    monkeypatch.setitem(BACKENDS, "openvino", _refuse)
    assert open_model(tiny_bundle).backend == "onnxruntime"
    assert "of no use here: another is tried" in caplog.text
    monkeypatch.setitem(BACKENDS, "onnxruntime", _refuse)
    with pytest.raises(BackendError, match="no inference backend can be used: pip install"):
        open_model(tiny_bundle)


def _refuse(*_: Any) -> Any:
    raise BackendError("of no use here")


@pytest.mark.parametrize(
    ("compiled", "started", "said"),
    [
        (["CPUExecutionProvider"], [], "this onnxruntime is for the CPU alone. pip uninstall"),
        (["CUDAExecutionProvider"], ["CPUExecutionProvider"], "does not reach an NVIDIA GPU"),
        (["CUDAExecutionProvider"], None, r"NVIDIA GPU \(CUDA failure 35\)"),
    ],
)
def test_onnx_runtime_does_not_take_the_cpu_for_a_gpu(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: list[str],
    started: list[str] | None,
    said: str,
) -> None:
    """``started``: what a session then has; None if it fails to start."""

    def start(graph: Path, options: Any, providers: list[str], enable_fallback: int) -> Any:
        assert (providers, enable_fallback) == (["CUDAExecutionProvider"], 0)
        if started is None:
            raise RuntimeError("CUDA failure 35")
        return SimpleNamespace(get_providers=lambda: started)

    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: compiled)
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    with pytest.raises(BackendError, match=said):
        open_model(tiny_bundle, "onnxruntime-cuda")


def test_a_backend_that_is_not_installed_is_named(tiny_bundle: Path) -> None:
    # A real interpreter in which the import fails, as it does where the wheel is missing.
    script = f"""
import sys
from pathlib import Path
sys.modules["openvino"] = None
from vpr_lite_ros.inference import BackendError, open_model
try:
    open_model(Path({str(tiny_bundle)!r}), "openvino")
except BackendError as error:
    print(error)
"""
    output = _run(script)
    assert "openvino" in output and "pip install openvino" in output


def test_the_id_changes_with_a_graph_and_with_no_remark(
    tiny_bundle: Path, bundle_copy: Path
) -> None:
    before = load_bundle(bundle_copy).model_id
    _edit_card(bundle_copy, notes="another date, another place")
    assert load_bundle(bundle_copy).model_id == before

    path = bundle_copy / "place.onnx"
    graph = onnx.load(path)
    weight = next(t for t in graph.graph.initializer if len(t.dims) == 2)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] += 1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, path)
    hashes = dict(load_bundle(tiny_bundle).card["sha256"])
    hashes["place.onnx"] = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit_card(bundle_copy, sha256=hashes)
    assert load_bundle(bundle_copy).model_id != before


def test_running_a_model_imports_no_torch(tiny_bundle: Path) -> None:
    script = f"""
import sys
from pathlib import Path
import numpy as np
import vpr_lite_ros.detector
from vpr_lite_ros.inference import load_bundle, open_model
bundle = Path({str(tiny_bundle)!r})
width, height = load_bundle(bundle).image_size
for backend in ("openvino", "onnxruntime"):
    model = open_model(bundle, backend, 1)
    tokens = model.describe(np.zeros((height, width, 3), np.uint8)).tokens
    model.match(tokens, tokens[None])
foreign = [name for name in ("torch", "onnx", "rclpy") if name in sys.modules]
print("imported:", foreign)
"""
    pytest.importorskip("openvino")
    assert _run(script).strip() == "imported: []"


def _run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_export_leaves_other_folders_alone(tiny_networks: Networks, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="precious"):
        export_bundle(*tiny_networks, {}, precious, name="tiny")
    assert (precious / "thesis.tex").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [precious]


def test_checkpoints_keep_the_networks(
    tiny_networks: Networks, make_picture: MakePicture, tmp_path: Path
) -> None:
    place, match = tiny_networks
    path = tmp_path / "networks.safetensors"
    save_networks(path, place, match, {"epochs": 3, "data": "none"})
    loaded, loaded_match, about = load_networks(path)
    assert about == {"epochs": 3, "data": "none"}
    assert not loaded.training and not loaded_match.training
    for before, after in ((place, loaded), (match, loaded_match)):
        weights = before.state_dict()
        assert weights.keys() == after.state_dict().keys()
        assert all(torch.equal(weights[k], after.state_dict()[k]) for k in weights)
    picture = make_picture(4)
    one, other = _describe_in_torch(place, picture), _describe_in_torch(loaded, picture)
    assert np.array_equal(one.tokens, other.tokens)
    fewer, _, _ = load_networks(path, max_patches=7)
    assert _describe_in_torch(fewer, picture).tokens.shape == (7, place.vlad.dimension)
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_checkpoint_is_named(tiny_networks: Networks, tmp_path: Path) -> None:
    path = tmp_path / "networks.safetensors"
    with pytest.raises(CheckpointError, match=r"networks\.safetensors"):
        load_networks(path)
    save_networks(path, *tiny_networks, {})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"networks\.safetensors"):
        load_networks(path)
