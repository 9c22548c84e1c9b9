"""NetVLAD over the whole map and over its 2×2 patches (paper, equations 1 and 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_SIZE = 2
"""Side of a patch in cells of the feature map; stride 1, no padding, one scale."""
SIDE = 0.6
"""Share of the image's width that its left and its right part each have."""


def patch_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches on a map of ``height`` × ``width`` cells (equation 2)."""
    return height - PATCH_SIZE + 1, width - PATCH_SIZE + 1


def unit_cells(features: Tensor) -> Tensor:
    """Feature maps (B, C, H, W) to unit vectors (B, H·W, C), row by row."""
    return F.normalize(features.flatten(2).transpose(1, 2), dim=2)


class Whitening(nn.Linear):
    """PCA with whitening to D, then unit length."""

    @torch.no_grad()
    def set(self, mean: Tensor, components: Tensor, variances: Tensor) -> None:
        """``mean`` (C), ``components`` (D, C) and their ``variances`` (D)."""
        weight = components / variances.sqrt()[:, None]
        self.weight.copy_(weight)
        self.bias.copy_(-weight @ mean)

    def forward(self, vlad: Tensor) -> Tensor:
        """VLAD (…, C) to unit vectors (…, D), float32."""
        return F.normalize(super().forward(vlad.to(self.weight.dtype)).float(), dim=-1)


class NetVLAD(nn.Module):
    """Soft-assigned residuals to K clusters, then PCA with whitening to D (equation 1).

    Residuals and lengths are computed in float32: differences of sums over a thousand cells.

    Works on L2-normalised features. The clusters serve the whole image and each patch; ``pca`` is
    that of patches (``place.py`` says why the image has its own).
    """

    def __init__(self, width: int = 192, clusters: int = 32, dimension: int = 512) -> None:
        super().__init__()
        self.clusters, self.dimension = clusters, dimension
        self.assign = nn.Linear(width, clusters)
        self.centroids = nn.Parameter(F.normalize(torch.randn(clusters, width), dim=1))
        self.pca = Whitening(clusters * width, dimension)

    @torch.no_grad()
    def set_clusters(self, centroids: Tensor, sharpness: float) -> None:
        """Start from k-means: ``centroids`` (K, C); softmax of −``sharpness`` · distance²."""
        self.centroids.copy_(centroids)
        self.assign.weight.copy_(2 * sharpness * centroids)
        self.assign.bias.copy_(-sharpness * centroids.square().sum(dim=1))

    def forward(self, cells: Tensor) -> Tensor:
        """VLAD of whole images, before PCA: unit vectors (B, S, C) to unit vectors (B, K·C)."""
        return self.aggregate(cells, self.soft_assign(cells))

    def soft_assign(self, features: Tensor) -> Tensor:
        """Features (…, C), unit length, to their share in each cluster (…, K)."""
        return torch.softmax(self.assign(features), dim=-1)

    def aggregate(self, features: Tensor, shares: Tensor) -> Tensor:
        """VLAD of groups of cells: features (…, S, C), shares (…, S, K) to (…, K·C)."""
        residuals = shares.transpose(-2, -1) @ features
        residuals = residuals - shares.sum(dim=-2)[..., None] * self.centroids
        # Intra-normalisation per cluster, so that a repeated texture does not outshout the rest.
        return F.normalize(F.normalize(residuals, dim=-1, eps=1e-6).flatten(-2), dim=-1)


def netvlad_of(state: dict[str, Tensor]) -> NetVLAD:
    """A NetVLAD of the sizes that its ``state`` has."""
    count, width = state["centroids"].shape
    vlad = NetVLAD(width, count, len(state["pca.bias"]))
    vlad.load_state_dict(state)
    return vlad


def image_parts(height: int, width: int) -> Tensor:
    """(3, H·W): 1 for the cells of the whole map, of its left and of its right part; 0 else."""
    column = torch.arange(width).repeat(height)
    part = round(SIDE * width)
    return torch.stack([column >= 0, column < part, column >= width - part]).float()


def patch_cells(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cells and centres of all patches of a map.

    Returns
    -------
    cells
        (P, 4) int64: indices into the map's flattened cells, row by row.
    centres
        (P, 2) float32: x, y of each patch's centre as a fraction of the image's width and
        height. Cell i of the backbone is centred on input pixel 16 i (padding is symmetric),
        so the centre of cells i and i + 1 is at 16 i + 8, that is (i + 0.5) / cells.
    """
    rows, columns = patch_grid(height, width)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = row.flatten(), column.flatten()
    cells = torch.stack(
        [(row + dr) * width + column + dc for dr in range(PATCH_SIZE) for dc in range(PATCH_SIZE)],
        dim=1,
    )
    centres = torch.stack([(column + 0.5) / width, (row + 0.5) / height], dim=1)
    return cells, centres
