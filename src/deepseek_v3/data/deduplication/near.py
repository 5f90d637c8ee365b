"""Near deduplication by MinHash: drops documents that share most of their word n-grams with an earlier document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepseek_v3.config.deduplication_config import DeduplicationConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.content import contents_of
from deepseek_v3.data.deduplication import jaccard, key_files, lsh
from deepseek_v3.data.deduplication.clusters import choose_kept, drop_duplicates, read_duplicates, write_decisions
from deepseek_v3.data.deduplication.jaccard import Pairs, estimate_pairs, make_pairs, read_pairs
from deepseek_v3.data.deduplication.key_files import group_keys, repeated_keys
from deepseek_v3.data.deduplication.minhash import MinHasher
from deepseek_v3.data.in_memory import Deduplicator
from deepseek_v3.data.stages import IdLookup, NumberedPart, Outcome, Task

_BYTES_PER_KEY = 500  # the memory that a match task takes for each document in its range


class MinHashDeduplicator(Deduplicator):
    """Keeps the first of similar documents (`DeduplicationConfig`).

    Signatures propose pairs; if the estimate is too close to the threshold, the exact Jaccard similarity of the
    shingles decides. Documents without words have no duplicates. In source code, by the name of its file or its
    record, operators are words.
    """

    name = "deduplication"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(DeduplicationConfig, options, type(self).__name__)
        self._bands, self._rows = self.options.banding()
        self._margin = jaccard.estimate_margin(self.options.threshold, self.options.num_perm)
        self._hasher = MinHasher(
            self.options.num_perm, self.options.ngram, self.options.seed, self.options.accelerator
        )

    def write_keys(self, table: pa.Table, folder: Path) -> None:
        signatures = np.empty((table.num_rows, self.options.num_perm), np.uint8)
        band_keys = np.empty((self._bands, table.num_rows), np.uint64)
        num_shingles = np.empty(table.num_rows, np.uint32)
        first = 0
        is_code = np.array([content == "code" for content in contents_of(table)], np.bool_)
        for texts in table.column("text").chunks:
            for shingles in self._hasher.shingles(texts, is_code[first : first + len(texts)]):
                found = self._hasher.signatures(shingles)
                block = slice(first, first + len(found))
                signatures[block] = lsh.b_bit_signatures(found)
                band_keys[:, block] = lsh.band_keys(found, self._bands, self._rows)
                num_shingles[block] = np.diff(shingles.offsets)
                first += len(found)
        key_files.write_keys(folder, signatures, num_shingles, band_keys)

    def match_tasks(self, parts: Sequence[NumberedPart], memory: int) -> list[Task]:
        documents = sum(part.rows for part in parts)
        ranges = key_files.key_ranges(documents * _BYTES_PER_KEY, memory)
        return [Task("match", (tuple(parts), band, *limits)) for band in range(self._bands) for limits in ranges]

    def match(self, output: Path, parts: Sequence[NumberedPart], band: int, low: int, high: int) -> None:
        """Writes the pairs that a band proposes among the keys in [low, high), with their estimates."""
        band_keys, documents = key_files.read_band(parts, band, low, high)
        buckets = repeated_keys(group_keys(band_keys))
        members = documents[buckets.positions]
        one, other, similarity = lsh.similar_pairs(
            key_files.read_signatures(parts, members),
            buckets.groups,
            self.options.threshold - self._margin,
            self.options.threshold + self._margin,
        )
        np.save(output, make_pairs(members[one], members[other], similarity))

    def refine_tasks(self, parts: Sequence[NumberedPart], memory: int, matches: Sequence[Path]) -> list[Task]:
        pairs = read_pairs(matches)
        _, undecided = self._decide_by_estimate(parts, pairs)
        chunks = jaccard.split_pairs(parts, jaccard.unique_pairs(pairs[undecided]), memory)
        return [Task("refine", (tuple(parts), chunk["one"], chunk["other"])) for chunk in chunks]

    def refine(self, output: Path, parts: Sequence[NumberedPart], one: Int64Array, other: Int64Array) -> None:
        """Writes those of the pairs whose exact similarity reaches the threshold."""
        similarity = jaccard.exact_similarities(parts, one, other, self._hasher)
        similar = similarity >= self.options.threshold
        np.save(output, make_pairs(one[similar], other[similar], similarity[similar]))

    def resolve(
        self, parts: Sequence[NumberedPart], matches: Sequence[Path], refined: Sequence[Path], folder: Path
    ) -> dict[str, Any]:
        pairs = read_pairs(matches)
        similar, _ = self._decide_by_estimate(parts, pairs)
        pairs = np.concatenate([pairs[similar], read_pairs(refined)])

        def is_close(kept: Int64Array, documents: Int64Array) -> BoolArray:
            return estimate_pairs(parts, kept, documents) >= self.options.min_similarity_to_kept

        kept = choose_kept(pairs["one"], pairs["other"], sum(part.rows for part in parts), is_close)
        duplicates = np.flatnonzero(kept != np.arange(len(kept)))
        similarity = np.ones(len(kept))
        similarity[duplicates] = estimate_pairs(parts, kept[duplicates], duplicates)
        return write_decisions(folder, parts, kept, similarity)

    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        return drop_duplicates(self.name, "near_duplicate", batch, documents, folder, ids_of)

    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:  # noqa: ARG002
        return read_duplicates(folder)

    def _decide_by_estimate(self, parts: Sequence[NumberedPart], pairs: Pairs) -> tuple[BoolArray, BoolArray]:
        """Marks the pairs that the estimates call similar, and the undecided ones, whose texts must be compared.

        If a text is not available, the estimate alone decides.
        """
        similarity = pairs["similarity"]
        sure = similarity > self.options.threshold + self._margin
        comparable = jaccard.have_both_texts(parts, pairs)
        return sure | (~comparable & (similarity >= self.options.threshold)), ~sure & comparable
