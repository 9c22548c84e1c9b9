"""Train for places: two views of one place are more alike than views of any two places.

Two losses, both InfoNCE over all of a batch:

- *local*: a cell of one view against what lies at the same spot of the other; all other cells
  of all other views are wrong. Only where it is known which spot is the same.
- *global*: the NetVLAD vector (paper, equation 1, before PCA) of one view against all views. Where
  branches are folded, together with that of the view at half its resolution, as the network that
  ships projects both; batch norm would mix up what it measures of the two.

What teaches most is what looks alike and is not the same. Half of a batch are places of one data
set; half of these times they follow each other as closely as they may, as frames of a drive
do. The other half are single images. Two of three pairs take one for two places: here, and some
steps ahead, where what is near is larger; both are seen again from beside. A robot that stands
beside its old track is at the same place; one that stands before it is not, and a map wants to
know. The third pair is for the local loss alone: one view may be 40% closer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpr_lite_ros.models.netvlad import NetVLAD, netvlad_of, unit_cells
from vpr_lite_ros.models.repvgg import STRIDE, RepVGGLite, standardise
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.fit import COARSE, fit_clusters
from vpr_lite_ros.training.loop import Batch, Stage
from vpr_lite_ros.training.pairs import (
    Pair,
    Pairs,
    PairsConfig,
    here,
    here_and_ahead,
    part,
    render,
)

_NEAR = 24.0
"""Pixels: cells of the other view closer than this to the right spot are not called wrong."""
_CLUSTER_BATCHES = 12
"""Batches whose features the clusters are first fitted to."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(PairsConfig):
    """What to learn from, for how long."""

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
    folded: bool = False
    """Train the convolutions that the backbone's branches fold into, without batch norm. For
    weights that have learned already: on a CPU a step takes a third of the time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 2 * STRIDE or self.size % STRIDE:
            raise TrainingError(f"size is {self.size}, should be 32, 48, 64, …")


def cell_centres(size: int) -> NDArray[np.float64]:
    """(C, 2) x, y in pixels of what the cells of a view of ``size`` pixels are centred on."""
    cells = np.arange(size // STRIDE) * float(STRIDE)
    return np.stack(np.meshgrid(cells, cells), axis=2).reshape(-1, 2)


class ViewPairs(Dataset[Batch]):
    """Item i: (A, B, spots, aligned, one_place, scene) of batch i.

    A and B (N, 3, S, S) uint8; spots (N, C, 2) float32, the pixels of B that show what lies at
    the centres of A's cells; whether that is known (N) bool; whether both are one place (N) bool;
    the scene's number (N) int64.
    """

    def __init__(self, config: ViewsConfig) -> None:
        self.config, self.pairs = config, Pairs(config, "views")
        self.centres = cell_centres(config.size)

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.config.seed, index))
        plan = self._plan(rng)
        views: list[list[Tensor]] = [[], []]
        spots = []
        for pair in plan:
            *both, of_first, of_second = render(pair, (self.config.size,) * 2, rng)
            for found, view in zip(views, both, strict=True):
                found.append(torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1))))
            spots.append(of_second.from_image(of_first.to_image(self.centres)))
        return (
            torch.stack(views[0]),
            torch.stack(views[1]),
            torch.from_numpy(np.stack(spots).astype(np.float32)),
            torch.tensor([pair.aligned for pair in plan]),
            torch.tensor([pair.one_place for pair in plan]),
            torch.tensor([pair.scene for pair in plan]),
        )

    def _plan(self, rng: np.random.Generator) -> list[Pair]:
        plan = self.pairs.of_places(self.config.batch // 2, rng, here)
        while len(plan) < self.config.batch:
            scene, mirrored = len(plan), bool(rng.random() < 0.5)
            files = self.pairs.still(rng)
            plan += [Pair(*files, look, True, scene) for look in here_and_ahead(mirrored, rng)]
            files = self.pairs.still(rng)
            plan.append(Pair(*files, part(mirrored, rng), True, len(plan), one_place=False))
        return plan[: self.config.batch]


class Views(Stage):
    """Backbone and NetVLAD clusters under the two losses.

    Parameters
    ----------
    clusters
        State of a NetVLAD to go on with; None: new ones, where the features are.
    """

    def __init__(
        self,
        config: ViewsConfig,
        backbone: RepVGGLite,
        clusters: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.finds_clusters = config, clusters is None
        if clusters is None:
            vlad = NetVLAD(RepVGGLite.width, config.clusters)
        else:
            vlad = netvlad_of(clusters)
        vlad.pca.requires_grad_(False)  # fitted afterwards
        if config.folded:
            backbone = backbone.eval().folded()
        self.trained = nn.ModuleDict({"backbone": backbone, "vlad": vlad})
        self.vlad, self.backbone = vlad, backbone
        self.centres: Tensor
        self.register_buffer("centres", torch.from_numpy(cell_centres(config.size)).float())

    def batches(self) -> ViewPairs:
        return ViewPairs(self.config)

    @torch.no_grad()
    def begin_round(self, step: int) -> dict[str, float]:
        """Put the clusters where the features are, unless there are some."""
        if not self.finds_clusters:
            return {}
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
        first, second, spots, aligned, one_place, scene = batch
        views = torch.cat([first, second]).float()
        features = self._features(views).float()
        maps = [(1.0, features)]
        if self.config.folded:
            maps.append((COARSE, self._features(F.avg_pool2d(views, 2)).float()))
        with torch.autocast(features.device.type, enabled=False):
            vlads = [length * self.vlad(unit_cells(map_)) for length, map_ in maps]
            whole, recall = self._global_loss(F.normalize(torch.cat(vlads, dim=1)), one_place)
            local, hits = self._local_loss(features, spots, aligned, scene)
        loss = local + self.config.global_weight * whole
        figures = {"global": whole, "recall": recall, "local": local, "local_recall": hits}
        return {"loss": loss} | {name: value.detach() for name, value in figures.items()}

    def _features(self, images: Tensor) -> Tensor:
        out: Tensor = self.backbone(standardise(images.float()))
        return out

    def _global_loss(self, vlad: Tensor, one_place: Tensor) -> tuple[Tensor, Tensor]:
        """Of the VLADs of all first views, then of all second ones: loss and Recall@1."""
        first, second = vlad.chunk(2)
        logits = first @ second.T / self.config.temperature
        # Views that are not one place are still none of the others.
        wanted = one_place.nonzero()[:, 0]
        there, back = logits[wanted], logits.T[wanted]
        loss = (F.cross_entropy(there, wanted) + F.cross_entropy(back, wanted)) / 2
        return loss, (there.argmax(dim=1) == wanted).float().mean()

    def _local_loss(
        self, features: Tensor, spots: Tensor, aligned: Tensor, scene: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the feature maps of all first views, then of all second ones: loss and Recall@1."""
        first, second = features.chunk(2)
        centres, far = self.centres, float(self.centres.max())
        seen = ((spots >= 0) & (spots <= far)).all(dim=-1)
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
        # What is seen from some steps ahead is the same, wherever it lies.
        same = scene[image][:, None] == scene
        near = same[:, :, None].repeat(1, 1, others.shape[1])
        rows = torch.arange(len(query), device=image.device)
        near[rows, image] = distance < _NEAR
        wrong = wrong.masked_fill(near.flatten(1), -math.inf)
        logits = torch.cat([(query * right).sum(dim=1, keepdim=True), wrong], dim=1)
        if not len(logits):  # not one cell is seen twice
            return first.sum() * 0, first.new_ones(())
        wanted = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = F.cross_entropy(logits / self.config.temperature, wanted)
        return loss, (logits.argmax(dim=1) == 0).float().mean()
