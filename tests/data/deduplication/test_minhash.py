"""Signatures: their definition, their estimates, and the NumPy and Numba kernels that compute them."""

import logging
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepseek_v3.config.deduplication_config import DeduplicationConfig, candidate_probability
from deepseek_v3.data.deduplication import kernels
from deepseek_v3.data.deduplication.hashing import odd_multipliers
from deepseek_v3.data.deduplication.jaccard import estimate_margin
from deepseek_v3.data.deduplication.kernels import numba_kernels, numpy_kernels, select
from deepseek_v3.data.deduplication.lsh import b_bit_signatures, band_keys, estimate_jaccard
from deepseek_v3.data.deduplication.minhash import MinHasher, Shingles
from deepseek_v3.utils.errors import DataError

KERNELS = (numpy_kernels, numba_kernels)


def _random_hashes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 2**32, count, dtype=np.uint32)


@pytest.mark.parametrize("module", KERNELS)
def test_signature_values_are_minimum_products(module: ModuleType) -> None:
    hashes, multipliers = _random_hashes(0, 30), odd_multipliers(0, 20)
    offsets = np.array([0, 0, 1, 9, 9, 30, 30])
    found = module.minhash_signatures(hashes, offsets, multipliers)
    for document, (start, end) in enumerate(pairwise(offsets)):
        for value, multiplier in enumerate(multipliers.tolist()):
            products = [h * multiplier % 2**32 for h in hashes[start:end].tolist()]
            assert found[document, value] == min(products, default=2**32 - 1)


@given(sizes=st.lists(st.integers(0, 40), max_size=30), values=st.integers(16, 130), seed=st.integers(0, 99))
def test_numpy_and_numba_agree_bit_for_bit(sizes: list[int], values: int, seed: int) -> None:
    offsets = np.cumsum([0, *sizes])
    hashes, multipliers = _random_hashes(seed, sum(sizes)), odd_multipliers(seed, values)
    one, other = (module.minhash_signatures(hashes, offsets, multipliers) for module in KERNELS)
    assert one.dtype == other.dtype == np.uint32
    assert one.shape == (len(sizes), values)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("module", KERNELS)
