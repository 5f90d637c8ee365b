"""What makes two texts equal: the same characters, letter case and white space left out."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import xxhash

from deepseek_v3.data.arrays import Int64Array, UInt8Array, UInt32Array, UInt64Array
from deepseek_v3.data.deduplication.kernels.select import select_kernels
from deepseek_v3.data.deduplication.utf8 import find_multibyte, overwrite_characters, pad_text, text_blocks

_SPACES = bytes(byte for byte in range(128) if chr(byte).isspace())
_LOWERED_BYTES = bytes(ord(chr(byte).lower()) for byte in range(128)) + bytes(range(128, 256))
_END = 0x1F000  # behind it stand no capitals and no spaces
_HARD = 1  # no character's UTF-8: lower case takes another number of bytes, or depends on what stands around


def normalize(text: str) -> str:
    """The text in lower case, without white space."""
    return "".join(text.lower().split())


def normalized_hashes(texts: pa.Array) -> UInt64Array:
    """XXH3-128 of the normal form of each text in UTF-8: uint64 [texts, 2]."""
    digests = [digest for text, offsets in text_blocks(texts) for digest in _digests(text, offsets)]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def _digests(text: UInt8Array, offsets: Int64Array) -> list[bytes]:
    lowered, hard = _lowered(text, offsets)
    left, places = select_kernels("auto").remove_bytes(lowered, offsets, _SPACES)
    normal, ends = memoryview(left), places.tolist()
    digests = [xxhash.xxh3_128_digest(normal[start:end]) for start, end in pairwise(ends)]
    for document in hard:
        whole = text[offsets[document] : offsets[document + 1]].tobytes().decode()
        digests[document] = xxhash.xxh3_128_digest(normalize(whole).encode())
    return digests


def _lowered(text: UInt8Array, offsets: Int64Array) -> tuple[UInt8Array, set[int]]:
    """The text with lower case and ASCII spaces in place of other capitals and spaces.

    Returns also the documents in which that is not all there is to do.
    """
    lowered = np.frombuffer(pad_text(text).translate(_LOWERED_BYTES), np.uint8)
    places, code_points, sizes = find_multibyte(lowered)
    known = _replacements()
    found = known[np.minimum(code_points, len(known) - 1)]
    changed = np.flatnonzero(found)
    hard = places[changed[found[changed] == _HARD]]
    overwrite_characters(lowered, places[changed], found[changed], sizes[changed])
    return lowered[: len(text)], {*(np.searchsorted(offsets, hard, side="right") - 1).tolist()}


@lru_cache(maxsize=1)
def _replacements() -> UInt32Array:
    """By code point: the UTF-8, first byte lowest, of what stands for the character in `_lowered`.

    0 where that is the character itself. The last entry stands for all from there on.
    """
    table = np.zeros(_END + 1, np.uint32)
    for code_point in range(128, _END):
        character = chr(code_point)
        lower = character.lower()
        if character.isspace():
            table[code_point] = int.from_bytes(b" " * 4, "little")
        elif lower != character:
            encoded = lower.encode()
            simple = len(encoded) == len(character.encode()) and character != "Σ"  # Σ is ς or σ
            table[code_point] = int.from_bytes(encoded, "little") if simple else _HARD
    return table
