"""Builds every CUDA C++ kernel ahead of use with nvcc: `scripts/build_kernels.sh`.

The package does not need it: NVRTC compiles a kernel that is not built, at its first use. What is built here is
launched without compiling anything and without NVRTC. A folder `ops/<operation>/cuda` takes part by a line in
`cuda_packages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from deepseek_v3.utils.interrupts import exit_on_interrupt

with exit_on_interrupt():
    import torch
    import typer

    from deepseek_v3.ops import kernel_cache
    from deepseek_v3.ops.kernel_cache import ARCHITECTURE, CACHE_VARIABLE, NVCC, MachineCode
    from deepseek_v3.ops.nvcc import Nvcc, describe, find_nvcc
    from deepseek_v3.ops.nvrtc import CudaError, Kernel
    from deepseek_v3.utils.command_line import run_command
    from deepseek_v3.utils.errors import UserError
    from deepseek_v3.utils.logging import configure_logging
    from deepseek_v3.utils.machine import usable_cores
    from deepseek_v3.utils.text import paragraph, pluralize, printable, table


class KernelError(UserError):
    """A kernel that cannot be built or stored here, or whose results are wrong."""


class CudaPackage(NamedTuple):
    """The kernels of an operation: a folder `ops/<name>/cuda`.

    `kernels` returns every variant that the operation may launch; creating them compiles nothing. `check` compares
    them with the reference on a GPU, and launches each of them: it yields comparisons and whether they hold.
    """

    name: str
    kernels: Callable[[], Iterable[Kernel]]
    check: Callable[[torch.device], Iterable[tuple[str, bool]]]


def cuda_packages() -> list[CudaPackage]:
    """Every folder `ops/<operation>/cuda`. Raises KernelError if a library that one imports is missing."""
    try:
        from deepseek_v3.ops.fp8 import cuda as fp8
        from deepseek_v3.ops.fp8.cuda.check import check as check_fp8
        from deepseek_v3.ops.fp8_gemm import cuda as fp8_gemm
        from deepseek_v3.ops.fp8_gemm.cuda.check import check as check_fp8_gemm
        from deepseek_v3.ops.grouped_gemm import cuda as grouped_gemm
        from deepseek_v3.ops.grouped_gemm.cuda.check import check as check_grouped_gemm
        from deepseek_v3.ops.mla_decode import cuda as mla_decode
        from deepseek_v3.ops.mla_decode.cuda.check import check as check_mla_decode
    except ImportError as error:
        raise KernelError(f"the kernels work beside Triton's, which torch for CUDA brings along: {error}") from None
    return [
        CudaPackage("fp8", fp8.kernels, check_fp8),
        CudaPackage("fp8_gemm", fp8_gemm.kernels, check_fp8_gemm),
        CudaPackage("grouped_gemm", grouped_gemm.kernels, check_grouped_gemm),
        CudaPackage("mla_decode", mla_decode.kernels, check_mla_decode),
    ]


class _Built(NamedTuple):
    """A kernel, its machine code, and whether this run has built it."""

    kernel: Kernel
    code: MachineCode
    is_new: bool


def build_kernels() -> None:
    """Build every CUDA C++ kernel with nvcc, and check the results where a GPU can run them.

    Training and inference then start without compiling. The kernels go to $DSV3_KERNEL_CACHE, or else to
    ~/.cache/deepseek_v3/kernels. Kernels that are there already are not built again.
    """
    configure_logging()
    packages = cuda_packages()
    nvcc = find_nvcc()
    folder = kernel_cache.cache_folder()
    _say(f"Compiler: {nvcc.path}, version {nvcc.version}, for {ARCHITECTURE} and torch {torch.__version__}")
    _say(f"Kernels in: {folder} ({CACHE_VARIABLE} names another folder)")
    start = perf_counter()
    built = _build([kernel for package in packages for kernel in package.kernels()], nvcc)
    typer.echo(printable("\n".join(["", *_report(built), ""])))
    if new := sum(each.is_new for each in built):
        _say(f"Built {pluralize(new, 'kernel')} in {perf_counter() - start:.1f} s.")
    else:
        _say("Nothing to build: all kernels were built before.")
    if torch.version.cuda and nvcc.version.split(".")[0] != torch.version.cuda.split(".")[0]:
        _say(
            f"torch is built for CUDA {torch.version.cuda}, nvcc is {nvcc.version}: if a driver refuses these "
            "kernels, NVRTC compiles them instead."
        )
    _check(packages)


def _build(kernels: Sequence[Kernel], nvcc: Nvcc) -> list[_Built]:
    """The code of each kernel, from the cache or from nvcc, which builds several sources at a time."""
    found: dict[Path, tuple[MachineCode, bool]] = {}
    missing: dict[Path, Kernel] = {}
    paths = [kernel_cache.path_of(kernel.source, kernel.defines, NVCC) for kernel in kernels]
    for path, kernel in zip(paths, kernels, strict=True):
        code = kernel_cache.find(kernel.source, kernel.defines, NVCC)
        if code is not None and code.compiler == nvcc.compiler:
            found[path] = code, False
        else:
            missing[path] = kernel

    def build(path: Path) -> tuple[MachineCode, bool]:
        kernel = missing[path]
        code = nvcc.compile(kernel.source.name, kernel_cache.text_of(kernel.source), kernel.defines)
        kernel_cache.store(path, code)
        return code, True

    try:
        for path in missing:
            path.parent.mkdir(parents=True, exist_ok=True)  # to fail before long work
        with ThreadPoolExecutor(usable_cores()) as pool:
            found.update(zip(missing, pool.map(build, missing), strict=True))
    except OSError as error:
        raise KernelError(
            f"{error.filename or kernel_cache.cache_folder()}: kernels cannot be stored there ({error.strerror}); "
            f"make room, or set {CACHE_VARIABLE} to a folder that you may write to"
        ) from None
    return [_Built(kernel, *found[path]) for path, kernel in zip(paths, kernels, strict=True)]


def _report(built: Sequence[_Built]) -> list[str]:
    """A table of what each kernel takes, then those that spill registers, and what the assembler warns of."""
    header = ("kernel", "variant", "registers", "spilled", "static", "dynamic", "")
    variants = _variants([each.kernel for each in built])
    spilling = [
        f"{each.kernel.name} ({variants[each.kernel]})"
        for each in built
        if (taken := each.code.resources.get(each.kernel.name)) and taken.spill_stores + taken.spill_loads
    ]
    return [
        *table(header, [_row(each, variants[each.kernel]) for each in built], left=("variant", "")),
        "registers: of a thread; spilled: bytes that it stores and loads for want of registers;",
        "static, dynamic: bytes of shared memory of a thread block",
        f"SPILLS registers to memory, which is slow: {'; '.join(spilling)}" if spilling else "No kernel spills.",
        *dict.fromkeys(note for each in built for note in each.code.notes),
    ]


def _row(built: _Built, variant: str) -> tuple[str, ...]:
    kernel, code, is_new = built
    taken, where = code.resources.get(kernel.name), "built now" if is_new else "built before"
    numbers = ("?",) * 3
    if taken:
        numbers = f"{taken.registers}", f"{taken.spill_stores + taken.spill_loads:,}", f"{taken.static_shared:,}"
    return kernel.name, variant, *numbers, f"{kernel.shared_bytes:,}", where


def _variants(kernels: Sequence[Kernel]) -> dict[Kernel, str]:
    """What distinguishes each kernel from others of its source: its defines without those that all of them have."""
    defines_of: dict[Path, list[set[tuple[str, int]]]] = {}
    for kernel in kernels:
        defines_of.setdefault(kernel.source, []).append(set(kernel.defines.items()))
    same = {source: set.intersection(*all_defines) for source, all_defines in defines_of.items()}
    found = {}
    for kernel in kernels:
        own = {name: value for name, value in kernel.defines.items() if (name, value) not in same[kernel.source]}
        found[kernel] = describe("", own).removeprefix(" with ") or "–"
    return found


def _check(packages: Sequence[CudaPackage]) -> None:
    """Compares the results of the built kernels with the references, if there is a GPU for them."""
    if not torch.cuda.is_available():
        _say("There is no GPU here to check the results on.")
        return
    if torch.cuda.get_device_capability() != (9, 0):
        _say(f"The results are not checked: {torch.cuda.get_device_name()} cannot run kernels for {ARCHITECTURE}.")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    wrong = [f"{package.name}: {found}" for package in packages for found in _check_package(package, device)]
    if wrong:
        raise KernelError("\n".join(["kernels are wrong; their packages' files were removed again:", *wrong]))


def _check_package(package: CudaPackage, device: torch.device) -> list[str]:
    """What is wrong with a package's kernels; the files of wrong ones are removed, so that no run takes them."""
    kernels = list(package.kernels())
    wrong, count = list[str](), 0
    try:
        for name, holds in package.check(device):
            count += 1
            if not holds:
                wrong.append(f"{name}: differs from the reference")
    except CudaError as error:
        wrong.append(str(error))
    for kernel, variant in _variants(kernels).items():
        if not kernel.is_loaded:
            wrong.append(f"{kernel.name} ({variant}): was not checked")
        elif not kernel.is_built:
            wrong.append(f"{kernel.name} ({variant}): the driver refuses what nvcc has built")
    if wrong:
        for kernel in kernels:
            kernel_cache.path_of(kernel.source, kernel.defines, NVCC).unlink(missing_ok=True)
    else:
        kinds = pluralize(len(kernels), "kernel")
        _say(
            f"Checked on {torch.cuda.get_device_name(device)}: {package.name}, {kinds}, {count} comparisons agree."
        )
    return wrong


def _say(text: str) -> None:
    typer.echo(paragraph(text))


if __name__ == "__main__":
    run_command(build_kernels)