@given(sets=st.lists(st.sets(st.integers(0, 60)), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_intersection_sizes_of_random_sets(module: ModuleType, sets: list[set[int]], seed: int) -> None:
    members = np.array(
        [number << 32 | value for number, some in enumerate(sets) for value in sorted(some)], np.uint64
    )
    offsets = np.cumsum([0, *map(len, sets)])
    one, other = np.random.default_rng(seed).integers(0, len(sets), (2, 20))
    found = module.intersection_sizes(members, offsets, one, other)
    assert found.tolist() == [len(sets[a] & sets[b]) for a, b in zip(one, other, strict=True)]


def test_many_pairs_are_processed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_kernels, "_SHINGLES_PER_CHUNK", 7)
    members, offsets = np.array([1, 2, 3, 4, 2, 3, 5, 9], np.uint64), np.array([0, 4, 4, 8])
    one, other = np.array([0, 0, 2, 1, 0]), np.array([2, 1, 2, 1, 0])
    assert numpy_kernels.intersection_sizes(members, offsets, one, other).tolist() == [2, 0, 4, 0, 4]


@pytest.mark.parametrize("module", KERNELS)
@given(documents=st.lists(st.binary(max_size=40), max_size=12), left_out=st.binary(max_size=5))
def test_unwanted_bytes_are_removed(module: ModuleType, documents: list[bytes], left_out: bytes) -> None:
    text, offsets = np.frombuffer(bytearray(b"".join(documents)), np.uint8), np.cumsum([0, *map(len, documents)])
    left, places = module.remove_bytes(text, offsets, left_out)
    found = [left[start:end].tobytes() for start, end in pairwise(places)]
    assert found == [bytes(byte for byte in document if byte not in left_out) for document in documents]


@pytest.mark.parametrize(("size", "similarity"), [(20, 0.5), (200, 0.8), (2000, 0.8), (200, 0.95)])
def test_estimates_are_unbiased_with_the_expected_spread(size: int, similarity: float) -> None:
    trials, values = 400, 128
    both = round(size * similarity)
    apart = (size - both) // 2
    hasher = MinHasher(values, 5, 3, "numpy")
    hashes = _random_hashes(1, trials * size).reshape(trials, size)
    sides = [hashes[:, : size - apart], np.concatenate([hashes[:, :both], hashes[:, size - apart :]], axis=1)]
    signatures = [
        hasher.signatures(Shingles(np.ascontiguousarray(side).ravel(), np.arange(trials + 1) * side.shape[1]))
        for side in sides
    ]
    rows = np.arange(trials)
    found = estimate_jaccard(b_bit_signatures(np.concatenate(signatures)), rows, rows + trials)
    truth = both / size
    deviation = np.sqrt(truth * (1 - truth) / values)
    assert found.mean() == pytest.approx(truth, abs=4 * deviation / np.sqrt(trials))
    assert found.std() == pytest.approx(deviation, rel=0.15)


def test_bands_agree_as_often_as_the_formula_says() -> None:
    trials, size, both = 1500, 100, 80
    hasher = MinHasher(128, 5, 0, "numpy")
    hashes = _random_hashes(2, trials * (2 * size - both)).reshape(trials, -1)
    sides = [hashes[:, : both + 10], np.concatenate([hashes[:, :both], hashes[:, both + 10 : both + 20]], axis=1)]
    keys = [
        band_keys(hasher.signatures(Shingles(side.ravel(), np.arange(trials + 1) * (both + 10))), 16, 8)
        for side in map(np.ascontiguousarray, sides)
    ]
    found = (keys[0] == keys[1]).any(axis=0).mean()
    assert found == pytest.approx(candidate_probability(both / (both + 20), 16, 8), abs=0.02)


def test_band_keys_distinguish_bands() -> None:
    signatures = np.random.default_rng(0).integers(0, 2, (500, 12), dtype=np.uint32)
    keys = band_keys(signatures, 3, 4)
    for band in range(3):
        expected = [row.tobytes() for row in signatures[:, 4 * band : 4 * band + 4]]
        found = keys[band].tolist()
        assert len(set(zip(expected, found, strict=True))) == len(set(expected)) == len(set(found))


@pytest.mark.parametrize(
    ("num_perm", "threshold", "banding"),
    [(128, 0.8, (16, 8)), (128, 0.5, (42, 3)), (256, 0.7, (36, 7)), (64, 0.8, (10, 6)), (128, 1.0, (1, 128))],
)
def test_bands_by_values_and_threshold(num_perm: int, threshold: float, banding: tuple[int, int]) -> None:
    options = DeduplicationConfig(num_perm=num_perm, threshold=threshold)
    assert options.banding() == banding
    bands, rows = banding
    assert candidate_probability(threshold, bands, rows) >= 0.94
    if rows < num_perm:
        assert candidate_probability(threshold, num_perm // (rows + 1), rows + 1) < 0.94


def test_impossible_banding_options_are_refused() -> None:
    assert DeduplicationConfig(num_perm=112, bands=14).banding() == (14, 8)
    assert DeduplicationConfig(bands=9).banding() == (9, 14)
    with pytest.raises(ValidationError, match="at most num_perm = 64"):
        DeduplicationConfig(num_perm=64, bands=65)
    with pytest.raises(ValidationError, match="find only 81% of the pairs"):
        DeduplicationConfig(num_perm=16, threshold=0.1)
    assert DeduplicationConfig().min_similarity_to_kept == 0.8
    assert DeduplicationConfig(threshold=0.05).min_similarity_to_kept == 0.05
    assert DeduplicationConfig(cluster_threshold=0.8).min_similarity_to_kept == 0.8


def test_the_margin_is_three_standard_deviations() -> None:
    assert estimate_margin(0.8, 128) == pytest.approx(0.106, abs=1e-3)
    assert estimate_margin(1.0, 128) == 0


def test_numpy_replaces_a_missing_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    texts = pa.array(["one two three four five six", "seven"])
    expected = [
        hasher.signatures(found) for hasher in [MinHasher(16, 5, 0, "numba")] for found in hasher.shingles(texts)
    ]
    monkeypatch.delattr(kernels, "numba_kernels")
    monkeypatch.setitem(sys.modules, numba_kernels.__name__, None)
    select.select_kernels.cache_clear()
    caplog.set_level(logging.INFO)
    hasher = MinHasher(16, 5, 0, "auto")
    assert [hasher.signatures(found).tolist() for found in hasher.shingles(texts)] == [f.tolist() for f in expected]
    assert [record.message.partition(" cannot")[0] for record in caplog.records] == [
        "accelerator = auto: kernels in NumPy, because numba"
    ]
    with pytest.raises(DataError, match=r"pip install 'deepseek_v3\[numba\]'"):
        MinHasher(16, 5, 0, "numba")
    select.select_kernels.cache_clear()


def test_numba_compiles_without_a_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def njit(signature: str, cache: bool = False) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: compiled.append(signature) or function

    monkeypatch.setattr(numba_kernels.numba, "njit", njit)
    assert numba_kernels._compiled("int64(int64)")(abs) is abs
    assert compiled == ["int64(int64)"]
