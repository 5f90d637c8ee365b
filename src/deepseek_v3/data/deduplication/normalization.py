"""Text normalization for exact deduplication: texts are equal if they differ only in case and white space."""

from __future__ import annotations

from collections.abc import Sequence
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
_END = 0x1F000  # no code point from here on is a capital letter or white space
_EXACT_SEED = 1  # separates the hashes of exact texts from those of normalized ones
_NEEDS_PYTHON = 1  # marks a character whose lower case has another size in UTF-8, or depends on its neighbours


def normalize(text: str) -> str:
    """Returns the text in lower case, without white space."""
    return "".join(text.lower().split())


def normalized_hashes(texts: pa.Array) -> UInt64Array:
    """Returns the XXH3-128 hash of each normalized text in UTF-8: uint64 [texts, 2], the high half first."""
    digests = [digest for text, offsets in text_blocks(texts) for digest in _block_digests(text, offsets)]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def exact_hashes(texts: Sequence[str]) -> UInt64Array:
    """Returns hashes of texts as they are, in the form of `normalized_hashes`, none of which they equal."""
    digests = [xxhash.xxh3_128_digest(text.encode(), seed=_EXACT_SEED) for text in texts]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def _block_digests(text: UInt8Array, offsets: Int64Array) -> list[bytes]:
    lowered, hard_documents = _lower_case(text, offsets)
    normalized, normalized_offsets = select_kernels("auto").remove_bytes(lowered, offsets, _SPACES)
    data, edges = memoryview(normalized), normalized_offsets.tolist()
    digests = [xxhash.xxh3_128_digest(data[start:end]) for start, end in pairwise(edges)]
    for document in hard_documents:
        whole = text[offsets[document] : offsets[document + 1]].tobytes().decode()
        digests[document] = xxhash.xxh3_128_digest(normalize(whole).encode())
    return digests


def _lower_case(text: UInt8Array, offsets: Int64Array) -> tuple[UInt8Array, set[int]]:
    """Replaces capitals by lower case, and white space by ASCII spaces, if the size in UTF-8 stays the same.

    Also returns the documents with a character that this cannot handle; `normalize` has to process those.
    """
    lowered = np.frombuffer(pad_text(text).translate(_LOWERED_BYTES), np.uint8)
    positions, code_points, sizes = find_multibyte(lowered)
    table = _replacements()
    found = table[np.minimum(code_points, len(table) - 1)]
    changed = np.flatnonzero(found)
    hard = positions[changed[found[changed] == _NEEDS_PYTHON]]
    overwrite_characters(lowered, positions[changed], found[changed], sizes[changed])
    return lowered[: len(text)], {*(np.searchsorted(offsets, hard, side="right") - 1).tolist()}


@lru_cache(maxsize=1)
def _replacements() -> UInt32Array:
    """Builds the table of replacements by code point: UTF-8 with the first byte lowest, or `_NEEDS_PYTHON`.

    An entry of 0 leaves the character as it is. The last entry is that of all higher code points, too.
    """
    table = np.zeros(_END + 1, np.uint32)
    for code_point in range(128, _END):
        character = chr(code_point)
        lower = character.lower()
        if character.isspace():
            table[code_point] = int.from_bytes(b" " * 4, "little")
        elif lower != character:
            encoded = lower.encode()
            simple = len(encoded) == len(character.encode()) and character != "Σ"  # Σ becomes ς or σ
            table[code_point] = int.from_bytes(encoded, "little") if simple else _NEEDS_PYTHON
    return table
