"""Training: a loop that survives being killed, its stages, and the way to a bundle."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")

import torch.nn.functional as F
from torch import Tensor

from vpr_lite_ros.datasets import PlaceDataset, PlaceIds
from vpr_lite_ros.export import CheckpointError, load_networks
from vpr_lite_ros.image import fit
from vpr_lite_ros.inference import PlaceModel, open_model
from vpr_lite_ros.models.matcher import PairMatcher
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.models.repvgg import RepVGGLite
from vpr_lite_ros.training.augment import distort, random_crop
from vpr_lite_ros.training.distill import Distill, DistillConfig
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import image_files, read_rgb
from vpr_lite_ros.training.fit import (
    fit_place_network,
    k_means,
    principal_components,
    views_of,
)
from vpr_lite_ros.training.loop import devices, read_checkpoint, train
from vpr_lite_ros.training.pretrained import load_pretrained, read_clusters
from vpr_lite_ros.training.recipe import (
    MatcherRecipe,
    PlaceRecipe,
    read_recipe,
    train_place,
)
from vpr_lite_ros.training.thresholds import (
    Scores,
    least_threshold,
    recommend,
    score_labelled_sets,
    score_pairs,
)
from vpr_lite_ros.training.triplet import Triplet, TripletConfig, triplet_loss
from vpr_lite_ros.training.views import Views, ViewsConfig

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
WriteImages = Callable[[Path, Sequence[Image]], list[Path]]


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


# The loop of all stages


@pytest.fixture
def recipe(pictures: Path, places: Path, tmp_path: Path) -> dict[str, Any]:
    """Views, triplets and a bundle; some seconds a stage on one core."""
    return {
        "name": "made-in-a-test",
        "about": "a test",
        "licence": "none",
        "output": str(tmp_path / "out"),
        "views": {
            "images": [str(pictures)],
            "places": [str(places)],
            "steps": 6,
            "batch": 4,
            "size": 64,
            "clusters": 4,
            "workers": 0,
        },
        "triplet": {
            "data": {"table": str(places)},
            "validation": {"table": str(places)},
            "image_size": [96, 64],
            "steps": 6,
            "round_steps": 3,
            "batch": 2,
            "negatives": 2,
            "clusters": 4,
            "workers": 0,
        },
    }


def small_fit(pictures: Path, places: Path) -> dict[str, Any]:
    """The recipe's last stage, from the clusters that there are."""
    return {
        "images": [str(pictures), str(places.parent)],
        "labelled": [{"table": str(places)}],
        "image_size": [96, 64],
        "image_count": 14,
        "dimension": 16,
        "max_patches": 10,
    }


