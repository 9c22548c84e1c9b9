"""RepVGG-A0 checkpoints of others, made up in their names, against a plain forward pass."""

from __future__ import annotations

import copy
import math
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vpr_lite_ros.export import CheckpointError, export_bundle
from vpr_lite_ros.models.matcher import PairMatcher
from vpr_lite_ros.models.netvlad import NetVLAD
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.models.repvgg import RepVGGLite, standardise
from vpr_lite_ros.training.pretrained import load_pretrained, read_clusters, restore_statistics

Weights = dict[str, Tensor]

# RepVGG-A0 (RepVGG, table 2): the stem, then blocks and widths of four stages.
DEPTHS, WIDTHS = (1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)
ORIGINAL = {"kxk": "rbr_dense", "1x1": "rbr_1x1", "identity": "rbr_identity"}
TIMM = {"kxk": "conv_kxk", "1x1": "conv_1x1", "identity": "identity"}


def block_name(naming: str, stage: int, block: int) -> str:
    if naming == "original":
        return "stage0" if stage == 0 else f"stage{stage}.{block}"
    return "stem" if stage == 0 else f"stages.{stage - 1}.{block}"


def make_checkpoint(naming: str, seed: int = 3) -> Weights:
    """Random weights of the whole RepVGG-A0; no two tensors are alike."""
    rng = torch.Generator().manual_seed(seed)
    branches = ORIGINAL if naming == "original" else TIMM
    weights: Weights = {}

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 0.5 + torch.rand(width, generator=rng)
        weights[f"{name}.bias"] = 0.2 * torch.randn(width, generator=rng)
        weights[f"{name}.running_mean"] = 0.2 * torch.randn(width, generator=rng)
        weights[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=rng)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(1234)

    width = 3
    for stage, (depth, out) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        for block in range(depth):
            name = block_name(naming, stage, block)
            if stage > 0 and block > 0:
                norm(f"{name}.{branches['identity']}", out)
            for branch, kernel in (("kxk", 3), ("1x1", 1)):
                part = f"{name}.{branches[branch]}"
                scale = 0.6 / math.sqrt(width * kernel**2)
                shape = (out, width, kernel, kernel)
                weights[f"{part}.conv.weight"] = scale * torch.randn(shape, generator=rng)
                norm(f"{part}.bn", out)
            width = out
    classifier = "linear" if naming == "original" else "head.fc"
    weights[f"{classifier}.weight"] = torch.randn(1000, 1280, generator=rng)
    weights[f"{classifier}.bias"] = torch.randn(1000, generator=rng)
    return weights


def plain_forward(weights: Weights, naming: str, image: Tensor) -> Tensor:
    """What RepVGG-A0 computes in evaluation mode, up to the end of its stage of 192 channels."""
    branches = ORIGINAL if naming == "original" else TIMM

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = image
    for stage, depth in enumerate(DEPTHS[:-1]):
        for block in range(depth):
            name, stride = block_name(naming, stage, block), 2 if block == 0 else 1
            out = torch.zeros(())
            for branch, padding in (("kxk", 1), ("1x1", 0)):
                part = f"{name}.{branches[branch]}"
                weight = weights[f"{part}.conv.weight"]
                out = out + norm(F.conv2d(x, weight, None, stride, padding), f"{part}.bn")
            if stage > 0 and block > 0:
                out = out + norm(x, f"{name}.{branches['identity']}")
            x = F.relu(out)
    return x


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(8))


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("naming", ["original", "timm"])
def test_the_backbone_computes_what_the_checkpoint_says(
    naming: str, image: Tensor, tmp_path: Path
) -> None:
    weights = make_checkpoint(naming)
    backbone = RepVGGLite()
    account = load_pretrained(backbone, save(tmp_path / "a0.pth", weights))
    with torch.no_grad():
        wanted, found = plain_forward(weights, naming, image), backbone.eval()(image)
    assert found.shape == (2, 192, 4, 6) and wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    # Each tensor once, and none of the network's own left as it was.
    assert sorted(account.used + account.unused) == sorted(weights)
    own = [name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")]
    assert len(account.used) == len(own)
    last = ("stage4.", "linear.") if naming == "original" else ("stages.3.", "head.")
    assert all(
        name.startswith(last) or name.endswith(".num_batches_tracked") for name in account.unused
    )


def test_both_namings_give_the_same_network(tmp_path: Path) -> None:
    one, other = RepVGGLite(), RepVGGLite()
    load_pretrained(one, save(tmp_path / "original.pth", make_checkpoint("original")))
    save_file(make_checkpoint("timm"), tmp_path / "timm.safetensors")
    load_pretrained(other, tmp_path / "timm.safetensors")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("wrap", "beside"),
    [
        (lambda weights: {f"module.{k}": v for k, v in weights.items()}, []),
        (lambda weights: {"state_dict": weights, "epoch": 120}, ["epoch"]),
        (lambda weights: {"model": weights, "optimizer": {"lr": 0.1}}, ["optimizer"]),
        (
            lambda weights: {
                "epoch": 119,
                "model": {
                    "state_dict": {f"module.{k}": v for k, v in weights.items()},
                    "arch": "A0",
                },
            },
            ["epoch", "arch"],
        ),
    ],
)
def test_wrappers_come_off(
    wrap: Callable[[Weights], dict[str, object]], beside: list[str], tmp_path: Path
) -> None:
    weights = make_checkpoint("original")
    bare, wrapped = RepVGGLite(), RepVGGLite()
    without = load_pretrained(bare, save(tmp_path / "bare.pth", weights))
    account = load_pretrained(wrapped, save(tmp_path / "wrapped.pth", wrap(weights)))
    assert list(account.unused[: len(beside)]) == beside
    assert len(account.used) == len(without.used)
    for name, tensor in bare.state_dict().items():
        assert torch.equal(tensor, wrapped.state_dict()[name]), name


