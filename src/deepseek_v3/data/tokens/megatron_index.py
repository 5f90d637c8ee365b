"""The index of a Megatron-LM dataset, `PREFIX.idx`, read and checked in blocks, so memory does not grow with it.

All numbers are little-endian:

    bytes 0-8     the magic `MMIDIDX` and two NUL bytes
    bytes 9-16    uint64   version, 1
    byte  17      uint8    the code of the tokens' type, as in `TOKEN_TYPES`
    bytes 18-25   uint64   S, the number of sequences
    bytes 26-33   uint64   D + 1, one more than the number of documents
    int32 [S]              tokens of each sequence
    int64 [S]              the byte of `PREFIX.bin` at which each sequence begins
    int64 [D + 1]          the sequence with which each document begins, and S at the end
    int8  [S]              mode of each sequence; multimodal datasets alone have it

`PREFIX.bin` holds the tokens of all sequences, one after another. This is the layout of Megatron-LM's
`megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.pread_file import PreadFile
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.text import pluralize

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
REMEDY = "copy both files of the dataset again, or write them anew"

_FLOAT_TYPES = {6: "float64", 7: "float32"}
_BLOCK = 2**20  # entries, or bytes for the checksum, that are read at a time


def bin_file(prefix: Path) -> Path:
    """The file of the tokens. A prefix may contain dots, so no suffix of it is replaced."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_file(prefix: Path) -> Path:
    """The file of the index."""
    return prefix.with_name(f"{prefix.name}.idx")


