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
    """Put clusters and whitening projections, of patches and of images, on top of ``backbone``.

    Every image is seen as it is, once distorted (another light, season or camera) and once from
    a standpoint nearby, so that directions in which a place changes with the light or with the
    standpoint have large variance and are whitened down. ``images`` must give at least
    ``dimension`` pictures.

    Parameters
    ----------
    clusters
        How many to find by k-means, or a NetVLAD whose clusters are trained already.
    """
    if 3 * len(images) < dimension:
        raise TrainingError(
            f"fit.images: {len(images)} images cannot span {dimension} dimensions: give more"
        )
    trained = clusters if isinstance(clusters, NetVLAD) else None
    count = clusters.clusters if isinstance(clusters, NetVLAD) else clusters
    place = PlaceNetwork(image_size, count, dimension, max_patches)
    place.backbone = backbone
    place.eval()
    rng = np.random.default_rng(seed)
    maps: list[tuple[Tensor, Tensor]] = []
    for path in tqdm(images, desc="describe"):
        image = fit(read_rgb(path), image_size)
        moved = move(image, rng)
        seen = (image, distort(image, rng), distort(moved, rng) if rng.random() < 0.5 else moved)
        maps += [(cells_of(place, picture), cells_of(place, picture, 2)) for picture in seen]
    if trained:
        place.vlad.assign, place.vlad.centroids = trained.assign, trained.centroids
    else:
        chosen = [fine[rng.permutation(len(fine))[:FEATURES_PER_IMAGE]] for fine, _ in maps]
        fit_clusters(place.vlad, torch.cat(chosen), seed)
    with torch.no_grad():
        fine, coarse = (
            torch.cat([place.vlad(cells[None]) for cells in both])
            for both in zip(*maps, strict=True)
        )
    place.vlad.pca.set(*principal_components(fine, dimension))
    place.whole.set(*principal_components(torch.cat([fine, COARSE * coarse], dim=1), dimension))
    with torch.no_grad():  # the network's own VLADs have length 1
        place.whole.weight[:, fine.shape[1] :] *= COARSE
    return place


@torch.no_grad()
def cells_of(place: PlaceNetwork, image: Image, shrink: int = 1) -> Tensor:
    """(cells, 192) unit vectors of an image of the network's size, ``shrink`` times smaller."""
    return F.normalize(place.local_features(torch.from_numpy(image)[None], shrink)[0], dim=1)


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
