"""Files in the safetensors format: a JSON header, then the tensors' values in row-major order, little-endian.

The safetensors library builds the whole file in memory first, and its checksum would take a second pass over it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from deepseek_v3.utils.text import format_value

# The format's dtype names, widest first: written in this order, every tensor is aligned to its element size.
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
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = list(DTYPES.values())
_ALIGNMENT = 8
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 10**8  # as in the safetensors library
_MAX_AXES = 64  # as in torch
_LENGTH_BYTES = 8  # size of the number before the header that gives the header's length


class HeaderEntry(NamedTuple):
    """A tensor in a file's header: the name of its dtype, its shape, and its first byte, counted in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


class WrittenFile(NamedTuple):
    """The size and SHA-256 of a file, and the first byte of each tensor."""

    num_bytes: int
    sha256: str
    begins: dict[str, int]


def write_tensor_file(path: Path, tensors: dict[str, Tensor]) -> WrittenFile:
    """Writes a file as `write_tensors` does, and computes its checksum in the same pass. Raises OSError."""
    digest = hashlib.sha256()
    num_bytes, begins = write_tensors(path, tensors, written=digest.update)
    return WrittenFile(num_bytes, digest.hexdigest(), begins)


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    written: Callable[[bytes | memoryview], object] = lambda _: None,
) -> tuple[int, dict[str, int]]:
    """Writes CPU tensors of the dtypes in `DTYPES`, and fsyncs the file. Raises OSError.

    `metadata` becomes the entry `__metadata__` of the header; `written` is called with each part of the file.
    Returns the size of the file and the first byte of each tensor.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: _ORDER.index(item[1].dtype)))
    header, begins = _header(tensors, metadata)
    parts: Iterator[bytes | memoryview] = chain([header], map(_bytes_of, tensors.values()))
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            written(part)
        num_bytes = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return num_bytes, begins


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Reads the header of a file, without its metadata.

    Raises OSError, and ValueError if the header is not valid, or if a tensor is not wholly in the file, overlaps
    another one, or has another number of bytes than its shape and dtype.
    """
    with path.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if num_bytes < _LENGTH_BYTES or length > min(num_bytes - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ValueError(f"{length:,} bytes of header in a file of {num_bytes:,} bytes")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError(f"its header begins with {text[:1]!r}, expected {{")
    start = _LENGTH_BYTES + length
    entries = require_plain_json(text.decode())
    spans = {name: _span(name, entry, start) for name, entry in entries.items() if name != _METADATA}
    _check_spans(spans, start, num_bytes)
    return {name: entry for name, (entry, _) in spans.items()}


def _span(name: str, entry: Any, start: int) -> tuple[HeaderEntry, int]:
    """A tensor's entry and the byte after its last one, both counted in the file. Raises ValueError."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {format_value(name)} holds half of a surrogate pair") from None
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{format_value(name)} has the dtype {format_value(dtype)}, expected one of {', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"{format_value(name)} has the shape {format_value(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{format_value(name)} has the data_offsets {format_value(offsets)}, expected its first byte and the "
            "one after its last"
        )
    return HeaderEntry(dtype, tuple(shape), start + offsets[0]), start + offsets[1]


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of whole numbers that are not negative and fit in 64 bits."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_spans(spans: Mapping[str, tuple[HeaderEntry, int]], start: int, num_bytes: int) -> None:
    """Raises ValueError unless every tensor has its own bytes of the file, as many as its shape and dtype take."""
    ends = start
    for name, (entry, end) in sorted(spans.items(), key=lambda item: (item[1][0].begin, item[1][1])):
        shown = format_value(name)
        expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if end - entry.begin != expected:
            raise ValueError(f"{shown} has {end - entry.begin:,} bytes, expected {expected:,} for its shape")
        if end > num_bytes:
            raise ValueError(f"{shown} ends at byte {end:,}, and the file has {num_bytes:,}: it was cut short")
        if entry.begin < ends:
            raise ValueError(f"{shown} begins at byte {entry.begin:,}, inside the header or another tensor")
        ends = end


def require_plain_json(text: bytes | str) -> Any:
    """Parses JSON. Raises ValueError for repeated keys, NaN and infinity, RecursionError for deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
            raise ValueError(f"the key {twice!r:.200} is given twice")
        return found

    def refuse(word: str) -> Any:
        raise ValueError(f"found {word}, expected a finite number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def map_bytes(path: Path, num_bytes: int) -> Tensor:
    """The bytes of a file as a uint8 tensor mapped into memory: they are read when they are used."""
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)


def _header(tensors: dict[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The header, padded so that the values are aligned, and the first byte of each tensor in the file."""
    ends = list(accumulate((tensor.nbytes for tensor in tensors.values()), initial=0))
    entries: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    entries |= {
        name: {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        for (name, tensor), span in zip(tensors.items(), pairwise(ends), strict=True)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: len(header) + begin for name, begin in zip(tensors, ends, strict=False)}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
