"""Text in UTF-8 without its case, as an array of bytes in which only words are left: many documents at a time."""

from __future__ import annotations

import string
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.deduplication.characters import tables
from deepseek_v3.data.deduplication.utf8 import Int64s, UInt8s, multibyte, overwrite, padded

LONGEST = 64  # bytes of a word; what is longer, such as Base64, counts as several words

_IN_WORDS = (string.ascii_letters + string.digits + "_").encode()
_ASCII = bytes(ord(chr(byte).lower()) if byte in _IN_WORDS else 0 for byte in range(128))
_FOLDED_BYTES = _ASCII + bytes(range(128, 256))


class Folded(NamedTuple):
    """A block of n bytes of text.

    `text` (uint8 [n + 8]): each character of a word without its case, 0 for all other bytes, and 8 more zeros.
    `cuts` (bool [n + 1]): where no word goes on, because a document begins or a character is a word by itself.
    """

    text: UInt8s
    cuts: NDArray[np.bool_]


def fold(text: UInt8s, offsets: Int64s) -> Folded:
    """Folds documents that stand one behind the other.

    `text`: UTF-8, uint8 [n]. `offsets`: int64 [documents + 1], where each document begins, from 0 to n.
    """
    folded = np.frombuffer(padded(text).translate(_FOLDED_BYTES), np.uint8)
    cuts = np.zeros(len(text) + 1, np.bool_)
    cuts[offsets] = True
    places, code_points, sizes = multibyte(folded)
    if len(places):
        known = tables()
        code_points = np.minimum(code_points, len(known.folded) - 1)
        overwrite(folded, places, known.folded[code_points], sizes)
        alone = np.flatnonzero(known.alone[code_points])
        cuts[places[alone]] = True
        cuts[places[alone] + sizes[alone]] = True
    return Folded(folded, cuts)
