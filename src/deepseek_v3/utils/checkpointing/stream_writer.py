"""Writes a checkpoint folder from tensors that come one by one, so that memory never holds all of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from deepseek_v3.utils.checkpointing.index import Chunk, Index, StoredFile, StoredTensor
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPE_NAMES, write_tensor_file

FILE_BYTES = 4 * 10**9


class CheckpointStream:
    """Collects tensors into files of about `file_bytes` in a folder, and ends with the index.

    The result is a checkpoint folder such as ranks write together, except that the caller makes it appear. Raises
    OSError if a file cannot be written.
    """

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._files: dict[str, StoredFile] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._waiting: dict[str, Tensor] = {}

    def write(self, tensors: Iterable[tuple[str, Tensor]], plain: dict[str, Any]) -> None:
        """Writes CPU tensors by their dotted names, then the index with the `plain` values."""
        for name, tensor in tensors:
            self._waiting[name] = tensor
            if sum(waiting.nbytes for waiting in self._waiting.values()) >= self._file_bytes:
                self._write_file()
        self._write_file()
        Index(files=self._files, tensors=self._tensors, plain=plain).write(self._folder)

    def _write_file(self) -> None:
        if not self._waiting:
            return
        name = f"rank_{len(self._files):05d}.safetensors"
        num_bytes, sha256, begins = write_tensor_file(self._folder / name, self._waiting)
        self._files[name] = StoredFile(bytes=num_bytes, sha256=sha256)
        for tensor, values in self._waiting.items():
            shape = tuple(values.shape)
            whole = Chunk(file=name, begin=begins[tensor], offsets=(0,) * len(shape), sizes=shape)
            self._tensors[tensor] = StoredTensor(dtype=DTYPE_NAMES[values.dtype], shape=shape, chunks=(whole,))
        self._waiting = {}
