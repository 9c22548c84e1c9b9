"""Pairs of views of one place, and that a network learns from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")

from vpr_lite_ros.datasets import load_places
from vpr_lite_ros.models.repvgg import RepVGGLite
from vpr_lite_ros.training.corridor import (
    AT_PICTURE,
    Corridor,
    Eye,
    some_corridor,
)
from vpr_lite_ros.training.loop import devices, train
from vpr_lite_ros.training.pairs import _distinct_places
from vpr_lite_ros.training.views import ViewPairs, Views, ViewsConfig

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
WriteImages = Callable[[Path, Sequence[Image]], list[Path]]


def views_config(pictures: Path, **changes: Any) -> ViewsConfig:
    settings: dict[str, Any] = {
        "images": [str(pictures)],
        "steps": 1,
        "batch": 4,
        "size": 64,
        "clusters": 4,
    }
    return ViewsConfig(**settings | changes)


def test_spots_say_where_each_cell_of_a_view_is_in_the_other(pictures: Path) -> None:
    """Around a cell of A, and around its spot in B, are the same colours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpr_lite_ros.training.pairs.distort", lambda image, _rng: image)
        pairs = ViewPairs(views_config(pictures, size=96, batch=12))
        batches = [pairs[index] for index in range(3)]
    right, aside = [], []
    for first, second, spots, aligned, _, _ in batches:  # some of them mirrored
        assert aligned.all()
        for a, b, there in zip(first, second, spots.numpy(), strict=True):
            a, b = (cv2.blur(view.permute(1, 2, 0).numpy(), (5, 5)) for view in (a, b))
            for (x, y), (u, v) in zip(pairs.centres.astype(int), there, strict=True):
                if 0 <= u < 96 and 0 <= v < 96:
                    here = a[y, x].astype(float)
                    right.append(np.abs(here - b[int(v), int(u)]).mean())
                    aside.append(np.abs(here - b[y, x]).mean())
    assert len(right) > 500 and np.mean(right) < 0.4 * np.mean(aside)


def test_a_batch_follows_from_its_number_alone(pictures: Path, places: Path) -> None:
    config = views_config(pictures, places=[str(places)])
    for one, two in zip(ViewPairs(config)[7], ViewPairs(config)[7], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(ViewPairs(config)[7][0], ViewPairs(config)[8][0])


def test_a_single_image_is_two_places_one_some_steps_ahead(pictures: Path) -> None:
    for seed in range(10):
        plan = ViewPairs(views_config(pictures, batch=6))._plan(np.random.default_rng(seed))
        assert [pair.scene for pair in plan] == [0, 0, 2, 3, 3, 5]
        # The third is for the cells alone: as a whole it may be much closer or further away.
        assert [pair.one_place for pair in plan] == [True, True, False] * 2
        for here, ahead in (plan[:2], plan[3:5]):
            assert len({here.first, here.second, ahead.first, ahead.second}) == 1
            assert here.look.centre == ahead.look.centre and here.look.sides == ahead.look.sides
            assert here.look.mirrored == ahead.look.mirrored
            assert here.look.corridor == ahead.look.corridor
            # Those of one place are closer to each other than to those of the other.
            steps = [eye.forward for look in (here.look, ahead.look) for eye in look.eyes]
            assert max(abs(steps[0] - steps[1]), abs(steps[2] - steps[3])) <= 0.08
            assert min(steps[2:]) - max(steps[:2]) > 0.08


def test_what_is_near_moves_faster_than_what_is_far() -> None:
    corridor = Corridor((0.0, 0.0), 1.0, 1.0, 10.0)
    near, far = np.array([[0.8, 0.1]]), np.array([[0.1, 0.02]])
    # At 0.8 the wall is 1.25 ahead: 0.45 nearer it is seen at 1 / 0.8.
    ahead = Eye(forward=0.45)
    assert corridor.seen_from(ahead, near, AT_PICTURE) == pytest.approx(near / 0.64)
    grown = corridor.seen_from(ahead, far, AT_PICTURE) / far
    assert (grown < 1.06).all()
    # From 0.3 to the right, the wall is 0.3 / 1.25 further left.
    beside = Eye(sideways=0.3)
    shifted = corridor.seen_from(beside, near, AT_PICTURE)
    assert shifted == pytest.approx(np.array([[0.8 - 0.24, 0.1]]))


def test_a_walk_there_and_back_ends_where_it_began() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        corridor = some_corridor(rng)
        there = Eye(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.5))
        here = Eye(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.5))
        points = rng.uniform(-0.4, 0.4, (50, 2))
        away = corridor.seen_from(there, points, here)
        assert corridor.seen_from(here, away, there) == pytest.approx(points, abs=1e-9)


def test_what_is_behind_the_camera_is_out_of_sight() -> None:
    corridor = Corridor((0.0, 0.0), 1.0, 1.0, 10.0)
    walked_past = corridor.seen_from(Eye(forward=2.0), np.array([[0.9, 0.3]]), AT_PICTURE)
    assert (np.abs(walked_past) > 1).any() and np.isfinite(walked_past).all()


