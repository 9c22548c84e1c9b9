"""Training the matcher: who is whose partner, the loss, and that it learns to say no."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")

from vpr_lite_ros.cli import main
from vpr_lite_ros.export import load_networks, save_networks
from vpr_lite_ros.inference import open_model
from vpr_lite_ros.models.matcher import PairMatcher
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import image_files, read_rgb
from vpr_lite_ros.training.loop import devices, read_checkpoint, train
from vpr_lite_ros.training.match import (
    DUSTBIN,
    UNKNOWN,
    Match,
    MatchConfig,
    MatchPairs,
    assignment_loss,
    look_up,
    partners_by_points,
    partners_by_spots,
)
from vpr_lite_ros.training.xfeat import XFeat, correspondences

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]


def grid(columns: int, rows: int) -> Any:
    """(N, 2) centres of patches, 16 pixels apart, row by row."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1) * 16.0 + 8


# Who is whose partner


def moved(matrix: list[list[float]], centres: Any) -> tuple[Any, Any]:
    """Where a homography takes ``centres``, and where it brings ``centres`` from."""
    there = torch.tensor(matrix)
    lifted = torch.nn.functional.pad(centres, (0, 1), value=1.0)
    both = (lifted @ matrix.T for matrix in (there, torch.linalg.inv(there)))
    first, second = (points[:, :2] / points[:, 2:] for points in both)
    return first, second


def test_partners_by_spots() -> None:
    """The second view looks two patches to the right; one past the border nothing is said."""
    spots = moved([[1, 0, -32], [0, 1, 0], [0, 0, 1.0]], grid(5, 2))
    rows, columns = partners_by_spots(grid(5, 2), grid(5, 2), *spots)
    assert rows.tolist() == [DUSTBIN, UNKNOWN, 0, 1, 2, DUSTBIN, UNKNOWN, 5, 6, 7]
    assert columns.tolist() == [2, 3, 4, UNKNOWN, DUSTBIN, 7, 8, 9, UNKNOWN, DUSTBIN]


def test_nothing_is_said_of_patches_that_are_nearly_seen() -> None:
    """Some 20 pixels past the border: neither the same nor surely alone."""
    spots = moved([[1, 0, -20], [0, 1, 0], [0, 0, 1.0]], grid(3, 1))
    rows, columns = partners_by_spots(grid(3, 1), grid(3, 1), *spots)
    # 8, 24, 40 go to −12, 4, 20.
    assert rows.tolist() == [UNKNOWN, 0, 1] and columns.tolist() == [1, 2, UNKNOWN]


def test_two_patches_do_not_share_a_partner() -> None:
    """Seen from half as far, four patches fall on one."""
    spots = moved([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1.0]], grid(6, 6))
    rows, columns = partners_by_spots(grid(6, 6), grid(6, 6), *spots)
    found = rows[rows >= 0]
    assert len(found.unique()) == len(found) == 9
    for row, column in zip(range(36), rows.tolist(), strict=True):
        assert column < 0 or columns[column] == row


def test_a_map_of_spots_is_right_between_its_points(pictures: Path) -> None:
    pairs = MatchPairs(MatchConfig(images=[str(pictures)], steps=1), (96, 64))
    assert pairs.shape == (5, 7, 2)
    affine = pairs.lattice * [0.9, 1.1] + [12, -7]
    at = grid(5, 3) + 5.0
    found = look_up(pairs._maps([affine])[0], at)
    assert torch.allclose(found, at * torch.tensor([0.9, 1.1]) + torch.tensor([12.0, -7.0]))


def test_partners_by_matches_of_points() -> None:
    nothing = [float("nan")] * 4
    points = torch.tensor(
        [
            [9.0, 8, 41, 9],  # patch 0 and patch 2
            [7.0, 9, 39, 8],
            [8.0, 8, 24, 8],  # outvoted: patch 0 and patch 1
            [40.0, 30, 8, 8],  # near no patch
            nothing,
        ]
    )
    rows, columns = partners_by_points(grid(4, 1), grid(4, 1), points)
    assert rows.tolist() == [2, UNKNOWN, UNKNOWN, UNKNOWN]
    assert columns.tolist() == [UNKNOWN, UNKNOWN, 0, UNKNOWN]
    rows, columns = partners_by_points(grid(4, 1), grid(4, 1), torch.tensor([nothing]))
    assert set(rows.tolist()) == set(columns.tolist()) == {UNKNOWN}


# The loss