def write_recipe(content: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def start(path: Path, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    """``vpr-lite train place PATH`` in a process group of its own, or several by torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "vpr_lite_ros.cli", "train", "place", str(path), *options]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    return out


_KILLED = """
import os, signal, sys
from vpr_lite_ros.cli import main
from vpr_lite_ros.training import loop

save, last = loop.save, int(sys.argv.pop(1))

def save_and_die(*args, **options):
    save(*args, **options)
    if args[4] == last:
        os.kill(os.getpid(), signal.SIGKILL)

loop.save = save_and_die
sys.exit(main())
"""


def kill_after(path: Path, step: int) -> None:
    """``vpr-lite train place PATH``, killed when the checkpoint of this step is written."""
    command = [sys.executable, "-c", _KILLED, str(step), "train", "place", str(path)]
    killed = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=280
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()


def assert_same(one: Path, two: Path) -> None:
    a, b = read_checkpoint(one), read_checkpoint(two)
    assert a.step == b.step and a.finished and b.finished
    assert sorted(a.weights) == sorted(b.weights)
    for name, tensor in a.weights.items():
        assert torch.allclose(tensor.double(), b.weights[name].double(), atol=1e-5), name


@pytest.mark.parametrize(("stage", "killed_at"), [("views", 2), ("triplet", 4)])
def test_a_killed_training_goes_on_and_ends_where_it_would_have(
    recipe: dict[str, Any], tmp_path: Path, stage: str, killed_at: int
) -> None:
    recipe.pop("triplet" if stage == "views" else "views")
    whole = write_recipe(recipe | {"output": str(tmp_path / "whole")}, tmp_path / "whole.yaml")
    finish(start(whole))
    path, output = write_recipe(recipe, tmp_path / "recipe.yaml"), tmp_path / "out"
    kill_after(path, killed_at)
    killed = read_checkpoint(output / f"{stage}.safetensors")
    assert killed.step == killed_at and not killed.finished
    out = finish(start(path))
    assert f"going on at step {killed.step}" in out
    assert_same(output / f"{stage}.safetensors", tmp_path / "whole" / f"{stage}.safetensors")
    assert killed.config["batch"] == recipe[stage]["batch"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / stage)).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6], "lost with the killed process"
    assert not list(output.glob("*.tmp"))
    # All is done: the same command does nothing again.
    before = (output / f"{stage}.safetensors").stat().st_mtime_ns
    assert "is finished: 6 steps" in finish(start(path))
    assert (output / f"{stage}.safetensors").stat().st_mtime_ns == before


def test_a_changed_recipe_is_said_when_training_goes_on(
    recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ViewsConfig(**recipe["views"] | {"steps": 1})
    path = tmp_path / "a.safetensors"
    with devices() as on:
        train(Views(config, RepVGGLite()), config, path, on)
        train(Views(config, RepVGGLite()), config, path, on)
        assert not caplog.records
        changed = replace(config, learning_rate=0.25, anchors=7)
        train(Views(changed, RepVGGLite()), changed, path, on)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{path} began with learning_rate 0.0005, now 0.25",
        f"{path} began with anchors 384, now 7",
    ]


def test_each_step_is_saved_unless_asked_otherwise(recipe: dict[str, Any], tmp_path: Path) -> None:
    from vpr_lite_ros.training import loop

    saved: list[int] = []
    config = ViewsConfig(**recipe["views"])
    original = loop.save

    def save(*args: Any, **options: Any) -> None:
        saved.append(args[4])
        original(*args, **options)

    with pytest.MonkeyPatch.context() as patch, devices() as on:
        patch.setattr(loop, "save", save)
        train(Views(config, RepVGGLite()), config, tmp_path / "a.safetensors", on)
        assert saved == [1, 2, 3, 4, 5, 6, 6]
        saved.clear()
        rarely = replace(config, save_every_s=1e6)
        train(Views(rarely, RepVGGLite()), rarely, tmp_path / "b.safetensors", on)
        assert saved == [6]


def test_two_processes_average_their_gradients(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Started by torchrun, both end with the same weights, which are not those of one alone."""
    recipe |= {"views": recipe["views"] | {"steps": 2}, "triplet": recipe["triplet"] | {"steps": 3}}
    alone = write_recipe(recipe | {"output": str(tmp_path / "alone")}, tmp_path / "alone.yaml")
    finish(start(alone))
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    finish(start(path, processes=2))
    for stage, steps in (("views", 2), ("triplet", 3)):
        two = read_checkpoint(tmp_path / "out" / f"{stage}.safetensors")
        one = read_checkpoint(tmp_path / "alone" / f"{stage}.safetensors")
        assert two.step == steps and two.finished
        name = "vlad.centroids"
        assert not torch.equal(two.weights[name], one.weights[name])
    # Both processes mined the same: twice as many triplets, none of them empty.
    assert len(two.weights["mined"]) == 2 * len(one.weights["mined"]) and two.weights["mined"].any()


def test_tensorboard_shows_loss_and_recall(recipe: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_place(write_recipe(recipe, tmp_path / "recipe.yaml"))
    for stage, names in (
        ("views", {"loss", "recall", "local", "learning_rate"}),
        ("triplet", {"loss", "recall", "cache/recall_at_1", "validation/recall_at_5"}),
    ):
        events = EventAccumulator(str(tmp_path / "out" / stage)).Reload()
        assert names <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("cache/recall_at_1")] == [0, 3]


def test_the_learning_rate_warms_up_and_ends_near_zero(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = ViewsConfig(**recipe["views"] | {"warmup_steps": 2, "learning_rate": 1e-3})
    with devices() as on:
        train(Views(config, RepVGGLite()), config, tmp_path / "a.safetensors", on)
    events = EventAccumulator(str(tmp_path / "a")).Reload()
    rates = [event.value for event in events.Scalars("learning_rate")]
    cosine = [(1 + np.cos(np.pi * step / 6)) / 2 * 1e-3 for step in range(6)]
    assert rates == pytest.approx([cosine[0] / 2, *cosine[1:]], rel=1e-4)


def test_time_ends_a_training(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = ViewsConfig(**recipe["views"] | {"steps": 100000, "minutes": 0.05})
    with devices() as on:
        path = train(Views(config, RepVGGLite()), config, tmp_path / "a.safetensors", on)
    done = read_checkpoint(path)
    assert done.finished and 0 < done.step < 1000


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    class Breaks(Views):
        def forward(self, *batch: Tensor) -> dict[str, Tensor]:
            result = super().forward(*batch)
            if path.exists() and read_checkpoint(path).step == 3:
                result["loss"] = result["loss"] * float("nan")
            return result

    config, path = ViewsConfig(**recipe["views"]), tmp_path / "a.safetensors"
    with devices() as on, pytest.raises(TrainingError, match=r"step 3 is nan: lower learning_rate"):
        train(Breaks(config, RepVGGLite()), config, path, on)
    done = read_checkpoint(path)
    assert done.step == 3 and not done.finished
    assert all(tensor.isfinite().all() for tensor in done.weights.values())


@pytest.mark.parametrize(
    ("damage", "words"),
    [("truncate", "no checkpoint of a training stage"), ("other", "of another network")],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(
    recipe: dict[str, Any], tmp_path: Path, damage: str, words: str
) -> None:
    config = ViewsConfig(**recipe["views"] | {"steps": 1})
    path = tmp_path / "a.safetensors"
    with devices() as on:
        train(Views(config, RepVGGLite()), config, path, on)
        if damage == "truncate":
            path.write_bytes(path.read_bytes()[:1000])
        content = path.read_bytes()
        other = replace(config, clusters=5)
        with pytest.raises(CheckpointError, match=words) as caught:
            train(Views(other, RepVGGLite()), other, path, on)
    assert str(path) in str(caught.value) and path.read_bytes() == content


# Distilling


def test_distilling_brings_the_student_nearer_to_its_teachers(
    data_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = DistillConfig(
        images=[str(pictures)],
        teachers=str(data_dir / "teachers"),
        steps=30,
        batch=4,
        size=64,
        warmup_steps=5,
        workers=0,
    )
    stage = Distill(config, RepVGGLite())
    held_out = stage.batches()[2**41]
    with devices() as on:
        train(stage, replace(config, steps=1), tmp_path / "one.safetensors", on)
        stage.eval()
        before = stage(*held_out)
        train(stage, config, tmp_path / "student.safetensors", on)
    stage.eval()
    after = stage(*held_out)
    assert after["loss"] < before["loss"] and after["cosine"] > before["cosine"]
    # The teachers' scales are in the checkpoint, the teachers are not.
    weights = read_checkpoint(tmp_path / "student.safetensors").weights
    assert (weights["layer3_std"] > 0).all() and not any("resnet" in name for name in weights)


# Triplets


def test_the_triplet_loss_by_hand() -> None:
    unit = torch.eye(4)
    near = torch.tensor([0.96, 0.28, 0.0, 0.0])  # squared distance 0.08 from the first axis
    mid = torch.tensor([0.9, 0.0, 0.4359, 0.0])  # 0.2
    vlad = torch.stack(
        [torch.stack([unit[0], near, mid, unit[3]]), torch.stack([unit[0], mid, near, unit[3]])]
    )
    loss, satisfied = triplet_loss(vlad, 0.15)
    # First query: 0.08 + 0.15 − 0.2 = 0.03; second: 0.2 + 0.15 − 0.08 = 0.27; far ones: none.
    assert loss.item() == pytest.approx((0.03 + 0.27) / 2, abs=1e-4)
    assert satisfied.item() == 0.5


def test_mining_takes_the_nearest_positive_and_the_hardest_negatives(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = TripletConfig(**recipe["triplet"])
    with devices() as on:
        stage = Triplet(config, RepVGGLite(), on)
        figures = stage.begin_round(0)
        mined = stage.trained.get_buffer("mined").numpy()
        again = Triplet(config, RepVGGLite(), on)
        vlads = stage._describe(stage.images)
    assert mined.shape == (3 * 2, 4)
    count = len(stage.dataset.queries)
    for query, positive, *negatives in mined:
        assert (positive - count) // 2 == query // 2 and positive - count != query
        assert all((negative - count) // 2 != query // 2 for negative in negatives)
        far = [i for i in range(count, 2 * count) if (i - count) // 2 != query // 2]
        similarity = {i: float(vlads[i] @ vlads[query]) for i in far}
        assert sorted(negatives, key=lambda i: -similarity[i]) == list(negatives)
        assert similarity[negatives[0]] == pytest.approx(max(similarity.values()), abs=1e-5)
    assert 0 <= figures["cache/recall_at_1"] <= figures["validation/recall_at_5"] <= 1
    assert not again.trained.get_buffer("mined").any()
    # What a step reads is what was mined for it.
    (images,) = stage.batches()[1]
    for row, wanted in zip(images, mined[2:4], strict=True):
        assert all(
            torch.equal(image, stage.images[i]) for image, i in zip(row, wanted, strict=True)
        )


def test_too_few_negatives_are_named(recipe: dict[str, Any]) -> None:
    config = TripletConfig(**recipe["triplet"] | {"negatives": 11})
    with devices() as on, pytest.raises(TrainingError, match=r"has only 10 .* 11 are needed"):
        Triplet(config, RepVGGLite(), on).begin_round(0)


def test_triplets_leave_batch_norm_as_it_was(recipe: dict[str, Any], tmp_path: Path) -> None:
    backbone = RepVGGLite()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    config = TripletConfig(**recipe["triplet"] | {"learning_rate": 1e-3})
    with devices() as on:
        train(Triplet(config, backbone, on), config, tmp_path / "t.safetensors", on)
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert any(name.endswith("conv.weight") for name in changed)
    assert not any("running" in name for name in changed)


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


def test_thresholds_are_the_strictest_that_any_set_asks_for() -> None:
    def scores(match: float, inliers: float) -> Scores:
        """Ten true pairs, and ten false ones of which the best has these scores."""
        true = np.arange(20) < 10
        rising = np.linspace(0.1, 1, 10, dtype=np.float32)
        similarity = np.concatenate([rising * match, rising]).astype(np.float32)
        false = np.concatenate([np.ones(10), rising * match]).astype(np.float32)
        geometry = np.concatenate([np.full(10, 99), rising * inliers]).astype(np.float32)
        return Scores(similarity, false, geometry, true, 10, 10)

    found = recommend({"rooms": scores(0.2, 40.0), "street": scores(0.5, 30.0)}, 0.0)
    assert found["match"] == pytest.approx(0.5) and found["inliers"] == 41
    # The least similar true pairs of the set whose are less similar.
    assert found["similarity"] == pytest.approx(
        np.quantile(np.linspace(0.02, 0.2, 10), 0.02), abs=1e-3
    )
    assert recommend({"rooms": scores(0.2, 40.0)}, 0.1)["match"] == pytest.approx(0.18, abs=1e-3)
    # A drawn town is asked for the match score only.
    town = replace(scores(0.6, 80.0), drawn=True)
    found = recommend({"rooms": scores(0.2, 40.0), "town 1": town}, 0.0)
    assert found["match"] == pytest.approx(0.6) and found["inliers"] == 41


def test_a_town_is_a_labelled_set(tiny_model: PlaceModel) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpr_lite_ros.training.town.TOWN_STEP", 15)
        found = score_labelled_sets(tiny_model, [{"town": 5}], most_queries=4)
    scores = found["town 5"]
    assert list(found) == ["town 5"] and scores.drawn
    # Two laps: frames of the second were taken near those of the first.
    assert len(scores.true) > 20 and 0 < scores.true.sum() < len(scores.true)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"a\.jpg cannot be read"):
        read_rgb(tmp_path / "a.jpg")


def test_pairs_of_one_place_score_higher(
    tiny_model: PlaceModel, make_picture: MakePicture, write_images: WriteImages, tmp_path: Path
) -> None:
    pictures = [make_picture(i // 2) for i in range(8)]
    pictures[1::2] = [(picture * 0.9 + 8).astype(np.uint8) for picture in pictures[1::2]]
    files = write_images(tmp_path / "pairs", pictures)
    places = tuple("aabbccdd")
    dataset = PlaceDataset("pairs", tuple(files), tuple(files), PlaceIds(places, places))
    scores = score_pairs(tiny_model, dataset)
    assert scores.queries == scores.recognised == 8
    assert scores.true.sum() == 8 and len(scores.true) == 8 * (1 + 6)
    for values in (scores.similarity, scores.match):
        assert values[scores.true].min() > values[~scores.true].max()


# From nothing to a bundle


def test_one_command_makes_a_bundle(
    recipe: dict[str, Any], pictures: Path, places: Path, tmp_path: Path
) -> None:
    """Pretrained backbone, views, triplets, fit; the bundle runs and says how it was made."""
    recipe["fit"] = {
        "images": [str(pictures), str(places.parent)],
        "labelled": [{"table": str(places)}, {"table": str(places), "distorted": True}],
        "most_queries": 8,
        "image_size": [96, 64],
        "image_count": 14,
        "dimension": 16,
        "max_patches": 10,
        "false_rate": 0.1,
    }
    torch.manual_seed(5)
    pretrained = RepVGGLite()
    last_stage = {"stage4.0.rbr_dense.conv.weight": torch.zeros(1), "linear.bias": torch.zeros(2)}
    torch.save(pretrained.state_dict() | last_stage, tmp_path / "a0.pth")
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    out = finish(start(path, "--backbone", str(tmp_path / "a0.pth")))
    bundle = tmp_path / "out" / "bundle"
    assert out.strip().endswith(str(bundle))
    assert "stage4.0.rbr_dense.conv.weight" in out and "linear.bias" in out, "not accounted for"
    model = open_model(bundle)
    card = model.bundle.card
    assert (card["about"], model.bundle.name) == ("a test", "made-in-a-test")
    assert (model.bundle.dimension, model.bundle.max_patches) == (16, 10)
    assert card["training"]["views"]["steps"] == 6
    assert card["training"]["views"]["data"] == ["images", "places"]
    assert card["training"]["triplet"]["batch"] == 2
    assert card["training"]["licence"] == "none"
    assert card["training"]["fit"].startswith("PCA on 14 images")
    thresholds = card["thresholds"]
    assert -1 <= thresholds["similarity"] <= 1 and 0 <= thresholds["match"] <= 1
    assert isinstance(thresholds["inliers"], int) and thresholds["inliers"] >= 0
    # The clusters are those that triplets trained, the backbone began as it was given.
    place, _, _ = load_networks(tmp_path / "out" / "networks.safetensors")
    trained = read_checkpoint(tmp_path / "out" / "triplet.safetensors")
    assert torch.equal(place.vlad.centroids, trained.part("vlad")["centroids"])
    weights, given = place.backbone.state_dict(), pretrained.state_dict()
    name = "stages.2.3.conv_kxk.conv.weight"
    distance = (weights[name] - given[name]).norm() / given[name].norm()
    assert 0 < distance < 0.1


@pytest.mark.parametrize(("is_bundle", "restored"), [(True, 1), (False, 0)])
def test_batch_norm_is_restored_where_training_begins_with_a_bundle(
    recipe: dict[str, Any], tmp_path: Path, is_bundle: bool, restored: int
) -> None:
    recipe.pop("triplet")
    recipe["views"]["steps"] = 1
    given = tmp_path if is_bundle else tmp_path / "a0.pth"
    calls: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        where = "vpr_lite_ros.training.recipe"
        patch.setattr(f"{where}.load_pretrained", lambda _backbone, path: path == given or 1 / 0)
        patch.setattr(f"{where}.restore_statistics", lambda _, images: calls.append(images.shape))
        train_place(write_recipe(recipe, tmp_path / "recipe.yaml"), given)
    assert calls == [(4, 3, 64, 64)] * restored


def test_folded_training_goes_on_where_a_bundle_ends(
    recipe: dict[str, Any], tiny_bundle: Path, pictures: Path, places: Path, tmp_path: Path
) -> None:
    recipe.pop("triplet")
    recipe["views"] |= {"steps": 2, "folded": True, "learning_rate": 1e-4, "warmup_steps": 1}
    recipe["fit"] = small_fit(pictures, places)
    given, clusters = RepVGGLite(), read_clusters(tiny_bundle)
    load_pretrained(given, tiny_bundle)
    before = given.eval().folded().state_dict()
    with pytest.MonkeyPatch.context() as patch:
        # There is no batch norm to restore.
        patch.setattr("vpr_lite_ros.training.recipe.restore_statistics", None)
        train_place(write_recipe(recipe, tmp_path / "recipe.yaml"), tiny_bundle)
    trained = read_checkpoint(tmp_path / "out" / "views.safetensors")
    # A step of AdamW moves a weight by the learning rate at most, the bundle is of float16.
    changes = [
        (weight - before[name]).abs().max() for name, weight in trained.part("backbone").items()
    ]
    assert 1e-5 < max(changes) < 1e-3
    moved = (trained.part("vlad")["centroids"] - clusters["centroids"]).abs().max()
    assert 0 < moved < 1e-3
    # What was fitted is what was trained, taken apart into branches.
    place, _, _ = load_networks(tmp_path / "out" / "networks.safetensors")
    for name, weight in place.backbone.eval().folded().state_dict().items():
        torch.testing.assert_close(weight, trained.part("backbone")[name], atol=1e-5, rtol=1e-4)
    assert torch.equal(place.vlad.centroids, trained.part("vlad")["centroids"])


@pytest.mark.parametrize("from_bundle", [False, True])
def test_what_follows_distilling_finds_clusters_of_its_own(
    recipe: dict[str, Any],
    tiny_bundle: Path,
    data_dir: Path,
    pictures: Path,
    tmp_path: Path,
    from_bundle: bool,
) -> None:
    recipe.pop("triplet")
    recipe["views"] |= {"steps": 1, "learning_rate": 1e-9}
    recipe["distil"] = {
        "images": [str(pictures)],
        "teachers": str(data_dir / "teachers"),
        "steps": 1,
        "batch": 2,
        "size": 64,
        "workers": 0,
    }
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    train_place(path, tiny_bundle if from_bundle else None)
    found = read_checkpoint(tmp_path / "out" / "views.safetensors").part("vlad")["centroids"]
    before = read_clusters(tiny_bundle)["centroids"]
    assert found.shape == (4, RepVGGLite.width)
    assert found.shape != before.shape or (found - before).abs().max() > 1e-2


def test_a_bundle_is_fitted_to_other_images(
    recipe: dict[str, Any], tiny_bundle: Path, pictures: Path, places: Path, tmp_path: Path
) -> None:
    """Without training: the same backbone and clusters, projections of one's own images."""
    content = {k: recipe[k] for k in ("name", "about", "licence", "output")}
    content["fit"] = small_fit(pictures, places)
    bundle = train_place(write_recipe(content, tmp_path / "recipe.yaml"), tiny_bundle)
    place, _, _ = load_networks(tmp_path / "out" / "networks.safetensors")
    assert torch.equal(place.vlad.centroids, read_clusters(tiny_bundle)["centroids"])
    assert place.whole.weight.shape == (16, 2 * place.vlad.clusters * RepVGGLite.width)
    began_with = open_model(bundle).bundle.card["training"]["began_with"]
    assert began_with["bundle"] == open_model(tiny_bundle).bundle.name


def test_images_are_whitened_at_both_resolutions(
    pictures: Path, tiny_networks: tuple[PlaceNetwork, PairMatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the images that it was fitted to, the projection's output is white."""
    for name in ("distort", "move"):
        monkeypatch.setattr(f"vpr_lite_ros.training.fit.{name}", lambda image, _: image)
    files, size = list(image_files(pictures)), (96, 64)
    backbone = copy.deepcopy(tiny_networks[0].backbone)
    place = fit_place_network(
        backbone, files, image_size=size, clusters=4, dimension=4, max_patches=10
    )
    images = torch.from_numpy(np.stack([fit(read_rgb(file), size) for file in files]))
    with torch.no_grad():
        cells = F.normalize(place.local_features(images), dim=2)
        vlads = place.vlads(images, cells, place.vlad.soft_assign(cells))[:, 0]
        white = F.linear(vlads, place.whole.weight, place.whole.bias)
        patches = F.linear(place.vlad(cells), place.vlad.pca.weight, place.vlad.pca.bias)
    # Each image was seen three times.
    count = 3 * len(files) - 1
    for projected in (white, patches):
        assert projected.mean(dim=0).abs().max() < 1e-3
        assert torch.allclose(3 * projected.T @ projected / count, torch.eye(4), atol=1e-2)


def test_an_image_is_fitted_as_it_is_distorted_and_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpr_lite_ros.training.fit.distort", lambda image, _: image + 1)
    monkeypatch.setattr("vpr_lite_ros.training.fit.move", lambda image, _: image + 2)
    rng, image = np.random.default_rng(0), np.zeros((4, 6, 3), np.uint8)
    seen = [tuple(int(view[0, 0, 0]) for view in views_of(image, rng)) for _ in range(50)]
    assert set(seen) == {(0, 1, 2), (0, 1, 3)}


def test_empty_clusters_need_a_stage_that_trains_some(
    recipe: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    content = {k: recipe[k] for k in ("name", "about", "licence", "output")}
    content["fit"] = {"images": [str(pictures)], "labelled": []}
    with pytest.raises(TrainingError, match=r"fit\.clusters is empty"):
        train_place(write_recipe(content, tmp_path / "recipe.yaml"))


# Configuration files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{name: a, about: b, licence: d, output: c, views: {image: [a], steps: 3}}",
            ["views.image", "unknown"],
        ),
        (
            "{name: a, about: b, licence: d, output: c, views: {images: [a]}}",
            ["views.steps", "missing"],
        ),
        ("{name: a, about: b, licence: d, output: c, views: 3}", ["views", "3"]),
        (
            "{name: a, about: b, licence: d, output: c, "
            "views: {images: [a], steps: 3, learning_rate: 1e-4}}",
            ["views.learning_rate is '1e-4'", "1.0e-4"],
        ),
        (
            "{name: a, about: b, licence: d, output: c, views: {images: [a], steps: 0}}",
            ["views.steps is 0"],
        ),
        (
            "{name: a, about: b, licence: d, output: c, views: {images: [a], steps: 3, size: 150}}",
            ["views.size is 150"],
        ),
        ("{name: a, about: b, licence: d, output: c}", ["no stage", "distil, views, triplet, fit"]),
        ("{name: a, about: b, licence: d, views: {images: [a], steps: 3}}", ["output is missing"]),
        ("{name: a, about: b, licence: d, output: c, view: {}}", ["view is unknown"]),
        ("- a", ["no entries"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(TrainingError) as caught:
        read_recipe(path, PlaceRecipe)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere"):
        read_recipe(tmp_path / "nowhere.yaml", PlaceRecipe)


def test_a_folder_without_images_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipe["views"]["images"] = [str(tmp_path / "empty")]
    with pytest.raises(TrainingError, match=r"views\.images: .*empty"):
        train_place(write_recipe(recipe, tmp_path / "recipe.yaml"))


def test_the_shipped_recipes_can_be_read(repository: Path) -> None:
    for path in (repository / "config" / "training").glob("*.yaml"):
        kind = MatcherRecipe if path.stem.startswith("matcher") else PlaceRecipe
        assert read_recipe(path, kind).name == path.stem


def test_images_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a/1.png", "a/notes.txt", "c.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [os.fspath(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert found == ["a/1.png", "b/2.JPG", "c.jpeg"]
