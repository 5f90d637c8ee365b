"""Writes a checkpoint folder from blocks of tensors that come one by one; memory holds the blocks of one file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deepseek_v3.utils.checkpointing.index import Chunk, Extents, Index, StoredFile, StoredTensor, chunk_name
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPE_NAMES, write_tensor_file

FILE_BYTES = 4 * 10**9


class Block(NamedTuple):
    """A block of the tensor `name` of a whole `shape`: its CPU `values`, which begin at `offsets`."""

    name: str
    shape: Extents
    offsets: Extents
    values: Tensor


class CheckpointStream:
    """Collects blocks of tensors into files of about `file_bytes` in a folder, and ends with the index.

    The result is a checkpoint folder such as ranks write together, except that the caller makes it appear. Raises
    OSError if a file cannot be written.
    """

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._files: dict[str, StoredFile] = {}
        self._dtypes: dict[str, str] = {}
        self._shapes: dict[str, Extents] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._waiting: list[Block] = []
        self._waiting_bytes = 0

    def write(self, blocks: Iterable[Block], plain: dict[str, Any]) -> None:
        """Writes the blocks of all tensors, then the index with the `plain` values."""
        for block in blocks:
            self._waiting.append(block)
            self._waiting_bytes += block.values.nbytes
            if self._waiting_bytes >= self._file_bytes:
                self._write_file()
        self._write_file()
        tensors = {
            name: StoredTensor(dtype=self._dtypes[name], shape=self._shapes[name], chunks=tuple(chunks))
            for name, chunks in self._chunks.items()
        }
        Index(files=self._files, tensors=tensors, plain=plain).write(self._folder)

    def _write_file(self) -> None:
        if not self._waiting:
            return
        file = f"rank_{len(self._files):05d}.safetensors"
        stored = {
            chunk_name(block.name, block.shape, block.offsets, tuple(block.values.shape)): block.values
            for block in self._waiting
        }
        num_bytes, sha256, begins = write_tensor_file(self._folder / file, stored)
        self._files[file] = StoredFile(bytes=num_bytes, sha256=sha256)
        for name, block in zip(stored, self._waiting, strict=True):
            sizes = tuple(block.values.shape)
            chunk = Chunk(file=file, begin=begins[name], offsets=block.offsets, sizes=sizes)
            self._dtypes[block.name], self._shapes[block.name] = DTYPE_NAMES[block.values.dtype], block.shape
            self._chunks.setdefault(block.name, []).append(chunk)
        self._waiting, self._waiting_bytes = [], 0
