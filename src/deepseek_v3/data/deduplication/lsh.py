"""Locality-sensitive hashing (Leskovec et al., MMDS, §3.4): finds the pairs of documents to compare.

Documents whose signatures agree in all values of a band fall into the same bucket and become candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepseek_v3.data.arrays import Float64Array, Int64Array, UInt8Array, UInt32Array, UInt64Array, mix64
from deepseek_v3.data.deduplication.hashing import random_bits

_BAND_SEED = 2**32 + 16
_BYTE_MULTIPLIER = np.uint32(0x9E3779B1)  # near 2^32 divided by the golden ratio
_NEIGHBOURS = 8  # a document is compared with this many at the start of its bucket, and just before itself
_PAIRS_PER_CHUNK = 2**12


def band_keys(signatures: UInt32Array, bands: int, rows: int) -> UInt64Array:
    """Hashes each band of `rows` signature values to 64 bits.

    Takes uint32 [documents, values]; returns uint64 [bands, documents].
    """
    multipliers = random_bits(_BAND_SEED, rows) | np.uint64(1)
    values = signatures[:, : bands * rows].reshape(-1, bands, rows)
    totals = np.zeros((len(signatures), bands), np.uint64)
    for row in range(rows):
        totals += values[:, :, row] * multipliers[row]
    return mix64(totals.T)


def b_bit_signatures(signatures: UInt32Array) -> UInt8Array:
    """Keeps 8 bits of each signature value (b-bit minwise hashing, Li and König 2010).

    This takes a quarter of the space and costs the estimates hardly any precision.
    """
    return (signatures * _BYTE_MULTIPLIER >> np.uint32(24)).astype(np.uint8)


def estimate_jaccard(signatures: UInt8Array, one: Int64Array, other: Int64Array) -> Float64Array:
    """Estimates the Jaccard similarities of pairs of documents without bias: float64 [pairs].

    `signatures`: uint8 [documents, values]. `one` and `other` (int64 [pairs]) are rows of it. Different values
    agree in their 8 bits by chance in one of 256 cases (Li and König 2010, theorem 1).
    """
    agreeing = np.empty(len(one), np.int64)
    for start in range(0, len(one), _PAIRS_PER_CHUNK):
        chunk = slice(start, start + _PAIRS_PER_CHUNK)
        agreeing[chunk] = (signatures[one[chunk]] == signatures[other[chunk]]).sum(axis=1)
    return (256 * agreeing / signatures.shape[1] - 1) / 255


def similar_pairs(
    signatures: UInt8Array, buckets: Int64Array, min_similarity: float, sure_similarity: float
) -> tuple[Int64Array, Int64Array, Float64Array]:
    """Finds pairs of documents in the same bucket whose estimated similarity is at least `min_similarity`.

    `signatures`: uint8 [documents, values]. `buckets`: int64 [documents], ascending. Returns the indices of the
    earlier and of the later document of each pair (int64 [pairs]), and the estimates (float64 [pairs]).

    In a bucket of up to 9 documents all pairs are compared; in a larger one each document is compared with the
    first 8 and with the 8 before it, so the work grows linearly with the bucket. Two documents whose estimates
    with the bucket's first document both exceed `sure_similarity` are connected by it, and are not compared.
    """
    first = np.searchsorted(buckets, buckets)
    other = np.flatnonzero(first < np.arange(len(buckets)))
    one = first[other]
    found = [(one, other, estimate_jaccard(signatures, one, other))]
    settled = np.ones(len(buckets), np.bool_)
    settled[other] = found[0][2] > sure_similarity
    for one, other in _candidates(buckets, first):
        needed = np.flatnonzero(~(settled[one] & settled[other]) & (one > first[one]))
        one, other = one[needed], other[needed]
        found.append((one, other, estimate_jaccard(signatures, one, other)))
    one, other, similarities = (np.concatenate(column) for column in zip(*found, strict=True))
    kept = similarities >= min_similarity
    return one[kept], other[kept], similarities[kept]


def _candidates(buckets: Int64Array, first: Int64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Yields pairs of a bucket at most 8 positions apart, then pairs of its first members with all later ones."""
    for distance in range(1, _NEIGHBOURS + 1):
        one = np.flatnonzero(buckets[distance:] == buckets[:-distance])
        yield one, one + distance
    ranks = np.arange(len(buckets)) - first
    for leader in range(1, _NEIGHBOURS):
        other = np.flatnonzero(ranks > leader + _NEIGHBOURS)
        yield first[other] + leader, other
