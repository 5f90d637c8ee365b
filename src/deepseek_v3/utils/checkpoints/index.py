"""`index.json` of a sharded checkpoint: where every tensor lies, what the files are, and all that is no tensor.

    {"version":1,"sha256":"<64 hex digits>","files":{…},"tensors":{…},"plain":{…}}

The hash is over every byte behind its comma. The numbers lie in safetensors files, one from each rank that wrote.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek_v3.utils.checkpoints.failures import REPAIR, damaged, unreadable
from deepseek_v3.utils.checkpoints.tensor_file import DTYPES
from deepseek_v3.utils.errors import CheckpointError

INDEX_FILE = "index.json"
_VERSION = 1
_HEAD = re.compile(rb'\{"version":([0-9]+),"sha256":"([0-9a-f]{64})",')

Natural = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^rank_[0-9]+\.safetensors$")]  # no path: never outside the folder
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Chunk(_Entry):
    """A box of a tensor, and its place: byte `begin` of `file`."""

    file: FileName
    begin: Natural
    offsets: tuple[Natural, ...]
    sizes: tuple[Natural, ...]


class StoredTensor(_Entry):
    """A tensor in chunks that together are all of it; `dtype` is a name of the safetensors format."""

    dtype: str
    shape: tuple[Natural, ...]
    chunks: tuple[Chunk, ...]


class StoredFile(_Entry):
    """What proves a file whole."""

    bytes: Natural
    sha256: Sha256


class Index(_Entry):
    """The contents of `index.json` behind its version and checksum."""

    files: dict[FileName, StoredFile]
    tensors: dict[str, StoredTensor]
    plain: dict[str, Any]

    @model_validator(mode="after")
    def _complete(self) -> Index:
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name} has dtype {tensor.dtype!r}, expected one of {', '.join(DTYPES)}")
            for chunk in tensor.chunks:
                self._check_chunk(name, tensor, chunk)
            found = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if found != math.prod(tensor.shape):
                raise ValueError(f"{name} has {found} of its {math.prod(tensor.shape)} numbers")
        return self

    def _check_chunk(self, name: str, tensor: StoredTensor, chunk: Chunk) -> None:
        if chunk.file not in self.files:
            raise ValueError(f"{name} lies in {chunk.file}, which is not among the files")
        end = chunk.begin + math.prod(chunk.sizes) * DTYPES[tensor.dtype].itemsize
        if end > self.files[chunk.file].bytes:
            raise ValueError(f"{name} lies beyond the end of {chunk.file}")
        box = zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        if any(offset + size > whole for offset, size, whole in box):
            raise ValueError(f"{name} has a chunk beyond its shape {tensor.shape}")

    def write(self, folder: Path) -> None:
        """Writes and fsyncs the index of a folder. Raises OSError."""
        body = self.model_dump_json()[1:].encode()
        head = f'{{"version":{_VERSION},"sha256":"{hashlib.sha256(body).hexdigest()}",'
        with (folder / INDEX_FILE).open("wb") as file:
            file.write(head.encode() + body)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder. Raises CheckpointError where it is missing, damaged or of another version."""
        path = folder / INDEX_FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable(path, error) from None
        head = _HEAD.match(content)
        if not head:
            raise CheckpointError(
                f"{path}: does not begin with a version and a checksum, so it is damaged or no index of this "
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
            raise damaged(path, found, head[2].decode())
        try:
            return cls.model_validate_json(b"{" + body)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path}: {field or 'the index'}: {first['msg']}; {REPAIR}") from None
