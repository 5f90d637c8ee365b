"""The hashes by which fastText finds the rows of n-grams: FNV-1a over bytes, and polynomials of words' hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt32s = NDArray[np.uint32]
UInt64s = NDArray[np.uint64]

_OFFSET, _PRIME = 2166136261, 16777619
_WORD_FACTOR = np.uint64(116049371)
_END_OF_LINE = b"</s>"  # has no n-grams of characters


def word_hash(word: bytes) -> int:
    """32 bits; fastText extends the sign of bytes from 128 on."""
    value = _OFFSET
    for byte in word:
        value = (value ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * _PRIME & 0xFFFFFFFF
    return value


def word_hashes(words: Sequence[bytes]) -> UInt64s:
    """The hashes with which `word_ngrams` begins: signed numbers of 32 bits, extended to uint64 [words]."""
    return np.array([*map(word_hash, words)], np.uint32).view(np.int32).astype(np.int64).view(np.uint64)


def word_ngrams(hashes: UInt64s, starts: Int64s, longest: int) -> tuple[UInt64s, Int64s]:
    """Hashes of all n-grams of 2 to `longest` words, and the line of each, ascending.

    `hashes` (uint64 [words]) are those of words; line i has the words from starts[i] to starts[i + 1].
    """
    line_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    last = starts[1:][line_of]
    found: list[UInt64s] = []
    owners: list[Int64s] = []
    begins = np.arange(len(hashes))
    values = hashes
    for n in range(2, longest + 1):
        inside = begins + n <= last[begins]
        begins = begins[inside]
        values = values[inside] * _WORD_FACTOR + hashes[begins + n - 1]
        found.append(values)
        owners.append(line_of[begins])
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(found)[order], owner[order]


def character_ngrams(words: Sequence[bytes], shortest: int, longest: int) -> Iterator[tuple[UInt32s, Int64s]]:
    """For each n from 1 to `longest`, if it is at least `shortest`: the hashes of all n-grams, and their words.

    N-grams count characters of `<word>`; those of one character are none of the two brackets.
    """
    marked = [b"" if word == _END_OF_LINE else b"<" + word + b">" for word in words]
    data = np.frombuffer(b"".join(marked), np.uint8)
    begins = np.flatnonzero((data & 0xC0) != 0x80)
    sizes = np.diff(begins, append=len(data))
    word_of = np.repeat(np.arange(len(words)), [*map(len, marked)])[begins]
    signed = data.view(np.int8).astype(np.int32).view(np.uint32)

    first: Int64s = np.arange(len(begins))
    values: UInt32s = np.full(len(begins), _OFFSET, np.uint32)
    for n in range(1, longest + 1):
        inside = first + n <= len(begins)
        first, values = first[inside], values[inside]
        last = first + n - 1
        inside = word_of[last] == word_of[first]
        first, values, last = first[inside], values[inside], last[inside]
        values = (values ^ signed[begins[last]]) * np.uint32(_PRIME)
        for byte in range(1, int(sizes.max(initial=1))):
            longer = np.flatnonzero(sizes[last] > byte)
            values[longer] = (values[longer] ^ signed[begins[last[longer]] + byte]) * np.uint32(_PRIME)
        if n >= shortest:
            chosen = _inner(word_of, first) if n == 1 else slice(None)
            yield values[chosen], word_of[first[chosen]]


def _inner(word_of: Int64s, characters: Int64s) -> NDArray[np.bool_]:
    """Which characters are not the first or the last of their word."""
    change = np.flatnonzero(np.diff(word_of)) + 1
    inner = np.ones(len(word_of), np.bool_)
    inner[np.concatenate([[0], change, change - 1, [len(word_of) - 1]])] = False
    return inner[characters]
