"""The cache of machine code: what is found in it, what is not, and how kernels use it."""

import logging
import os
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_v3.ops import kernel_cache, nvrtc
from deepseek_v3.ops.kernel_cache import NVCC, MachineCode, Resources, find, path_of, store
from deepseek_v3.ops.nvrtc import CudaError, Kernel, nvrtc_obstacle
from deepseek_v3.utils.errors import PathError

BUILT = MachineCode(b"\x7fELF\n\0built\n", "nvcc 13.0.88", {"kernel": Resources(32, 8, 4, 1024)}, ("a warning",))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source, beside an empty cache."""
    monkeypatch.setenv("DSV3_KERNEL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "kernels.cu"
    path.write_text("a kernel", encoding="utf-8")
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for NVRTC; lists the sources that it compiles."""
    names: list[str] = []
    monkeypatch.setattr(nvrtc, "_compile", lambda source, _: names.append(source.name) or b"compiled")
    monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: None)
    return names


def without_nvrtc() -> Any:
    raise OSError("libnvrtc.so.13: no such file")


def test_what_is_stored_is_found(source: Path) -> None:
    assert find(source, {"N": 1}, NVCC) is None
    store(path_of(source, {"N": 1}, NVCC), BUILT)
    assert find(source, {"N": 1}, NVCC) == BUILT
    assert [path.suffix for path in kernel_cache.cache_folder().iterdir()] == [".kernel"]  # nothing is left beside


def test_all_that_the_code_depends_on_is_in_its_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [path_of(source, {"N": 1, "M": 2}, NVCC)]
    assert path_of(source, {"M": 2, "N": 1}, NVCC) == paths[0]
    paths += [path_of(source, {"N": 2, "M": 2}, NVCC), path_of(source, {}, NVCC), path_of(source, {}, "NVRTC 13.0")]
    monkeypatch.setattr(torch, "__version__", "99.0")
    paths.append(path_of(source, {}, NVCC))
    monkeypatch.setattr(kernel_cache, "ARCHITECTURE", "sm_100a")
    paths.append(path_of(source, {}, NVCC))
    source.write_text("another kernel", encoding="utf-8")
    paths.append(path_of(source, {}, NVCC))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("damage", ["cut", "a byte", "empty", "a folder", "of another kind"])