def test_half_precision_is_read(tmp_path: Path) -> None:
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in make_checkpoint("timm").items()
    }
    backbone = RepVGGLite()
    load_pretrained(backbone, save(tmp_path / "half.pth", halves))
    own = backbone.state_dict()["stages.2.13.conv_kxk.conv.weight"]
    assert own.dtype == torch.float32
    assert torch.equal(own, halves["stages.2.13.conv_kxk.conv.weight"].float())


def drop(weights: Weights) -> None:
    del weights["stage3.13.rbr_identity.running_var"]


def drop_a_bias(weights: Weights) -> None:
    del weights["stage0.rbr_1x1.bn.bias"]


def add_a_block(weights: Weights) -> None:
    weights["stage3.14.rbr_dense.conv.weight"] = torch.zeros(192, 192, 3, 3)


def add_attention(weights: Weights) -> None:
    weights["stage1.0.se.down.weight"] = torch.zeros(3)


def add_a_counter(weights: Weights) -> None:
    weights["stage1.0.se.bn.num_batches_tracked"] = torch.tensor(3)


def repeat(weights: Weights) -> None:
    weights["module.stage0.rbr_1x1.bn.bias"] = weights["stage0.rbr_1x1.bn.bias"]


def widen(weights: Weights) -> None:
    weights["stage2.1.rbr_1x1.conv.weight"] = torch.zeros(128, 96, 1, 1)


def diverge(weights: Weights) -> None:
    weights["stage2.1.rbr_dense.bn.weight"][5] = math.nan


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (drop, r"missing.*: stages\.2\.13\.identity\.running_var$"),
        (drop_a_bias, r"missing.*: stem\.conv_1x1\.bn\.bias$"),
        (add_a_block, r"unexpected: stage3\.14\.rbr_dense\.conv\.weight$"),
        (add_attention, r"unexpected: stage1\.0\.se\.down\.weight$"),
        (add_a_counter, r"unexpected: stage1\.0\.se\.bn\.num_batches_tracked$"),
        (repeat, r"unexpected: module\.stage0\.rbr_1x1\.bn\.bias$"),
        (widen, r"misfit: stage2\.1\.rbr_1x1\.conv\.weight \(128, 96, .* of \(96, 96, 1, 1\)$"),
        (diverge, r"misfit: stage2\.1\.rbr_dense\.bn\.weight not finite$"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    spoil: Callable[[Weights], None], fault: str, tmp_path: Path
) -> None:
    weights = make_checkpoint("original")
    spoil(weights)
    backbone = RepVGGLite()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"spoilt\.pth is no RepVGG-A0 .*{fault}"):
        load_pretrained(backbone, save(tmp_path / "spoilt.pth", weights))
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    weights = make_checkpoint("original")
    for spoil in (drop, add_attention, widen):
        spoil(weights)
    with pytest.raises(CheckpointError, match=r"unexpected: .*; missing .*; misfit: "):
        load_pretrained(RepVGGLite(), save(tmp_path / "spoilt.pth", weights))


