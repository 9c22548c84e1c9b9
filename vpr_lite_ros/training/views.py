"""Train for places: two views of one place are more alike than views of any two places.

The views are one image cut out twice, from another point of view and in another light, or two
images of one place: a webcam's by day and by night, neighbours of a drive. Two losses, both
InfoNCE over all of a batch:

- *local*: a cell of one view against what lies at the same spot of the other; all other cells
  of all other views are wrong. Only where it is known which spot is the same.
- *global*: the NetVLAD vector (paper, equation 1, before PCA) of one view against all views.

Half of a batch are places of one data set, far from each other but alike: the negatives that
teach most. The other half comes from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpr_lite_ros.datasets import PlaceDataset, load_places, load_sequences
from vpr_lite_ros.image import Image
from vpr_lite_ros.models.netvlad import NetVLAD, unit_cells
from vpr_lite_ros.models.repvgg import STRIDE, RepVGGLite, standardise
from vpr_lite_ros.training.augment import CORNERS, distort, homography_of
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import by_root, read_rgb, weighted_folders
from vpr_lite_ros.training.fit import fit_clusters
from vpr_lite_ros.training.loop import Batch, Schedule, Stage

_NEAR = 24.0
"""Pixels: cells of the other view closer than this to the right spot are not called wrong."""
_CLUSTER_BATCHES = 12
"""Batches whose features the clusters are first fitted to."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Schedule):
    """What to learn from, for how long."""

    images: Sequence[str]
    """Folders of images, each seen twice."""
    fixed_cameras: Sequence[str] = ()
    """Tables (``file``, ``place``) of cameras that do not move: pixels correspond."""
    places: Sequence[str] = ()
    """Tables (``file`` with ``place`` or with ``x``, ``y``) of places seen more than once."""
    sequences: Sequence[str] = ()
    """Tables (``file``, ``clip``) of frames in order of time."""
    batch: int = 24
    """Pairs of a step."""
    size: int = 160
    """Side of the views in pixels, a multiple of 16."""
    learning_rate: float = 5e-4
    clusters: int = 32
    temperature: float = 0.07
    global_weight: float = 0.5
    anchors: int = 384
    """Cells of a step that the local loss looks at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 2 * STRIDE or self.size % STRIDE:
            raise TrainingError(f"size is {self.size}, should be 32, 48, 64, …")


@dataclass(frozen=True)
class Pair:
    """Two images of one place."""

    first: Path
    second: Path
    aligned: bool
    """Whether equal pixels show the same."""


class ViewPairs(Dataset[Batch]):
    """Item i: (A, B, H, aligned) of batch i.

    A and B (N, 3, S, S) uint8, H (N, 3, 3) float32 from pixels of A to pixels of B, and whether
    H says what lies where (N) bool.
    """

    def __init__(self, config: ViewsConfig) -> None:
        self.config = config
        self.folders, self.weights = weighted_folders(config.images, "views.images")
        self.sources: list[tuple[list[PlaceDataset], bool]] = [
            *(([load_places(Path(table))], True) for table in config.fixed_cameras),
            *(([load_places(Path(table))], False) for table in config.places),
            *((load_sequences(Path(table)), False) for table in config.sequences),
        ]

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.config.seed, index))
        views = [self._views(pair, rng) for pair in self._plan(rng)]
        first, second, homography, aligned = zip(*views, strict=True)
        return (
            torch.from_numpy(np.stack(first)),
            torch.from_numpy(np.stack(second)),
            torch.from_numpy(np.stack(homography).astype(np.float32)),
            torch.tensor(aligned),
        )

    def _plan(self, rng: np.random.Generator) -> list[Pair]:
        pairs: list[Pair] = []
        for choice in rng.permutation(len(self.sources)):
            datasets, aligned = self.sources[choice]
            weights = by_root([len(dataset.queries) for dataset in datasets])
            dataset = datasets[rng.choice(len(datasets), p=weights)]
            pairs += _distinct_places(dataset, self.config.batch // 2 - len(pairs), aligned, rng)
        while len(pairs) < self.config.batch:
            files = self.folders[rng.choice(len(self.folders), p=self.weights)]
            path = files[rng.integers(len(files))]
            pairs.append(Pair(path, path, True))
        return pairs

    def _views(
        self, pair: Pair, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64], bool]:
        a = read_rgb(pair.first)
        b = a if pair.second == pair.first else read_rgb(pair.second)
        height, width = a.shape[:2]
        if b.shape != a.shape:
            b = np.asarray(cv2.resize(b, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        size = self.config.size
        to_a, to_b = _two_windows((width, height), size, rng)
        mirror = np.array([[-1, 0, size - 1], [0, 1, 0], [0, 0, 1]], np.float64)
        if rng.random() < 0.5:
            to_a, to_b = mirror @ to_a, mirror @ to_b
        seen_a, seen_b = _warp(a, to_a, size), _warp(b, to_b, size)
        if rng.random() < 0.5:
            seen_a = distort(seen_a, rng)
        seen_b = distort(seen_b, rng)
        planes = (2, 0, 1)
        return (
            np.ascontiguousarray(seen_a.transpose(planes)),
            np.ascontiguousarray(seen_b.transpose(planes)),
            to_b @ np.linalg.inv(to_a),
            pair.aligned,
        )


class Views(Stage):
    """Backbone and NetVLAD clusters under the two losses."""

    def __init__(self, config: ViewsConfig, backbone: RepVGGLite) -> None:
        super().__init__()
        self.config = config
        vlad = NetVLAD(RepVGGLite.width, config.clusters)
        vlad.pca.requires_grad_(False)  # fitted afterwards
        self.trained = nn.ModuleDict({"backbone": backbone, "vlad": vlad})
        self.vlad, self.backbone = vlad, backbone
        cells = torch.arange(config.size // STRIDE)
        y, x = torch.meshgrid(cells, cells, indexing="ij")
        centres = torch.stack([x.flatten(), y.flatten()], dim=1).float() * STRIDE
        self.centres: Tensor
        self.register_buffer("centres", centres)

    def batches(self) -> ViewPairs:
        return ViewPairs(self.config)

    @torch.no_grad()
    def begin_round(self, step: int) -> dict[str, float]:
        """Put the clusters where the features are."""
        pairs = self.batches()
        self.backbone.eval()
        # Batches that no step sees, so that it does not matter when this is done.
        views = [pairs[2**40 + i][:2] for i in range(_CLUSTER_BATCHES)]
        device = self.centres.device
        maps = [self._features(view.to(device)) for pair in views for view in pair]
        sample = torch.cat([unit_cells(features).flatten(0, 1) for features in maps]).cpu()
        fit_clusters(self.vlad, sample, self.config.seed)
        return {}

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        first, second, homography, aligned = batch
        features = self._features(torch.cat([first, second])).float()
        with torch.autocast(features.device.type, enabled=False):
            whole, recall = self._global_loss(self.vlad(unit_cells(features)))
            local, hits = self._local_loss(features, homography, aligned)
        loss = local + self.config.global_weight * whole
        figures = {"global": whole, "recall": recall, "local": local, "local_recall": hits}
        return {"loss": loss} | {name: value.detach() for name, value in figures.items()}

    def _features(self, images: Tensor) -> Tensor:
        out: Tensor = self.backbone(standardise(images.float()))
        return out

    def _global_loss(self, vlad: Tensor) -> tuple[Tensor, Tensor]:
        """Of the VLADs of all first views, then of all second ones: loss and Recall@1."""
        first, second = vlad.chunk(2)
        logits = first @ second.T / self.config.temperature
        wanted = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
        return loss, (logits.argmax(dim=1) == wanted).float().mean()

    def _local_loss(
        self, features: Tensor, homography: Tensor, aligned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the feature maps of all first views, then of all second ones: loss and Recall@1."""
        first, second = features.chunk(2)
        centres, far = self.centres, float(self.centres.max())
        lifted = torch.cat([centres, torch.ones_like(centres[:, :1])], dim=1)
        lifted = lifted @ homography.transpose(1, 2)
        spots = lifted[..., :2] / lifted[..., 2:]
        seen = ((spots >= 0) & (spots <= far)).all(dim=-1) & (lifted[..., 2] > 0)
        image, cell = (seen & aligned[:, None]).nonzero(as_tuple=True)
        chosen = torch.randperm(len(image), device=image.device)[: self.config.anchors]
        image, cell = image[chosen], cell[chosen]
        grid = (spots / far * 2 - 1)[:, :, None]
        right = F.grid_sample(second, grid, align_corners=True)[..., 0].transpose(1, 2)
        right = F.normalize(right, dim=2)[image, cell]
        query = unit_cells(first)[image, cell]
        others = unit_cells(second)
        wrong = query @ others.flatten(0, 1).T
        distance = (centres[None] - spots[image, cell][:, None]).abs().amax(dim=2)
        near = torch.zeros(len(query), *others.shape[:2], dtype=torch.bool, device=image.device)
        rows = torch.arange(len(query), device=image.device)
        near[rows, image] = distance < _NEAR
        wrong = wrong.masked_fill(near.flatten(1), -math.inf)
        logits = torch.cat([(query * right).sum(dim=1, keepdim=True), wrong], dim=1)
        if not len(logits):  # not one cell is seen twice
            return first.sum() * 0, first.new_ones(())
        wanted = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = F.cross_entropy(logits / self.config.temperature, wanted)
        return loss, (logits.argmax(dim=1) == 0).float().mean()


