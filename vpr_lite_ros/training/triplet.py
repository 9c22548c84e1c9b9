"""The paper's recipe (2.5): triplet ranking loss with hard negatives, as NetVLAD was trained.

Triplets come in rounds. Before each round the network as it is then describes the round's
queries, their potential positives and a random pool of the database (the cache); a query's
positive is the nearest image taken close to it, its negatives are the nearest of the pool taken
elsewhere. The round's triplets are part of the checkpoint, so a restart goes on with the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vpr_lite_ros.datasets import PlaceDataset, load_dataset
from vpr_lite_ros.image import fit
from vpr_lite_ros.models.netvlad import NetVLAD, unit_cells
from vpr_lite_ros.models.repvgg import RepVGGLite, standardise
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import read_rgb
from vpr_lite_ros.training.fit import FEATURES_PER_IMAGE, fit_clusters
from vpr_lite_ros.training.loop import Batch, Devices, Schedule, Stage

_CLUSTER_IMAGES = 1000
_RECALLS = (1, 5)
_VALIDATION_ROUNDS = 8
"""Validation describes a whole database: it is done before one round of so many."""


@dataclass(frozen=True, kw_only=True)
class TripletConfig(Schedule):
    """What to learn from, and how hard to look for negatives."""

    data: Mapping[str, Any]
    """The data set, such as ``{pitts30k: ROOT, split: train}``; see ``load_dataset``."""
    validation: Mapping[str, Any] | None = None
    """Another one, on which recall is measured now and then."""
    image_size: Sequence[int] = (640, 480)
    batch: int = 4
    """Triplets of a step."""
    negatives: int = 5
    margin: float = 0.1
    """By which a negative shall be further away, in squared distance of unit vectors."""
    round_steps: int = 250
    """Steps until the cache is made anew."""
    pool: int = 1000
    """Random database images among which a round's negatives are looked for."""
    describe_batch: int = 24
    """Images described at once for the cache."""
    learning_rate: float = 1e-5
    clusters: int = 64


