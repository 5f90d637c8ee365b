"""Reads a Megatron-LM dataset: the tokens in `PREFIX.bin` and their index, `PREFIX.idx`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from deepseek_v3.data.tokens.megatron_index import REMEDY, MegatronIndex, bin_file, idx_file
from deepseek_v3.data.tokens.pread_file import PreadFile
from deepseek_v3.data.tokens.source import Tokens
from deepseek_v3.utils.errors import DataError

_BLOCK_BYTES = 2**16  # of the .bin, as `checksum` reads them
_BLOCKS = 2**10  # the most that it reads


class MegatronDataset:
    """The tokens of a dataset, by position, sequence or document; safe to use from several threads.

    Both files stay open, so a file that is removed or replaced later is still read as it was checked. Raises
    DataError, naming the file, if one of the two is missing or they do not fit each other, as `MegatronIndex` says.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        _check_files(prefix)
        self._file = PreadFile(bin_file(prefix), None, REMEDY)
        self.index = MegatronIndex(prefix, self._file.num_bytes)

    def read(self, start: int, length: int) -> Tokens:
        """Tokens `start` to `start + length`, counted through all sequences: [length], of the index's `dtype`."""
        size = self.index.dtype.itemsize
        return np.frombuffer(self._file.read(start * size, length * size), self.index.dtype)

    def sequence(self, number: int) -> Tokens:
        """The tokens of a sequence. Raises IndexError if there is none with this number."""
        return self._between(self.index.sequence_start, number, self.index.num_sequences)

    def document(self, number: int) -> Tokens:
        """The tokens of all sequences of a document. Raises IndexError if there is none with this number."""
        return self._between(self.index.document_start, number, self.index.num_documents)

    def blocks(self, tokens: int = 2**20) -> Iterator[tuple[int, Tokens]]:
        """All tokens, `tokens` of them at a time, each block with the position of its first token."""
        for start in range(0, self.index.num_tokens, tokens):
            yield start, self.read(start, min(tokens, self.index.num_tokens - start))

    def checksum(self) -> str:
        """SHA-256 of the index, the size of the .bin and up to 1,024 blocks of it, in hexadecimal.

        The blocks, of 64 KiB each, are spread evenly, so a .bin of up to 64 MiB is read as a whole, and a larger
        one takes no longer than that.
        """
        digest = hashlib.sha256(self.index.checksum().encode())
        digest.update(str(self._file.num_bytes).encode())
        blocks = -(-self._file.num_bytes // _BLOCK_BYTES)
        read = min(blocks, _BLOCKS)
        for number in range(read):
            start = number * (blocks - 1) // max(1, read - 1) * _BLOCK_BYTES
            digest.update(self._file.read(start, min(_BLOCK_BYTES, self._file.num_bytes - start)))
        return digest.hexdigest()

    def _between(self, start_of: Callable[[int], int], number: int, end: int) -> Tokens:
        if not 0 <= number < end:
            raise IndexError(f"{self.prefix}: number {number}, expected 0 to {end - 1}")
        start = start_of(number)
        return self.read(start, start_of(number + 1) - start)


def is_dataset(prefix: Path) -> bool:
    """Whether a file of a Megatron-LM dataset has this prefix; the other one may be missing."""
    return any(os.path.isfile(f"{prefix}{suffix}") for suffix in (".bin", ".idx"))  # noqa: PTH113 -- False for names too long


def _check_files(prefix: Path) -> None:
    """Raises DataError unless both files exist."""
    if not prefix.name:
        raise DataError(f"{prefix}: expected the prefix of a Megatron-LM dataset, such as data/code_text_document")
    files = (bin_file(prefix), idx_file(prefix))
    missing = [file for file in files if not file.exists()]
    if not missing:
        return
    if prefix.suffix in (".bin", ".idx") and prefix.exists():
        raise DataError(f"{prefix}: expected the prefix of the dataset, {prefix.with_suffix('')}, without a suffix")
    found = ", ".join(str(file) for file in files if file.exists()) or "neither of its two files"
    raise DataError(
        f"{missing[0]}: does not exist; expected both PREFIX.bin and PREFIX.idx of a Megatron-LM dataset, found "
        f"{found}"
    )
