"""Patch-NetVLAD's architecture (CVPR 2021), to compare times with: its weights are random.

VGG-16 up to its last convolution, NetVLAD with 64 clusters, square patches of 2, 5 and 8 cells at
every cell, PCA with whitening to 4096 numbers for each of them, and RANSAC on patches that are each
other's nearest. 149 million parameters, as in table 3 of the paper that this package follows.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG_WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
PATCH_SIZES = (2, 5, 8)
WEIGHTS = (0.45, 0.15, 0.4)
"""Of the patch sizes in the score of a pair."""
CLUSTERS, DIMENSION = 64, 4096
STRIDE = 16


class PatchNetVLAD(nn.Module):
    """An image to one descriptor and to those of its patches, each of ``dimension`` numbers."""

    def __init__(self, dimension: int = DIMENSION) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for out_width, depth in VGG_WIDTHS:
            for _ in range(depth):
                layers += [nn.Conv2d(width, out_width, 3, padding=1), nn.ReLU(inplace=True)]
                width = out_width
            layers.append(nn.MaxPool2d(2))
        # It ends before the last activation and pooling.
        self.backbone = nn.Sequential(*layers[:-2])
        self.assign = nn.Conv2d(width, CLUSTERS, 1, bias=False)
        self.centroids = nn.Parameter(torch.rand(CLUSTERS, width))
        self.pca = nn.Linear(CLUSTERS * width, dimension)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(1, 3, H, W) to (1, D) and, for each size, (patches, D), row by row."""
        features = F.normalize(self.backbone(image), dim=1)
        shares = F.softmax(self.assign(features), dim=1)
        height, width = features.shape[2:]
        # Per cell and cluster what NetVLAD sums; any rectangle's sum is four corners of this.
        residuals = shares[:, :, None] * (
            features[:, None] - self.centroids[None, :, :, None, None]
        )
        integral = F.pad(residuals.flatten(1, 2), (1, 0, 1, 0)).cumsum(3).cumsum(2)
        patches = [
            self._project(
                integral[:, :, :-size, :-size]
                + integral[:, :, size:, size:]
                - integral[:, :, size:, :-size]
                - integral[:, :, :-size, size:]
            )
            for size in PATCH_SIZES
        ]
        whole = self._project(integral[:, :, height:, width:])
        return whole, patches

    def _project(self, sums: Tensor) -> Tensor:
        """(1, K·C, h, w) to (h·w, D)."""
        vlad = sums.flatten(2)[0].T.unflatten(1, (CLUSTERS, -1))
        vlad = F.normalize(F.normalize(vlad, dim=2).flatten(1), dim=1)
        return F.normalize(self.pca(vlad), dim=1)


def match(
    query: list[Tensor], candidate: list[Tensor], map_size: tuple[int, int] = (30, 40)
) -> float:
    """Score of a pair: over patch sizes, the share of patches that agree with one homography.

    The nearest are found where the descriptors lie, RANSAC runs on the CPU. ``map_size``: rows and
    columns of the feature map.
    """
    score = 0.0
    for size, weight, first, second in zip(PATCH_SIZES, WEIGHTS, query, candidate, strict=True):
        columns = map_size[1] - size + 1
        cosines = first @ second.T
        there, back = (cosines.argmax(dim=side).cpu().numpy() for side in (1, 0))
        kept = np.flatnonzero(back[there] == np.arange(len(there)))
        if len(kept) < 4:
            continue
        ends = [
            np.stack([index % columns, index // columns], axis=1).astype(np.float32) * STRIDE
            for index in (kept, there[kept])
        ]
        _, inliers = cv2.findHomography(*ends, cv2.RANSAC, STRIDE * 1.5)
        if inliers is not None:
            score += weight * float(inliers.sum()) / len(there)
    return score