def test_the_loss_by_hand() -> None:
    plan = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.4, 0.55, 1.05]])
    rows, columns = torch.tensor([0, DUSTBIN]), torch.tensor([0, DUSTBIN])
    matches, dustbins = -np.log(0.5), -(np.log(0.7) + np.log(0.55)) / 2
    assert assignment_loss(plan.log(), rows, columns).item() == pytest.approx(
        (matches + dustbins) / 2, rel=1e-5
    )
    unknown = torch.tensor([UNKNOWN, UNKNOWN])
    only = assignment_loss(plan.log(), unknown, torch.tensor([DUSTBIN, UNKNOWN]))
    assert only.item() == pytest.approx(-np.log(0.4), rel=1e-5)
    assert assignment_loss(plan.log(), unknown, unknown) == 0


# XFeat


def test_xfeat_finds_what_two_views_have_in_common(data_dir: Path) -> None:
    xfeat = XFeat(data_dir / "teachers" / "xfeat.onnx")
    image = read_rgb(next(image_files(data_dir / "train" / "grief_places")))
    homography = np.array([[0.9, 0.05, 40], [-0.05, 0.9, 30], [0, 0, 1]])
    height, width = image.shape[:2]
    moved = np.asarray(cv2.warpPerspective(image, homography, (width, height)), np.uint8)
    first, second = xfeat(image), xfeat(moved)
    assert len(first.points) == 600 and first.size == (width, height)
    assert np.linalg.norm(first.descriptors, axis=1) == pytest.approx(np.ones(600), abs=1e-4)
    same = correspondences(first, second)
    wanted = cv2.perspectiveTransform(same[None, :, :2].astype(np.float64), homography)[0]
    error = np.linalg.norm(same[:, 2:] - wanted, axis=1)
    assert len(same) > 150 and np.median(error) < 1.5
    nothing = xfeat(np.zeros((120, 160, 3), np.uint8))
    assert len(nothing.points) == 0 and len(correspondences(first, nothing)) == 0


def test_xfeat_sees_one_place_at_two_times(data_dir: Path) -> None:
    xfeat = XFeat(data_dir / "teachers" / "xfeat.onnx")
    sites = data_dir / "train" / "grief_places" / "michigan"
    noon, later, elsewhere = (xfeat(read_rgb(sites / f"{n}.jpg")) for n in ("0101", "0201", "0203"))
    assert len(correspondences(noon, later)) > 2 * len(correspondences(noon, elsewhere))


def test_a_file_that_is_not_xfeat_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(TrainingError, match=r"x\.onnx is not XFeat's network"):
        XFeat(tmp_path / "x.onnx")


# Pairs and the stage


def config_of(pictures: Path, **changes: Any) -> MatchConfig:
    settings: dict[str, Any] = {"images": [str(pictures)], "steps": 1, "batch": 2, "workers": 0}
    return MatchConfig(**settings | changes)


def test_real_pairs_bring_what_xfeat_sees(data_dir: Path) -> None:
    config = MatchConfig(
        images=[str(data_dir / "train" / "grief_places")],
        places=[str(data_dir / "train" / "grief_places" / "places.csv")],
        xfeat=str(data_dir / "teachers" / "xfeat.onnx"),
        steps=1,
    )
    pairs = MatchPairs(config, (640, 480))
    seen = 0
    for index in range(12):
        first, _, _, _, aligned, points = pairs[index]
        assert first.shape == (4, 480, 640, 3) and points.shape == (4, 600, 4)
        for known, of_pair in zip(aligned, points, strict=True):
            found = of_pair[~of_pair.isnan().any(dim=1)]
            assert not (known and len(found))
            seen += len(found) >= 40
            if len(found):
                inside = (found[:, :2] > -200).all(dim=1) & (found[:, :2] < 900).all(dim=1)
                assert inside.all()
    assert seen >= 5


def test_a_configuration_that_cannot_work_is_refused(pictures: Path) -> None:
    with pytest.raises(TrainingError, match="xfeat is missing"):
        config_of(pictures, places=["drive/poses.csv"])
    with pytest.raises(TrainingError, match="batch is 1"):
        config_of(pictures, batch=1)