def _distinct_places(
    dataset: PlaceDataset, count: int, aligned: bool, rng: np.random.Generator
) -> list[Pair]:
    """Up to ``count`` pairs of places of which no two may be the same."""
    taken: set[int] = set()
    pairs: list[Pair] = []
    for query in rng.permutation(dataset.queries_with_positives):
        if len(pairs) >= count:
            break
        around = dataset.non_negatives(query)
        if taken.isdisjoint(around.tolist()):
            taken.update(around.tolist())
            partner = rng.choice(dataset.positives(query))
            pairs.append(Pair(dataset.queries[query], dataset.database[partner], aligned))
    return pairs


def _two_windows(
    image_size: tuple[int, int], size: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two overlapping quadrangles of an image, each as the homography to its view's pixels."""
    width, height = image_size
    longest = min(height, width)
    side = math.exp(rng.uniform(math.log(min(110, longest)), math.log(longest)))
    aspect = math.exp(rng.uniform(-1, 1) * math.log(1.5))
    window = np.minimum([side * math.sqrt(aspect), side / math.sqrt(aspect)], image_size)
    centre = rng.uniform(window / 2, image_size - window / 2)
    first = CORNERS * window / 2 + centre
    # The other camera stands closer or further, looks past it, is tilted and turned a little.
    angle = rng.normal(0, 0.07)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = CORNERS * math.exp(rng.uniform(-0.35, 0.35)) @ turn.T
    corners = corners + rng.normal(0, 0.06, (4, 2))
    moved = centre + rng.uniform([-0.3, -0.2], [0.3, 0.2]) * window
    view = size, size
    return homography_of(first, view), homography_of(corners * window / 2 + moved, view)


def _warp(image: Image, homography: NDArray[np.float64], size: int) -> Image:
    """A view; what lies outside of the image is its mirror image.

    Where the view is smaller than what it shows, the image is blurred first: ``warpPerspective``
    only looks at the nearest pixels.
    """
    shrink = 1 / math.sqrt(max(abs(float(np.linalg.det(homography[:2, :2]))), 1e-9))
    if shrink > 1.2:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), 0.5 * math.sqrt(shrink**2 - 1)))
    view = cv2.warpPerspective(
        image, homography, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    return np.asarray(view, np.uint8)
