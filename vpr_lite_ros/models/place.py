"""All that one image goes through, in one network: what ``place.onnx`` holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpr_lite_ros.models.matcher import SelfAttention
from vpr_lite_ros.models.netvlad import NetVLAD, Whitening, patch_cells, patch_grid, unit_cells
from vpr_lite_ros.models.repvgg import STRIDE, RepVGGLite, standardise

COARSENESS = 2
"""How many times smaller the image is that the coarse part of the global descriptor sees."""
COARSE_PART = 4
"""One number in so many of the global descriptor is of its coarse part ..."""
COARSE_WEIGHT = 0.8
"""... whose length this is beside a fine part of length 1. All three were chosen on drawn towns and
on walks kept from training (docs/training.md)."""


class PlaceNetwork(nn.Module):
    """Image to global descriptor, patch tokens and the patches' centres.

    The global descriptor has two parts, both NetVLAD of the same clusters: a fine one, and a coarse
    one of the image at half its resolution. There each cell sees four times as much of the
    scene, and what differs by night or from the other side of the road has less weight. It costs a
    quarter of the fine part's time.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (640, 480),
        clusters: int = 32,
        dimension: int = 512,
        max_patches: int = 1131,
    ) -> None:
        super().__init__()
        width, height = image_size
        step = STRIDE * COARSENESS
        if width % step or height % step:
            raise ValueError(f"image_size {image_size} must be multiples of {step}")
        if dimension % COARSE_PART:
            raise ValueError(f"dimension {dimension} must be a multiple of {COARSE_PART}")
        map_size = (height // STRIDE, width // STRIDE)
        rows, columns = patch_grid(*map_size)
        if not 1 <= max_patches <= rows * columns:
            raise ValueError(f"max_patches {max_patches} must be within 1…{rows * columns}")
        self.image_size, self.max_patches = image_size, max_patches
        self.backbone = RepVGGLite()
        self.vlad = NetVLAD(RepVGGLite.width, clusters, dimension)
        self.coarse = Whitening(clusters * RepVGGLite.width, dimension // COARSE_PART)
        self.self_attention = SelfAttention(dimension)
        cells, centres = patch_cells(*map_size)
        self.cells: Tensor
        self.centres: Tensor
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Describe one image.

        Parameters
        ----------
        image
            (1, H, W, 3) uint8, RGB.

        Returns
        -------
        descriptor
            (1, D) unit vector of the whole image.
        tokens
            (1, N, D) patches after self-attention, N = ``max_patches``, in the projection's
            precision.
        centres
            (1, N, 2) x, y of each patch as fractions of the image's width and height.
        """
        features = self.local_features(image)
        cells = F.normalize(features, dim=2)
        shares = self.vlad.soft_assign(cells)
        vlad = self.vlad.aggregate(cells, shares)
        descriptor = self.descriptor(vlad, self.vlad(self.coarse_cells(image)))
        patches, centres = self.patches(features, cells, shares)
        tokens = self.self_attention(patches, centres).to(self.vlad.pca.weight.dtype)
        return descriptor, tokens, centres

    def descriptor(self, vlad: Tensor, coarse_vlad: Tensor) -> Tensor:
        """Global descriptor (B, D) of the VLADs (B, K·C) of an image and of it made smaller."""
        fine = self.vlad.pca.project(vlad)[:, : -self.coarse.out_features]
        coarse = COARSE_WEIGHT * self.coarse.project(coarse_vlad)
        return F.normalize(torch.cat([F.normalize(fine, dim=1), coarse], dim=1), dim=1)

    def coarse_cells(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to unit vectors (B, cells / 4, 192) of the image made smaller."""
        pixels = F.avg_pool2d(image.float().permute(0, 3, 1, 2).contiguous(), COARSENESS)
        return unit_cells(self._features(pixels))

    def patches(self, features: Tensor, cells: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The most salient patches (1, N, D), before self-attention, and centres (1, N, 2)."""
        chosen = self.salient_patches(features)
        cells_of_chosen = self.cells[chosen]
        patches = self.vlad.pca.project(
            self.vlad.aggregate(cells[0][cells_of_chosen], shares[0][cells_of_chosen])
        )
        return patches[None], self.centres[chosen][None]

    def local_features(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, cells, 192), row by row, not normalised, float32."""
        # Floats first: TensorRT can do nothing else with bytes.
        pixels = image.float().permute(0, 3, 1, 2).contiguous()
        return self._features(pixels).flatten(2).transpose(1, 2)

    def _features(self, pixels: Tensor) -> Tensor:
        precision = next(self.backbone.parameters()).dtype
        out: Tensor = self.backbone(standardise(pixels).to(precision))
        return out.float()

    def salient_patches(self, features: Tensor) -> Tensor:
        """Indices (N,) of the patches kept, of features (1, cells, C)."""
        if self.max_patches == self.cells.shape[0]:
            return torch.arange(self.max_patches)
        salience = features[0].norm(dim=1)[self.cells].sum(dim=1)
        return torch.topk(salience, self.max_patches).indices
