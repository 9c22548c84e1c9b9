"""XFeat (CVPR 2024): sparse local features that say which pixels of two images show the same.

A teacher, for pairs of images whose geometry nothing else tells: its matches survive night. The
network is read from ``xfeat.onnx``; neither it nor this module runs in the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from vpr_lite_ros.image import Image
from vpr_lite_ros.training.errors import TrainingError

SIDE = 640
"""Pixels: the network wants squares."""
_CELL = 8
"""Pixels of a cell, which has one descriptor and at most some key points."""
_LEAST_SCORE = 0.05
_LEAST_COSINE = 0.75
_TOLERANCE_PX = 2.0


@dataclass(frozen=True)
class KeyPoints:
    """The best key points of an image."""

    points: NDArray[np.float32]
    """(N, 2) x, y in pixels of the image."""
    descriptors: NDArray[np.float32]
    """(N, 64) unit vectors."""
    size: tuple[int, int]
    """Width and height of the image."""


class XFeat:
    """The network on one CPU thread."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no base of their own
            raise TrainingError(f"{path} is not XFeat's network: {error}") from error

    def __call__(self, image: Image, most: int = 600) -> KeyPoints:
        """The ``most`` best key points of an RGB image (H, W, 3)."""
        height, width = image.shape[:2]
        shrinks = width * height > SIDE * SIDE
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        square = cv2.resize(image, (SIDE, SIDE), interpolation=method).astype(np.float32) / 255
        dense, logits, reliability = self._session.run(
            ["output", "1266", "266"], {"input": square.transpose(2, 0, 1)[None]}
        )
        weights = np.exp(logits[0] - logits[0].max(axis=0))
        shares = (weights / weights.sum(axis=0))[:-1]  # the last is the dustbin
        side = SIDE // _CELL
        heat = shares.reshape(_CELL, _CELL, side, side).transpose(2, 0, 3, 1).reshape(SIDE, SIDE)
        peaks = heat == cv2.dilate(heat, np.ones((5, 5), np.uint8))
        y, x = np.nonzero(peaks & (heat > _LEAST_SCORE))
        at = np.stack([x, y], axis=1).astype(np.float32)
        score = heat[y, x] * _sample(reliability[0, 0], at)
        best = np.argsort(-score, kind="stable")[:most]
        at = at[best]
        descriptors = np.stack([_sample(channel, at) for channel in dense[0]], axis=1)
        length = np.linalg.norm(descriptors, axis=1, keepdims=True)
        scale = np.array([width / SIDE, height / SIDE], np.float32)
        return KeyPoints(at * scale, descriptors / np.maximum(length, 1e-9), (width, height))


def mutual_nearest(first: KeyPoints, second: KeyPoints) -> NDArray[np.float32]:
    """(M, 4) x, y in the first image and in the second, of key points nearest to each other."""
    if not len(first.points) or not len(second.points):
        return np.zeros((0, 4), np.float32)
    cosines = first.descriptors @ second.descriptors.T
    partner, rows = cosines.argmax(axis=1), np.arange(len(cosines))
    mutual = cosines.argmax(axis=0)[partner] == rows
    kept = rows[mutual & (cosines[rows, partner] > _LEAST_COSINE)]
    return np.concatenate([first.points[kept], second.points[partner[kept]]], axis=1)


def correspondences(first: KeyPoints, second: KeyPoints) -> NDArray[np.float32]:
    """Of ``mutual_nearest`` those that agree with one fundamental matrix (MAGSAC, 2 pixels)."""
    pairs = mutual_nearest(first, second)
    if len(pairs) < 8:
        return pairs[:0]
    matrix, inliers = cv2.findFundamentalMat(
        pairs[:, :2], pairs[:, 2:], cv2.USAC_MAGSAC, _TOLERANCE_PX, 0.999, 2000
    )
    return pairs[inliers.ravel() > 0] if matrix is not None else pairs[:0]


def _sample(plane: NDArray[np.float32], at: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear values of a map of cells at pixels (N, 2) of the square."""
    if not len(at):
        return np.zeros(0, np.float32)  # which OpenCV would refuse
    x, y = ((at + 0.5) / _CELL - 0.5).T[:, None]
    values = cv2.remap(plane, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(values[0], np.float32)
