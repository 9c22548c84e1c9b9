"""What can be fitted without gradient steps: clusters by k-means, projection by PCA whitening."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
    """Put clusters and a whitening projection on top of ``backbone``.

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
    # Folded, it says the same in a third of the time.
    place.backbone = backbone.eval().folded()
    place.eval()
    if trained:
        place.vlad.assign, place.vlad.centroids = trained.assign, trained.centroids
    else:
        chosen, order = [], np.random.default_rng(seed)
        for image in _seen(images, image_size, seed, "find clusters"):
            cells = _cells(place, image)[0]
            chosen.append(cells[order.permutation(len(cells))[:FEATURES_PER_IMAGE]])
        fit_clusters(place.vlad, torch.cat(chosen), seed)
    fine: list[Tensor] = []
    coarse: list[Tensor] = []
    for image in _seen(images, image_size, seed, "describe"):
        with torch.no_grad():
            for vlads, cells in zip((fine, coarse), _cells(place, image), strict=True):
                vlads.append(place.vlad(cells[None]))
    for whitening, vlads in ((place.vlad.pca, fine), (place.coarse, coarse)):
        all_vlads = torch.cat(vlads)
        kept = principal_components(all_vlads, whitening.out_features)
        share = float(kept[2].sum() / all_vlads.var(0).sum())
        log.info("PCA to %d keeps %.1f%% of the variance", whitening.out_features, 100 * share)
        whitening.set_pca(*kept)
    place.backbone = backbone
    return place


def _seen(images: list[Path], size: tuple[int, int], seed: int, what: str) -> Iterator[Image]:
    """Every image as it is, distorted, and from another standpoint: the same for the same seed."""
    rng = np.random.default_rng(seed)
    for path in tqdm(images, desc=what):
        image = fit(read_rgb(path), size)
        moved = move(image, rng)
        yield image
        yield distort(image, rng)
        yield distort(moved, rng) if rng.random() < 0.5 else moved


@torch.no_grad()
def _cells(place: PlaceNetwork, image: Image) -> tuple[Tensor, Tensor]:
    """Unit vectors (cells, 192) of an image of the network's size, and of it made smaller."""
    pixels = torch.from_numpy(image)[None]
    return F.normalize(place.local_features(pixels)[0], dim=1), place.coarse_cells(pixels)[0]


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
    return mean, components[:dimension].float(), variances.float()
