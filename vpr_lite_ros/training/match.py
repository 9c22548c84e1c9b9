"""Train the matcher (paper, 2.3 to 2.5) on a frozen place network.

It sees two views of one place and learns which patch of the one shows what a patch of the other
shows; it sees views of two places and learns that nothing does. Which is which follows

- from how the views were made, where both are of one image or of a camera that does not move;
- from XFeat's matches that agree with one motion of the camera, for two images of one place;
- and for two places all patches go to the dustbin, so that the score learns to say no.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpr_lite_ros.models.matcher import PairMatcher
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.models.repvgg import STRIDE
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import read_rgb
from vpr_lite_ros.training.loop import Batch, Stage
from vpr_lite_ros.training.pairs import (
    Pair,
    Pairs,
    PairsConfig,
    Standpoint,
    part_from_beside,
    render,
)
from vpr_lite_ros.training.xfeat import KeyPoints, XFeat, correspondences

_SAME = 0.75 * STRIDE
"""Pixels: patches whose centres come closer than this show the same."""
_OTHER = 1.5 * STRIDE
"""Pixels: a patch that comes closer to none than this has no partner. Between the two it may."""
_MOST_POINTS = 600
_LEAST_POINTS = 40
"""Of fewer matches of XFeat nothing is believed: two places have 20 to 30."""
UNKNOWN, DUSTBIN = -2, -1
"""What a patch's partner may be, beside the number of a patch."""


@dataclass(frozen=True, kw_only=True)
class MatchConfig(PairsConfig):
    """What to learn from, for how long."""

    xfeat: str = ""
    """``xfeat.onnx``; needed where there are ``places`` or ``sequences``."""
    batch: int = 4
    """Pairs of one place in a step; as many pairs of two places are made of them."""
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 2:
            raise TrainingError(f"batch is {self.batch}, should be 2 or more: two places differ")
        if (self.places or self.sequences) and not self.xfeat:
            raise TrainingError("xfeat is missing: its matches tell what real pairs have in common")


class MatchPairs(Dataset[Batch]):
    """Item i: (A, B, there, back, aligned, points) of batch i.

    A and B (N, H, W, 3) uint8; there (N, H/16 + 1, W/16 + 1, 2) float32, the pixels of B that
    show what every 16th pixel of A shows, and back, the other way round; whether these are known
    (N) bool; and where they are not, points (N, ``_MOST_POINTS``, 4) float32: x, y in A and in B
    that show the same; rows of NaN say nothing.
    """

    def __init__(self, config: MatchConfig, image_size: tuple[int, int]) -> None:
        self.config, self.image_size = config, image_size
        self.pairs = Pairs(config, "match")
        columns, rows = (np.arange(0.0, side + STRIDE, STRIDE) for side in image_size)
        self.shape = len(rows), len(columns), 2
        self.lattice = np.stack(np.meshgrid(columns, rows), axis=2).reshape(-1, 2)
        self._xfeat: XFeat | None = None
        self._key_points = lru_cache(maxsize=2000)(self._find_key_points)

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.config.seed, index))
        plan = self._plan(rng)
        views: list[list[Tensor]] = [[], []]
        there, back = [], []
        points = np.full((len(plan), _MOST_POINTS, 4), np.nan, np.float32)
        for number, pair in enumerate(plan):
            *both, of_first, of_second = render(pair, self.image_size, rng)
            for found, view in zip(views, both, strict=True):
                found.append(torch.from_numpy(np.ascontiguousarray(view)))
            there.append(of_second.from_image(of_first.to_image(self.lattice)))
            back.append(of_first.from_image(of_second.to_image(self.lattice)))
            if not pair.aligned:
                same = self._same_points(pair, of_first, of_second)
                points[number, : len(same)] = same
        return (
            torch.stack(views[0]),
            torch.stack(views[1]),
            *(self._maps(spots) for spots in (there, back)),
            torch.tensor([pair.aligned for pair in plan]),
            torch.from_numpy(points),
        )

    def _maps(self, spots: list[NDArray[np.float64]]) -> Tensor:
        return torch.from_numpy(np.stack(spots).astype(np.float32).reshape(-1, *self.shape))

    def _plan(self, rng: np.random.Generator) -> list[Pair]:
        count = self.config.batch if rng.random() < 0.67 else 0
        plan = self.pairs.of_places(count, rng, part_from_beside)
        while len(plan) < self.config.batch:
            look = part_from_beside(bool(rng.random() < 0.5), rng)
            plan.append(Pair(*self.pairs.still(rng), look, True, len(plan)))
        return plan

    def _same_points(
        self, pair: Pair, of_first: Standpoint, of_second: Standpoint
    ) -> NDArray[np.float32]:
        """(M, 4) pixels of the views that show the same, as XFeat sees it in the images."""
        first, second = self._key_points(pair.first), self._key_points(pair.second)
        same = correspondences(first, second)
        if len(same) < _LEAST_POINTS:
            return same[:0]
        # Of two images of different size ``render`` scales the second one.
        scale = np.array(first.size) / np.array(second.size)
        points = same.astype(np.float64)
        ends = of_first.from_image(points[:, :2]), of_second.from_image(points[:, 2:] * scale)
        return np.concatenate(ends, axis=1).astype(np.float32)[:_MOST_POINTS]

    def _find_key_points(self, path: Path) -> KeyPoints:
        if self._xfeat is None:  # in the worker process
            self._xfeat = XFeat(Path(self.config.xfeat))
        return self._xfeat(read_rgb(path), _MOST_POINTS)


