"""`scripts/build_kernels.sh` with a stand-in for nvcc, and with nvcc itself where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_v3.ops import build_kernels as command
from deepseek_v3.ops import kernel_cache, nvcc
from deepseek_v3.ops.build_kernels import CudaPackage, KernelError, build_kernels, cuda_packages
from deepseek_v3.ops.kernel_cache import NVCC, MachineCode, Resources
from deepseek_v3.ops.nvcc import NvccError, find_nvcc, resources_of
from deepseek_v3.ops.nvrtc import CudaError, Kernel
from deepseek_v3.utils.command_line import run_command
from helpers import ROOT

SCRIPT = ROOT / "scripts" / "build_kernels.sh"
# What ptxas 13.0 says of two kernels; the numbers of the first one are changed.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 18944 bytes smem, 16 bytes cumulative stack size
ptxas info    : Compile time = 45.272 ms
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : (C7519) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'two'
"""
# Takes nvcc's place: lists its calls in a file, and copies its source in place of compiling it.
STAND_IN = """\
#!{python}
import sys
from pathlib import Path
if "--version" in sys.argv:
    sys.exit(print("Cuda compilation tools, release 13.0, V{version}"))
source, cubin = sys.argv[-1], sys.argv[sys.argv.index("-o") + 1]
with Path("{calls}").open("a") as file:
    print(*sys.argv[1:], file=file)
text = Path(source).read_text()
if "mistake" in text:
    print(f'{{source}}(3): error: identifier "mistake" is undefined', file=sys.stderr)
    sys.exit(2)
Path(cubin).write_text("code of " + text)
print('''{said}''', file=sys.stderr)
"""


