"""Pairs of similar documents: the files that tasks write, and what estimates say of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.deduplication.keys import read_signatures
from deepseek_v3.data.deduplication.lsh import Floats, estimates
from deepseek_v3.data.deduplication.utf8 import Int64s
from deepseek_v3.data.stages import Part, split_by_part

# The earlier and the later document, by number, and their Jaccard similarity, be it exact or estimated.
PAIR = np.dtype([("one", "<i8"), ("other", "<i8"), ("similarity", "<f8")])
Pairs = NDArray[np.void]

_DEVIATIONS = 3
_PAIRS_AT_ONCE = 2**16


def as_pairs(one: Int64s, other: Int64s, similarity: Floats) -> Pairs:
    """An array of `PAIR` from its columns."""
    pairs = np.empty(len(one), PAIR)
    pairs["one"], pairs["other"], pairs["similarity"] = one, other, similarity
    return pairs


def read_pairs(files: Iterable[Path]) -> Pairs:
    """All pairs in these files; a pair may be there more than once."""
    return np.concatenate([np.zeros(0, PAIR), *(np.load(file) for file in files)])


def unique_pairs(pairs: Pairs) -> Pairs:
    """Each pair once, ascending."""
    pairs = pairs[np.lexsort((pairs["other"], pairs["one"]))]
    new = np.ones(len(pairs), np.bool_)
    new[1:] = (pairs["one"][1:] != pairs["one"][:-1]) | (pairs["other"][1:] != pairs["other"][:-1])
    return pairs[new]


def margin(threshold: float, values: int) -> float:
    """How far an estimate from so many values may be off: three standard deviations at the threshold."""
    return _DEVIATIONS * math.sqrt(threshold * (1 - threshold) / values)


def estimated(parts: Sequence[Part], one: Int64s, other: Int64s) -> Floats:
    """Estimated Jaccard similarities of documents: float64 [pairs]."""
    found = np.empty(len(one))
    for start in range(0, len(one), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        signatures = read_signatures(parts, np.concatenate([one[some], other[some]]))
        first, second = np.split(np.arange(len(signatures)), 2)
        found[some] = estimates(signatures, first, second)
    return found


def have_texts(parts: Sequence[Part], pairs: Pairs) -> NDArray[np.bool_]:
    """Of which pairs both texts are there to be compared: bool [pairs]."""
    there = np.ones(len(pairs), np.bool_)
    for side in ("one", "other"):
        for part, chosen in split_by_part(parts, pairs[side]):
            if part.records is None:
                there[chosen] = False
    return there
