"""How alike descriptors are, and the index that finds the most alike."""

from __future__ import annotations

import math

import faiss
import numpy as np
import pytest
from keyframes import rounded
from numpy.typing import NDArray

from vpr_lite_ros.descriptors import DescriptorIndex, similarities


def _descriptors(count: int, parts: int, dimension: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, parts, dimension))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return vectors.astype(np.float32)


def test_all_parts_are_compared_or_crossed_sides() -> None:
    one, two, three, four = np.eye(4, dtype=np.float32)
    query = np.stack([one, two, three])  # whole, left, right
    known = np.stack(
        [
            query,
            np.stack([one, four, four]),  # the same whole alone
            np.stack([four, two, three]),  # the same sides alone
            np.stack([four, four, two]),  # at its right what the query has at its left
            np.stack([four, three, four]),  # at its left what the query has at its right
            np.stack([one, three, two]),  # both, and the whole
            np.stack([two, one, one]),
        ]
    )
    expected = [1, 1 / 3, 2 / 3, 1, 1, 1, 0]
    assert similarities(query, known).tolist() == pytest.approx(expected)
    slanted = np.stack([0.6 * one + 0.8 * four, 0.8 * two + 0.6 * three, one])
    assert similarities(query, slanted[None])[0] == pytest.approx(0.6)  # not (0.6 + 0.8) / 3
    # Of wholes alone, that is their cosine.
    assert similarities(query[:1], known[:, :1]).tolist() == [1, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("many", [0, 10**6], ids=["side by side", "one by one"])
def test_the_index_finds_what_is_most_alike(
    parts: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpr_lite_ros.descriptors.MANY", many)
    monkeypatch.setattr("vpr_lite_ros.descriptors.MORE", 300)  # as many as there are
    rng = np.random.default_rng(1)
    index, known = DescriptorIndex(16), _descriptors(300, parts, 16)
    for first in range(0, 300, 70):
        index.add(known[first : first + 70])
    left = rounded(known)
    for _ in range(4):
        gone = np.sort(rng.choice(len(left), 40, replace=False))
        index.remove(gone)
        left = np.delete(left, gone, axis=0)
        assert len(index) == len(left) and index.bytes_each == 16 * parts
        assert index.wholes(np.arange(5)) == pytest.approx(left[:5, 0], abs=1e-6)
        for query in _descriptors(20, parts, 16, seed=2):
            eligible = rng.random(len(left)) < rng.choice([0.01, 0.2, 1.0])
            alike = np.where(eligible, similarities(query, left), -math.inf)
            for k in (1, 7, 1000):
                found = index.search(query, k, eligible)
                expected = np.sort(alike)[::-1][: min(k, int(eligible.sum()))]
                assert [s for _, s in found] == pytest.approx(expected.tolist(), abs=1e-6)
                rows = [row for row, _ in found]  # of equals, any may come first
                assert alike[rows] == pytest.approx(expected, abs=1e-6)
                assert len(set(rows)) == len(rows)


def test_only_what_is_proposed_is_compared_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    known, (query,) = _descriptors(2000, 3, 16), _descriptors(1, 3, 16, seed=3)
    index, everyone = DescriptorIndex(16), np.ones(2000, np.bool_)
    index.add(known)
    alike = similarities(query, rounded(known))
    best = set(np.argsort(-alike)[:10].tolist())
    shares = []
    for more in (0, 50, 2000):
        monkeypatch.setattr("vpr_lite_ros.descriptors.MORE", more)
        found = index.search(query, 10, everyone)
        assert [s for _, s in found] == pytest.approx([alike[row] for row, _ in found], abs=1e-6)
        shares.append(len(best & {row for row, _ in found}))
    assert shares[0] < shares[1] <= shares[2] == 10


def test_searches_leave_faiss_its_threads() -> None:
    """For thinning a full database it takes all; here it would wait for them."""
    index, used = DescriptorIndex(16), []

    class Watched:
        def __init__(self, half: faiss.Index) -> None:
            self.half, self.d = half, half.d

        def search(self, *asked: object, **how: object) -> object:
            used.append(faiss.omp_get_max_threads())
            return self.half.search(*asked, **how)

        def __getattr__(self, name: str) -> object:
            return getattr(self.half, name)

    before = faiss.omp_get_max_threads()
    index.add(_descriptors(30, 3, 16))
    index._parts = [(Watched(principal), rest) for principal, rest in index._parts]
    index.search(_descriptors(1, 3, 16)[0], 5, np.ones(30, np.bool_))
    assert used == [1, 1, 1] and faiss.omp_get_max_threads() == before


def test_bytes_are_near_enough() -> None:
    known, queries = _descriptors(400, 3, 512), _descriptors(30, 3, 512, seed=1)
    index = DescriptorIndex(512)
    index.add(known)
    errors = []
    for query in queries:
        alike = similarities(query, known)
        for row, similarity in index.search(query, 400, np.ones(400, np.bool_)):
            errors.append(similarity - float(alike[row]))
    assert np.std(errors) < 0.0008 and np.abs(errors).max() < 0.004


def test_numbers_too_large_for_a_byte_count_as_the_largest() -> None:
    index = DescriptorIndex(512)
    index.add(np.eye(512, dtype=np.float32)[:4, None])
    largest = 6 / math.sqrt(512)
    assert index.wholes(np.arange(4)).max() == pytest.approx(largest, abs=1e-6)
    ((row, similarity),) = index.search(np.eye(512, dtype=np.float32)[2:3], 1, np.ones(4, np.bool_))
    assert row == 2 and similarity == pytest.approx(largest, abs=1e-6)
