"""The recipe of the first bundle: distilling that survives being killed, fitting, thresholds."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")

from safetensors import safe_open  # noqa: E402

from vpr_lite_ros.inference import PlaceModel, open_model  # noqa: E402
from vpr_lite_ros.training.augment import distort, random_crop  # noqa: E402
from vpr_lite_ros.training.datasets import PlaceDataset, PlaceIds  # noqa: E402
from vpr_lite_ros.training.distill import (  # noqa: E402
    DistillConfig,
    Student,
    distil,
    load_checkpoint,
    save_checkpoint,
)
from vpr_lite_ros.training.files import image_files  # noqa: E402
from vpr_lite_ros.training.fit import k_means, principal_components  # noqa: E402
from vpr_lite_ros.training.recipe import (  # noqa: E402
    FitConfig,
    RecipeError,
    fit_bundle,
    read_recipe,
)
from vpr_lite_ros.training.thresholds import (  # noqa: E402
    least_threshold,
    score_pairs,
)

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]


def write_pictures(folder: Path, pictures: list[Image]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:03}.png" for index in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        assert cv2.imwrite(str(file), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return files


# What the student sees


def test_distortions_change_the_light_and_move_nothing(make_picture: MakePicture) -> None:
    picture = make_picture(0, (192, 128))
    changed = []
    for seed in range(40):
        seen = distort(picture, np.random.default_rng(seed))
        assert seen.shape == picture.shape and seen.dtype == np.uint8
        assert np.array_equal(seen, distort(picture, np.random.default_rng(seed)))
        changed.append(float(np.abs(seen.astype(int) - picture).mean()))
        # Were it moved, it would fit better somewhere else than in its place.
        grey, mine = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (picture, seen))
        shift, certainty = cv2.phaseCorrelate(grey.astype(np.float32), mine.astype(np.float32))
        assert certainty < 0.3 or np.hypot(*shift) < 1.5, seed
    assert np.median(changed) > 15 and min(changed) >= 0


@pytest.mark.parametrize("size", [(150, 150), (480, 270), (960, 266), (90, 70)])
def test_crops_are_windows_of_the_size_asked_for(
    make_picture: MakePicture, size: tuple[int, int]
) -> None:
    picture = make_picture(1, size)
    crops = [random_crop(picture, np.random.default_rng(seed), 64) for seed in range(20)]
    assert {crop.shape for crop in crops} == {(64, 64, 3)}
    assert len({crop.tobytes() for crop in crops}) == 20


# Distilling


@pytest.fixture
def distill_config(data_dir: Path, make_picture: MakePicture, tmp_path: Path) -> DistillConfig:
    """Eight steps on small crops with the real teachers; some seconds on one core."""
    write_pictures(tmp_path / "images", [make_picture(i, (160, 120)) for i in range(6)])
    return DistillConfig(
        images=[str(tmp_path / "images")],
        teachers=str(data_dir / "teachers"),
        output=str(tmp_path / "student.safetensors"),
        steps=8,
        batch=4,
        size=64,
        warmup_steps=2,
        save_every=2,
        workers=0,
    )


_DISTIL = """
import json, sys
import torch
from vpr_lite_ros.training.distill import DistillConfig, distil
torch.set_num_threads(1)
distil(DistillConfig(**json.loads(sys.argv[1])))
"""


def _distil_in_a_process(config: DistillConfig) -> subprocess.Popen[bytes]:
    import json
    from dataclasses import asdict

    values = {k: v for k, v in asdict(config).items() if k != "minutes"}
    return subprocess.Popen([sys.executable, "-c", _DISTIL, json.dumps(values)])


def _step(path: Path) -> int:
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def test_a_killed_training_goes_on_and_ends_where_it_would_have(
    distill_config: DistillConfig, tmp_path: Path
) -> None:
    whole = replace(distill_config, output=str(tmp_path / "whole.safetensors"))
    assert _distil_in_a_process(whole).wait(200) == 0
    output = Path(distill_config.output)
    process = _distil_in_a_process(distill_config)
    until = time.monotonic() + 200
    while _step(output) == 0:
        assert process.poll() is None and time.monotonic() < until, "no checkpoint was written"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = _step(output)
    assert 0 < killed_at < 8, "it ended before it could be killed"
    assert _distil_in_a_process(distill_config).wait(200) == 0
    assert _step(output) == 8
    with safe_open(output, framework="pt") as one, safe_open(whole.output, framework="pt") as two:
        assert sorted(one.keys()) == sorted(two.keys())
        for name in one.keys():
            assert torch.allclose(one.get_tensor(name), two.get_tensor(name), atol=1e-5), name
        assert '"batch": 4' in one.metadata()["config"]
    assert not list(tmp_path.glob("*.tmp"))


def test_distilling_brings_the_student_nearer_to_its_teachers(
    distill_config: DistillConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    distil(replace(distill_config, steps=30, save_every=10))
    losses = [
        float(record.getMessage().split()[3])
        for record in caplog.records
        if record.getMessage().startswith("step ")
    ]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_a_folder_without_images_is_named(distill_config: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        distil(replace(distill_config, images=[str(tmp_path / "empty")]))


# Fitting


def test_k_means_finds_the_clusters_that_are_there() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16, dtype=np.float32)
    features = np.concatenate([c + 0.05 * rng.standard_normal((50, 16)) for c in centres])
    found = k_means(features.astype(np.float32), 4, seed=0)
    distances = np.linalg.norm(found[:, None] - centres[None], axis=2)
    assert sorted(distances.argmin(axis=1).tolist()) == [0, 1, 2, 3]
    assert distances.min(axis=1).max() < 0.05


def test_principal_components_whiten() -> None:
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((12, 12))
    vectors = torch.from_numpy((rng.standard_normal((400, 12)) @ mix + 3).astype(np.float32))
    mean, components, variances = principal_components(vectors, 5)
    projected = ((vectors - mean) @ components.T / variances.sqrt()).numpy()
    assert np.cov(projected.T) == pytest.approx(np.eye(5), abs=1e-3)
    largest = np.sort(np.linalg.eigvalsh(np.cov(vectors.numpy().T)))[::-1][:5]
    assert variances.numpy() == pytest.approx(largest, rel=1e-3)


# Thresholds


def test_the_least_threshold_lets_few_false_pairs_pass() -> None:
    scores = np.linspace(0, 1, 1001, dtype=np.float32)
    true = np.zeros(1001, bool)
    true[::100] = True
    for rate in (0.0, 0.01, 0.1):
        threshold = least_threshold(scores, true, rate)
        passing = scores[~true] >= threshold
        assert passing.sum() == int(rate * (~true).sum())
    with pytest.raises(ValueError, match="no false pair"):
        least_threshold(scores, np.ones(1001, bool), 0.1)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def labelled_folder(make_picture: MakePicture, tmp_path: Path) -> Path:
    """The three labelled sets, in their layouts, with three places of two images each."""
    root = tmp_path / "labelled"
    for name, table in (("grief_places", "places.csv"), ("webcam", "images.csv")):
        pictures = [make_picture(i // 2, (160, 120)) for i in range(6)]
        pictures[1::2] = [(picture * 0.5).astype(np.uint8) for picture in pictures[1::2]]
        files = write_pictures(root / name / "images", pictures)
        rows = [{"file": f"images/{f.name}", "place": i // 2} for i, f in enumerate(files)]
        _write_table(root / name / table, rows)
    files = write_pictures(
        root / "karlsruhe" / "images", [make_picture(10 + i, (160, 120)) for i in range(6)]
    )
    positions = (0, 8, 20, 40, 49, 80)
    rows = [
        {"file": f"images/{f.name}", "x": x, "y": 0}
        for f, x in zip(files, positions, strict=True)
    ]
    _write_table(root / "karlsruhe" / "poses.csv", rows)
    return root


def test_pairs_of_one_place_score_higher(
    tiny_model: PlaceModel, make_picture: MakePicture, tmp_path: Path
) -> None:
    pictures = [make_picture(i // 2) for i in range(8)]
    pictures[1::2] = [(picture * 0.9 + 8).astype(np.uint8) for picture in pictures[1::2]]
    files = write_pictures(tmp_path / "pairs", pictures)
    places = tuple("aabbccdd")
    dataset = PlaceDataset("pairs", tuple(files), tuple(files), PlaceIds(places, places))
    scores = score_pairs(tiny_model, dataset)
    assert scores.queries == scores.recognised == 8
    assert scores.true.sum() == 8 and len(scores.true) == 8 * (1 + 6)
    for values in (scores.similarity, scores.match):
        assert values[scores.true].min() > values[~scores.true].max()


# The whole second half of the recipe


def test_a_checkpoint_becomes_a_bundle_with_thresholds(
    labelled_folder: Path, make_picture: MakePicture, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    student = Student()
    optimiser = torch.optim.AdamW(student.parameters())
    backbone = tmp_path / "backbone.safetensors"
    save_checkpoint(backbone, student, optimiser, 12, 90.0, DistillConfig([], "", ""))
    assert load_checkpoint(backbone, Student()) == (12, 90.0)
    images = tmp_path / "fit"
    write_pictures(images, [make_picture(50 + i, (160, 120)) for i in range(10)])
    config = FitConfig(
        backbone=str(backbone),
        images=[str(images)],
        labelled=str(labelled_folder),
        networks=str(tmp_path / "networks.safetensors"),
        bundle=str(tmp_path / "bundle"),
        name="made-in-a-test",
        about="a test",
        image_count=9,
        clusters=4,
        dimension=16,
        max_patches=30,
        false_rate=0.1,
    )
    bundle = fit_bundle(config)
    model = open_model(bundle)
    card = model.bundle.card
    assert (card["about"], model.bundle.name) == ("a test", "made-in-a-test")
    assert (model.bundle.dimension, model.bundle.max_patches) == (16, 30)
    assert "12 steps" in card["training"]["backbone"]
    assert card["training"]["clusters_and_pca"].startswith("9 images")
    thresholds = card["thresholds"]
    assert -1 <= thresholds["similarity"] <= 1 and 0 <= thresholds["match"] <= 1
    assert isinstance(thresholds["inliers"], int) and thresholds["inliers"] >= 0
    assert set(thresholds["measured_on"]) == {"grief_places", "webcam", "karlsruhe"}


# Configuration files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distil: {images: [a], teachers: b, output: c, step: 3}", ["distil.step", "unknown"]),
        ("distil: {images: [a], teachers: b}", ["distil.output", "missing"]),
        ("fit: {}", ["distil"]),
        ("- a", ["distil"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, "distil", DistillConfig)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere"):
        read_recipe(tmp_path / "nowhere.yaml", "fit", FitConfig)


def test_the_shipped_recipe_can_be_read(repository: Path) -> None:
    for path in (repository / "config" / "training").glob("*.yaml"):
        assert read_recipe(path, "distil", DistillConfig).steps > 0
        assert read_recipe(path, "fit", FitConfig).name == path.stem


def test_images_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a/1.png", "a/notes.txt", "c.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [os.fspath(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert found == ["a/1.png", "b/2.JPG", "c.jpeg"]