class Match(Stage):
    """Self-attention and pair matcher under the assignment's log likelihood (equation 5)."""

    def __init__(self, config: MatchConfig, place: PlaceNetwork, match: PairMatcher) -> None:
        super().__init__()
        self.config, self.place, self.match = config, place, match
        self.place.requires_grad_(False)
        place.self_attention.requires_grad_(True)
        self.trained = nn.ModuleDict({"self_attention": place.self_attention, "match": match})

    def train(self, mode: bool = True) -> Match:
        """Batch norm keeps its averages: the place network is frozen."""
        super().train(mode)
        self.place.eval()
        return self

    def batches(self) -> MatchPairs:
        return MatchPairs(self.config, self.place.image_size)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        first, second, there, back, aligned, points = batch
        width, height = self.place.image_size
        pixels = torch.tensor([width, height], device=first.device)
        views = []
        for images in (first, second):
            described = [self._describe(image[None]) for image in images]
            views.append([torch.cat(parts) for parts in zip(*described, strict=True)])
        (tokens0, centres0), (tokens1, centres1) = views
        losses, scores = [], []
        for i in range(len(first)):
            both = centres0[i] * pixels, centres1[i] * pixels
            if aligned[i]:
                spots = (look_up(map[i], at) for map, at in zip((there, back), both, strict=True))
                rows, columns = partners_by_spots(*both, *spots)
            else:
                rows, columns = partners_by_points(*both, points[i])
            # The next pair's second view shows another place: no patch has a partner there.
            candidates = tokens1[[i, (i + 1) % len(first)]]
            log_plan = self._log_plan(tokens0[i : i + 1], candidates)
            nobody = torch.full_like(rows, DUSTBIN)
            losses.append(assignment_loss(log_plan[0], rows, columns))
            losses.append(assignment_loss(log_plan[1], nobody, nobody))
            scores.append(log_plan[:, :-1, :-1].detach().exp().sum(dim=(1, 2)) / len(rows))
        true, false = torch.stack(scores).mean(dim=0)
        known = torch.stack(losses)
        return {"loss": known.mean(), "same": true, "other": false}

    @torch.no_grad()
    def _patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.place.local_features(image).float()
        with torch.autocast(image.device.type, enabled=False):
            cells = F.normalize(features, dim=2)
            return self.place.patches(features, cells, self.place.vlad.soft_assign(cells))

    def _describe(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(1, H, W, 3) to tokens (1, N, D) and their centres (1, N, 2)."""
        patches, centres = self._patches(image)
        return self.place.self_attention(patches, centres), centres

    def _log_plan(self, query: Tensor, candidates: Tensor) -> Tensor:
        x0, x1 = self.match.cross(query, candidates)
        with torch.autocast(query.device.type, enabled=False):  # a dustbin is 0.01 away
            return self.match.transport(x0.float(), x1.float())


def look_up(spots: Tensor, at: Tensor) -> Tensor:
    """What a map (H/16 + 1, W/16 + 1, 2) says of pixels (N, 2), between its points too."""
    height, width, _ = spots.shape
    span = torch.tensor([width - 1, height - 1], device=at.device) * STRIDE
    grid = (at / span * 2 - 1)[None, None].to(spots.dtype)
    found = F.grid_sample(spots.permute(2, 0, 1)[None], grid, align_corners=True)
    return found[0, :, 0].T


def partners_by_spots(
    centres0: Tensor, centres1: Tensor, there: Tensor, back: Tensor
) -> tuple[Tensor, Tensor]:
    """Which patch of the other view shows the same, where each patch's spot there is known.

    Parameters
    ----------
    centres0, centres1
        (N, 2) and (M, 2) pixels of the patches of either view.
    there, back
        (N, 2) and (M, 2) where the other view shows them.

    Returns
    -------
    rows, columns
        (N,) numbers of patches of the second view and (M,) of the first, or ``DUSTBIN``, or
        ``UNKNOWN``.
    """
    distance = torch.cdist(there, centres1)
    alone0 = distance.min(dim=1).values > _OTHER
    alone1 = torch.cdist(back, centres0).min(dim=1).values > _OTHER
    rows, columns = _mutual(-distance, distance < _SAME)
    rows[alone0 & (rows == UNKNOWN)] = DUSTBIN
    columns[alone1 & (columns == UNKNOWN)] = DUSTBIN
    return rows, columns


def partners_by_points(centres0: Tensor, centres1: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The same, where some points are known; nothing is said of patches that none speaks for.

    Parameters
    ----------
    points
        (P, 4) x, y in the first and in the second view; rows of NaN are ignored.
    """
    points = points[~points.isnan().any(dim=1)]
    votes = torch.zeros(len(centres0), len(centres1), device=centres0.device)
    if len(points):
        # Each match of points speaks for the patches nearest to its ends.
        distance0, near0 = torch.cdist(points[:, :2], centres0).min(dim=1)
        distance1, near1 = torch.cdist(points[:, 2:], centres1).min(dim=1)
        heard = (distance0 < _SAME) & (distance1 < _SAME)
        ones = torch.ones(int(heard.sum()), device=votes.device)
        votes.index_put_((near0[heard], near1[heard]), ones, accumulate=True)
    return _mutual(votes, votes > 0)


def _mutual(closeness: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (N, M) that are each other's closest and ``same``; all others are ``UNKNOWN``."""
    rows = torch.full((len(closeness),), UNKNOWN, device=closeness.device)
    columns = torch.full((closeness.shape[1],), UNKNOWN, device=closeness.device)
    best1, best0 = closeness.argmax(dim=1), closeness.argmax(dim=0)
    number = torch.arange(len(rows), device=rows.device)
    mutual = (best0[best1] == number) & same[number, best1]
    rows[mutual] = best1[mutual]
    columns[best1[mutual]] = number[mutual]
    return rows, columns


def assignment_loss(log_plan: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Negative log likelihood of an assignment (equation 5), matches and dustbins alike.

    Parameters
    ----------
    log_plan
        (N + 1, M + 1) log of the transport plan, dustbins last.
    rows, columns
        What ``partners_by_spots`` returns.
    """
    matched = rows >= 0
    matches = -log_plan[:-1][matched, rows[matched]]
    dustbins = torch.cat(
        [-log_plan[:-1, -1][rows == DUSTBIN], -log_plan[-1, :-1][columns == DUSTBIN]]
    )
    means = [part.mean() for part in (matches, dustbins) if len(part)]
    # Where nothing is known there is nothing to learn, but a gradient to hand back.
    return torch.stack(means).mean() if means else log_plan.sum() * 0
