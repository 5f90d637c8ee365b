"""Kernels in CUDA C++: NVRTC compiles them without a GPU. The tests of each operation compare their results."""

import ctypes
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_v3.ops import nvrtc
from deepseek_v3.ops.build_kernels import cuda_packages
from deepseek_v3.ops.fp8 import reference
from deepseek_v3.ops.fp8_gemm import cuda
from deepseek_v3.ops.nvrtc import CudaError, Kernel

needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc_obstacle() is not None, reason="NVRTC comes with torch's CUDA builds")
H200 = 132  # its multiprocessors
SHARES = 3  # of the kernels, that several processes may compile


@needs_nvrtc
@pytest.mark.parametrize("share", range(SHARES))
def test_every_kernel_compiles_without_headers(share: int) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    kernels = [kernel for package in cuda_packages() for kernel in package.kernels()]
    texts = list(dict.fromkeys((kernel.source, *kernel.defines.items()) for kernel in kernels))
    assert len(texts) >= SHARES
    for kernel in kernels:
        if texts.index((kernel.source, *kernel.defines.items())) % SHARES == share:
            assert kernel.name.encode() in kernel._code.cubin
            assert kernel.shared_bytes <= cuda._SHARED_BYTES


@needs_nvrtc
def test_a_mistake_in_the_source_is_shown(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text('extern "C" __global__ void kernel(int* out) { out[0] = missing + VALUE; }', encoding="utf-8")
    with pytest.raises(CudaError, match=r"(?s)kernel.cu with {'VALUE': 3}.*missing"):
        _ = Kernel(source, "kernel", {"VALUE": 3}, 0)._code


def test_why_nvrtc_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc._nvrtc.cache_clear()
    monkeypatch.setattr(nvrtc.torch.version, "cuda", "99.0")
    assert "libnvrtc.so.99" in str(nvrtc.nvrtc_obstacle())
    nvrtc._nvrtc.cache_clear()


class FakeDriver:
    """Notes what is called; `context` is that of the thread, None in a new one."""

    def __init__(self, context: int | None) -> None:
        self.context, self.calls = context, list[str]()

    def cuCtxGetCurrent(self, place: Any) -> int:
        place._obj.value = self.context
        return 0

    def cuDevicePrimaryCtxRetain(self, place: Any, device: int) -> int:
        self.calls.append(f"retain that of device {device}")
        place._obj.value = 7
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.calls.append(f"enter {context.value}")
        return 0


@pytest.mark.parametrize(("context", "calls"), [(5, []), (None, ["retain that of device 1", "enter 7"])])
def test_a_thread_without_a_context_gets_that_of_its_device(
    context: int | None, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(context)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(nvrtc, "_entered", nvrtc._Entered())
    for _ in range(2):
        with nvrtc.current_device(torch.device("cuda", 1)):
            assert driver.calls == calls


def test_the_map_of_the_same_memory_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same address, type, shape and box; everything else is another map."""
    made = []
    driver = SimpleNamespace(cuTensorMapEncodeTiled=lambda *given: made.append(given) or 0)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    nvrtc._tensor_map.cache_clear()
    matrix = torch.zeros(64, 128, dtype=torch.uint8)
    first = nvrtc.tensor_map(matrix, 64, 128, swizzle=True)
    assert nvrtc.tensor_map(matrix.view(64, 128), 64, 128, swizzle=True) is first
    others = [
        nvrtc.tensor_map(matrix, 32, 128, swizzle=True),
        nvrtc.tensor_map(matrix, 64, 128),
        nvrtc.tensor_map(matrix[1:], 64, 128, swizzle=True),
        nvrtc.tensor_map(matrix[:32], 64, 128, swizzle=True),
        nvrtc.tensor_map(matrix.view(torch.float32), 64, 32),
    ]
    assert len({id(found) for found in (first, *others)}) == len(made) == 6
    nvrtc._tensor_map.cache_clear()


def test_an_early_launch_is_laid_out_as_the_driver_reads_it() -> None:
    """By the offsets of `CUlaunchConfig` and `CUlaunchAttribute` in cuda.h."""
    config = nvrtc._early_launch(7, 256, 1024, ctypes.c_void_p(5))
    words = (ctypes.c_uint32 * 14).from_buffer(config)
    assert ctypes.sizeof(config) == 56
    assert list(words[:7]) == [7, 1, 1, 256, 1, 1, 1024]
    assert list(words[8:10]) == [5, 0]
    assert words[12] == 1
    attribute = config.attributes.contents
    assert ctypes.sizeof(attribute) == 72
    assert list((ctypes.c_uint32 * 3).from_buffer(attribute)) == [6, 0, 1]


@pytest.mark.gpu
def test_a_kernel_may_be_the_first_thing_that_a_thread_does() -> None:
    """As in autograd's thread, whose memory comes from torch's cache."""
    rows = reference.quantize_rows(torch.ones(1, 128, device="cuda"), False)
    weight, _ = reference.quantize_weight(torch.ones(1, 16, 128, device="cuda"), False)
    cuda.rows_product(rows, weight, None)
    torch.cuda.synchronize()
    found = []
    thread = Thread(target=lambda: found.append(cuda.rows_product(rows, weight, None)))
    thread.start()
    thread.join()
    assert found[0].eq(128).all()


@pytest.mark.parametrize(
    ("row_tiles", "columns", "expected"),
    [(512, 4096, 256), (64, 576, 128), (64, 1536, 256), (1, 128, 128), (8, 1024, 128)],
)
def test_tiles_keep_all_multiprocessors_busy(
    row_tiles: int, columns: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "multiprocessors", lambda _: H200)
    assert cuda._tile_columns(row_tiles, columns, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("tiles", "num_rows", "number"), [(64, 32768, 2), (8, 1000, 8), (132, 4096, 1), (1, 100, 1)]
)
def test_a_long_sum_is_cut_into_parts(
    tiles: int, num_rows: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last are whole blocks, and they end with the last row."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda _: H200)
    parts = cuda._parts(tiles, num_rows, torch.device("cpu"))
    if number == 1:
        assert parts is None
        return
    assert parts is not None
    assert len(parts) == number
    assert parts[-1] == num_rows
    assert all(end % 128 == 0 for end in parts[:-1].tolist())
