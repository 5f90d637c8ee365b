"""Machine code of CUDA C++ kernels in a folder: what `build_kernels.py` has built, and what NVRTC has compiled.

A file holds the code of one source with one set of defines. Its name ends in a hash of all that the code depends
on: the source's text with what it includes, the defines, the architecture, torch's version and the compiler. So a
file is never out of date, and a changed source gets another file. The first line is the SHA-256 of the rest, the
second one is JSON, and the ELF file that the driver loads follows.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepseek_v3.utils.errors import PathError
from deepseek_v3.utils.files import fsync_directory
from deepseek_v3.utils.logging import get_logger

ARCHITECTURE = "sm_90a"  # that every kernel is written for: Hopper with its own instructions
CACHE_VARIABLE = "DSV3_KERNEL_CACHE"
NVCC = "nvcc"  # of any version: a run that finds what it built need not have it
_FORMAT = 1
_HEADER = Path(__file__).with_name("hopper.cuh")

_log = get_logger("Kernels")


class Resources(NamedTuple):
    """What a thread, and for shared memory a thread block, of one kernel takes; in bytes, but for registers."""

    registers: int
    spill_stores: int
    spill_loads: int
    static_shared: int


class MachineCode(NamedTuple):
    """The compiled kernels of one source: an ELF file, and its compiler.

    If nvcc has built it, also each kernel's resources and the assembler's warnings.
    """

    cubin: bytes
    compiler: str
    resources: Mapping[str, Resources] = {}
    notes: tuple[str, ...] = ()

    @property
    def is_built(self) -> bool:
        """Whether nvcc built it ahead of use."""
        return self.compiler.startswith(NVCC)


def cache_folder() -> Path:
    """The folder of the machine code: `DSV3_KERNEL_CACHE`, or `deepseek_v3/kernels` in the user's cache folder.

    Raises PathError if the user has no home folder.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_v3" / "kernels"
    except RuntimeError:
        raise PathError(f"the home folder is unknown; set {CACHE_VARIABLE} to a folder for kernels") from None


def text_of(source: Path) -> bytes:
    """The text of a source, with that of `hopper.cuh` in place of the line that includes it.

    So a compiler needs no folder of headers. Its messages still name the lines of both files.
    """
    before, include, after = source.read_bytes().partition(b'#include "hopper.cuh"\n')
    if not include:
        return before
    next_line = before.count(b"\n") + 2
    return b"".join((before, _line(1, _HEADER), _HEADER.read_bytes(), _line(next_line, source), after))


def _line(number: int, file: Path) -> bytes:
    return f'#line {number} "{file.name}"\n'.encode()


def path_of(source: Path, defines: Mapping[str, int], compiler: str) -> Path:
    """The file for the code that a compiler makes of a source; `NVCC` stands for nvcc of any version."""
    identity = [_FORMAT, sorted(defines.items()), ARCHITECTURE, torch.__version__, compiler]
    digest = hashlib.sha256(json.dumps(identity).encode() + b"\n" + text_of(source)).hexdigest()
    return cache_folder() / f"{source.stem}-{digest[:32]}.kernel"


def find(source: Path, defines: Mapping[str, int], compiler: str) -> MachineCode | None:
    """The code that a compiler has made of a source; None if it is not there, or damaged, which is logged."""
    try:
        return _read(path_of(source, defines, compiler))
    except PathError:
        return None


def _read(path: Path) -> MachineCode | None:
    try:
        digest, _, rest = path.read_bytes().partition(b"\n")
        if hashlib.sha256(rest).hexdigest().encode() != digest:
            raise ValueError("its checksum is wrong")
        about, _, cubin = rest.partition(b"\n")
        return _decode(json.loads(about), cubin)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is not used: %s", path, error)
        return None


def store(path: Path, code: MachineCode) -> None:
    """Writes a file that is complete or invisible, also if other processes or machines write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = json.dumps(_encode(code)).encode() + b"\n" + code.cubin
    # Containers that share a folder may share process ids, too.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _encode(code: MachineCode) -> dict[str, Any]:
    return {"compiler": code.compiler, "resources": dict(code.resources), "notes": code.notes}


def _decode(about: dict[str, Any], cubin: bytes) -> MachineCode:
    resources = {name: Resources(*numbers) for name, numbers in about["resources"].items()}
    return MachineCode(cubin, about["compiler"], resources, tuple(about["notes"]))
