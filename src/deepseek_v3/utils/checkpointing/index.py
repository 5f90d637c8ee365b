"""`index.json` of a sharded checkpoint: its files, where they hold each tensor, and all values but tensors.

    {"version":1,"sha256":"<64 hex digits>","files":{…},"tensors":{…},"plain":{…}}

The hash covers every byte after the comma that follows it. The tensors' values are in safetensors files, one from
each rank that wrote any. A tensor is stored in chunks: boxes, each given by its offsets and sizes along every axis.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek_v3.utils.checkpointing.errors import (
    REPAIR,
    checksum_error,
    join_problems,
    read_error,
    require_regular_file,
    validation_problems,
)
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPES, HeaderEntry, require_plain_json
from deepseek_v3.utils.errors import CheckpointError

Extents = tuple[int, ...]  # one number per axis
Box = tuple[Extents, Extents]  # offsets and sizes

INDEX_FILE = "index.json"
_VERSION = 1
_MAX_NUMEL = 2**60  # the most elements of a tensor; more overflow torch's count of bytes
_MAX_CUT_AXES = 8  # a box has 2**n corners
_HEAD = re.compile(rb'\{"version":([0-9]+),"sha256":"([0-9a-f]{64})",')

NonNegative = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^rank_[0-9]+\.safetensors$")]  # no path, so never outside the folder
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Chunk(_Entry):
    """A box of a tensor, stored from byte `begin` of `file` on."""

    file: FileName
    begin: NonNegative
    offsets: tuple[NonNegative, ...]
    sizes: tuple[NonNegative, ...]


class StoredTensor(_Entry):
    """A tensor and the chunks that make it up; `dtype` is a name of the safetensors format."""

    dtype: str
    shape: tuple[NonNegative, ...]
    chunks: tuple[Chunk, ...]


class StoredFile(_Entry):
    """The size in bytes and the SHA-256 by which a file is verified."""

    bytes: NonNegative
    sha256: Sha256


class Index(_Entry):
    """The contents of `index.json` after its version and checksum.

    Validation ensures that the chunks of each tensor hold each of its elements exactly once, and that they are
    within their files and do not overlap there, so that nothing can be read that was never written.
    """

    files: dict[FileName, StoredFile]
    tensors: dict[str, StoredTensor]
    plain: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Index:
        problems = [problem for name, tensor in self.tensors.items() for problem in self._problems(name, tensor)]
        problems += self._overlaps()
        if problems:
            raise ValueError(join_problems(problems))
        return self

    def _problems(self, name: str, tensor: StoredTensor) -> list[str]:
        if tensor.dtype not in DTYPES:
            return [f"{name!r} has dtype {tensor.dtype!r}, expected one of {', '.join(DTYPES)}"]
        if math.prod(size for size in tensor.shape if size) > _MAX_NUMEL:
            return [f"{name!r} has shape {list(tensor.shape)}, which is more than any memory holds"]
        problems = [
            f"{name!r} {problem}" for chunk in tensor.chunks for problem in self._chunk_problems(tensor, chunk)
        ]
        if problems:
            return problems
        problem = tiling_problem(tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks])
        return [f"{name!r} {problem}"] if problem else []

    def _chunk_problems(self, tensor: StoredTensor, chunk: Chunk) -> list[str]:
        problems = []
        axes = len(tensor.shape)
        if len(chunk.offsets) != axes or len(chunk.sizes) != axes:
            problems.append(f"has a chunk with other axes than its shape {list(tensor.shape)}")
        elif any(
            offset + size > whole
            for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        ):
            problems.append(f"has a chunk beyond its shape {list(tensor.shape)}")
        if chunk.file not in self.files:
            problems.append(f"is in {chunk.file}, which is not among the files")
        elif _end(tensor, chunk) > self.files[chunk.file].bytes:
            problems.append(f"extends beyond the end of {chunk.file}")
        if chunk.begin % DTYPES[tensor.dtype].itemsize:
            problems.append(f"begins at byte {chunk.begin} of {chunk.file}, which is not aligned to its numbers")
        return problems

    def _overlaps(self) -> list[str]:
        """One problem for each chunk that shares bytes of a file with another chunk."""
        ranges = sorted(
            (chunk.file, chunk.begin, _end(tensor, chunk), name)
            for name, tensor in self.tensors.items()
            if tensor.dtype in DTYPES
            for chunk in tensor.chunks
            if 0 not in chunk.sizes
        )
        return [
            f"{name!r} overlaps {other!r} at byte {begin} of {file}"
            for (other_file, _, end, other), (file, begin, _, name) in pairwise(ranges)
            if file == other_file and begin < end
        ]

    def stored_in(self, file: str) -> dict[str, HeaderEntry]:
        """The entries that the header of a file must have: its chunks, by their names in the file."""
        return {
            chunk_name(name, tensor.shape, chunk.offsets, chunk.sizes): HeaderEntry(
                tensor.dtype, chunk.sizes, chunk.begin
            )
            for name, tensor in self.tensors.items()
            for chunk in tensor.chunks
            if chunk.file == file
        }

    def write(self, folder: Path) -> None:
        """Writes the index to a folder and fsyncs it. Raises OSError."""
        body = self.model_dump_json()[1:].encode()
        head = f'{{"version":{_VERSION},"sha256":"{hashlib.sha256(body).hexdigest()}",'
        with (folder / INDEX_FILE).open("wb") as file:
            file.write(head.encode() + body)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Reads the index of a folder.

        Raises CheckpointError if it is missing, damaged, of another version or inconsistent, with all problems
        in one message.
        """
        path = folder / INDEX_FILE
        try:
            require_regular_file(path)
            content = path.read_bytes()
        except OSError as error:
            raise read_error(path, error) from None
        head = _HEAD.match(content)
        if not head:
            raise CheckpointError(
                f"{path}: does not begin with a version and a checksum, so it is damaged or not an index of this "
                f"project; {REPAIR}"
            )
        if int(head[1]) != _VERSION:
            raise CheckpointError(
                f"{path}: has version {int(head[1])}, this program reads version {_VERSION}; "
                "load it with the version of the program that wrote it"
            )
        body = content[head.end() :]
        found = hashlib.sha256(body).hexdigest()
        if found != head[2].decode():
            raise checksum_error(path, found, head[2].decode())
        try:
            require_plain_json(b"{" + body)
            return cls.model_validate_json(b"{" + body)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {validation_problems(error)}; {REPAIR}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: is not JSON as this project writes it: {error}; {REPAIR}") from None


