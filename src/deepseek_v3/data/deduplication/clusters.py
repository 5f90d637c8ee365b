"""Clusters of documents that pairs connect, of which the earliest one is kept.

FOLDED: Which documents are duplicates of which: written once for the whole corpus, carried out part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.stages import Drop, NumberedPart, Outcome, outcome


def choose_kept(
    one: Int64Array, other: Int64Array, documents: int, close: Callable[[Int64Array, Int64Array], BoolArray]
) -> Int64Array:
    """For each of so many documents the one that is kept in its place, perhaps itself: int64 [documents].

    `one` and `other` are pairs of alike documents, one < other. Of all that pairs connect the earliest is kept; it
    stands for those that are a pair with it or that `close(earliest, document)` calls close to it. The others,
    which a chain of pairs has led away from it, are gone through in order: each is kept, unless it is a pair with
    an earlier one of them that is. So of each pair one document at most is kept.

    Connected components alone would drop whole chains whose ends have nothing in common.
    """
    kept = connected_components(one, other, documents)
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


def connected_components(one: Int64Array, other: Int64Array, documents: int) -> Int64Array:
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


_KEPT_FILE = "keeper.npy"  # int64 [documents]: the document that is kept in place of each, perhaps itself
_SIMILARITY_FILE = "similarity.npy"  # float32 [documents]: how alike the two are
_EXAMPLES = 20


def write_decisions(
    folder: Path, parts: Sequence[NumberedPart], kept: Int64Array, similarity: NDArray[np.floating[Any]]
) -> dict[str, Any]:
    """Writes them, and returns what a report says of the documents that this run judges, as JSON.

    A cluster is a kept document with its duplicates; `cluster_sizes` counts clusters by size, in powers of two.
    `examples` are pairs of documents, by number, of different clusters, spread over all of them.
    """
    np.save(folder / _KEPT_FILE, kept)
    np.save(folder / _SIMILARITY_FILE, similarity.astype(np.float32))
    judged = documents_to_filter(parts)
    duplicates = np.flatnonzero((kept != np.arange(len(kept))) & judged)
    clusters, sizes = np.unique(kept[duplicates], return_counts=True)
    return {
        "documents": int(judged.sum()),
        "duplicates": len(duplicates),
        "clusters": len(clusters),
        "largest_cluster": 1 + int(sizes.max()) if len(sizes) else 0,
        "cluster_sizes": _by_power_of_two(sizes + 1),
        "examples": _examples(kept, duplicates[judged[kept[duplicates]]], similarity),
    }


def documents_to_filter(parts: Sequence[NumberedPart]) -> BoolArray:
    """Which documents this run judges: none of an earlier corpus, none that a stage before it removed."""
    rows = [np.zeros(part.rows, np.bool_) if part.records is None else ~part.removed_rows() for part in parts]
    return np.concatenate([np.zeros(0, np.bool_), *rows])


def read_duplicates(folder: Path) -> BoolArray:
    """Which documents are duplicates: bool [documents]."""
    kept = np.load(folder / _KEPT_FILE, mmap_mode="r")
    return np.asarray(kept != np.arange(len(kept)))


def drop_duplicates(
    stage: str,
    reason: str,
    batch: pa.RecordBatch,
    documents: Int64Array,
    folder: Path,
    ids_of: Callable[[Int64Array], list[str]],
) -> Outcome:
    """The batch of these documents without the duplicates among them."""
    kept = np.load(folder / _KEPT_FILE, mmap_mode="r")[documents]
    rows = np.flatnonzero(kept != documents)
    similarity = np.load(folder / _SIMILARITY_FILE, mmap_mode="r")[documents[rows]]
    drops = [
        Drop(row, reason, {"duplicate_of": id_, "similarity": round(alike, 3)})
        for row, id_, alike in zip(rows.tolist(), ids_of(np.asarray(kept[rows])), similarity.tolist(), strict=True)
    ]
    return outcome(stage, batch, drops)


def _by_power_of_two(sizes: Int64Array) -> dict[str, int]:
    powers, counts = np.unique(np.floor(np.log2(sizes)).astype(np.int64), return_counts=True)
    return {f"{2**p}-{2 ** (p + 1) - 1}": c for p, c in zip(powers.tolist(), counts.tolist(), strict=True)}


def _examples(
    kept: Int64Array, duplicates: Int64Array, similarity: NDArray[np.floating[Any]]
) -> list[dict[str, Any]]:
    _, first = np.unique(kept[duplicates], return_index=True)
    spread = np.linspace(0, len(first) - 1, min(_EXAMPLES, len(first))).astype(np.int64)
    chosen = duplicates[first[spread]]
    return [
        {"kept": one, "duplicate": other, "similarity": round(alike, 3)}
        for one, other, alike in zip(
            kept[chosen].tolist(), chosen.tolist(), similarity[chosen].tolist(), strict=True
        )
    ]
