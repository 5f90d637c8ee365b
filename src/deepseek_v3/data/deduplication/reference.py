"""Words, shingles and their hashes for one text at a time, written to be read: what the fast path computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from deepseek_v3.data.arrays import SPLITMIX64_GAMMA, SPLITMIX64_MIX_1, SPLITMIX64_MIX_2
from deepseek_v3.data.deduplication.case_folding import (
    MAX_WORD_BYTES,
    fold_character,
    is_unspaced_script,
    is_word_character,
)
from deepseek_v3.data.deduplication.hashing import MIX_32, shingle_multipliers

Shingle = tuple[bytes, ...]


def words(text: str) -> list[bytes]:
    """The words of a text without their case, in UTF-8.

    A word is a run of letters, marks, numbers and underscores; in scripts without spaces each character is one. A
    run of more than `LONGEST` bytes counts as several words, all but the last of that many bytes.
    """
    runs: list[str] = []
    inside = False
    for character in text:
        in_word, alone, plain = _seen_as(character)
        if in_word and inside and not alone:
            runs[-1] += plain
        elif in_word:
            runs.append(plain)
        inside = in_word and not alone
    return [
        run[start : start + MAX_WORD_BYTES]
        for run in map(str.encode, runs)
        for start in range(0, len(run), MAX_WORD_BYTES)
    ]


@lru_cache(maxsize=2**12)
def _seen_as(character: str) -> tuple[bool, bool, str]:
    return is_word_character(character), is_unspaced_script(character), fold_character(character)


def shingles(text: str, ngram: int = 5) -> set[Shingle]:
    """All runs of `ngram` words; one of all words where they are fewer; none where there are no words."""
    found = words(text)
    return {tuple(found[i : i + ngram]) for i in range(max(len(found) - ngram + 1, 1))} if found else set()


def jaccard(one: set[Shingle], other: set[Shingle]) -> float:
    """Shingles that both have, as a share of those that either has; 0 where neither has any."""
    either = len(one | other)
    return len(one & other) / either if either else 0.0


def word_hash(word: bytes) -> int:
    """32 bits: the hashes of the word's pieces of 8 bytes, each at its place, added up."""
    total = 0
    for number, start in enumerate(range(0, len(word), 8)):
        value = int.from_bytes(word[start : start + 8], "little") + number * SPLITMIX64_GAMMA
        value = value * SPLITMIX64_MIX_1 % 2**64
        total += (value ^ value >> 32) * SPLITMIX64_MIX_2
    return total % 2**64 >> 32


def shingle_hash(shingle: Sequence[bytes], ngram: int = 5) -> int:
    """32 bits, never 0: a sum of the words' hashes, each times the multiplier of its place, mixed."""
    multipliers = shingle_multipliers(ngram).tolist()
    total = sum(word_hash(word) * factor for word, factor in zip(shingle, multipliers, strict=False)) % 2**32
    total = (total ^ total >> 16) * MIX_32 % 2**32
    return max(total ^ total >> 15, 1)