def test_the_matcher_learns_to_say_yes_and_no(
    pictures: Path, tiny_networks: tuple[PlaceNetwork, PairMatcher], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    place, match = copy.deepcopy(tiny_networks)
    config = config_of(pictures, steps=40, warmup_steps=5, learning_rate=1e-3)
    frozen = {k: v.clone() for k, v in place.state_dict().items() if "self_attention" not in k}
    stage = Match(config, place, match)
    held_out = [MatchPairs(config, place.image_size)[2**41 + i] for i in range(6)]

    def figures() -> dict[str, float]:
        stage.eval()
        with torch.no_grad():
            found = [stage(*batch) for batch in held_out]
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

    with devices() as on:
        train(stage, replace(config, steps=1), tmp_path / "one.safetensors", on)
        before = figures()
        train(stage, config, tmp_path / "match.safetensors", on)
    after = figures()
    assert after["loss"] < 0.8 * before["loss"]
    assert after["same"] - after["other"] > before["same"] - before["other"]
    for name, tensor in frozen.items():
        assert torch.equal(place.state_dict()[name], tensor), f"{name} is frozen"


# The command


@pytest.fixture
def recipe(
    pictures: Path, tiny_networks: tuple[PlaceNetwork, PairMatcher], tmp_path: Path
) -> dict[str, Any]:
    save_networks(tmp_path / "networks.safetensors", *tiny_networks, {"training": "a test"})
    return {
        "name": "made-in-a-test",
        "about": "a test",
        "licence": "none",
        "output": str(tmp_path / "out"),
        "networks": str(tmp_path / "networks.safetensors"),
        "match": {"images": [str(pictures)], "steps": 4, "batch": 2, "workers": 0},
        "thresholds": {"labelled": [{"table": str(pictures / "twice.csv")}], "false_rate": 0.1},
    }


def run(recipe: dict[str, Any], tmp_path: Path, *options: str) -> int:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    level = logging.getLogger("vpr_lite_ros").level
    try:
        return main(["train", "matcher", str(path), *options])
    finally:  # the command shows more than other tests expect to see
        logging.getLogger("vpr_lite_ros").setLevel(level)


def test_from_a_place_network_to_a_bundle(
    recipe: dict[str, Any],
    pictures: Path,
    tiny_networks: tuple[PlaceNetwork, PairMatcher],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(3):
        picture = cv2.imread(str(pictures / f"{number:03}.png"))
        assert cv2.imwrite(str(pictures / f"{number:03}_again.png"), picture // 2)
    rows = [f"{n:03}{again}.png,{n}" for n in range(3) for again in ("", "_again")]
    (pictures / "twice.csv").write_text("\n".join(["file,place", *rows]))
    assert run(recipe, tmp_path) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.strip() == str(out / "bundle")
    model = open_model(out / "bundle", "onnxruntime")
    card = model.bundle.card
    assert card["training"]["match"]["steps"] == 4 and card["training"]["place"] == "a test"
    assert set(card["thresholds"]) >= {"similarity", "match", "inliers"}
    # The graphs hold what was trained, on the place network as it was.
    done = read_checkpoint(out / "match.safetensors")
    place, match, _ = load_networks(out / "networks.safetensors")
    trained = place.self_attention.state_dict()
    assert all(torch.equal(done.part("self_attention")[k], v) for k, v in trained.items())
    assert all(torch.equal(done.part("match")[k], v) for k, v in match.state_dict().items())
    assert not torch.equal(match.dustbin, tiny_networks[1].dustbin)
    image = read_rgb(pictures / "000.png")
    image = np.asarray(cv2.resize(image, place.image_size), np.uint8)
    described = model.describe(image)
    with torch.no_grad():
        descriptor, tokens, _ = place(torch.from_numpy(image)[None])
        score, _ = match(tokens, tokens)
        before, _, _ = tiny_networks[0](torch.from_numpy(image)[None])
    assert torch.equal(descriptor, before)
    assert described.descriptor == pytest.approx(descriptor[0].numpy(), abs=2e-3)
    found, _ = model.match(described.tokens, described.tokens[None])
    assert found == pytest.approx(score.numpy(), abs=5e-3)


def test_matcher_training_goes_on_where_it_was_killed(
    recipe: dict[str, Any], tiny_networks: tuple[PlaceNetwork, PairMatcher], tmp_path: Path
) -> None:
    config = MatchConfig(**recipe["match"])

    def trained(path: Path, fails_at: int | None = None) -> Any:
        stage = Match(config, *copy.deepcopy(tiny_networks))
        steps = 0
        original = stage.forward

        def forward(*batch: Any) -> dict[str, Any]:
            nonlocal steps
            steps += 1
            if steps == fails_at:
                raise KeyboardInterrupt
            return original(*batch)

        with pytest.MonkeyPatch.context() as patch, devices() as on:
            patch.setattr(stage, "forward", forward)
            train(stage, config, path, on)
        return read_checkpoint(path)

    whole = trained(tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.safetensors", fails_at=3)
    assert read_checkpoint(tmp_path / "cut.safetensors").step == 2
    cut = trained(tmp_path / "cut.safetensors")
    assert cut.finished and cut.step == whole.step == 4
    for name, tensor in whole.weights.items():
        assert torch.allclose(cut.weights[name], tensor, atol=1e-6), name


def test_a_matcher_has_no_backbone(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, tmp_path, "--backbone", "x.pth") == 1
    assert "--backbone is of the place network" in capsys.readouterr().err
