"""How alike two images are by their global descriptors, and all keyframes' descriptors in FAISS.

An image has one descriptor of all that it shows, one of its left and one of its right part. A
camera that has turned sees at its left what was at its right, so two images are as alike as the
most alike of: both wholes, left and right, right and left.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
from numpy.typing import NDArray

COMPARED = ((0, 0), (1, 2), (2, 1))
"""Parts of the query and of a keyframe (0: the whole, 1: left, 2: right) that are compared."""
LARGEST = 6.0
"""A whitened vector's numbers are seldom larger than so many times their root mean square; those
that are count as so large."""
MANY = 30_000
"""From so many keyframes on, reading them takes longer than starting threads for it."""


def similarities(query: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.floating]:
    """Similarity, -1…1, of an image's descriptors (V, D) with those of N others (N, V, D).

    V is 3, or 1 where a model describes wholes alone.
    """
    each = [known[:, there] @ query[here] for here, there in COMPARED[: len(query)]]
    return np.asarray(np.max(each, axis=0))


class DescriptorIndex:
    """Descriptors of keyframes by row number, in memory, one byte a number.

    That is read in a third of the time that half precision takes, and changes a cosine of 512
    numbers by 0.0008 (root mean square). Queries are rounded, too: on some processors FAISS would
    cut off what follows the point, so all count in whole numbers and find the same.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._scale = 127 / min(1.0, LARGEST / math.sqrt(dimension))
        self._parts: list[faiss.Index] = []

    def __len__(self) -> int:
        return int(self._parts[0].ntotal) if self._parts else 0

    @property
    def bytes_each(self) -> int:
        """What one keyframe takes."""
        return sum(part.code_size for part in self._parts)

    def add(self, descriptors: NDArray[np.float32]) -> None:
        """Add rows (M, V, D) of unit vectors; V must be that of the rows before."""
        if not self._parts:
            self._parts = [self._empty() for _ in range(descriptors.shape[1])]
        numbers = self._rounded(descriptors)
        for number, part in enumerate(self._parts):
            part.add(np.ascontiguousarray(numbers[:, number]))

    def remove(self, rows: NDArray[np.int64]) -> None:
        """Remove rows; those behind move up."""
        for part in self._parts:
            part.remove_ids(faiss.IDSelectorBatch(rows))

    def search(
        self, query: NDArray[np.float32], k: int, eligible: NDArray[np.bool_]
    ) -> list[tuple[int, float]]:
        """The ``k`` ``eligible`` rows most similar to descriptors (V, D), as (row, similarity).

        As many as there are, if fewer are eligible.
        """
        k = min(k, int(eligible.sum()))
        if not k:
            return []
        bitmap = np.packbits(eligible, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(eligible), faiss.swig_ptr(bitmap))
        parameters = faiss.SearchParameters(sel=selector)
        numbers = self._rounded(query)

        def search_part(pair: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            here, there = pair
            found: tuple[NDArray[np.float32], NDArray[np.int64]] = self._parts[there].search(
                numbers[here : here + 1], k, params=parameters
            )
            return found

        pairs = COMPARED[: len(self._parts)]
        if len(self) < MANY:
            parts = list(map(search_part, pairs))
        else:
            with ThreadPoolExecutor(len(pairs)) as threads:
                parts = list(threads.map(search_part, pairs))
        # Whatever is among the k best by its greatest similarity is so in the search that finds it.
        best: dict[int, float] = {}
        for products, rows in parts:
            cosines = products[0] / self._scale**2
            for row, cosine in zip(rows[0].tolist(), cosines.tolist(), strict=True):
                best[row] = max(best.get(row, -math.inf), cosine)
        order = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        return [(row, min(1.0, cosine)) for row, cosine in order]  # by rounding, some exceed 1

    def wholes(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Descriptors (M, D) of the whole images of these rows."""
        vectors: NDArray[np.float32] = self._parts[0].reconstruct_batch(rows)
        vectors /= self._scale
        return vectors

    def _rounded(self, descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whole numbers, -127 to 127."""
        numbers: NDArray[np.float32] = np.clip(np.rint(descriptors * self._scale), -127, 127)
        return numbers

    def _empty(self) -> faiss.Index:
        return faiss.IndexScalarQuantizer(
            self._dimension, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        )
