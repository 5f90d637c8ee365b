"""Locality-sensitive hashing (Leskovec et al., MMDS, §3.4): which documents are worth comparing.

Documents that agree in all signature values of a band fall into the same bucket and become candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepseek_v3.data.arrays import Float64Array, Int64Array, UInt8Array, UInt32Array, UInt64Array, mix64
from deepseek_v3.data.deduplication.hashing import random_bits

_BAND_SEED = 2**32 + 16
_BYTE_MULTIPLIER = np.uint32(0x9E3779B1)  # near 2^32 divided by the golden ratio
_NEAR = 8  # members of a bucket
_PAIRS_AT_ONCE = 2**12


def band_keys(signatures: UInt32Array, bands: int, rows: int) -> UInt64Array:
    """Keys of 64 bits for bands of `rows` values: uint64 [bands, documents] from uint32 [documents, values]."""
    multipliers = random_bits(_BAND_SEED, rows) | np.uint64(1)
    values = signatures[:, : bands * rows].reshape(-1, bands, rows)
    totals = np.zeros((len(signatures), bands), np.uint64)
    for row in range(rows):
        totals += values[:, :, row] * multipliers[row]
    return mix64(totals.T)


def b_bit_signatures(signatures: UInt32Array) -> UInt8Array:
    """8 bits of each value (b-bit minwise hashing, Li and König 2010): a quarter to keep, hardly less to tell."""
    return (signatures * _BYTE_MULTIPLIER >> np.uint32(24)).astype(np.uint8)


def estimate_jaccard(signatures: UInt8Array, one: Int64Array, other: Int64Array) -> Float64Array:
    """Estimated Jaccard similarities of pairs of documents: float64 [pairs], without bias.

    `signatures`: uint8 [documents, values]; `one` and `other` are rows of it. Values that differ agree by chance in
    one of 256 cases (Li and König 2010, theorem 1).
    """
    agreeing = np.empty(len(one), np.int64)
    for start in range(0, len(one), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        agreeing[some] = (signatures[one[some]] == signatures[other[some]]).sum(axis=1)
    return (256 * agreeing / signatures.shape[1] - 1) / 255


def similar_pairs(
    signatures: UInt8Array, buckets: Int64Array, least: float, sure: float
) -> tuple[Int64Array, Int64Array, Float64Array]:
    """Pairs of documents of the same bucket whose estimated similarity is at least `least`.

    `signatures`: uint8 [documents, values]. `buckets`: int64 [documents], ascending. Returns the documents' indices
    (in each pair the earlier and the later one) and the estimates.

    In a bucket of up to 9 documents all pairs are compared; in a larger one each document with the first 8 and with
    the 8 before it, so that the work grows no faster than the bucket. Two documents that are both more than `sure`
    alike to the bucket's first are connected by it, so they are not compared.
    """
    first = np.searchsorted(buckets, buckets)
    other = np.flatnonzero(first < np.arange(len(buckets)))
    one = first[other]
    found = [(one, other, estimate_jaccard(signatures, one, other))]
    settled = np.ones(len(buckets), np.bool_)
    settled[other] = found[0][2] > sure
    for one, other in _candidates(buckets, first):
        needed = np.flatnonzero(~(settled[one] & settled[other]) & (one > first[one]))
        one, other = one[needed], other[needed]
        found.append((one, other, estimate_jaccard(signatures, one, other)))
    one, other, similarities = (np.concatenate(column) for column in zip(*found, strict=True))
    kept = similarities >= least
    return one[kept], other[kept], similarities[kept]


def _candidates(buckets: Int64Array, first: Int64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Pairs of near members of a bucket, then those of its first few with all that are further away."""
    for distance in range(1, _NEAR + 1):
        one = np.flatnonzero(buckets[distance:] == buckets[:-distance])
        yield one, one + distance
    ranks = np.arange(len(buckets)) - first
    for leader in range(1, _NEAR):
        other = np.flatnonzero(ranks > leader + _NEAR)
        yield first[other] + leader, other
