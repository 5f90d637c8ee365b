"""The n-grams of evaluation texts that occur in the documents of a corpus, part by part.

The keys of a part are
- `matches.npy`: `MATCH` [matches], in the order of the documents and their words;
- `words.npy`: uint32 [documents], the number of words of each document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.decontamination.index import EvaluationIndex, split_words, word_pattern
from deepseek_v3.data.deduplication.key_files import map_keys
from deepseek_v3.data.documents import text_batches
from deepseek_v3.data.stages import NumberedPart

# An n-gram of the index in a document: the document's row in its part, the first word and the number of words.
_PLACE = [("start", "<u4"), ("length", "<u4"), ("ngram", "<i8")]
MATCH = np.dtype([("row", "<u4"), *_PLACE])
# A document with matches that count: their number, the share of its words in them, and the first of them.
OVERLAP = np.dtype([("document", "<i8"), ("ngrams", "<i8"), ("share", "<f8"), *_PLACE])
Matches: TypeAlias = NDArray[np.void]

_MATCHES_FILE, _WORDS_FILE = "matches.npy", "words.npy"
_EXAMPLES = 5  # the most common n-grams that the report shows, each of another evaluation text


def write_keys(index: EvaluationIndex, texts: Sequence[str], folder: Path) -> None:
    """Finds the matches in the texts of a part, and writes them and the numbers of words into `folder`."""
    found: list[Matches] = [np.zeros(0, MATCH)]
    sizes: list[int] = []
    for batch in text_batches(texts):
        lists = [split_words(text.lower()) for text in batch]
        lengths = np.array([*map(len, lists)], np.int64)
        in_batch = index.find(lists)
        ends = np.cumsum(lengths)
        rows = np.searchsorted(ends, in_batch.starts, side="right")
        matches = np.empty(len(rows), MATCH)
        matches["row"] = rows + len(sizes)
        matches["start"] = in_batch.starts - (ends - lengths)[rows]
        matches["length"], matches["ngram"] = in_batch.lengths, in_batch.ngrams
        found.append(matches)
        sizes += lengths.tolist()
    np.save(folder / _MATCHES_FILE, np.concatenate(found))
    np.save(folder / _WORDS_FILE, np.array(sizes, np.uint32))


def count_documents(parts: Sequence[NumberedPart], num_ngrams: int) -> Int64Array:
    """The number of documents in which each n-gram of the index occurs: int64 [n-grams]."""
    counts = np.zeros(num_ngrams, np.int64)
    for _, matches in _read(parts):
        once = np.unique(matches[["row", "ngram"]])
        ngrams, documents = np.unique(once["ngram"], return_counts=True)
        counts[ngrams] += documents
    return counts


def matching_documents(parts: Sequence[NumberedPart]) -> int:
    """The number of documents with any match, also with one that does not count."""
    return sum(len(np.unique(matches["row"])) for _, matches in _read(parts))


def overlaps(parts: Sequence[NumberedPart], is_common: BoolArray) -> NDArray[np.void]:
    """The `OVERLAP` of each document that has matches with n-grams that are not common, in order."""
    found: list[NDArray[np.void]] = [np.zeros(0, OVERLAP)]
    for part, matches in _read(parts):
        found.append(_overlaps_of_part(part, matches[~is_common[matches["ngram"]]]))
    return np.concatenate(found)


def _overlaps_of_part(part: NumberedPart, matches: Matches) -> NDArray[np.void]:
    rows, firsts, documents = np.unique(matches["row"], return_index=True, return_inverse=True)
    sizes = map_keys(part, _WORDS_FILE)[rows].astype(np.int64)
    starts = (np.cumsum(sizes) - sizes)[documents] + matches["start"]
    changes = np.zeros(sizes.sum() + 1, np.int64)
    np.add.at(changes, starts, 1)
    np.add.at(changes, starts + matches["length"], -1)
    document_of_word = np.repeat(np.arange(len(rows)), sizes)
    covered = np.bincount(document_of_word[np.cumsum(changes[:-1]) > 0], minlength=len(rows))
    found = np.empty(len(rows), OVERLAP)
    found["document"] = rows.astype(np.int64) + part.first
    found["ngrams"] = np.bincount(documents, minlength=len(rows))
    found["share"] = np.round(covered / np.maximum(sizes, 1), 4)
    for field, _ in _PLACE:
        found[field] = matches[field][firsts]
    return found


def common_examples(
    parts: Sequence[NumberedPart], documents: Int64Array, is_common: BoolArray, index: EvaluationIndex
) -> list[dict[str, Any]]:
    """The most common n-grams, each of another evaluation text: its name, the number of documents, and the text.

    `documents`, int64 [n-grams], are the numbers of documents in which the n-grams occur.
    """
    ngrams = np.flatnonzero(is_common)
    ngrams = ngrams[np.argsort(-documents[ngrams], kind="stable")]
    _, firsts = np.unique(index.owners[ngrams], return_index=True)
    chosen = ngrams[np.sort(firsts)[:_EXAMPLES]]
    texts: dict[int, str] = {}
    for part, matches in _read(parts) if len(chosen) else ():
        present, places = np.unique(matches["ngram"], return_index=True)
        for match in matches[places[np.isin(present, chosen) & ~np.isin(present, [*texts])]]:
            text = _text(part, int(match["row"]))
            texts[int(match["ngram"])] = excerpt(text, int(match["start"]), int(match["length"]))
        if len(texts) == len(chosen):
            break
    return [
        {"evaluation": index.names[index.owners[one]], "documents": int(documents[one]), "text": texts[one]}
        for one in chosen.tolist()
    ]


def excerpt(text: str, start: int, length: int) -> str:
    """`length` words of a text in lower case, from word `start` on, with what stands between them."""
    lower = text.lower()
    found = [*islice(word_pattern(lower).finditer(lower), start, start + length)]
    return lower[found[0].start() : found[-1].end()]


def _read(parts: Sequence[NumberedPart]) -> Iterator[tuple[NumberedPart, Matches]]:
    """The matches of each part, without those of documents that a preceding stage removed."""
    for part in parts:
        matches = map_keys(part, _MATCHES_FILE)
        if len(matches):
            yield part, matches[~part.removed_rows()[matches["row"]]]


def _text(part: NumberedPart, row: int) -> str:
    assert part.records is not None, "this stage has no documents of previous runs"
    with pa.memory_map(str(part.records)) as file:
        text: str = pa.ipc.open_file(file).read_all().column("text")[row].as_py()
    return text
