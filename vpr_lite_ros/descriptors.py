"""How alike two images are by their global descriptors, and all keyframes' descriptors in FAISS.

An image has one descriptor of all that it shows, one of its left and one of its right part. Seen
the same way, two images are as alike as these three cosines are in the mean: two parts that are
alike are more than one. But a camera that has turned sees at its left what was at its right, so
the cosine of the one's left and the other's right part counts where it is greater.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

PROPOSED_BY = ((0, 0), (1, 2), (2, 1))
"""Parts of the query and of a keyframe (0: the whole, 1: left, 2: right) that FAISS compares."""
MORE = 100
"""By the principal half of each pair's numbers, so many more than are wanted are proposed. These
are compared in full."""
LARGEST = 6.0
"""A whitened vector's numbers are seldom larger than so many times their root mean square; those
that are count as so large."""
MANY = 30_000
"""From so many keyframes on, reading them takes longer than starting threads for it."""


def similarities(query: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.floating]:
    """Similarity, -1…1, of an image's descriptors (V, D) with those of N others (N, V, D).

    V is 3, or 1 where a model describes wholes alone: then it is their cosine.
    """
    # (N, V of the others, V of the query). Not by BLAS, whose threads wait for each other.
    cosines = np.einsum("nvd,qd->nvq", known, query)
    straight = np.trace(cosines, axis1=1, axis2=2) / len(query)
    if len(query) == 1:
        return np.asarray(straight)
    return np.max([straight, cosines[:, 2, 1], cosines[:, 1, 2]], axis=0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS shares nothing of one query among threads, but waits for all: 30 ms if others work."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


class DescriptorIndex:
    """Descriptors of keyframes by row number, in memory, one byte a number.

    That is read in half the time that half precision takes, and changes a cosine of 512 numbers by
    0.0006 (root mean square). FAISS is asked for whole numbers, too: on some processors it would
    cut off what follows the point, on others not.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._scale = 127 / min(1.0, LARGEST / math.sqrt(dimension))
        # Of each part the principal components, which are searched, and the others.
        self._parts: list[tuple[faiss.Index, faiss.Index]] = []

    def __len__(self) -> int:
        return int(self._parts[0][0].ntotal) if self._parts else 0

    @property
    def bytes_each(self) -> int:
        """What one keyframe takes."""
        return self._dimension * len(self._parts)

    def add(self, descriptors: NDArray[np.float32]) -> None:
        """Add rows (M, V, D) of unit vectors; V must be that of the rows before."""
        if not self._parts:
            half = self._dimension // 2
            self._parts = [(_bytes(half), _bytes(self._dimension - half)) for _ in descriptors[0]]
        numbers = self._rounded(descriptors)
        for number, (principal, rest) in enumerate(self._parts):
            principal.add(np.ascontiguousarray(numbers[:, number, : principal.d]))
            rest.add(np.ascontiguousarray(numbers[:, number, principal.d :]))

    def remove(self, rows: NDArray[np.int64]) -> None:
        """Remove rows; those behind move up."""
        for half in itertools.chain.from_iterable(self._parts):
            half.remove_ids(faiss.IDSelectorBatch(rows))

    def search(
        self, query: NDArray[np.float32], k: int, eligible: NDArray[np.bool_]
    ) -> list[tuple[int, float]]:
        """The ``k`` ``eligible`` rows most similar to descriptors (V, D), as (row, similarity).

        As many as there are, if fewer are eligible. A row that is not among the ``k`` + ``MORE``
        most alike by half of the numbers of its whole or of crossed sides is not found.
        """
        proposals = min(k + MORE, int(eligible.sum()))
        if not proposals:
            return []
        bitmap = np.packbits(eligible, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(eligible), faiss.swig_ptr(bitmap))
        parameters = faiss.SearchParameters(sel=selector)
        numbers = self._rounded(query)

        def search_part(pair: tuple[int, int]) -> NDArray[np.int64]:
            here, there = pair
            principal, _ = self._parts[there]
            asked = np.ascontiguousarray(numbers[here : here + 1, : principal.d])
            with _one_thread():
                _, rows = principal.search(asked, proposals, params=parameters)
            return np.asarray(rows[0])

        pairs = PROPOSED_BY[: len(self._parts)]
        if len(self) < MANY:
            proposed = list(map(search_part, pairs))
        else:
            with ThreadPoolExecutor(len(pairs)) as threads:
                proposed = list(threads.map(search_part, pairs))
        rows = np.unique(np.concatenate(proposed))
        known = np.stack([_read(part, rows) for part in self._parts], axis=1)
        # By rounding, some would exceed 1.
        found = np.minimum(similarities(query / self._scale, known), 1.0)
        best = np.argsort(-found, kind="stable")[:k]
        return list(zip(rows[best].tolist(), found[best].tolist(), strict=True))

    def wholes(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Descriptors (M, D) of the whole images of these rows."""
        vectors = _read(self._parts[0], rows)
        vectors /= self._scale
        return vectors

    def _rounded(self, descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whole numbers, -127 to 127."""
        numbers: NDArray[np.float32] = np.clip(np.rint(descriptors * self._scale), -127, 127)
        return numbers


def _bytes(dimension: int) -> faiss.Index:
    """An empty index of vectors of whole numbers, -128 to 127."""
    return faiss.IndexScalarQuantizer(
        dimension, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
    )


def _read(part: tuple[faiss.Index, faiss.Index], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """All numbers (M, D) of a part."""
    # What FAISS holds, 128 more than each number: fifteen times as fast as its reconstruct_batch.
    codes = [
        faiss.rev_swig_ptr(half.codes.data(), half.ntotal * half.d).reshape(-1, half.d)[rows]
        for half in part
    ]
    numbers = np.concatenate(codes, axis=1).astype(np.float32)
    numbers -= 128
    return numbers
