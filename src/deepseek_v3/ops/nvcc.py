"""nvcc, CUDA's compiler: where it may be, and what it and its assembler say of the kernels that it compiles."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from deepseek_v3.ops.kernel_cache import ARCHITECTURE, NVCC, MachineCode, Resources
from deepseek_v3.utils.errors import UserError

_OLDEST = (12, 0)  # that knows sm_90a
_USUAL_RELEASE = "13.0"  # of CUDA, for a torch without it
_OLDEST_PACKAGE = 13  # whose Python package holds nvcc itself
_LONGEST_START = 60.0  # seconds in which an nvcc says its version, even from a slow network drive
_TOOLKITS = Path("/usr/local")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_NOTE = re.compile(r"warning|Potential Performance Loss", re.IGNORECASE)


class NvccError(UserError):
    """nvcc is missing, or it refuses a kernel."""


class Nvcc(NamedTuple):
    """An nvcc that runs: its path and its version, such as `13.0.88`."""

    path: Path
    version: str

    @property
    def compiler(self) -> str:
        """How machine code names it."""
        return f"{NVCC} {self.version}"

    def compile(self, name: str, text: bytes, defines: Mapping[str, int]) -> MachineCode:
        """The machine code of a source text.

        Raises NvccError with what nvcc says, or if there is no folder for its temporary files.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="deepseek_v3_kernels_") as folder:
                return self._compile_in(folder, name, text, defines)
        except OSError as error:
            raise NvccError(
                f"nvcc needs temporary files, which cannot be written ({error.strerror}); make room, or set TMPDIR "
                "to a folder that you may write to"
            ) from None

    def _compile_in(self, folder: str, name: str, text: bytes, defines: Mapping[str, int]) -> MachineCode:
        source, cubin = Path(folder) / name, Path(folder) / "kernels.cubin"
        source.write_bytes(text)
        run = _run(
            self.path,
            "-cubin",
            f"-arch={ARCHITECTURE}",
            "-Xptxas=-v",
            *(f"-D{key}={value}" for key, value in defines.items()),
            "-o",
            str(cubin),
            str(source),
        )
        said = (run.stdout + run.stderr).replace(f"{folder}/", "")
        if run.returncode or not cubin.is_file():
            what = _explain(said) or f"it says nothing, and ends with status {run.returncode}"
            raise NvccError(f"{self.path} cannot compile {describe(name, defines)}:\n{what}")
        notes = tuple(line.strip() for line in said.splitlines() if _NOTE.search(line))
        return MachineCode(cubin.read_bytes(), self.compiler, resources_of(said), notes)


def describe(name: str, defines: Mapping[str, int]) -> str:
    """A source or kernel with its defines: `products.cu with TILE_N=128`."""
    values = " ".join(f"{key}={value}" for key, value in defines.items())
    return f"{name} with {values}" if values else name


def find_nvcc() -> Nvcc:
    """The first nvcc that runs and is new enough. Raises NvccError, with ways to get one, if there is none."""
    refused: list[str] = []
    for path in dict.fromkeys(_places()):
        if not path.is_file():
            continue
        found = _version(path)
        if isinstance(found, Nvcc):
            return found
        refused.append(f"  {path} {found}")
    raise NvccError("\n".join(_missing(refused)))


def _missing(refused: list[str]) -> list[str]:
    """The lines that say where nvcc was sought, and how to get the one of torch's CUDA release."""
    release = ".".join((torch.version.cuda or _USUAL_RELEASE).split(".")[:2])
    lines = [
        "there is no nvcc that can build the kernels in CUDA_HOME, CUDA_PATH, PATH, this Python's packages or "
        f"{_TOOLKITS}/cuda*",
        *refused,
        "Nothing needs the build: without it, NVRTC compiles each kernel at first use. To get nvcc, choose one of",
        f"  conda install -c conda-forge cuda-nvcc={release}",
        f"  apt install cuda-nvcc-{release.replace('.', '-')}   from https://developer.nvidia.com/cuda-downloads",
        "  your distribution's CUDA toolkit, such as Debian's nvidia-cuda-toolkit, if it is CUDA 12 or newer",
    ]
    if _numbers(release)[0] >= _OLDEST_PACKAGE:
        packages = f"pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart]=={release}.*'"
        lines.insert(-3, f"  {packages}   100 MB; needs g++ as well")
    return lines


def _places() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home) / "bin" / NVCC
    if found := shutil.which(NVCC):
        yield Path(found)
    yield from sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob(f"*/bin/{NVCC}"), reverse=True)
    yield _TOOLKITS / "cuda" / "bin" / NVCC
    newest_first = sorted(_TOOLKITS.glob("cuda-*"), key=lambda path: _numbers(path.name), reverse=True)
    yield from (path / "bin" / NVCC for path in newest_first)


def _version(path: Path) -> Nvcc | str:
    """The nvcc at a path, or why it cannot be used."""
    try:
        said = _run(path, "--version", seconds=_LONGEST_START).stdout
    except NvccError as error:
        return str(error)
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    if found is None:
        return "does not say its version"
    if _numbers(found[1]) < _OLDEST:
        return f"is {found[1]}, which is too old: expected CUDA {_OLDEST[0]} or newer"
    return Nvcc(path, found[1])


def _run(path: Path, *arguments: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """What a run of nvcc gives. Raises NvccError if it cannot be started, or is not done in `seconds`."""
    try:
        return subprocess.run(  # noqa: S603 -- a list of words, without a shell
            [str(path), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise NvccError(f"does not answer within {seconds:g} s") from None
    except OSError as error:
        raise NvccError(f"cannot be started ({error.strerror})") from None


def _explain(said: str) -> str:
    if re.search(r"host compiler|g(cc|\+\+): No such file|cl\.exe", said):
        said += "nvcc reads a source through the host's C++ compiler: install g++, or name one in NVCC_CCBIN"
    return said.strip()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def resources_of(said: str) -> dict[str, Resources]:
    """The resources of each kernel, from what the assembler says of them with `-v`."""
    found = {}
    for name, block in zip(_ENTRY.findall(said), _ENTRY.split(said)[2::2], strict=True):
        registers, spills, shared = (pattern.search(block) for pattern in (_REGISTERS, _SPILLS, _SHARED))
        if registers and spills:
            found[name] = Resources(
                int(registers[1]), int(spills[1]), int(spills[2]), int(shared[1]) if shared else 0
            )
    return found
