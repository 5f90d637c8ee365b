"""A batch of documents split into lines, chunks and words, once for all rules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.heuristics.ragged import encode_strings, flatten_lists, prefix_sums, string_lengths, to_mask
from deepseek_v3.data.heuristics.rules import CITATION, LIST_MARK, SMALL_START
from deepseek_v3.data.heuristics.words import split_chunk, word_traits
from deepseek_v3.data.scripts import UNSPACED_CLASS

MIN_WRAP, MAX_WRAP = 30, 120  # characters of the longest line of a wrapped paragraph


@dataclass(frozen=True)
class TextTable:
    """The texts of a batch with their lines, chunks (text between white space) and words.

    texts                 the documents
    newline_counts        newlines of each document
    lines                 all lines that are not blank; document d has lines[line_starts[d] : line_starts[d + 1]]
    stripped              the same lines without surrounding white space, then those with citations once more,
                          without the citations
    uncited               for each line the row of `stripped` without citations, which C4 reads
    unwrapped_starts      unwrapped line u, of which the text was wrapped into several lines or stands on one, is
                          lines[unwrapped_starts[u] : unwrapped_starts[u + 1]]
    chunk_starts          row i of `stripped` has the chunks from chunk_starts[i] to chunk_starts[i + 1] - 1
    chunk_lengths         characters of each chunk; those of a script without spaces do not count
    chunk_words           words of each chunk; a character of a script without spaces is one
    word_starts           row i of `stripped` has words[word_starts[i] : word_starts[i + 1]]
    words                 all words, as indices into `vocabulary`
    vocabulary, traits    the distinct words, and `word_traits` of each
    """

    texts: pa.Array
    lines: pa.Array
    stripped: pa.Array
    newline_counts: Int64Array
    line_starts: Int64Array
    uncited: Int64Array
    unwrapped_starts: Int64Array
    chunk_starts: Int64Array
    chunk_lengths: Int64Array
    chunk_words: Int64Array
    word_starts: Int64Array
    words: Int64Array
    vocabulary: pa.Array
    traits: Int64Array

    @cached_property
    def document_word_starts(self) -> Int64Array:
        """Document d has words[document_word_starts[d] : document_word_starts[d + 1]]."""
        return self.word_starts[self.line_starts]

    @cached_property
    def characters(self) -> Int64Array:
        """The number of characters of each document."""
        return string_lengths(self.texts)

    def phrase(self, start: int, count: int) -> str:
        """Returns `count` words from word `start` on, joined by spaces."""
        return " ".join(self.vocabulary.take(pa.array(self.words[start : start + count])).to_pylist())


def build_text_table(texts: pa.Array, options: HeuristicsConfig) -> TextTable:
    """Splits texts into lines, chunks and words.

    Unless `remove_citations`, `uncited` points to the lines as they are; unless `join_wrapped_lines`, every line is
    an unwrapped line.
    """
    lines, starts = flatten_lists(pc.split_pattern(texts, "\n"))
    stripped = pc.utf8_trim_whitespace(lines)
    filled = pc.not_equal(stripped, "")
    lines, stripped = lines.filter(filled), stripped.filter(filled)
    uncited = np.arange(len(lines))
    if options.remove_citations:
        cited = np.flatnonzero(to_mask(pc.match_substring_regex(stripped, CITATION)))
        uncited[cited] = np.arange(len(lines), len(lines) + len(cited))
        stripped = pa.concat_arrays(
            [stripped, pc.replace_substring_regex(stripped.take(pa.array(cited)), CITATION, "")]
        )
    chunks, chunk_starts = flatten_lists(pc.utf8_split_whitespace(stripped))
    chunk_numbers, distinct_chunks = encode_strings(chunks)
    words, vocabulary, first_words = _split_into_words(chunk_numbers, distinct_chunks)
    unspaced = pc.count_substring_regex(distinct_chunks, f"[{UNSPACED_CLASS}]").to_numpy().astype(np.int64)
    chunk_lengths = string_lengths(distinct_chunks)
    line_starts = prefix_sums(to_mask(filled))[starts]
    unwrapped_starts: Int64Array = np.arange(len(lines) + 1)
    if options.join_wrapped_lines:
        blocks = _block_starts(np.flatnonzero(to_mask(filled)), line_starts)
        first_chunks = chunk_lengths[chunk_numbers[chunk_starts[: len(lines)]]]
        unwrapped_starts = _unwrapped_starts(lines, stripped, first_chunks, blocks)
    return TextTable(
        texts=texts,
        lines=lines,
        stripped=stripped,
        newline_counts=np.diff(starts) - 1,
        line_starts=line_starts,
        uncited=uncited,
        unwrapped_starts=unwrapped_starts,
        chunk_starts=chunk_starts,
        chunk_lengths=(chunk_lengths - unspaced)[chunk_numbers],
        chunk_words=np.maximum(unspaced, 1)[chunk_numbers],
        word_starts=first_words[chunk_starts],
        words=words,
        vocabulary=vocabulary,
        traits=np.fromiter(map(word_traits, vocabulary.to_pylist()), np.int64, len(vocabulary)),
    )


def _block_starts(places: Int64Array, line_starts: Int64Array) -> Int64Array:
    """Returns the first line of each block of lines without a blank line between them, and the number of lines.

    `places` (int64 [lines]) are the positions of the lines among all lines of the batch, blank ones included.
    """
    is_start = np.diff(places, prepend=-2) != 1
    is_start[line_starts[line_starts < len(places)]] = True
    return np.append(np.flatnonzero(is_start), len(places))


def _unwrapped_starts(
    lines: pa.Array, stripped: pa.Array, first_chunks: Int64Array, blocks: Int64Array
) -> Int64Array:
    """Returns the first line of each unwrapped line, and the number of lines.

    A block is as wide as its longest line. A line continues the line before it, of the same block, if that fills
    at least half of a width of `MIN_WRAP` to `MAX_WRAP` characters, and if its first chunk would not have fit
    there, or is in lower case.
    """
    lengths = string_lengths(lines)
    if not len(lengths):
        return np.zeros(1, np.int64)
    widths = np.repeat(np.maximum.reduceat(lengths, blocks[:-1]), np.diff(blocks))
    continues = np.zeros(len(lengths), np.bool_)
    heads = stripped.slice(0, len(lengths))
    continues[1:] = lengths[:-1] + 1 + first_chunks[1:] > widths[1:]
    continues |= to_mask(pc.match_substring_regex(heads, SMALL_START))
    continues[1:] &= 2 * lengths[:-1] >= widths[1:]
    continues &= (widths >= MIN_WRAP) & (widths <= MAX_WRAP)
    continues &= ~to_mask(pc.match_substring_regex(heads, LIST_MARK))
    continues[blocks[:-1]] = False
    return np.append(np.flatnonzero(~continues), len(lengths))


def _split_into_words(
    chunk_numbers: Int64Array, distinct_chunks: pa.Array
) -> tuple[Int64Array, pa.Array, Int64Array]:
    """Returns the words of all chunks as numbers, the word of each number, and the first word of each chunk."""
    split = list(map(split_chunk, distinct_chunks.to_pylist()))
    starts = prefix_sums(np.array(list(map(len, split)), np.int64))
    numbers, vocabulary = encode_strings(pa.array(list(chain.from_iterable(split)), pa.string()))
    counts = np.diff(starts)[chunk_numbers]
    first_words = prefix_sums(counts)
    positions = np.repeat(starts[chunk_numbers] - first_words[:-1], counts) + np.arange(first_words[-1])
    return numbers[positions], vocabulary, first_words
