"""What several test files share. Imports neither ROS nor torch until a fixture needs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

if TYPE_CHECKING:
    from keyframes import Open
    from robot import Robot

    from vpr_lite_ros.database import KeyframeDatabase
    from vpr_lite_ros.detector import LoopDetector
    from vpr_lite_ros.inference import PlaceModel
    from vpr_lite_ros.models.matcher import PairMatcher
    from vpr_lite_ros.models.place import PlaceNetwork

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
WriteImages = Callable[[Path, Sequence[Image]], list[Path]]

TINY_SIZE = (160, 128)
TINY_PATCHES = 20
TINY_DIMENSION = 64


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir(repository: Path) -> Path:
    """Real images and teachers; without them the test is skipped."""
    folder = Path(os.environ.get("VPR_LITE_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set VPR_LITE_DATA to the folder with train/ and eval/")
    return folder


@pytest.fixture(scope="session")
def corridor(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real recording, and a folder that keeps what the shipped model says of it."""
    folder = data_dir / "eval" / "corridor_two_laps"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder, tmp_path_factory.mktemp("corridor")


@pytest.fixture(scope="session")
def make_picture() -> MakePicture:
    """``make_picture(seed, (width, height))``: a picture that is the same for the same seed."""
    return _make_picture


def _make_picture(seed: int, size: tuple[int, int] = TINY_SIZE) -> Image:
    rng = np.random.default_rng(seed)
    width, height = size
    # Blobs of all sizes, as in photographs; a picture of one scale alone excites few features.
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24):
        noise = rng.random((cells, cells, 3), dtype=np.float32) - 0.5
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    out: Image = np.clip(128 + 90 * picture, 0, 255).astype(np.uint8)
    for _ in range(8):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        side = int(rng.integers(width // 16, width // 4))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        cv2.rectangle(out, (x, y), (x + side, y + side // 2), colour, -1)
    return out


@pytest.fixture(scope="session")
def write_images() -> WriteImages:
    """``write_images(folder, pictures)``: 000.png, 001.png, …; their paths."""

    def write(folder: Path, pictures: Sequence[Image]) -> list[Path]:
        folder.mkdir(parents=True)
        files = [folder / f"{index:03}.png" for index in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            assert cv2.imwrite(str(file), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        return files

    return write


@pytest.fixture
def pictures(write_images: WriteImages, tmp_path: Path) -> Path:
    """A folder of six images."""
    write_images(tmp_path / "images", [_make_picture(i, (160, 120)) for i in range(6)])
    return tmp_path / "images"


@pytest.fixture
def places(write_images: WriteImages, tmp_path: Path) -> Path:
    """A table of six places 30 m apart, each seen twice, 2 m apart."""
    seen = [_make_picture(i // 2, (160, 120)) for i in range(12)]
    seen[1::2] = [np.roll(picture, 6, axis=1) for picture in seen[1::2]]
    files = write_images(tmp_path / "places", seen)
    rows = [f"{file.name},{30 * (i // 2) + 2 * (i % 2)},0" for i, file in enumerate(files)]
    (tmp_path / "places" / "poses.csv").write_text("\n".join(["file,x,y", *rows]) + "\n")
    return tmp_path / "places" / "poses.csv"


@pytest.fixture(scope="session")
def tiny_networks() -> tuple[PlaceNetwork, PairMatcher]:
    """Seeded random networks for small images, fitted to pictures without gradient steps.

    Without the fit, random features are nearly the same for every picture and nothing could be
    told apart.
    """
    import torch
    import torch.nn.functional as F

    from vpr_lite_ros.models.matcher import PairMatcher
    from vpr_lite_ros.models.place import PlaceNetwork
    from vpr_lite_ros.models.repvgg import RepVGGBlock

    with torch.random.fork_rng():
        torch.manual_seed(7)
        place = PlaceNetwork(TINY_SIZE, 8, TINY_DIMENSION, TINY_PATCHES)
        match = PairMatcher(TINY_DIMENSION).eval()
        pictures = np.stack([_make_picture(1000 + i) for i in range(10)])
        with torch.no_grad():
            # Batch norm takes on these pictures' statistics, so that no layer fades out. The
            # identity stays one and outweighs the random branches: a deep random network is
            # chaotic and, as no trained one does, turns bfloat16's rounding into another place.
            place.train()
            for module in place.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
                if isinstance(module, RepVGGBlock) and module.identity is not None:
                    module.conv_kxk.bn.weight.fill_(0.08)
                    module.conv_1x1.bn.weight.fill_(0.08)
                    module.identity.eval()
            place.local_features(torch.from_numpy(pictures))
            place.eval()
            cells = F.normalize(place.local_features(torch.from_numpy(pictures)), dim=2)
            place.vlad.set_clusters(cells[:8, 17], sharpness=8.0)
            groups = cells[:, place.cells].flatten(0, 1)
            vlad = place.vlad.aggregate(groups, place.vlad.soft_assign(groups))
            mean = vlad.mean(dim=0)
            _, deviations, components = torch.linalg.svd(vlad - mean, full_matrices=False)
            # Half-whitened: ten pictures say little about the weaker directions but noise.
            variances = (deviations**2 / len(vlad))[:TINY_DIMENSION]
            variances = variances.clamp_min(float(variances[8]))
            place.vlad.pca.set(mean, components[:TINY_DIMENSION], variances)
            # Of the two VLADs of an image, mostly the first.
            weight, bias = place.vlad.pca.weight, place.vlad.pca.bias
            place.whole.weight.copy_(torch.cat([weight, 0.3 * weight], dim=1))
            place.whole.bias.copy_(1.3 * bias)
    return place, match


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_networks: tuple[PlaceNetwork, PairMatcher], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model bundle exported from ``tiny_networks``; copy it before changing it."""
    from vpr_lite_ros.export import export_bundle

    about: dict[str, Any] = {"training": "none: seeded random weights, for tests"}
    output = tmp_path_factory.mktemp("bundles") / "tiny"
    return export_bundle(*tiny_networks, about, output, name="tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> PlaceModel:
    """``tiny_bundle`` on ONNX Runtime, which computes in float32 on every machine."""
    from vpr_lite_ros.inference import open_model

    return open_model(tiny_bundle, "onnxruntime", threads=2)


ALL_PASS = {
    "similarity_threshold": -1.0,
    "match_threshold": 0.0,
    "min_matches": 0,
    "min_inliers": 0,
    "min_agreeing_keyframes": 1,
    "min_time_gap_s": 0.0,
    "min_closure_interval_s": 0.0,
    "odometry.max_drift": 1000.0,
    "odometry.place_radius_m": 1e6,
    "keyframe.min_interval_s": 0.0,
    "keyframe.max_similarity": 0.99,
}
"""Every check is off; tests turn on the one they are about."""


@pytest.fixture
def make_detector(tiny_model: PlaceModel, tmp_path: Path) -> Iterator[Callable[..., LoopDetector]]:
    """``make_detector(**{parameter: value})``; each has the same database file."""
    from vpr_lite_ros.config import make_config
    from vpr_lite_ros.database import KeyframeDatabase
    from vpr_lite_ros.detector import LoopDetector

    databases: list[KeyframeDatabase] = []

    def make(
        session: str = "one", robot_id: int = 0, read_only: bool = False, **values: object
    ) -> LoopDetector:
        bundle = tiny_model.bundle
        databases.append(
            KeyframeDatabase(
                tmp_path / "keyframes.db",
                model_id=bundle.model_id,
                dimension=bundle.dimension,
                max_patches=bundle.max_patches,
                session=session,
                robot_id=robot_id,
                read_only=read_only,
            )
        )
        return LoopDetector(make_config({**ALL_PASS, **values}), tiny_model, databases[-1])

    yield make
    for database in databases:
        database.close()


@pytest.fixture(scope="session")
def ros_context() -> Iterator[Any]:
    """ROS in this process; without it the test is skipped."""
    from robot import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def make_robot(ros_context: Any, tiny_bundle: Path) -> Iterator[Callable[..., Robot]]:
    """``make_robot(namespace, **parameters)``: a node under test, with its camera."""
    from robot import Robot

    robots: list[Robot] = []

    def make(namespace: str = "/robot", **options: Any) -> Robot:
        options.setdefault("bundle", tiny_bundle)
        robots.append(Robot(ros_context, namespace, **options))
        return robots[-1]

    yield make
    for robot in robots:
        robot.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The database that ``open_database`` opens unless it is told another."""
    return tmp_path / "keyframes.db"


@pytest.fixture
def open_database(path: Path) -> Iterator[Open]:
    """Opens the file of ``path``; whatever is still open is closed at the end."""
    from keyframes import DIMENSION, PATCHES

    from vpr_lite_ros.database import KeyframeDatabase

    opened: list[KeyframeDatabase] = []

    def open_it(session: str = "monday", **changes: Any) -> KeyframeDatabase:
        arguments: dict[str, Any] = {
            "path": path,
            "model_id": "tiny-0123",
            "dimension": DIMENSION,
            "max_patches": PATCHES,
            "session": session,
        }
        arguments |= changes
        opened.append(KeyframeDatabase(**arguments))
        return opened[-1]

    yield open_it
    for database in opened:
        database.close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``mount("size=2m")``: a folder on a small disk of its own, a real file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount_it(options: str) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount_it
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
