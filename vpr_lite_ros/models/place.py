"""All that one image goes through, in one network: what ``place.onnx`` holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpr_lite_ros.models.matcher import SelfAttention
from vpr_lite_ros.models.netvlad import NetVLAD, Whitening, image_parts, patch_cells, patch_grid
from vpr_lite_ros.models.repvgg import STRIDE, RepVGGLite, standardise


class PlaceNetwork(nn.Module):
    """Image to global descriptors, patch tokens and the patches' centres.

    The paper's global descriptor is the VLAD of the image, projected as its patches are. Here it
    has a projection of its own, of two VLADs side by side: that of the image, and that of the image
    at half its resolution, where each cell sees four times as much of the scene. Both go through
    the same backbone and clusters.

    The paper describes the image as a whole. Here its left and its right part are described, too,
    from the same cells: a camera that has turned sees at its left what was at its right.
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
        if width % STRIDE or height % STRIDE:
            raise ValueError(f"image_size {image_size} must be multiples of {STRIDE}")
        map_size = (height // STRIDE, width // STRIDE)
        rows, columns = patch_grid(*map_size)
        if not 1 <= max_patches <= rows * columns:
            raise ValueError(f"max_patches {max_patches} must be within 1…{rows * columns}")
        self.image_size, self.max_patches = image_size, max_patches
        self.backbone = RepVGGLite()
        self.vlad = NetVLAD(RepVGGLite.width, clusters, dimension)
        self.whole = Whitening(2 * clusters * RepVGGLite.width, dimension)
        self.self_attention = SelfAttention(dimension)
        cells, centres = patch_cells(*map_size)
        self.cells: Tensor
        self.centres: Tensor
        self.parts: Tensor
        self.coarse_parts: Tensor
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("parts", image_parts(*map_size), persistent=False)
        coarse_size = (-(-height // 2 // STRIDE), -(-width // 2 // STRIDE))
        self.register_buffer("coarse_parts", image_parts(*coarse_size), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Describe one image.

        Parameters
        ----------
        image
            (1, H, W, 3) uint8, RGB.

        Returns
        -------
        descriptor
            (1, 3, D) unit vectors of the whole image, its left and its right part.
        tokens
            (1, N, D) patches after self-attention, N = ``max_patches``, in the projection's
            precision.
        centres
            (1, N, 2) x, y of each patch as fractions of the image's width and height.
        """
        features = self.local_features(image)
        cells = F.normalize(features, dim=2)
        shares = self.vlad.soft_assign(cells)
        descriptor = self.whole(self.vlads(image, cells, shares)[0])[None]
        patches, centres = self.patches(features, cells, shares)
        tokens = self.self_attention(patches, centres).to(self.vlad.pca.weight.dtype)
        return descriptor, tokens, centres

    def vlads(self, image: Tensor, cells: Tensor, shares: Tensor) -> Tensor:
        """VLADs (B, 3, 2·K·C) of parts of images (B, H, W, 3), each beside that of the same part
        at half the resolution. Parts are the whole, the left and the right."""
        coarse = F.normalize(self.local_features(image, shrink=2), dim=2)
        both = (
            (cells, shares, self.parts),
            (coarse, self.vlad.soft_assign(coarse), self.coarse_parts),
        )
        return torch.cat(
            [
                self.vlad.aggregate(cells[:, None], shares[:, None] * parts[:, :, None])
                for cells, shares, parts in both
            ],
            dim=-1,
        )

    def patches(self, features: Tensor, cells: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The most salient patches (1, N, D), before self-attention, and centres (1, N, 2)."""
        chosen = self.salient_patches(features)
        cells_of_chosen = self.cells[chosen]
        patches = self.vlad.pca(
            self.vlad.aggregate(cells[0][cells_of_chosen], shares[0][cells_of_chosen])
        )
        return patches[None], self.centres[chosen][None]

    def local_features(self, image: Tensor, shrink: int = 1) -> Tensor:
        """(B, H, W, 3) uint8 to (B, cells, 192), row by row, not normalised, float32.

        The network sees the image at 1 / ``shrink`` of its resolution.
        """
        # Floats first: TensorRT can do nothing else with bytes.
        pixels = image.float().permute(0, 3, 1, 2).contiguous()
        if shrink > 1:
            pixels = F.avg_pool2d(pixels, shrink)
        standardised = standardise(pixels)
        precision = next(self.backbone.parameters()).dtype
        out: Tensor = self.backbone(standardised.to(precision))
        return out.flatten(2).transpose(1, 2).float()

    def salient_patches(self, features: Tensor) -> Tensor:
        """Indices (N,) of the patches kept, of features (1, cells, C)."""
        if self.max_patches == self.cells.shape[0]:
            return torch.arange(self.max_patches)
        salience = features[0].norm(dim=1)[self.cells].sum(dim=1)
        return torch.topk(salience, self.max_patches).indices
