"""Clusters of duplicate documents: connected components, the document kept of each, and the decision files.

A global stage writes its decisions once for the whole corpus; `drop_duplicates` applies them batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.stages import Drop, IdLookup, NumberedPart, Outcome, outcome

_KEPT_FILE = "keeper.npy"  # int64 [documents]: the document kept in place of each, which may be itself
_SIMILARITY_FILE = "similarity.npy"  # float32 [documents]: the similarity of the two
_MAX_EXAMPLES = 20


def choose_kept(
    one: Int64Array, other: Int64Array, num_documents: int, is_close: Callable[[Int64Array, Int64Array], BoolArray]
) -> Int64Array:
    """Chooses, for each document, the document that is kept in its place; it may be itself: int64 [documents].

    `one` and `other` (int64 [pairs]) are pairs of similar documents, one < other. The first document of each
    connected component is kept. It replaces every document that it forms a pair with, or that
    `is_close(first, document)` accepts. The remaining documents, which only a chain of pairs connects to it, are
    visited in order: each is kept unless it forms a pair with one of them that is kept. So at most one document of
    each pair is kept.

    Dropping whole connected components would drop chains of documents whose ends have nothing in common.
    """
    kept = connected_components(one, other, num_documents)
    members = np.flatnonzero(kept != np.arange(num_documents))
    paired_with_kept = np.zeros(num_documents, np.bool_)
    paired_with_kept[other[one == kept[other]]] = True
    far = members[~paired_with_kept[members]]
    far = far[~is_close(kept[far], far)]
    kept[far] = far
    is_far = np.zeros(num_documents, np.bool_)
    is_far[far] = True
    among = np.flatnonzero(is_far[one] & is_far[other])
    among = among[np.lexsort((one[among], other[among]))]
    for first, second in zip(one[among].tolist(), other[among].tolist(), strict=True):
        if kept[first] == first and kept[second] == second:
            kept[second] = first
    return kept


def connected_components(one: Int64Array, other: Int64Array, num_documents: int) -> Int64Array:
    """Returns the first document of the connected component of each document: int64 [documents].

    Union-find on whole arrays. Each document points to itself or to an earlier document of its component. A round
    points the roots of both documents of each pair to the smaller root, and then follows all pointers to their
    roots; rounds repeat until both documents of every pair have the same root.
    """
    paired = np.zeros(num_documents, np.bool_)
    paired[one] = paired[other] = True
    nodes = np.flatnonzero(paired)
    numbers = np.cumsum(paired) - 1
    one, other = numbers[one], numbers[other]
    roots = np.arange(len(nodes))
    while len(one):
        smaller = np.minimum(roots[one], roots[other])
        np.minimum.at(roots, roots[one], smaller)
        np.minimum.at(roots, roots[other], smaller)
        while not np.array_equal(followed := roots[roots], roots):
            roots = followed
        apart = roots[one] != roots[other]
        one, other = one[apart], other[apart]
    found = np.arange(num_documents)
    found[nodes] = nodes[roots]
    return found


def write_decisions(
    folder: Path, parts: Sequence[NumberedPart], kept: Int64Array, similarity: NDArray[np.floating[Any]]
) -> dict[str, Any]:
    """Writes the decisions, and returns figures on the documents of this run for the report, as JSON values.

    `kept` (int64 [documents]) is the document kept in place of each, `similarity` (float [documents]) the
    similarity of the two. A cluster is a kept document with its duplicates; `cluster_sizes` counts clusters by
    size, in powers of two. `examples` are pairs of document numbers from different clusters, spread over all of
    them.
    """
    np.save(folder / _KEPT_FILE, kept)
    np.save(folder / _SIMILARITY_FILE, similarity.astype(np.float32))
    in_this_run = documents_to_filter(parts)
    duplicates = np.flatnonzero((kept != np.arange(len(kept))) & in_this_run)
    clusters, sizes = np.unique(kept[duplicates], return_counts=True)
    return {
        "documents": int(in_this_run.sum()),
        "duplicates": len(duplicates),
        "clusters": len(clusters),
        "largest_cluster": 1 + int(sizes.max()) if len(sizes) else 0,
        "cluster_sizes": _count_by_power_of_two(sizes + 1),
        "examples": _examples(kept, duplicates[in_this_run[kept[duplicates]]], similarity),
    }


def documents_to_filter(parts: Sequence[NumberedPart]) -> BoolArray:
    """Marks the documents that this run filters: none of a previous run, none that a previous stage removed."""
    rows = [np.zeros(part.rows, np.bool_) if part.records is None else ~part.removed_rows() for part in parts]
    return np.concatenate([np.zeros(0, np.bool_), *rows])


def read_duplicates(folder: Path) -> BoolArray:
    """Marks the documents that the decisions in `folder` call duplicates: bool [documents]."""
    kept = np.load(folder / _KEPT_FILE, mmap_mode="r")
    return np.asarray(kept != np.arange(len(kept)))


def drop_duplicates(
    stage: str,
    reason: str,
    batch: pa.RecordBatch,
    documents: Int64Array,
    folder: Path,
    ids_of: IdLookup,
) -> Outcome:
    """Drops the duplicates from a batch of the documents with these numbers (int64 [rows])."""
    kept = np.load(folder / _KEPT_FILE, mmap_mode="r")[documents]
    rows = np.flatnonzero(kept != documents)
    similarity = np.load(folder / _SIMILARITY_FILE, mmap_mode="r")[documents[rows]]
    kept_ids = ids_of(np.asarray(kept[rows]))
    drops = [
        Drop(row, reason, {"duplicate_of": kept_id, "similarity": round(value, 3)})
        for row, kept_id, value in zip(rows.tolist(), kept_ids, similarity.tolist(), strict=True)
    ]
    return outcome(stage, batch, drops)


def _count_by_power_of_two(sizes: Int64Array) -> dict[str, int]:
    powers, counts = np.unique(np.floor(np.log2(sizes)).astype(np.int64), return_counts=True)
    return {f"{2**p}-{2 ** (p + 1) - 1}": c for p, c in zip(powers.tolist(), counts.tolist(), strict=True)}


def _examples(
    kept: Int64Array, duplicates: Int64Array, similarity: NDArray[np.floating[Any]]
) -> list[dict[str, Any]]:
    _, first = np.unique(kept[duplicates], return_index=True)
    spread = np.linspace(0, len(first) - 1, min(_MAX_EXAMPLES, len(first))).astype(np.int64)
    chosen = duplicates[first[spread]]
    return [
        {"kept": one, "duplicate": other, "similarity": round(value, 3)}
        for one, other, value in zip(
            kept[chosen].tolist(), chosen.tolist(), similarity[chosen].tolist(), strict=True
        )
    ]