class Images(Dataset[Tensor]):
    """Item i: image ``files[i]`` scaled to the network's size, (H, W, 3) uint8."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int]) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(fit(read_rgb(self.files[index]), self.size))


class Triplets(Dataset[Batch]):
    """Item i: (N, 2 + negatives, H, W, 3) uint8 of batch i: query, positive, negatives."""

    def __init__(self, images: Images, mined: NDArray[np.int64], batch: int) -> None:
        self.images, self.mined, self.batch = images, mined, batch

    def __getitem__(self, index: int) -> Batch:
        start = index * self.batch % len(self.mined)
        rows = self.mined[start : start + self.batch]
        return (torch.stack([torch.stack([self.images[i] for i in row]) for row in rows]),)


class Triplet(Stage):
    """Backbone and NetVLAD under the triplet ranking loss, on (squared) distances of VLADs."""

    def __init__(self, config: TripletConfig, backbone: RepVGGLite, on: Devices) -> None:
        super().__init__()
        self.config, self.on = config, on
        self.round_steps = config.round_steps
        self.dataset = load_dataset(config.data)
        self.validation = load_dataset(config.validation) if config.validation else None
        # Queries first, then the database: one index says which image.
        width, height = config.image_size
        files = [*self.dataset.queries, *self.dataset.database]
        self.images = Images(files, (width, height))
        if not len(self.dataset.queries_with_positives):
            raise TrainingError(f"triplet.data: no query of {self.dataset.name} has a positive")
        self.backbone, self.vlad = backbone, NetVLAD(RepVGGLite.width, config.clusters)
        self.vlad.pca.requires_grad_(False)  # fitted afterwards
        self.trained = nn.ModuleDict({"backbone": backbone, "vlad": self.vlad})
        count = config.round_steps * config.batch * on.world
        self.mined: Tensor
        self.trained.register_buffer(
            "mined", torch.zeros(count, 2 + config.negatives, dtype=torch.int64)
        )

    def train(self, mode: bool = True) -> Triplet:
        """Batch norm keeps its averages: few, similar images would spoil them, and the cache
        is made with them."""
        super().train(False)
        return self

    def batches(self) -> Triplets:
        mined = self.trained.get_buffer("mined").cpu().numpy()
        return Triplets(self.images, mined, self.config.batch)

    def begin_round(self, step: int) -> dict[str, float]:
        """Mine the round's triplets; how well the cache and ``validation`` are recognised."""
        if step == 0:
            self._set_clusters()
        rng = np.random.default_rng((self.config.seed, step))
        triplets, recall = self._mine(rng)
        self.trained.get_buffer("mined").copy_(torch.from_numpy(triplets))
        figures = {"cache/recall_at_1": recall}
        if self.validation and step // self.round_steps % _VALIDATION_ROUNDS == 0:
            found = recalls(self.validation, self._describe, self.config.image_size)
            figures |= {f"validation/recall_at_{k}": value for k, value in found.items()}
        return figures

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        (images,) = batch
        vlad = self._vlad(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        loss, satisfied = triplet_loss(vlad, self.config.margin)
        return {"loss": loss, "recall": satisfied.detach()}

    def _vlad(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to unit vectors (B, K·C)."""
        standardised = standardise(images.permute(0, 3, 1, 2).contiguous().float())
        features = self.backbone(standardised).float()
        with torch.autocast(features.device.type, enabled=False):
            vlad: Tensor = self.vlad(unit_cells(features))
        return vlad

    @torch.no_grad()
    def _describe(self, images: Images) -> NDArray[np.float32]:
        """(len(images), K·C) unit vectors; the processes share the work."""
        share = range(self.on.rank, len(images), self.on.world)
        loader = DataLoader(
            images, self.config.describe_batch, sampler=share, num_workers=self.config.workers
        )
        self.eval()
        shown = tqdm(loader, "describe", leave=False, disable=self.on.rank > 0)
        found = torch.zeros(len(images), self.vlad.clusters * RepVGGLite.width)
        for index, batch in enumerate(shown):
            with self.on.mixed_precision():
                vlad = self._vlad(batch.to(self.on.device))
            first = index * self.config.describe_batch
            found[list(share[first : first + len(batch)])] = vlad.float().cpu()
        return self.on.sum(found).numpy()

    @torch.no_grad()
    def _set_clusters(self) -> None:
        rng = np.random.default_rng(self.config.seed)
        chosen = rng.permutation(len(self.images))[:_CLUSTER_IMAGES]
        self.eval()
        cells = []
        for index in tqdm(chosen, "clusters", leave=False, disable=self.on.rank > 0):
            image = self.images[index][None].to(self.on.device)
            features = self.backbone(standardise(image.permute(0, 3, 1, 2).contiguous().float()))
            unit = unit_cells(features.float())[0].cpu()
            cells.append(unit[torch.from_numpy(rng.permutation(len(unit))[:FEATURES_PER_IMAGE])])
        fit_clusters(self.vlad, torch.cat(cells), self.config.seed)

    def _mine(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], float]:
        """(count, 2 + negatives) image indices, and Recall@1 within the cache."""
        data, count = self.dataset, len(self.trained.get_buffer("mined"))
        able = data.queries_with_positives
        # As many rounds through the queries as the round needs.
        repeats = -(-count // len(able))
        order = np.concatenate([rng.permutation(able) for _ in range(repeats)])[:count]
        queries = np.unique(order)
        pool = rng.permutation(len(data.database))[: self.config.pool]
        near = [data.positives(int(query)) for query in queries]
        members = np.unique(np.concatenate([pool, *near]))
        at = {int(member): place for place, member in enumerate(members)}
        offset = len(data.queries)
        files = [self.images.files[i] for i in (*queries, *(members + offset))]
        vlads = self._describe(Images(files, self.images.size))
        asked, known = vlads[: len(queries)], vlads[len(queries) :]
        in_pool = np.array([at[int(member)] for member in pool])
        rows: dict[int, NDArray[np.int64]] = {}
        hits = 0
        for query, vlad, close in zip(queries, asked, near, strict=True):
            similarity = known @ vlad
            positive = close[np.argmax(similarity[[at[int(c)] for c in close]])]
            blocked = np.isin(pool, data.non_negatives(int(query)))
            far, far_at = pool[~blocked], in_pool[~blocked]
            if len(far) < self.config.negatives:
                raise TrainingError(
                    f"triplet.negatives: query {data.queries[query]} has only {len(far)} "
                    f"negatives in a pool of {len(pool)}, {self.config.negatives} are needed: "
                    "raise triplet.pool or lower triplet.negatives"
                )
            hardest = np.argsort(-similarity[far_at], kind="stable")[: self.config.negatives]
            hits += bool(similarity[at[int(positive)]] > similarity[far_at[hardest[0]]])
            rows[int(query)] = np.array([query, positive + offset, *(far[hardest] + offset)])
        return np.stack([rows[int(query)] for query in order]), hits / len(queries)


def triplet_loss(vlad: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """NetVLAD's weakly supervised ranking loss of N queries.

    Parameters
    ----------
    vlad
        (N, 2 + negatives, C) unit vectors: query, positive, negatives.
    margin
        By which the squared distance to a negative shall exceed the one to the positive.

    Returns
    -------
    Mean over the queries of the hinge losses' sums, and the share of queries whose positive is
    nearer than all of their negatives.
    """
    distances = (vlad[:, :1] - vlad[:, 1:]).square().sum(dim=2)
    positive, negative = distances[:, :1], distances[:, 1:]
    loss = (positive + margin - negative).clamp_min(0).sum(dim=1).mean()
    return loss, (positive < negative).all(dim=1).float().mean()


def recalls(
    dataset: PlaceDataset,
    describe: Callable[[Images], NDArray[np.float32]],
    image_size: Sequence[int],
) -> dict[int, float]:
    """Recall@1 and @5 of the queries that can be found, by exhaustive search."""
    width, height = image_size
    known = describe(Images(dataset.database, (width, height)))
    index = faiss.IndexFlatIP(known.shape[1])
    index.add(known)
    able = [
        query
        for query in range(len(dataset.queries))
        if len(dataset.non_negatives(query)) > dataset.among_themselves
    ]
    asked = (
        known if dataset.among_themselves else describe(Images(dataset.queries, (width, height)))
    )
    _, order = index.search(asked[able], max(_RECALLS) + 1)
    hits = dict.fromkeys(_RECALLS, 0)
    for query, found in zip(able, order, strict=True):
        if dataset.among_themselves:
            found = found[found != query]
        true = np.isin(found, dataset.non_negatives(query))
        for k in _RECALLS:
            hits[k] += bool(true[:k].any())
    return {k: hit / max(1, len(able)) for k, hit in hits.items()}