def test_views_from_different_distances_are_wrong_answers_only(pictures: Path) -> None:
    """A pair that is no place by itself costs nothing, however unlike its views are."""
    stage = Views(views_config(pictures), RepVGGLite())
    unit = torch.eye(4)
    vlad = torch.stack([unit[0], unit[1], unit[0], unit[2]])
    loss, recall = stage._global_loss(vlad, torch.tensor([True, False]))
    assert loss < 0.01 and recall == 1
    loss, _ = stage._global_loss(vlad, torch.tensor([True, True]))
    assert loss == pytest.approx(np.log(2) / 2, abs=0.01)
    # But it is a wrong answer to others.
    alike = torch.stack([unit[0], unit[0], unit[0], unit[0]])
    loss, _ = stage._global_loss(alike, torch.tensor([True, False]))
    assert loss == pytest.approx(np.log(2), rel=1e-4)


def test_places_of_a_drive_are_as_close_as_its_radii_say(
    make_picture: MakePicture, write_images: WriteImages, tmp_path: Path
) -> None:
    files = write_images(tmp_path / "drive", [make_picture(0, (32, 24))] * 40)
    rows = [f"{file.name},{i},0" for i, file in enumerate(files)]
    (tmp_path / "drive" / "poses.csv").write_text("\n".join(["file,x,y", *rows]) + "\n")
    drive = load_places(tmp_path / "drive" / "poses.csv", 2, 4)
    closest = []
    for seed in range(20):
        pairs = _distinct_places(drive, 100, np.random.default_rng(seed))
        for index, (query, partner) in enumerate(pairs):
            assert 0 < abs(query - partner) <= 2
            others = pairs[:index] + pairs[index + 1 :]
            assert all(abs(query - other) > 4 for _, other in others)
        closest.append(len(pairs))
    assert max(closest) >= 7, "one after the other, not 8 m or more apart"
    assert min(closest) < max(closest), "at times from all over the drive"


def test_half_a_batch_are_places_of_one_data_set_far_from_each_other(
    pictures: Path, places: Path
) -> None:
    pairs = ViewPairs(views_config(pictures, places=[str(places)], batch=12))
    number = {path: i // 2 for i, path in enumerate(sorted(places.parent.glob("*.png")))}
    for seed in range(5):
        plan = pairs._plan(np.random.default_rng(seed))
        of_places = [pair for pair in plan if pair.first.parent == places.parent]
        assert len(plan) == 12 and len(of_places) == 6
        assert all(number[pair.first] == number[pair.second] for pair in of_places)
        assert len({number[pair.first] for pair in of_places}) == 6
        assert not any(pair.aligned or pair.first == pair.second for pair in of_places)


def test_the_local_loss_knows_the_right_cell(pictures: Path) -> None:
    """Features that move with the scene cost nothing; the same features unmoved cost much."""
    stage = Views(views_config(pictures, size=128, anchors=64), RepVGGLite())
    torch.manual_seed(1)
    scene = torch.nn.functional.normalize(torch.randn(2, 192, 8, 12), dim=1)
    # B looks two cells to the right: what is at x in A is at x − 32 pixels in B.
    features = torch.cat([scene[..., 0:8], scene[..., 2:10]])
    unmoved = stage.centres.expand(2, -1, -1)
    shift = unmoved - torch.tensor([32.0, 0])
    aligned = torch.tensor([True, True])
    scenes = torch.tensor([0, 1])
    right, hits = stage._local_loss(features, shift, aligned, scenes)
    wrong, misses = stage._local_loss(features, unmoved, aligned, scenes)
    assert right < 0.01 and hits == 1
    assert wrong > 3 and misses < 0.2
    nothing, _ = stage._local_loss(features, shift, ~aligned, scenes)
    assert nothing == 0


def test_what_is_seen_from_some_steps_ahead_is_not_called_wrong(pictures: Path) -> None:
    """The same picture twice in a batch: of one scene it costs nothing, of two it does."""
    stage = Views(views_config(pictures, size=128, anchors=64), RepVGGLite())
    torch.manual_seed(1)
    seen = torch.nn.functional.normalize(torch.randn(1, 192, 8, 8), dim=1).expand(4, -1, -1, -1)
    unmoved, aligned = stage.centres.expand(2, -1, -1), torch.tensor([True, True])
    one, _ = stage._local_loss(seen, unmoved, aligned, torch.tensor([3, 3]))
    two, _ = stage._local_loss(seen, unmoved, aligned, torch.tensor([0, 1]))
    assert one < 0.01 and two > 0.6


def test_views_teach_places(pictures: Path, places: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = views_config(pictures, places=[str(places)], steps=30, workers=0, warmup_steps=5)
    stage = Views(config, RepVGGLite())
    held_out = ViewPairs(config)[2**41]
    with devices() as on:
        train(stage, replace(config, steps=1), tmp_path / "one.safetensors", on)
        stage.eval()
        before = stage(*held_out)["loss"]
        train(stage, config, tmp_path / "views.safetensors", on)
    stage.eval()
    assert stage(*held_out)["loss"] < before - 0.2