def test_a_damaged_file_is_not_used(source: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(source, {}, NVCC)
    store(path, BUILT)
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "of another kind":
        digest = kernel_cache.hashlib.sha256(b"[]\ncode").hexdigest()
        path.write_bytes(digest.encode() + b"\n[]\ncode")
    else:
        path.write_bytes({"cut": data[:-1], "a byte": data[:-1] + b"x", "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert find(source, {}, NVCC) is None
    assert f"{path} is not used: " in caplog.text


def test_many_writers_leave_one_whole_file(source: Path) -> None:
    path, codes = path_of(source, {}, NVCC), [MachineCode(bytes([n]) * 100_000, "nvcc 1.0.0") for n in range(8)]
    threads = [Thread(target=store, args=(path, code)) for code in codes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert find(source, {}, NVCC) in codes
    assert list(path.parent.iterdir()) == [path]


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_cache.cache_folder() == Path(os.environ["DSV3_KERNEL_CACHE"])
    monkeypatch.delenv("DSV3_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert kernel_cache.cache_folder() == Path("/caches/deepseek_v3/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert kernel_cache.cache_folder() == Path("/home/user/.cache/deepseek_v3/kernels")


def test_without_a_home_kernels_are_compiled(
    source: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("DSV3_KERNEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(PathError, match="set DSV3_KERNEL_CACHE to a folder"):
        kernel_cache.cache_folder()
    assert Kernel(source, "kernel", {}, 0)._code == MachineCode(b"compiled", "NVRTC 13.0")


def test_a_built_kernel_is_taken_and_nothing_compiled(source: Path, compiled: list[str]) -> None:
    store(path_of(source, {"N": 1}, NVCC), BUILT)
    assert Kernel(source, "kernel", {"N": 1}, 0).is_built
    assert compiled == []
    assert not Kernel(source, "kernel", {"N": 2}, 0).is_built
    assert compiled == ["kernels.cu"]


def test_the_next_process_finds_what_nvrtc_has_compiled(
    source: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert Kernel(source, "kernel", {}, 0)._code.cubin == b"compiled"
    assert len(compiled) == 1
    monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: "13.1")
    _ = Kernel(source, "kernel", {}, 0)._code
    assert len(compiled) == 2


def test_a_cache_that_cannot_be_written_is_left_out(
    source: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV3_KERNEL_CACHE", str(source / "cache"))  # below a file
    assert Kernel(source, "kernel", {}, 0)._code.cubin == b"compiled"


def test_creating_a_kernel_compiles_nothing(source: Path, compiled: list[str]) -> None:
    kernel = Kernel(source, "kernel", {}, 0)
    assert not kernel.is_loaded
    assert compiled == []


def test_built_kernels_need_no_nvrtc(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_nvrtc", without_nvrtc)
    kernels = [Kernel(source, "one", {}, 0), Kernel(source, "two", {"N": 1}, 0)]
    store(path_of(source, {}, NVCC), BUILT)
    expected = (
        "needs NVRTC, which cannot be loaded (libnvrtc.so.13: no such file), or kernels built by scripts/build"
    )
    assert str(nvrtc_obstacle(kernels)).startswith(expected)
    assert str(nvrtc_obstacle()).startswith(expected)
    store(path_of(source, {"N": 1}, NVCC), BUILT)
    assert nvrtc_obstacle(kernels) is None


class StrictDriver:
    """Refuses code that nvcc has built, as a driver older than nvcc does."""

    def __init__(self) -> None:
        self.loaded = list[bytes]()

    def cuModuleLoadData(self, _: Any, cubin: bytes) -> int:
        self.loaded.append(cubin)
        return 218 if cubin == BUILT.cubin else 0

    def cuModuleGetFunction(self, *_: Any) -> int:
        return 0

    def cuFuncSetAttribute(self, *_: Any) -> int:
        return 0

    def cuGetErrorString(self, _: int, text: Any) -> int:
        text._obj.value = b"it is too new"
        return 0


def test_what_the_driver_refuses_is_compiled_by_nvrtc(
    source: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store(path_of(source, {}, NVCC), BUILT)
    driver = StrictDriver()
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc.torch, "cuda", SimpleNamespace(current_device=lambda: 0))
    kernel = Kernel(source, "kernel", {}, 0)
    with caplog.at_level(logging.WARNING):
        kernel._function()
    assert "loading kernel: CUDA error 218 (it is too new), as it was built; NVRTC compiles it" in caplog.text
    assert driver.loaded == [BUILT.cubin, b"compiled"]
    assert (kernel.is_loaded, kernel.is_built) == (True, False)

    monkeypatch.setattr(nvrtc, "_nvrtc", without_nvrtc)
    with pytest.raises(CudaError, match="it is too new"):
        Kernel(source, "kernel", {}, 0)._function()


def test_what_a_source_includes_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, header = tmp_path / "kernel.cu", tmp_path / "hopper.cuh"
    source.write_text('first\n#include "hopper.cuh"\nthird\n', encoding="utf-8")
    header.write_text("shared\n", encoding="utf-8")
    monkeypatch.setattr(kernel_cache, "_HEADER", header)
    assert kernel_cache.text_of(source) == b'first\n#line 1 "hopper.cuh"\nshared\n#line 3 "kernel.cu"\nthird\n'
    before = kernel_cache.path_of(source, {}, NVCC)
    header.write_text("changed\n", encoding="utf-8")
    assert kernel_cache.path_of(source, {}, NVCC) != before
