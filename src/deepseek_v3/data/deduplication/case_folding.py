"""Case folding of UTF-8 text: which characters make up words, and blocks in which only folded words remain."""

from __future__ import annotations

import string
import unicodedata
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from deepseek_v3.data.arrays import BoolArray, Int64Array, UInt8Array, UInt32Array
from deepseek_v3.data.deduplication.utf8 import encode_utf8, find_multibyte, overwrite_characters, pad_text
from deepseek_v3.data.scripts import UNSPACED

MAX_WORD_BYTES = 64  # longer runs of word characters, such as Base64, are cut into several words

_VARIATION_SELECTORS = range(0xFE00, 0xFE10)
_END = 0x34000  # no code point from here on is a letter

_WORD_BYTES = (string.ascii_letters + string.digits + "_").encode()
_FOLDED_ASCII = bytes(ord(chr(byte).lower()) if byte in _WORD_BYTES else 0 for byte in range(128))
OPERATORS = "+-*/%=<>!&|^~?@"  # in source code each is a word: x + y and x - y differ
_IS_OPERATOR = np.isin(np.arange(256), [*OPERATORS.encode()])
_FOLDED_BYTES = _FOLDED_ASCII + bytes(range(128, 256))


def is_word_character(character: str) -> bool:
    """Whether the character is part of a word: a letter, a mark, a digit or other number, or the underscore."""
    if unicodedata.category(character)[0] not in "LMN":
        return character == "_"
    return ord(character) < _END and ord(character) not in _VARIATION_SELECTORS


def is_unspaced_script(character: str) -> bool:
    """Whether the character belongs to a script that puts no spaces between words."""
    return any(first <= ord(character) <= last for first, last in UNSPACED)


def fold_character(character: str) -> str:
    """Folds the character's case if that gives one character of the same size in UTF-8; else returns it as is."""
    for candidate in (character.casefold(), character.lower()):
        if len(candidate) == 1 and len(candidate.encode()) == len(character.encode()):
            return candidate
    return character


class CharacterTables(NamedTuple):
    """Tables indexed by code point; the last entry is that of all higher code points, too.

    `utf8` (uint32) holds the UTF-8 bytes of the folded character, the first byte lowest, or 0 for a character that
    is in no word. `is_whole_word` (bool) is set for a character that is a word by itself.
    """

    utf8: UInt32Array
    is_whole_word: BoolArray


@lru_cache(maxsize=1)
def character_tables() -> CharacterTables:
    """Builds the tables of all characters, once per process."""
    words = [character for character in map(chr, range(_END)) if is_word_character(character)]
    changed = [
        character for character in words if character != character.casefold() or character != character.lower()
    ]
    folded = np.arange(_END, dtype=np.uint32)
    folded[[*map(ord, changed)]] = [ord(fold_character(character)) for character in changed]
    encoded = np.zeros(_END + 1, np.uint32)
    in_words = [*map(ord, words)]
    encoded[in_words] = encode_utf8(folded[in_words])
    is_whole_word = np.zeros(_END + 1, np.bool_)
    for first, last in UNSPACED:
        is_whole_word[first : last + 1] = encoded[first : last + 1] != 0
    return CharacterTables(encoded, is_whole_word)


class FoldedText(NamedTuple):
    """A block of n bytes of case-folded text.

    `text` (uint8 [n + 8]) holds the folded characters of words, 0 for every other byte, and 8 zeros at the end.
    `word_breaks` (bool [n + 1]) is set where a word cannot continue: at the start of a document, and before and
    after a character that is a word by itself.
    """

    text: UInt8Array
    word_breaks: BoolArray


def fold_case(text: UInt8Array, offsets: Int64Array, is_code: BoolArray | None = None) -> FoldedText:
    """Folds the case of a block of documents.

    `text`: UTF-8, uint8 [n]. `offsets`: int64 [documents + 1], the start of each document, from 0 to n. `is_code`,
    bool [documents], marks those in which each of `OPERATORS` is a word; None: none of them.
    """
    folded = np.frombuffer(pad_text(text).translate(_FOLDED_BYTES), np.uint8)
    word_breaks = np.zeros(len(text) + 1, np.bool_)
    word_breaks[offsets] = True
    positions, code_points, sizes = find_multibyte(folded)
    if len(positions):
        tables = character_tables()
        code_points = np.minimum(code_points, len(tables.utf8) - 1)
        overwrite_characters(folded, positions, tables.utf8[code_points], sizes)
        whole = np.flatnonzero(tables.is_whole_word[code_points])
        word_breaks[positions[whole]] = True
        word_breaks[positions[whole] + sizes[whole]] = True
    if is_code is not None and is_code.any():
        operators = np.flatnonzero(_IS_OPERATOR[text] & np.repeat(is_code, np.diff(offsets)))
        folded[operators] = text[operators]
        word_breaks[operators] = True
        word_breaks[operators + 1] = True
    return FoldedText(folded, word_breaks)
