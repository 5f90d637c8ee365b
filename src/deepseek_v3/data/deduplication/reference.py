"""The definition of words, shingles and their hashes, for one text at a time. The fast path computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from deepseek_v3.data.arrays import SPLITMIX64_GAMMA, SPLITMIX64_MIX_1, SPLITMIX64_MIX_2
from deepseek_v3.data.deduplication.case_folding import (
    MAX_WORD_BYTES,
    OPERATORS,
    fold_character,
    is_unspaced_script,
    is_word_character,
)
from deepseek_v3.data.deduplication.hashing import MIX_32, shingle_multipliers

Shingle = tuple[bytes, ...]


def words(text: str, is_code: bool = False) -> list[bytes]:
    """Returns the case-folded words of a text, in UTF-8.

    A word is a run of letters, marks, numbers and underscores; in scripts without spaces each character is a word,
    and in source code each operator. A run of more than `MAX_WORD_BYTES` bytes is cut into words of that size, the
    last of which may be shorter.
    """
    runs: list[str] = []
    inside = False
    for character in text:
        in_word, is_whole_word, folded = _classify(character)
        if is_code and character in OPERATORS:
            in_word = is_whole_word = True
        if in_word and inside and not is_whole_word:
            runs[-1] += folded
        elif in_word:
            runs.append(folded)
        inside = in_word and not is_whole_word
    return [
        run[start : start + MAX_WORD_BYTES]
        for run in map(str.encode, runs)
        for start in range(0, len(run), MAX_WORD_BYTES)
    ]


@lru_cache(maxsize=2**12)
def _classify(character: str) -> tuple[bool, bool, str]:
    return is_word_character(character), is_unspaced_script(character), fold_character(character)


def shingles(text: str, ngram: int = 5) -> set[Shingle]:
    """Returns the shingles of a text: its n-grams of `ngram` words.

    A text of fewer words has one shingle of all its words; a text without words has none.
    """
    found = words(text)
    return {tuple(found[i : i + ngram]) for i in range(max(len(found) - ngram + 1, 1))} if found else set()


def jaccard(one: set[Shingle], other: set[Shingle]) -> float:
    """Returns the Jaccard similarity |intersection| / |union|; 0 for two empty sets."""
    union = len(one | other)
    return len(one & other) / union if union else 0.0


def word_hash(word: bytes) -> int:
    """Hashes a word to 32 bits: the sum of the hashes of its windows of 8 bytes, each offset by its position."""
    total = 0
    for number, start in enumerate(range(0, len(word), 8)):
        value = int.from_bytes(word[start : start + 8], "little") + number * SPLITMIX64_GAMMA
        value = value * SPLITMIX64_MIX_1 % 2**64
        total += (value ^ value >> 32) * SPLITMIX64_MIX_2
    return total % 2**64 >> 32


def shingle_hash(shingle: Sequence[bytes], ngram: int = 5) -> int:
    """Hashes a shingle to 32 bits, never 0: mixes the sum of its word hashes, each times a factor per position."""
    multipliers = shingle_multipliers(ngram).tolist()
    total = sum(word_hash(word) * factor for word, factor in zip(shingle, multipliers, strict=False)) % 2**32
    total = (total ^ total >> 16) * MIX_32 % 2**32
    return max(total ^ total >> 15, 1)
