"""Text in UTF-8 without its case, as an array of bytes in which only words are left: many documents at a time.

FOLDED: What a character is to the deduplication: part of a word, a word by itself, or neither.
"""

from __future__ import annotations

import string
import unicodedata
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from deepseek_v3.data.arrays import BoolArray, Int64Array, UInt8Array, UInt32Array
from deepseek_v3.data.deduplication.utf8 import encode_utf8, find_multibyte, overwrite_characters, pad_text

# Blocks of scripts that put no spaces between words (Unicode, Blocks.txt): first and last code point.
_UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x3005, 0x3007),  # 々 〆 〇
    (0x3021, 0x3029),  # Hangzhou numerals
    (0x3031, 0x312F),  # kana repeat marks, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31FF),  # Bopomofo Extended, Katakana Phonetic Extensions
    (0x3400, 0x4DBF),  # CJK Extension A
    (0x4E00, 0xA4CF),  # CJK Unified Ideographs, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar Extended-B
    (0xAA60, 0xAA7F),  # Myanmar Extended-A
    (0xF900, 0xFAFF),  # CJK Compatibility Ideographs
    (0xFF66, 0xFF9F),  # halfwidth Katakana
    (0x1AFF0, 0x1B16F),  # Kana supplements
    (0x20000, 0x33FFF),  # CJK Extensions B and on
)
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)
_END = 0x34000  # behind it stand no letters


def is_word_character(character: str) -> bool:
    """Whether it is a letter, a mark on one, a digit or other number, or the underscore."""
    if unicodedata.category(character)[0] not in "LMN":
        return character == "_"
    return ord(character) < _END and ord(character) not in _VARIATION_SELECTORS


def is_unspaced_script(character: str) -> bool:
    """Whether it belongs to a script that puts no spaces between words."""
    return any(first <= ord(character) <= last for first, last in _UNSPACED)


def fold_character(character: str) -> str:
    """The character without its case, where that is one character of as many bytes in UTF-8; else as it is."""
    for candidate in (character.casefold(), character.lower()):
        if len(candidate) == 1 and len(candidate.encode()) == len(character.encode()):
            return candidate
    return character


class CharacterTables(NamedTuple):
    """By code point, the last entry standing for all from there on.

    `folded` (uint32) holds the UTF-8 bytes, the first one lowest, of the folded character, or 0 where it is no part
    of a word; `alone` (bool) says that it is a word by itself.
    """

    utf8: UInt32Array
    is_whole_word: BoolArray


@lru_cache(maxsize=1)
def character_tables() -> CharacterTables:
    """The tables of all characters; made once per process."""
    words = [character for character in map(chr, range(_END)) if is_word_character(character)]
    changed = [
        character for character in words if character != character.casefold() or character != character.lower()
    ]
    folds = np.arange(_END, dtype=np.uint32)
    folds[[*map(ord, changed)]] = [ord(fold_character(character)) for character in changed]
    encoded = np.zeros(_END + 1, np.uint32)
    in_words = [*map(ord, words)]
    encoded[in_words] = encode_utf8(folds[in_words])
    alone = np.zeros(_END + 1, np.bool_)
    for first, last in _UNSPACED:
        alone[first : last + 1] = encoded[first : last + 1] != 0
    return CharacterTables(encoded, alone)


MAX_WORD_BYTES = 64  # bytes of a word; what is longer, such as Base64, counts as several words

_IN_WORDS = (string.ascii_letters + string.digits + "_").encode()
_ASCII = bytes(ord(chr(byte).lower()) if byte in _IN_WORDS else 0 for byte in range(128))
_FOLDED_BYTES = _ASCII + bytes(range(128, 256))


class FoldedText(NamedTuple):
    """A block of n bytes of text.

    `text` (uint8 [n + 8]): each character of a word without its case, 0 for all other bytes, and 8 more zeros.
    `cuts` (bool [n + 1]): where no word goes on, because a document begins or a character is a word by itself.
    """

    text: UInt8Array
    word_breaks: BoolArray


def fold_case(text: UInt8Array, offsets: Int64Array) -> FoldedText:
    """Folds documents that stand one behind the other.

    `text`: UTF-8, uint8 [n]. `offsets`: int64 [documents + 1], where each document begins, from 0 to n.
    """
    folded = np.frombuffer(pad_text(text).translate(_FOLDED_BYTES), np.uint8)
    cuts = np.zeros(len(text) + 1, np.bool_)
    cuts[offsets] = True
    places, code_points, sizes = find_multibyte(folded)
    if len(places):
        known = character_tables()
        code_points = np.minimum(code_points, len(known.utf8) - 1)
        overwrite_characters(folded, places, known.utf8[code_points], sizes)
        alone = np.flatnonzero(known.is_whole_word[code_points])
        cuts[places[alone]] = True
        cuts[places[alone] + sizes[alone]] = True
    return FoldedText(folded, cuts)
