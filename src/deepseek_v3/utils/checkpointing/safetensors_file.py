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
from typing import Any, NamedTuple

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = list(DTYPES.values())
_ALIGNMENT = 8
_LENGTH_BYTES = 8  # the length of the header, before it


class HeaderEntry(NamedTuple):
    """What a file's header says of a tensor: its type's name, its shape, and the byte where it begins."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


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


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """What a file says that it holds. Raises OSError, and ValueError where its header is not one of the format."""
    with path.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if num_bytes < _LENGTH_BYTES or length > num_bytes - _LENGTH_BYTES:
            raise ValueError(f"{length:,} bytes of header in a file of {num_bytes:,} bytes")
        entries = require_plain_json(file.read(length))
    start = _LENGTH_BYTES + length
    try:
        return {
            name: HeaderEntry(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def require_plain_json(text: bytes) -> Any:
    """The value of a JSON text. Raises ValueError for repeated keys and NaN, RecursionError for deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
            raise ValueError(f"the key {twice!r} is given twice")
        return found

    def refuse(word: str) -> Any:
        raise ValueError(f"found {word}, expected a finite number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def map_bytes(path: Path, num_bytes: int) -> Tensor:
    """The bytes of a file, uint8, mapped into memory: they are read when they are touched."""
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header, padded so that the numbers begin aligned, and where in the file each tensor begins."""
    ends = list(accumulate((tensor.nbytes for tensor in tensors.values()), initial=0))
    entries = {
        name: {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        for (name, tensor), span in zip(tensors.items(), pairwise(ends), strict=True)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: len(header) + begin for name, begin in zip(tensors, ends, strict=False)}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
