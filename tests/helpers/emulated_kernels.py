"""CUDA C++ kernels compiled for the CPU: `cuda_emulation` runs the threads of a thread block as fibers."""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers import ROOT

_EMULATION = ROOT / "tests" / "helpers" / "cuda_emulation"
_OPTIONS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-DEMULATED")


def emulated_kernel(folder: Path, operation: str, name: str, defines: Mapping[str, int]) -> ctypes.CDLL:
    """The library of `cuda_emulation/<name>.cpp` and the sources of an operation, whose function is `run`.

    It is compiled into `folder` unless it is there already. Skips the test if there is no compiler.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, which compiles the kernel for the CPU")
    library = folder / ("_".join([name, *(f"{key}={value}" for key, value in defines.items())]) + ".so")
    if not library.exists():
        sources = ROOT / "src" / "deepseek_v3" / "ops" / operation / "cuda"
        options = [*_OPTIONS, *(f"-D{key}={value}" for key, value in defines.items())]
        files = [f"-I{_EMULATION}", f"-I{sources}", f"-I{sources.parents[1]}", str(_EMULATION / f"{name}.cpp")]
        subprocess.run([compiler, *options, *files, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
