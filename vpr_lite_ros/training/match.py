"""Train the matcher (paper, 2.3 to 2.5) on a frozen place network.

It sees two views of one place and learns which patch of the one shows what a patch of the other
shows; it sees views of two places and learns that nothing does. Which is which follows

- from the homography, where both views are of one image or of a camera that does not move;
- from XFeat's matches that agree with one motion of the camera, for two images of one place;
- and for two places all patches go to the dustbin, so that the score learns to say no.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
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
from vpr_lite_ros.training.pairs import Pair, Pairs, PairsConfig, part, render
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
    """Item i: (A, B, H, aligned, points) of batch i.

    A and B (N, H, W, 3) uint8, H (N, 3, 3) float32 from pixels of A to pixels of B, whether H
    says what lies where (N) bool, and where it does not, points (N, ``_MOST_POINTS``, 4) float32:
    x, y in A and in B that show the same; rows of NaN say nothing.
    """

    def __init__(self, config: MatchConfig, image_size: tuple[int, int]) -> None:
        self.config, self.image_size = config, image_size
        self.pairs = Pairs(config, "match")
        self._xfeat: XFeat | None = None
        self._key_points = lru_cache(maxsize=2000)(self._find_key_points)

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.config.seed, index))
        plan = self._plan(rng)
        views: list[list[Tensor]] = [[], []]
        homographies = []
        points = np.full((len(plan), _MOST_POINTS, 4), np.nan, np.float32)
        for number, pair in enumerate(plan):
            *both, to_first, to_second = render(pair, self.image_size, rng)
            for found, view in zip(views, both, strict=True):
                found.append(torch.from_numpy(np.ascontiguousarray(view)))
            homographies.append(to_second @ np.linalg.inv(to_first))
            if not pair.aligned:
                same = self._same_points(pair, to_first, to_second)
                points[number, : len(same)] = same
        return (
            torch.stack(views[0]),
            torch.stack(views[1]),
            torch.from_numpy(np.stack(homographies).astype(np.float32)),
            torch.tensor([pair.aligned for pair in plan]),
            torch.from_numpy(points),
        )

    def _plan(self, rng: np.random.Generator) -> list[Pair]:
        plan = self.pairs.of_places(self.config.batch, rng) if rng.random() < 0.67 else []
        while len(plan) < self.config.batch:
            path = self.pairs.image(rng)
            plan.append(Pair(path, path, part(bool(rng.random() < 0.5), rng), True, len(plan)))
        return plan

    def _same_points(
        self, pair: Pair, to_first: NDArray[np.float64], to_second: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """(M, 4) pixels of the views that show the same, as XFeat sees it in the images."""
        first, second = self._key_points(pair.first), self._key_points(pair.second)
        same = correspondences(first, second)
        if len(same) < _LEAST_POINTS:
            return same[:0]
        # Of two images of different size ``render`` scales the second one.
        scale = np.array(first.size) / np.array(second.size)
        ends = (same[:, :2], to_first), (same[:, 2:] * scale, to_second)
        moved = [cv2.perspectiveTransform(xy[None].astype(np.float64), to)[0] for xy, to in ends]
        return np.concatenate(moved, axis=1).astype(np.float32)[:_MOST_POINTS]

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
        first, second, homography, aligned, points = batch
        width, height = self.place.image_size
        pixels = torch.tensor([width, height], device=first.device)
        views = []
        for images in (first, second):
            described = [self._describe(image[None]) for image in images]
            views.append([torch.cat(parts) for parts in zip(*described, strict=True)])
        (tokens0, centres0), (tokens1, centres1) = views
        losses, scores = [], []
        for i in range(len(first)):
            rows, columns = partners(
                centres0[i] * pixels,
                centres1[i] * pixels,
                homography[i] if aligned[i] else None,
                points[i],
            )
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


def partners(
    centres0: Tensor, centres1: Tensor, homography: Tensor | None, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Which patch of the other view shows the same.

    Parameters
    ----------
    centres0, centres1
        (N, 2) and (M, 2) pixels of the patches of either view.
    homography
        (3, 3) from pixels of the first to pixels of the second, or None where only points are
        known.
    points
        (P, 4) x, y in the first and in the second view; rows of NaN are ignored.

    Returns
    -------
    rows, columns
        (N,) numbers of patches of the second view and (M,) of the first, or ``DUSTBIN``, or
        ``UNKNOWN``.
    """
    rows = torch.full((len(centres0),), UNKNOWN, device=centres0.device)
    columns = torch.full((len(centres1),), UNKNOWN, device=centres1.device)
    if homography is None:
        points = points[~points.isnan().any(dim=1)]
        if not len(points):
            return rows, columns
        # Each match of points speaks for the patches nearest to its ends.
        distance0, near0 = torch.cdist(points[:, :2], centres0).min(dim=1)
        distance1, near1 = torch.cdist(points[:, 2:], centres1).min(dim=1)
        heard = (distance0 < _SAME) & (distance1 < _SAME)
        votes = torch.zeros(len(centres0), len(centres1), device=centres0.device)
        ones = torch.ones(int(heard.sum()), device=votes.device)
        votes.index_put_((near0[heard], near1[heard]), ones, accumulate=True)
        same = votes > 0
        closeness = votes
    else:
        there = _project(centres0, homography)
        back = _project(centres1, torch.linalg.inv(homography))
        distance = torch.cdist(there, centres1)
        rows[distance.min(dim=1).values > _OTHER] = DUSTBIN
        columns[torch.cdist(back, centres0).min(dim=1).values > _OTHER] = DUSTBIN
        same = distance < _SAME
        closeness = -distance
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
        What ``partners`` returns.
    """
    matched = rows >= 0
    matches = -log_plan[:-1][matched, rows[matched]]
    dustbins = torch.cat(
        [-log_plan[:-1, -1][rows == DUSTBIN], -log_plan[-1, :-1][columns == DUSTBIN]]
    )
    means = [part.mean() for part in (matches, dustbins) if len(part)]
    # Where nothing is known there is nothing to learn, but a gradient to hand back.
    return torch.stack(means).mean() if means else log_plan.sum() * 0


def _project(points: Tensor, homography: Tensor) -> Tensor:
    """(N, 2) points through a homography; those behind the camera come to lie far away."""
    lifted = F.pad(points, (0, 1), value=1.0) @ homography.T
    there = lifted[:, :2] / lifted[:, 2:]
    return torch.where(lifted[:, 2:] > 1e-6, there, torch.full_like(there, math.inf))