@pytest.mark.parametrize(
    "name", ["stage1.0.rbr_reparam.weight", "module.stage0.rbr_reparam.bias", "stem.reparam.weight"]
)
def test_folded_blocks_are_refused(name: str, tmp_path: Path) -> None:
    weights = {name: torch.zeros(48), "linear.bias": torch.zeros(1000)}
    with pytest.raises(CheckpointError, match=rf"folded for deployment \({name}\).*-train\.pth"):
        load_pretrained(RepVGGLite(), save(tmp_path / "deploy.pth", weights))


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.path,)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    weights = make_checkpoint("original")
    sprung = tmp_path / "sprung"
    for name, content in {
        "namespace.pth": {"state_dict": weights, "args": Namespace(lr=0.1)},
        "trap.pth": {"state_dict": weights, "args": Trap(sprung)},
    }.items():
        with pytest.raises(CheckpointError, match=rf"{name} is damaged or holds more than tensors"):
            load_pretrained(RepVGGLite(), save(tmp_path / name, content))
    assert not sprung.exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    with pytest.raises(CheckpointError, match=r"plain\.pth"):
        load_pretrained(RepVGGLite(), tmp_path / "plain.pth")
    assert not sprung.exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pth cannot be read"):
        load_pretrained(RepVGGLite(), tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read"):
        load_pretrained(RepVGGLite(), tmp_path / "absent.safetensors")
    whole = save(tmp_path / "whole.pth", make_checkpoint("timm")).read_bytes()
    for name in ("half.pth", "half.safetensors", "empty.pth", "empty.safetensors"):
        path = tmp_path / name
        path.write_bytes(whole[: len(whole) // 2] if name.startswith("half") else b"")
        with pytest.raises(CheckpointError, match=name):
            load_pretrained(RepVGGLite(), path)
    with pytest.raises(CheckpointError, match="holds no named tensors but a list"):
        load_pretrained(RepVGGLite(), save(tmp_path / "list.pth", [torch.zeros(3)]))
    with pytest.raises(CheckpointError, match=r"missing.* and 2\d\d more"):
        load_pretrained(RepVGGLite(), save(tmp_path / "nothing.pth", {}))


# Bundles


def similarity(one: Tensor, two: Tensor) -> float:
    return torch.cosine_similarity(one.flatten(), two.flatten(), dim=0).item()


def test_a_bundle_gives_its_backbone_back(
    tiny_networks: tuple[PlaceNetwork, PairMatcher], image: Tensor, tmp_path: Path
) -> None:
    place, match = copy.deepcopy(tiny_networks)
    with torch.no_grad():
        for norm in (m for m in place.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            # As in a trained network, no two tensors are the same: export stores such once.
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor += 0.1 * torch.rand_like(tensor)
    bundle = export_bundle(place, match, {}, tmp_path / "bundle", name="trained")
    backbone = RepVGGLite()
    accounting = load_pretrained(backbone, bundle)
    with torch.no_grad():
        found, wanted = backbone.eval()(image), place.backbone.eval()(image)
    assert similarity(found, wanted) > 0.9999
    assert "vlad.centroids" in accounting.unused and len(accounting.used) > 200
    # It can be trained further: training mode begins where evaluation mode left off.
    views = 255 * torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    before = backbone(standardise(views)).detach()
    backbone.train()
    assert similarity(backbone(standardise(views)), before) < 0.98
    load_pretrained(backbone, bundle)
    restore_statistics(backbone, views)
    assert backbone.training
    assert similarity(backbone(standardise(views)), before) > 0.999
    restore_statistics(backbone, views)
    assert similarity(backbone.eval()(standardise(views)), before) > 0.9999


def test_a_bundle_gives_its_clusters_back(
    tiny_networks: tuple[PlaceNetwork, PairMatcher], tiny_bundle: Path
) -> None:
    vlad = tiny_networks[0].vlad
    given = NetVLAD(RepVGGLite.width, vlad.clusters, vlad.dimension)
    given.load_state_dict(read_clusters(tiny_bundle), strict=True)
    cells = F.normalize(torch.randn(1, 50, RepVGGLite.width), dim=2)
    with torch.no_grad():
        assert torch.allclose(given(cells), vlad(cells), atol=1e-5)
        assert torch.allclose(given.pca(vlad(cells)), vlad.pca(vlad(cells)), atol=5e-3)


def test_a_folder_that_is_no_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    for read in (lambda: load_pretrained(RepVGGLite(), tmp_path), lambda: read_clusters(tmp_path)):
        (tmp_path / "place.onnx").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match="no model bundle"):
            read()
        (tmp_path / "place.onnx").write_bytes(b"not a graph")
        with pytest.raises(CheckpointError, match="no model bundle"):
            read()
    (tmp_path / "place.onnx").write_bytes((tiny_bundle / "match.onnx").read_bytes())
    with pytest.raises(CheckpointError, match="has no clusters"):
        read_clusters(tmp_path)