def chunk_name(name: str, shape: Extents, offsets: Extents, sizes: Extents) -> str:
    """A chunk's name in its file: `w` for a whole tensor, `w[0:2,4:8]` for a part of it."""
    if sizes == shape:
        return name
    ranges = (f"{offset}:{offset + size}" for offset, size in zip(offsets, sizes, strict=True))
    return f"{name}[{','.join(ranges)}]"


def _end(tensor: StoredTensor, chunk: Chunk) -> int:
    return chunk.begin + math.prod(chunk.sizes) * DTYPES[tensor.dtype].itemsize


def tiling_problem(shape: Extents, boxes: Sequence[Box]) -> str | None:
    """Checks that boxes hold each element of a tensor exactly once; returns the problem, or None.

    The boxes have as many axes as `shape` and do not extend beyond it, in any order; empty ones do not count. The
    time is linear in the number of boxes, however they cut the tensor.
    """
    if 0 in shape:
        return None
    filled = [(offsets, sizes) for offsets, sizes in boxes if 0 not in sizes]
    axes = [axis for axis, size in enumerate(shape) if any(sizes[axis] != size for _, sizes in filled)]
    if len(axes) > _MAX_CUT_AXES:
        return f"is cut along {len(axes)} axes, expected at most {_MAX_CUT_AXES}"
    found = _first_miscounted([shape[axis] for axis in axes], [_along(axes, box) for box in filled])
    if found is None:
        return None
    position, surplus = found
    index = [0] * len(shape)
    for axis, coordinate in zip(axes, position, strict=True):
        index[axis] = coordinate
    return f"has the element at {index} {'in no chunk' if surplus < 0 else f'in {surplus + 1} chunks'}"


def _along(axes: Sequence[int], box: Box) -> Box:
    offsets, sizes = box
    return tuple(offsets[axis] for axis in axes), tuple(sizes[axis] for axis in axes)


def _first_miscounted(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[Extents, int] | None:
    """The first position, in row-major order, that is not in exactly one box, and its number of boxes less one.

    Give each corner of a box the sign +1 or -1, alternating along every axis. The number of boxes that hold a
    position is then the sum of the signs of all corners at or before it. So every position is held once if the
    corners of the boxes cancel those of the whole tensor; otherwise the first corner that remains is the first
    wrong position, and its sum of signs is the number of its boxes less one.
    """
    corners: Counter[Extents] = Counter()
    whole = ((0,) * len(shape), tuple(shape))
    for weight, (offsets, sizes) in [(-1, whole), *((1, box) for box in boxes)]:
        ends = [((offset, 1), (offset + size, -1)) for offset, size in zip(offsets, sizes, strict=True)]
        for corner in product(*ends):
            corners[tuple(position for position, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    left_over = [corner for corner, sign in corners.items() if sign]
    return (min(left_over), corners[min(left_over)]) if left_over else None
