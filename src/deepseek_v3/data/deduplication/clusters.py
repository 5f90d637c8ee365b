"""Clusters of documents that pairs connect, of which the earliest one is kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.deduplication.utf8 import Int64s


def keepers(
    one: Int64s, other: Int64s, documents: int, close: Callable[[Int64s, Int64s], NDArray[np.bool_]]
) -> Int64s:
    """For each of so many documents the one that is kept in its place, perhaps itself: int64 [documents].

    `one` and `other` are pairs of alike documents, one < other. Of all that pairs connect the earliest is kept; it
    stands for those that are a pair with it or that `close(earliest, document)` calls close to it. The others,
    which a chain of pairs has led away from it, are gone through in order: each is kept, unless it is a pair with
    an earlier one of them that is. So of each pair one document at most is kept.

    Connected components alone would drop whole chains whose ends have nothing in common.
    """
    kept = earliest_connected(one, other, documents)
    members = np.flatnonzero(kept != np.arange(documents))
    direct = np.zeros(documents, np.bool_)
    direct[other[one == kept[other]]] = True
    far = members[~direct[members]]
    far = far[~close(kept[far], far)]
    kept[far] = far
    left = np.zeros(documents, np.bool_)
    left[far] = True
    among = np.flatnonzero(left[one] & left[other])
    among = among[np.lexsort((one[among], other[among]))]
    for earlier, later in zip(one[among].tolist(), other[among].tolist(), strict=True):
        if kept[earlier] == earlier and kept[later] == later:
            kept[later] = earlier
    return kept


def earliest_connected(one: Int64s, other: Int64s, documents: int) -> Int64s:
    """For each of so many documents the earliest that pairs connect it with, perhaps itself: int64 [documents].

    Every document points at an earlier one that it is connected with, or at itself. What two of a pair point at is
    made to point at the earlier of both, and pointers are followed to their ends, until all pairs agree.
    """
    paired = np.zeros(documents, np.bool_)
    paired[one] = paired[other] = True
    nodes = np.flatnonzero(paired)
    numbers = np.cumsum(paired) - 1
    one, other = numbers[one], numbers[other]
    pointers = np.arange(len(nodes))
    while len(one):
        earlier = np.minimum(pointers[one], pointers[other])
        np.minimum.at(pointers, pointers[one], earlier)
        np.minimum.at(pointers, pointers[other], earlier)
        while not np.array_equal(ends := pointers[pointers], pointers):
            pointers = ends
        apart = pointers[one] != pointers[other]
        one, other = one[apart], other[apart]
    kept = np.arange(documents)
    kept[nodes] = nodes[pointers]
    return kept
