"""CUDA C++ kernels without a build step: NVRTC, which comes with torch's CUDA packages, compiles them at first use.

A kernel's source includes no header but `hopper.cuh`, whose text becomes part of it, so NVRTC alone suffices. NVRTC
and the driver are called through ctypes. `build_kernels.py` compiles all kernels ahead of use; what it has built is
launched instead, and needs no NVRTC.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.ops import kernel_cache
from deepseek_v3.ops.kernel_cache import ARCHITECTURE, NVCC, MachineCode
from deepseek_v3.utils.errors import PathError
from deepseek_v3.utils.logging import get_logger

_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_TYPES = {torch.uint8: 0, torch.float8_e4m3fn: 0, torch.float32: 7, torch.bfloat16: 9}
_NO_SWIZZLE, _SWIZZLE_128_BYTES, _PROMOTE_TO_256_BYTES = 0, 3, 3
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_…

_log = get_logger("Kernels")


class CudaError(RuntimeError):
    """The CUDA driver or NVRTC refused a call."""


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current one; its tensor maps are made, and its kernels are launched, inside."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        if index not in _entered.gpus:
            _enter_context(index)
            _entered.gpus.add(index)
        yield


class _Entered(threading.local):
    """The GPUs whose context a thread has."""

    def __init__(self) -> None:
        self.gpus: set[int] = set()


_entered = _Entered()


def _enter_context(index: int) -> None:
    """Enters a GPU's context, which the driver's functions need.

    A new thread, such as one of autograd's, has it only after its first call of the CUDA runtime.
    """
    context, driver = ctypes.c_void_p(), _driver()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "asking for the current context")
    if not context:
        retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index)
        _check(retained, f"retaining the context of GPU {index}")
        _check(driver.cuCtxSetCurrent(context), f"entering the context of GPU {index}")


class TensorMap:
    """Describes a matrix to the tensor memory accelerator, which copies boxes of it into shared memory."""

    def __init__(
        self, address: int, dtype: torch.dtype, shape: tuple[int, int], box: tuple[int, int], swizzle: bool
    ) -> None:
        # The driver wants 64-byte alignment, which ctypes does not promise.
        self._memory = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + 64)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64
        _check(
            _driver().cuTensorMapEncodeTiled(
                ctypes.c_void_p(self.address),
                _TENSOR_MAP_TYPES[dtype],
                2,
                ctypes.c_void_p(address),
                (ctypes.c_uint64 * 2)(*shape[::-1]),
                (ctypes.c_uint64 * 1)(shape[1] * dtype.itemsize),
                (ctypes.c_uint32 * 2)(*box[::-1]),
                (ctypes.c_uint32 * 2)(1, 1),
                0,
                _SWIZZLE_128_BYTES if swizzle else _NO_SWIZZLE,
                _PROMOTE_TO_256_BYTES,
                0,
            ),
            f"cuTensorMapEncodeTiled of {shape} {dtype}",
        )


def tensor_map(matrix: Tensor, box_rows: int, box_columns: int, swizzle: bool = False) -> TensorMap:
    """The map of a matrix (rows, columns), contiguous and aligned to 16 bytes, as its rows are.

    A box is `box_rows` × `box_columns`; what it has beyond the matrix is read as zeros. With `swizzle` the 16-byte
    pieces of a row of 128 bytes are permuted as the tensor cores expect. Training allocates the same addresses in
    every step, and their maps are made once.
    """
    rows, columns = matrix.shape
    return _tensor_map(matrix.data_ptr(), matrix.dtype, (rows, columns), (box_rows, box_columns), swizzle)


_tensor_map = lru_cache(maxsize=4096)(TensorMap)


class _LaunchAttribute(ctypes.Structure):
    """`CUlaunchAttribute`, whose value begins at byte 8 and has 64 bytes."""

    _fields_ = [("id", ctypes.c_int64), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


def _early_launch(blocks: int, threads: int, shared_bytes: int, stream: ctypes.c_void_p) -> _LaunchConfig:
    attribute = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (ctypes.c_int * 16)(1))
    sizes = ((ctypes.c_uint * 3)(number, 1, 1) for number in (blocks, threads))
    return _LaunchConfig(*sizes, shared_bytes, stream, ctypes.pointer(attribute), 1)


class Kernel:
    """A kernel of a CUDA C++ source, compiled at its first launch and loaded on every device that launches it.

    `shared_bytes` is the shared memory of a thread block that the source does not declare itself.
    """

    def __init__(self, source: Path, name: str, defines: Mapping[str, int], shared_bytes: int) -> None:
        self.source, self.name, self.defines, self.shared_bytes = source, name, defines, shared_bytes
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()

    @property
    def is_loaded(self) -> bool:
        """Whether a device has launched it."""
        return bool(self._functions)

    @property
    def is_built(self) -> bool:
        """Whether it is code that `build_kernels.py` has built."""
        return self._code.is_built

    def launch(self, blocks: int, threads: int, arguments: Sequence[Any], early: bool = False) -> None:
        """Launches the kernel on the current stream of the current device, inside `current_device`.

        An argument is a tensor (its address), a `TensorMap` (by value), None (a null pointer), or a ctypes object.
        With `early` its thread blocks may start before the previous kernel ends, if that one allows it; they wait
        for its results themselves.
        """
        values = [_by_value(argument) for argument in arguments]
        places = [value.address if isinstance(value, TensorMap) else ctypes.addressof(value) for value in values]
        packed = (ctypes.c_void_p * len(places))(*places)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        driver, function, one = _driver(), self._function(), ctypes.c_uint(1)
        if early:
            config = _early_launch(blocks, threads, self.shared_bytes, stream)
            launched = driver.cuLaunchKernelEx(ctypes.byref(config), function, packed, None)
        else:
            launched = driver.cuLaunchKernel(
                function, blocks, one, one, threads, one, one, self.shared_bytes, stream, packed, None
            )
        _check(launched, f"launching {self.name}")

    def _function(self) -> ctypes.c_void_p:
        device = torch.cuda.current_device()
        with self._lock:
            if device not in self._functions:
                self._functions[device] = self._load()
            return self._functions[device]

    @cached_property
    def _code(self) -> MachineCode:
        return _machine_code(self.source, self.defines)

    def _load(self) -> ctypes.c_void_p:
        try:
            return self._load_code()
        except CudaError as error:
            if not self._code.is_built or nvrtc_obstacle():
                raise
            _log.warning("%s, as it was built; NVRTC compiles it instead", error)
            self._code = _compiled(self.source, self.defines)
            return self._load_code()

    def _load_code(self) -> ctypes.c_void_p:
        module, function, driver = ctypes.c_void_p(), ctypes.c_void_p(), _driver()
        _check(driver.cuModuleLoadData(ctypes.byref(module), self._code.cubin), f"loading {self.name}")
        name = self.name.encode()
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name), f"finding {self.name}")
        attribute = driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, self.shared_bytes)
        _check(attribute, f"{self.shared_bytes} bytes of shared memory for {self.name}")
        return function


def _by_value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p() if argument is None else argument


def _machine_code(source: Path, defines: Mapping[str, int]) -> MachineCode:
    """What nvcc has built of a source file; if there is nothing, what NVRTC makes of it."""
    return kernel_cache.find(source, defines, NVCC) or _compiled(source, defines)


def _compiled(source: Path, defines: Mapping[str, int]) -> MachineCode:
    """What NVRTC makes of a source file; for the next process it is stored in the cache, if that can be written."""
    compiler = f"NVRTC {_nvrtc_version()}"
    if found := kernel_cache.find(source, defines, compiler):
        return found
    code = MachineCode(_compile(source, defines), compiler)
    with suppress(OSError, PathError):
        kernel_cache.store(kernel_cache.path_of(source, defines, compiler), code)
    return code


def _compile(source: Path, defines: Mapping[str, int]) -> bytes:
    """The machine code that NVRTC makes of a source file."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    text = kernel_cache.text_of(source)
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None)
    if created:
        raise CudaError(f"nvrtcCreateProgram failed with code {created}")
    options = [f"--gpu-architecture={ARCHITECTURE}", *(f"-D{name}={value}" for name, value in defines.items())]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            raise CudaError(f"NVRTC cannot compile {source.name} with {defines}:\n{_log_of(program)}")
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _log_of(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    _nvrtc().nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


def nvrtc_obstacle(kernels: Iterable[Kernel] = ()) -> str | None:
    """Why kernels have no machine code here; None if NVRTC can be loaded, or if all of these kernels are built."""
    try:
        _nvrtc()
    except OSError as error:
        built = [kernel_cache.find(kernel.source, kernel.defines, NVCC) for kernel in kernels]
        if built and all(built):
            return None
        return f"needs NVRTC, which cannot be loaded ({error}), or kernels built by scripts/build_kernels.sh"
    return None


def _nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    if code := _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        raise CudaError(f"nvrtcVersion failed with code {code}")
    return f"{major.value}.{minor.value}"


@cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC, of the CUDA packages beside torch if there, else from where the system finds it."""
    major = (torch.version.cuda or "13").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    if not packages.is_dir():
        return ctypes.CDLL(name)
    for builtins in sorted(packages.glob(f"*/lib/libnvrtc-builtins.so.{major}.*")):
        ctypes.CDLL(str(builtins))  # which NVRTC finds only where the system looks, or if it is loaded already
    beside = sorted(packages.glob(f"*/lib/{name}"))
    return ctypes.CDLL(str(beside[0]) if beside else name)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{what}: CUDA error {code} ({(text.value or b'unknown').decode()})")
