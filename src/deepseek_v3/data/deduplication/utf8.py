"""UTF-8 text as NumPy byte arrays: blocks of documents, and the characters outside ASCII in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from deepseek_v3.data.arrays import Int64Array, UInt8Array, UInt32Array, UInt64Array

WINDOW_BYTES = 8  # bytes that one uint64 window holds

_BLOCK_BYTES = 2**18  # small enough that most intermediate arrays of a block fit into the L2 cache
_MULTIBYTE = 0xC0  # bytes from this value on start a character of several bytes


def text_blocks(texts: pa.Array) -> Iterator[tuple[UInt8Array, Int64Array]]:
    """Yields blocks of consecutive documents without copying the text.

    A block is its UTF-8 text (uint8 [n]) and the start of each document in it (int64 [documents + 1], from 0 to n).
    """
    if not len(texts):
        return
    _, offsets_buffer, data = texts.buffers()
    width = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    offsets = np.frombuffer(offsets_buffer, width)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    text = np.frombuffer(data or b"", np.uint8)
    first = 0
    while first < len(texts):
        end = max(int(np.searchsorted(offsets, offsets[first] + _BLOCK_BYTES, side="right")) - 1, first + 1)
        yield text[offsets[first] : offsets[end]], offsets[first : end + 1] - offsets[first]
        first = end


def pad_text(text: UInt8Array) -> bytearray:
    """Returns a copy of the text with `WINDOW_BYTES` zeros appended."""
    return bytearray().join((text.data, bytes(WINDOW_BYTES)))


def byte_windows(text: UInt8Array) -> UInt64Array:
    """Returns a view of a padded text (uint8 [n + 8]) as overlapping little-endian windows: uint64 [n + 1].

    Window i holds bytes i to i + 7; byte i is the lowest.
    """
    return np.ndarray(len(text) - WINDOW_BYTES + 1, "<u8", text.data, strides=(1,))


class MultibyteCharacters(NamedTuple):
    """Characters outside ASCII: positions of their first bytes, code points, and sizes in bytes."""

    positions: Int64Array
    code_points: UInt32Array
    sizes: UInt32Array


def find_multibyte(text: UInt8Array) -> MultibyteCharacters:
    """Finds the characters outside ASCII in a padded text, in order."""
    positions = np.flatnonzero(text >= _MULTIBYTE)
    bytes_ = byte_windows(text)[positions].astype(np.uint32)
    first, second, third = bytes_ & 255, bytes_ >> 8 & 63, bytes_ >> 16 & 63
    code_points = np.where(first < 0xE0, (first & 31) << 6 | second, (first & 15) << 12 | second << 6 | third)
    sizes = 2 + (first >= 0xE0).astype(np.uint32) + (first >= 0xF0)
    four = np.flatnonzero(sizes == 4)
    code_points[four] = (first[four] & 7) << 18 | second[four] << 12 | third[four] << 6 | bytes_[four] >> 24 & 63
    return MultibyteCharacters(positions, code_points, sizes)


def encode_utf8(code_points: UInt32Array) -> UInt32Array:
    """Encodes each code point in UTF-8; the first byte is the lowest of the uint32."""
    last, third, second = (0x80 | code_points >> shift & 63 for shift in (0, 6, 12))
    kinds = [code_points < 0x80, code_points < 0x800, code_points < 0x10000]
    ascii_, two = code_points, 0xC0 | code_points >> 6 | last << 8
    three = 0xE0 | code_points >> 12 | third << 8 | last << 16
    four = 0xF0 | code_points >> 18 | second << 8 | third << 16 | last << 24
    return np.select(kinds, [ascii_, two, three], four)


def overwrite_characters(text: UInt8Array, positions: Int64Array, encoded: UInt32Array, sizes: UInt32Array) -> None:
    """Replaces the characters at `positions` in place by `encoded` ones (see `encode_utf8`) of the same sizes."""
    text[positions], text[positions + 1] = encoded, encoded >> np.uint32(8)
    for byte in (2, 3):
        longer = np.flatnonzero(sizes > byte)
        text[positions[longer] + byte] = encoded[longer] >> np.uint32(8 * byte)
