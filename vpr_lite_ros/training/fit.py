"""What can be fitted without gradient steps: clusters by k-means, projection by PCA whitening."""

from __future__ import annotations

import logging
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vpr_lite_ros.image import Image, fit
from vpr_lite_ros.models.netvlad import NetVLAD
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.models.repvgg import RepVGGLite
from vpr_lite_ros.training.augment import distort, move
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import read_rgb

log = logging.getLogger(__name__)

FEATURES_PER_IMAGE = 60
SHARPNESS = 30.0
"""Of the soft assignment: shares are softmax(−sharpness · squared distance)."""
COARSE = 0.6
"""Length of the VLAD at half the resolution beside that of the image, before PCA: more of it tells
neighbours along a walk apart better, and streets worse (docs/training.md)."""
VIEWS = 3
"""Of each image, which ``views_of`` takes."""


def fit_place_network(
    backbone: RepVGGLite,
    images: list[Path],
    *,
    image_size: tuple[int, int] = (640, 480),
    clusters: int | NetVLAD = 32,
    dimension: int = 512,
    max_patches: int,
    seed: int = 0,
) -> PlaceNetwork:
    """Put clusters and projections, of patches and of images, on top of ``backbone``.

    Every image is seen as it is, once distorted (another light, season or camera) and once from
    a standpoint nearby, so that directions in which a place changes with the light or with the
    standpoint have large variance and are whitened down.

    Parameters
    ----------
    images
        ``VIEWS`` times as many must be ``dimension`` or more.
    clusters
        How many to find by k-means, or a NetVLAD whose clusters are trained already.
    """
    if VIEWS * len(images) < dimension:
        raise TrainingError(
            f"fit.images: {len(images)} images cannot span {dimension} dimensions: give more"
        )
    count = clusters.clusters if isinstance(clusters, NetVLAD) else clusters
    place = PlaceNetwork(image_size, count, dimension, max_patches)
    place.backbone = backbone.eval().folded()  # the same, in less time
    place.eval()
    rng = np.random.default_rng(seed)
    if isinstance(clusters, NetVLAD):
        place.vlad.assign, place.vlad.centroids = clusters.assign, clusters.centroids
    else:
        chosen = []
        for path in tqdm(images, desc="find clusters"):
            views = views_of(fit(read_rgb(path), image_size), rng)
            cells = cells_of(place, torch.from_numpy(np.stack(views))).flatten(0, 1)
            chosen.append(cells[rng.permutation(len(cells))[: VIEWS * FEATURES_PER_IMAGE]])
        fit_clusters(place.vlad, torch.cat(chosen), seed)
    described = []
    for path in tqdm(images, desc="describe"):
        views = views_of(fit(read_rgb(path), image_size), rng)
        described.append(vlads_of(place, torch.from_numpy(np.stack(views))))
    place.backbone = backbone
    vlads = torch.cat(described)
    width = vlads.shape[1] // 2
    place.vlad.pca.set(*principal_components(vlads[:, :width], dimension))
    vlads[:, width:] *= COARSE
    place.whole.set(*principal_components(vlads, dimension))
    with torch.no_grad():  # the network's own VLADs have length 1
        place.whole.weight[:, width:] *= COARSE
    return place


def views_of(image: Image, rng: np.random.Generator) -> list[Image]:
    """``VIEWS`` pictures: as it is, distorted, and moved, half of the time distorted, too."""
    moved = move(image, rng)
    return [image, distort(image, rng), distort(moved, rng) if rng.random() < 0.5 else moved]


@torch.no_grad()
def vlads_of(place: PlaceNetwork, images: Tensor) -> Tensor:
    """VLADs (B, 2·K·C) of whole images (B, H, W, 3) at both resolutions, each of length 1."""
    cells = cells_of(place, images)
    return place.vlads(images, cells, place.vlad.soft_assign(cells))[:, 0]


@torch.no_grad()
def cells_of(place: PlaceNetwork, images: Tensor) -> Tensor:
    """Unit vectors (B, cells, 192) of images (B, H, W, 3) of the network's size."""
    return F.normalize(place.local_features(images), dim=2)


def fit_clusters(vlad: NetVLAD, cells: Tensor, seed: int) -> None:
    """Put the clusters where a network's features are: unit vectors (M, C), on the CPU."""
    centroids = k_means(cells.numpy(), vlad.clusters, seed)
    vlad.set_clusters(torch.from_numpy(centroids), SHARPNESS)


def k_means(features: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.float32]:
    """(clusters, C) centroids of unit vectors (M, C)."""
    means = faiss.Kmeans(
        features.shape[1], clusters, niter=40, nredo=3, seed=seed, max_points_per_centroid=10**6
    )
    means.train(np.ascontiguousarray(features, np.float32))
    return np.asarray(means.centroids, np.float32)


def principal_components(vectors: Tensor, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C), the ``dimension`` first components (dimension, C) and their variances."""
    mean = vectors.mean(dim=0)
    _, singular, components = torch.linalg.svd((vectors - mean).double(), full_matrices=False)
    variances = singular[:dimension].square() / (len(vectors) - 1)
    log.info(
        "PCA keeps %.1f%% of the variance", 100 * float(variances.sum() / vectors.var(0).sum())
    )
    return mean, components[:dimension].float(), variances.float()