class MegatronIndex:
    """The checked index of the dataset at `prefix`, whose .bin has `bin_bytes` bytes.

    `dtype` is the type of the tokens; `has_modes` says whether the file gives the mode of each sequence.

    Raises DataError, naming the file, the entry, what was found and what was expected, unless the sequences follow
    one another from the first byte of the .bin to its last, every sequence belongs to one document, and there are a
    document and a token.
    """

    def __init__(self, prefix: Path, bin_bytes: int) -> None:
        self._path, self._bin = idx_file(prefix), bin_file(prefix)
        self._file = PreadFile(self._path, None, REMEDY)
        self._read_header()
        self._check_size()
        self.num_tokens = bin_bytes // self.dtype.itemsize
        self._check_sequences(bin_bytes)
        self._check_documents()
        if not self.num_tokens:
            raise DataError(f"{self._path}: its documents hold no token, expected at least one; tokenize some text")

    def sequence_start(self, number: int) -> int:
        """The first token of a sequence, counted through the .bin; the end of all tokens for `num_sequences`."""
        if number == self.num_sequences:
            return self.num_tokens
        return int(self._int64(self._pointers_at, number, 1)[0]) // self.dtype.itemsize

    def document_start(self, number: int) -> int:
        """The first token of a document; the end of all tokens for `num_documents`."""
        return self.sequence_start(int(self._int64(self._documents_at, number, 1)[0]))

    def document_at(self, token: int) -> int:
        """The last document that begins at `token` or before it; found by bisection, without reading the index."""
        low, high = 0, self.num_documents
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.document_start(middle) <= token else (low, middle)
        return low

    def modes(self, first: int, count: int) -> Int64Array:
        """The modes of `count` sequences from `first` on, 0 for text: int64 [count]."""
        if not self.has_modes:
            return np.zeros(count, np.int64)
        data = self._file.read(self._modes_at + first, count)
        return np.frombuffer(data, np.int8).astype(np.int64)

    def has_other_modes(self) -> bool:
        """Whether a sequence has a mode other than 0, that is, holds no text."""
        return self.has_modes and any(
            self.modes(first, count).any() for first, count in _blocks(self.num_sequences)
        )

    def checksum(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        digest = hashlib.sha256()
        for start in range(0, self._file.num_bytes, _BLOCK):
            digest.update(self._file.read(start, min(_BLOCK, self._file.num_bytes - start)))
        return digest.hexdigest()

    def _read_header(self) -> None:
        if self._file.num_bytes < HEADER.size:
            raise self._error(
                f"holds {self._file.num_bytes} bytes, expected at least the {HEADER.size} of a header"
            )
        magic, version, code, self.num_sequences, entries = HEADER.unpack(self._file.read(0, HEADER.size))
        if magic != MAGIC:
            raise self._error(f"begins with {magic!r}, expected {MAGIC!r}: it is not a Megatron-LM index")
        if version != VERSION:
            raise self._error(f"has version {version}, expected {VERSION}")
        if code not in TOKEN_TYPES:
            found = f"{_FLOAT_TYPES[code]} (code {code})" if code in _FLOAT_TYPES else f"code {code}"
            known = ", ".join(f"{name} ({known})" for known, name in TOKEN_TYPES.items())
            raise self._error(f"has tokens of type {found}, expected an integer type: {known}")
        self.dtype = np.dtype(TOKEN_TYPES[code]).newbyteorder("<")
        self.num_documents = entries - 1
        if entries <= 1:
            raise DataError(f"{self._path}: holds no document, expected at least one; tokenize some text")

    def _check_size(self) -> None:
        """Checks the size of the index; a byte for each sequence more than needed is the array of modes."""
        self._pointers_at = HEADER.size + 4 * self.num_sequences
        self._documents_at = self._pointers_at + 8 * self.num_sequences
        self._modes_at = self._documents_at + 8 * (self.num_documents + 1)
        found, with_modes = self._file.num_bytes, self._modes_at + self.num_sequences
        if found not in (self._modes_at, with_modes):
            raise self._error(
                f"holds {found} bytes, expected {self._modes_at} for {self.num_sequences:,} sequences and "
                f"{pluralize(self.num_documents, 'document')}, or {with_modes} with modes"
            )
        self.has_modes = found != self._modes_at

    def _check_sequences(self, bin_bytes: int) -> None:
        """Raises DataError unless the sequences cover the .bin without a gap."""
        end = 0
        for first, count in _blocks(self.num_sequences):
            sizes = np.frombuffer(self._file.read(HEADER.size + 4 * first, 4 * count), "<i4").astype(np.int64)
            if (negative := np.flatnonzero(sizes < 0)).size:
                number = int(negative[0])
                raise self._error(f"sequence {first + number} has {sizes[number]} tokens, expected 0 or more")
            ends = end + np.cumsum(sizes * self.dtype.itemsize)
            starts = ends - sizes * self.dtype.itemsize
            pointers = self._int64(self._pointers_at, first, count)
            if (wrong := np.flatnonzero((pointers != starts) | (ends > bin_bytes))).size:
                place = int(wrong[0])
                entry = int(pointers[place]), int(starts[place]), int(sizes[place])
                raise self._wrong_sequence(first + place, *entry, bin_bytes)
            end = int(ends[-1])
        if end != bin_bytes:
            raise self._error(f"its sizes add up to {end} bytes, and {self._bin} holds {bin_bytes}")

    def _wrong_sequence(self, number: int, pointer: int, start: int, size: int, bin_bytes: int) -> DataError:
        """The error of a sequence whose pointer is not `start`, or that exceeds the .bin."""
        stop = pointer + size * self.dtype.itemsize
        if pointer < 0 or stop > bin_bytes:
            place = f"takes the bytes {pointer} to {stop} of {self._bin}"
            return self._error(f"sequence {number} {place}, which holds {bin_bytes}")
        return self._error(
            f"sequence {number} begins at byte {pointer}, expected {start}, the sum of the sizes before"
        )

    def _check_documents(self) -> None:
        """Raises DataError unless the documents hold all sequences, in order."""
        last = 0
        for first, count in _blocks(self.num_documents + 1):
            found = self._int64(self._documents_at, first, count)
            if first == 0 and found[0] != 0:
                raise self._error(f"document 0 begins with sequence {found[0]}, expected 0")
            before = np.concatenate([[last], found[:-1]])
            if (wrong := np.flatnonzero((found < before) | (found > self.num_sequences))).size:
                place = int(wrong[0])
                raise self._error(
                    f"entry {first + place} of its documents is sequence {found[place]}, expected "
                    f"{before[place]} to {self.num_sequences}"
                )
            last = int(found[-1])
        if last != self.num_sequences:
            raise self._error(f"its documents end with sequence {last}, expected the last, {self.num_sequences}")

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self._path}: {problem}; {REMEDY}")

    def _int64(self, offset: int, first: int, count: int) -> Int64Array:
        """Entries `first` to `first + count` of the array of int64 at `offset`."""
        return np.frombuffer(self._file.read(offset + 8 * first, 8 * count), "<i8")


def _blocks(entries: int) -> Iterator[tuple[int, int]]:
    """The first entry and the number of entries of each block of an array."""
    return ((first, min(_BLOCK, entries - first)) for first in range(0, entries, _BLOCK))
