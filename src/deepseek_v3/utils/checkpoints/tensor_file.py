"""One file of tensors in the safetensors format: a JSON header, then the numbers, row by row, little-endian.

The library of that name would build the whole file in memory, and leave its checksum to a second pass over it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# The format's names of types, widest first: in this order every tensor begins at a multiple of its numbers' size.
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = list(DTYPES.values())
_ALIGNMENT = 8


class WrittenFile(NamedTuple):
    """The size and SHA-256 of a file, and the byte at which each of its tensors begins."""

    num_bytes: int
    sha256: str
    begins: dict[str, int]


def write_tensor_file(path: Path, tensors: dict[str, Tensor]) -> WrittenFile:
    """Writes tensors, on the CPU and of the types in `DTYPES`, and fsyncs the file. Raises OSError."""
    tensors = dict(sorted(tensors.items(), key=lambda item: _ORDER.index(item[1].dtype)))
    header, begins = _header(tensors)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        pieces: Iterator[bytes | memoryview] = chain([header], map(_bytes_of, tensors.values()))
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        num_bytes = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(num_bytes, digest.hexdigest(), begins)


def map_bytes(path: Path, num_bytes: int) -> Tensor:
    """The bytes of a file, uint8, mapped into memory: they are read when they are touched."""
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header, padded so that the numbers begin aligned, and where in the file each tensor begins."""
    ends = list(accumulate((tensor.nbytes for tensor in tensors.values()), initial=0))
    entries = {
        name: {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        for (name, tensor), span in zip(tensors.items(), pairwise(ends), strict=True)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in zip(tensors, ends, strict=False)}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