class Toolkit:
    """A folder with a stand-in for nvcc, a source, and its two kernels in three variants."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.source = folder / "source" / "kernels.cu"
        self.source.parent.mkdir()
        self.write("two kernels")
        self.install("13.0.88")

    def install(self, version: str) -> None:
        path = self.folder / "toolkit" / "bin" / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = STAND_IN.format(python=sys.executable, version=version, calls=self.calls, said=PTXAS)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def write(self, text: str) -> None:
        self.source.write_text(text, encoding="utf-8")

    def kernels(self) -> list[Kernel]:
        variants = [("one", {"N": 1}), ("two", {"N": 1}), ("two", {"N": 2})]
        return [Kernel(self.source, name, defines, 4096) for name, defines in variants]

    def num_calls(self) -> int:
        return len(self.calls.read_text(encoding="utf-8").splitlines()) if self.calls.exists() else 0


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No nvcc anywhere, and no GPU; nothing is in the cache."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(nvcc, "_TOOLKITS", tmp_path / "local")
    monkeypatch.setattr(nvcc.sysconfig, "get_path", lambda _: str(tmp_path / "site-packages"))
    monkeypatch.setenv("DSV3_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.fixture
def toolkit(places: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    found = Toolkit(places)
    monkeypatch.setenv("CUDA_HOME", str(places / "toolkit"))
    package = CudaPackage("operation", found.kernels, lambda _: [])
    monkeypatch.setattr(command, "cuda_packages", lambda: [package])
    return found


Output = Callable[[], str]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    """Runs the command; its output, in lines that are not broken."""

    def run() -> str:
        build_kernels()
        return capsys.readouterr().out

    return run


def test_kernels_are_built_once(toolkit: Toolkit, output: Output) -> None:
    first = output()
    assert "Built 3 kernels in" in first
    assert "There is no GPU here to check the results on." in first
    assert toolkit.num_calls() == 2  # of one source with two sets of defines
    assert "-cubin -arch=sm_90a -Xptxas=-v -DN=1 -o" in toolkit.calls.read_text(encoding="utf-8")
    second = output()
    assert "Nothing to build: all kernels were built before." in second
    assert toolkit.num_calls() == 2
    assert [kernel._code.cubin for kernel in toolkit.kernels()] == [b"code of two kernels"] * 3
    assert all(kernel.is_built for kernel in toolkit.kernels())


def test_the_table_shows_what_kernels_take(toolkit: Toolkit, output: Output) -> None:
    text = output()
    assert re.search(r"one +N=1 +255 +64 +18,944 +4,096 +built now\n", text)
    assert re.search(r"two +N=2 +128 +0 +0 +4,096 +built now\n", text)
    assert "SPILLS registers to memory, which is slow: one (N=1)\n" in text
    assert text.count("Potential Performance Loss") == 1
    assert re.search(r"one +N=1 +255 +64 +18,944 +4,096 +built before\n", output())


def test_a_changed_source_is_built_again(toolkit: Toolkit, output: Output) -> None:
    output()
    toolkit.write("two better kernels")
    assert "Built 3 kernels" in output()
    toolkit.write("two kernels")
    assert "Nothing to build" in output()
    assert toolkit.num_calls() == 4


def test_another_nvcc_builds_again(toolkit: Toolkit, output: Output) -> None:
    output()
    toolkit.install("13.1.80")
    assert "Built 3 kernels" in output()
    assert kernel_cache.find(toolkit.source, {"N": 1}, NVCC).compiler == "nvcc 13.1.80"


def test_a_damaged_file_is_built_again(toolkit: Toolkit, output: Output) -> None:
    output()
    path = kernel_cache.path_of(toolkit.source, {"N": 2}, NVCC)
    path.write_bytes(path.read_bytes()[:-1])
    text = output()
    assert "its checksum is wrong" in text.replace("\n", " ")
    assert "Built 1 kernel in" in text
    assert "Nothing to build" in output()


def test_a_mistake_in_a_source_is_shown(toolkit: Toolkit) -> None:
    toolkit.write("a mistake")
    with pytest.raises(NvccError) as caught:
        build_kernels()
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("toolkit/bin/nvcc cannot compile kernels.cu with N=1:")
    assert lines[1] == 'kernels.cu(3): error: identifier "mistake" is undefined'
    assert not list((toolkit.folder / "cache").iterdir())


def test_a_killed_nvcc_is_named_with_its_status(toolkit: Toolkit) -> None:
    text = "#!/bin/sh\n[ $1 = --version ] && echo V13.0.88 || kill -9 $$\n"
    (toolkit.folder / "toolkit" / "bin" / "nvcc").write_text(text, encoding="utf-8")
    with pytest.raises(NvccError, match=r"kernels\.cu with N=1:\nit says nothing, and ends with status -9$"):
        build_kernels()


def test_without_temporary_files_the_cache_is_not_blamed(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc.tempfile, "tempdir", str(toolkit.folder / "missing"))
    with pytest.raises(NvccError, match=r"^nvcc needs temporary files, .+ \(No such file .+\); .+ TMPDIR"):
        build_kernels()


def test_a_cache_that_cannot_be_written(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3_KERNEL_CACHE", str(toolkit.source))
    with pytest.raises(
        KernelError, match=r"kernels\.cu: kernels cannot be stored there \(.+\); make room, or set "
    ):
        build_kernels()
    assert toolkit.num_calls() == 0


def test_a_compiler_of_another_cuda_is_mentioned(
    toolkit: Toolkit, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, expected in (("12.8", True), ("13.2", False)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert (f"torch is built for CUDA {version}, nvcc is 13.0.88" in output()) == expected


# Where nvcc is


def test_without_nvcc_the_ways_to_get_one(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(NvccError) as caught:
        find_nvcc()
    text = str(caught.value)
    assert text.startswith("there is no nvcc")
    assert "pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart]==13.0.*'" in text
    assert "cuda-nvcc=13.0\n" in text
    assert "apt install cuda-nvcc-13-0 " in text
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # whose Python packages hold no nvcc
    with pytest.raises(NvccError) as caught:
        find_nvcc()
    assert "pip" not in str(caught.value)
    assert "cuda-nvcc=12.8\n" in str(caught.value)


def test_the_command_exits_with_1_without_nvcc(
    toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(sys, "argv", ["build_kernels"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as caught:
        run_command(build_kernels)
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is no nvcc that can build the kernels")
    assert toolkit.num_calls() == 0


@pytest.mark.parametrize(
    "place",
    [
        "home/bin/nvcc",
        "path/nvcc",
        "site-packages/nvidia/cu13/bin/nvcc",
        "local/cuda/bin/nvcc",
        "local/cuda-13.0/bin/nvcc",
    ],
)
def test_every_place_is_searched(places: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = places / place
    path.parent.mkdir(parents=True)
    Toolkit(places)
    (places / "toolkit" / "bin" / "nvcc").rename(path)
    monkeypatch.setenv("PATH", str(places / "path"))
    monkeypatch.setenv("CUDA_HOME", str(places / "home"))
    assert find_nvcc() == (path, "13.0.88")


def test_one_that_cannot_be_used_is_passed_over(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit.install("11.5.119")
    run = nvcc._run

    def impatient(path: Path, *arguments: str, **_: float) -> subprocess.CompletedProcess[str]:
        return run(
            path, *arguments, seconds=0.5 if path.is_relative_to(toolkit.folder / "local" / "cuda") else None
        )

    monkeypatch.setattr(nvcc, "_run", impatient)
    for name, text in (
        ("path", "#!/bin/sh\nexit 1\n"),
        ("local/cuda/bin", "#!/bin/sh\nexec /bin/sleep 100\n"),
        ("local/cuda-9.0/bin", "#!/no/such/program\n"),
    ):
        path = toolkit.folder / name / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(toolkit.folder / "path"))
    with pytest.raises(NvccError) as caught:
        find_nvcc()
    text = str(caught.value)
    assert "toolkit/bin/nvcc is 11.5.119, which is too old: expected CUDA 12 or newer" in text
    assert "local/cuda/bin/nvcc does not answer within 0.5 s" in text
    assert "path/nvcc does not say its version" in text
    assert "cuda-9.0/bin/nvcc cannot be started (No such file or directory)" in text


def test_the_newest_toolkit_is_taken(places: Path) -> None:
    for version in ("9.2", "13.0", "12.8"):
        path = places / "local" / f"cuda-{version}" / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho 'release {version}, V{version}.1'\n", encoding="utf-8")
        path.chmod(0o755)
    assert find_nvcc().version == "13.0.1"


def test_a_missing_host_compiler_is_explained() -> None:
    said = "gcc: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.\n"
    assert "install g++, or name one in NVCC_CCBIN" in nvcc._explain(said)


def test_resources_of_kernels() -> None:
    assert resources_of(PTXAS) == {"one": Resources(255, 24, 40, 18944), "two": Resources(128, 0, 0, 0)}
    assert resources_of("something else") == {}


# Checking the results


class FakeGpu:
    """A GPU on which some kernels of a toolkit are launched by the check."""

    def __init__(
        self, toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)
    ) -> None:
        fake = SimpleNamespace(
            is_available=lambda: True,
            get_device_capability=lambda: capability,
            get_device_name=lambda *_: "a GPU",
            current_device=lambda: 0,
        )
        monkeypatch.setattr(torch, "cuda", fake)
        self.kernels, self.results, self.launched = toolkit.kernels(), [("sums", True), ("products", True)], 3
        package = CudaPackage("operation", lambda: self.kernels, self.check)
        monkeypatch.setattr(command, "cuda_packages", lambda: [package])

    def check(self, device: torch.device) -> Iterator[tuple[str, bool]]:
        assert device == torch.device("cuda", 0)
        for kernel in self.kernels[: self.launched]:
            kernel._functions[0] = Any
        yield from self.results


def test_on_a_gpu_the_results_are_checked(
    toolkit: Toolkit, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(toolkit, monkeypatch)
    assert "Checked on a GPU: operation, 3 kernels, 2 comparisons agree.\n" in output()


def test_another_gpu_checks_nothing(toolkit: Toolkit, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(toolkit, monkeypatch, capability=(8, 0))
    assert "The results are not checked: a GPU cannot run kernels for sm_90a." in output()


@pytest.mark.parametrize("problem", ["wrong", "not launched", "refused", "fails"])
def test_wrong_kernels_are_removed(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    gpu = FakeGpu(toolkit, monkeypatch)
    if problem == "wrong":
        gpu.results[1] = ("products", False)
        expected = "operation: products: differs from the reference"
    elif problem == "not launched":
        gpu.launched = 2
        expected = r"operation: two \(N=2\): was not checked"
    elif problem == "refused":
        monkeypatch.setattr(Kernel, "is_built", False)
        expected = r"operation: one \(N=1\): the driver refuses what nvcc has built"
    else:
        monkeypatch.setattr(gpu, "check", lambda _: (_ for _ in [1]).throw(CudaError("launching one: error 700")))
        monkeypatch.setattr(
            command, "cuda_packages", lambda: [CudaPackage("operation", lambda: gpu.kernels, gpu.check)]
        )
        expected = "operation: launching one: error 700"
    with pytest.raises(KernelError, match=expected):
        build_kernels()
    assert list((toolkit.folder / "cache").iterdir()) == []


# All of it


@pytest.mark.gpu
def test_kernels_pass_the_checks_and_all_are_launched() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    for package in cuda_packages():
        assert [name for name, holds in package.check(torch.device("cuda")) if not holds] == []
        assert all(kernel.is_loaded for kernel in package.kernels())


def test_every_folder_of_cuda_sources_takes_part() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    packages = cuda_packages()
    ops = ROOT / "src" / "deepseek_v3" / "ops"
    assert [package.name for package in packages] == sorted(path.parent.name for path in ops.glob("*/cuda"))
    sources = {kernel.source for package in packages for kernel in package.kernels()}
    assert sources == set(ops.glob("*/cuda/*.cu"))


def test_every_kernel_of_a_source_is_named() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    named: dict[Path, set[str]] = {}
    for kernel in (kernel for package in cuda_packages() for kernel in package.kernels()):
        named.setdefault(kernel.source, set()).add(kernel.name)
    for source, names in named.items():
        text = source.read_text(encoding="utf-8")
        assert set(re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", text)) == names


def script(cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "DSV3_KERNEL_CACHE": str(cache), **variables}
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


def test_nvcc_builds_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which needs no GPU. Of each source it builds one variant; NVRTC's test compiles all of them."""
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    try:
        compiler = find_nvcc().compiler
    except NvccError:
        pytest.skip("there is no nvcc here")
    monkeypatch.setenv("DSV3_KERNEL_CACHE", str(tmp_path))
    kernels = [kernel for package in cuda_packages() for kernel in package.kernels()]
    chosen = {kernel.source: kernel.defines for kernel in kernels}
    names = [kernel.name for kernel in kernels]
    for kernel in kernels:
        if kernel.defines != chosen[kernel.source]:
            code = MachineCode(b"\x7fELF", compiler, dict.fromkeys(names, Resources(1, 0, 0, 0)))
            kernel_cache.store(kernel_cache.path_of(kernel.source, kernel.defines, NVCC), code)
    run = script(tmp_path)
    assert run.returncode == 0, run.stderr
    for kernel, variant in command._variants(kernels).items():
        row = re.search(
            rf"^{kernel.name} +{re.escape(variant)} +\d+ +[\d,]+ .*built (\w+)", run.stdout, re.MULTILINE
        )
        assert row is not None
        assert row[1] == ("now" if kernel.defines == chosen[kernel.source] else "before")
    assert all(path.read_bytes().count(b"\n\x7fELF") == 1 for path in tmp_path.iterdir())


def test_the_script_reports_mistakes_in_one_line(tmp_path: Path) -> None:
    run = script(tmp_path, PYTHON=str(tmp_path / "python"))
    assert run.returncode == 1
    assert run.stderr == f"error: {tmp_path}/python: no such Python; run `make install`, or name one in PYTHON\n"
    empty = tmp_path / "empty"
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n', encoding="utf-8")
    empty.chmod(0o755)
    run = script(tmp_path, PYTHON=str(empty))
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"error: {empty} has no torch; run `make install`, or name another Python in PYTHON\n"


def test_the_script_ends_with_1_and_no_traceback(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    toolkit = Toolkit(tmp_path)
    run = script(tmp_path / "source" / "kernels.cu", CUDA_HOME=str(tmp_path / "toolkit"))
    assert run.returncode == 1
    assert run.stderr == (
        f"error: {toolkit.source}: kernels cannot be stored there (File exists); make room, or set "
        "DSV3_KERNEL_CACHE to a folder that you may write to\n"
    )
