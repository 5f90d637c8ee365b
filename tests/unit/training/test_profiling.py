"""`--profile`: the trace and the table of the profiled steps, and that nothing else of the run changes."""

from __future__ import annotations

import gzip
import json
import logging
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # public, but not said to be so
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

from deepseek_v3.config.loading import load_config
from deepseek_v3.training import profiling
from deepseek_v3.training.kernel_table import busy_microseconds, kernels_in, kind_of, sum_kernels, sum_kinds
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.profiling import ProfiledSteps, StepProfiler
from deepseek_v3.training.train import train_run
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.monitoring import read_metrics
from helpers.runs import dsv3, message_of, write_run

CPU = torch.device("cpu")
PRODUCTS_PER_STEP = 5


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "deepseek_v3")


def take_steps(profiler: StepProfiler, numbers: range, *, stop_inside: int = 0) -> None:
    """Steps of five matrix products each; seven more, which do not belong to a step, between any two."""
    matrix = torch.ones(4, 4)
    with profiler:
        for number in numbers:
            with profiler.step(number):
                for _ in range(PRODUCTS_PER_STEP):
                    torch.mm(matrix, matrix)
                if number == stop_inside:
                    raise KeyboardInterrupt
            with profiler.between_steps(True):
                for _ in range(7):
                    torch.mm(matrix, matrix)


def profiler_of(folder: Path, steps: str, total: int = 12, first: int = 1) -> StepProfiler:
    return StepProfiler(ProfiledSteps.parse(steps), folder / "profile", CPU, first, total)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def steps_in(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if re.fullmatch(r"step \d+", event.get("name", ""))]


def products_in(folder: Path) -> int:
    """The calls of aten::mm that the table counts."""
    lines = (folder / "profile" / "kernels.txt").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.endswith("aten::mm"))
    assert line.startswith("matrix products")
    return int(line.split()[-3])


@pytest.mark.parametrize(
    ("text", "next_step", "total", "steps"),
    [
        ("3", 1, 100, range(6, 9)),
        (" 1 ", 101, 200, range(106, 107)),
        ("3", 1, 6, range(4, 7)),  # a short run warms up for fewer steps
        ("3", 1, 2, range(1, 3)),
        ("10-12", 1, 100, range(10, 13)),
        ("10-12", 12, 100, range(12, 13)),
        ("10-12", 1, 11, range(10, 12)),
        ("7-7", 1, 100, range(7, 8)),
        ("20", 1, 100, range(6, 26)),
    ],
)
def test_the_steps_that_are_profiled(text: str, next_step: int, total: int, steps: range) -> None:
    assert ProfiledSteps.parse(text).in_run(next_step, total) == steps


@pytest.mark.parametrize("text", ["10-12", "3"])
def test_a_run_without_such_steps_profiles_none(text: str) -> None:
    assert not ProfiledSteps.parse(text).in_run(13, 12)


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "3.5", "three", "12-10", "0-3", "1-", "-", "1-2-3", "21", "1-21", "1–3", "٣", "9" * 400]
)
def test_bad_steps_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--profile .*: expected a number of steps such as 3, or .* 10-12"):
        ProfiledSteps.parse(text)


def test_the_command_refuses_bad_steps_before_it_starts(tmp_path: Path) -> None:
    result = dsv3("train", "--config", write_run(tmp_path), "--device", "cpu", "--profile", "4-2")
    assert message_of(result).startswith("--profile '4-2': expected a number of steps")
    assert files_in(tmp_path / "run") == []


def test_trace_and_table_hold_the_steps_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    take_steps(profiler_of(tmp_path, "3"), range(1, 13))
    assert files_in(tmp_path) == ["kernels.txt", "trace_step_6-8.json.gz"]
    assert steps_in(tmp_path / "profile" / "trace_step_6-8.json.gz") == ["step 6", "step 7", "step 8"]
    assert products_in(tmp_path) == 3 * PRODUCTS_PER_STEP
    table = (tmp_path / "profile" / "kernels.txt").read_text(encoding="utf-8")
    assert table.startswith("Steps 6 to 8 of rank 0 on the CPU")
    assert re.search(r"^Without it +[\d.]+ ms per step \(steps 3 to 5\)$", table, re.MULTILINE)
    assert table.rstrip() in caplog.text


def test_steps_without_other_work_between_them_are_all_counted(tmp_path: Path) -> None:
    profiler = profiler_of(tmp_path, "1-2")
    with profiler:
        for number in (1, 2, 3):
            with profiler.step(number):
                torch.mm(torch.ones(2, 2), torch.ones(2, 2))
            with profiler.between_steps(False):
                pass
    assert products_in(tmp_path) == 2
    assert "not measured" in (tmp_path / "profile" / "kernels.txt").read_text(encoding="utf-8")


def test_a_run_that_ends_early_writes_its_whole_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    take_steps(profiler_of(tmp_path, "4-8"), range(1, 7))
    assert steps_in(tmp_path / "profile" / "trace_step_4-6.json.gz") == ["step 4", "step 5", "step 6"]
    assert products_in(tmp_path) == 3 * PRODUCTS_PER_STEP
    assert "ended before steps 4 to 8 were complete; profiled: steps 4 to 6" in caplog.text


def test_the_table_ignores_a_step_that_was_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        take_steps(profiler_of(tmp_path, "2-4"), range(1, 7), stop_inside=3)
    assert files_in(tmp_path) == ["kernels.txt", "trace_step_2-2.json.gz"]
    assert products_in(tmp_path) == PRODUCTS_PER_STEP


@pytest.mark.parametrize(
    ("steps", "first", "last", "line"),
    [
        ("4-6", 1, 4, "ended during step 4: no whole step was profiled"),
        ("4-6", 1, 2, "ended before steps 4 to 6: nothing was profiled"),
        ("13-14", 1, 12, "--profile 13-14: the run has 12 steps; no step is profiled"),
        ("4-6", 7, 12, "--profile 4-6: the run starts with step 7; no step is profiled"),
    ],
)
def test_a_line_says_that_no_step_was_profiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: str, first: int, last: int, line: str
) -> None:
    inside = last if "during" in line else 0
    with pytest.raises(KeyboardInterrupt) if inside else nullcontext():
        take_steps(profiler_of(tmp_path, steps, first=first), range(first, last + 1), stop_inside=inside)
    assert line in caplog.text
    assert files_in(tmp_path) == []


def _raise(*_: object) -> Any:
    raise RuntimeError("no profiler\nhere")


@pytest.mark.parametrize("method", ["start", "stop", "events", "export_chrome_trace"])
def test_a_failing_profiler_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original = getattr(profile, method)
    calls: list[None] = []

    def fail_once(self: profile, *words: Any) -> Any:
        calls.append(None)
        return _raise() if len(calls) == 1 else original(self, *words)

    monkeypatch.setattr(profile, method, fail_once)
    take_steps(profiler_of(tmp_path, "2-3"), range(1, 6))
    assert caplog.text.count("no profiler; the run continues") == 1
    assert len(calls) == (2 if method == "stop" else 1)  # it is stopped after its failure, too
    assert [name for name in files_in(tmp_path) if name.startswith(".")] == []


def test_results_that_cannot_be_written_do_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be", encoding="utf-8")
    take_steps(profiler_of(tmp_path, "2-3"), range(1, 6))
    (tmp_path / "profile").unlink()
    monkeypatch.setattr(profile, "export_chrome_trace", lambda _, path: Path(path).write_text('{"traceEv'))
    take_steps(profiler_of(tmp_path, "2-3"), range(1, 6))
    assert caplog.text.count("the profile cannot be written") == 2
    assert "not written completely; is the disk full?" in caplog.text
    assert files_in(tmp_path) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / ".trace_step_1-9.json.77.partial").touch()
    take_steps(profiler_of(tmp_path, "2-2"), range(1, 4))
    assert files_in(tmp_path) == ["kernels.txt", "trace_step_2-2.json.gz"]


def test_without_steps_the_profiler_is_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "profile", _raise)
    monkeypatch.setattr(profiling, "record_function", _raise)
    take_steps(StepProfiler(None, tmp_path, CPU, 1, 12), range(1, 4))
    assert files_in(tmp_path) == []


def kernel(name: str, start: float, end: float, *, on_gpu: bool = True, note: bool = False) -> FunctionEvent:
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return FunctionEvent(0, name, 1, start, end, device_type=device, is_user_annotation=note)


GPU_EVENTS = [
    kernel("profiled steps", 100, 200, on_gpu=False, note=True),
    kernel("profiled steps", 300, 400, on_gpu=False, note=True),
    kernel("profiled steps", 105, 199, note=True),
    kernel("aten::mm", 101, 109, on_gpu=False),
    kernel("nvjet_hsh_128", 110, 150),
    kernel("ncclDevKernel_AllGather", 140, 180),  # 10 microseconds at the same time as the product
    kernel("nvjet_hsh_128", 310, 330),
    kernel("nvjet_hsh_128", 250, 290),  # between the steps
    kernel("Memcpy HtoD", 320, 325),
]


def test_kernels_on_a_gpu_are_summed_and_the_rest_is_idle(tmp_path: Path) -> None:
    class Recorded:
        def events(self) -> list[FunctionEvent]:
            return GPU_EVENTS

    lines = profiler_of(tmp_path, "1-2")._report(Recorded(), range(1, 3))  # type: ignore[arg-type]
    text = "\n".join(lines)
    assert "With the profiler  0.1 ms per step" in text
    assert "GPU idle           55.0% of the time" in text  # 70 + 20 of 200 microseconds are busy
    assert "Kernels            2 per step" in text
    assert re.search(r"^matrix products +0\.06 +30\.0% +2 +30\.0 +nvjet_hsh_128$", text, re.MULTILINE)
    assert "aten::mm" not in text


def test_sums_of_kernels() -> None:
    kernels = kernels_in(GPU_EVENTS)
    works = sum_kernels(kernels)
    assert [(work.name, work.calls, work.microseconds) for work in works] == [
        ("nvjet_hsh_128", 3, 100),
        ("ncclDevKernel_AllGather", 1, 40),
        ("Memcpy HtoD", 1, 5),
    ]
    assert [work.name for work in sum_kinds(works)] == ["matrix products", "communication", "memory movement"]
    assert busy_microseconds(kernels) == 70 + 40 + 20
    assert busy_microseconds([]) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("c10d::allreduce_", "communication"),
        ("_adamw_kernel", "optimizer"),
        ("_squares_kernel", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<...>", "optimizer"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_GroupMM>", "experts"),
        ("aten::_grouped_mm", "experts"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("aten::addmm_", "matrix products"),
        ("_fp8_rows_product_kernel", "FP8 products"),
        ("deepseek_v3::fp8_columns_product", "FP8 products"),
        ("_fp8_weight_kernel", "quantization"),
        ("deepseek_v3::quantize_rows", "quantization"),
        ("triton_poi_fused_fp8_rows_product_add_1", "memory movement"),
        ("triton_poi_fused_addmm_3", "memory movement"),
        ("_place_kernel", "memory movement"),
        ("Memset (Device)", "memory movement"),
        ("aten::add_", "memory movement"),
        ("aten::view", "other"),
        ("", "other"),
    ],
)
def test_kinds_of_work(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps without a profile."""
    folder = tmp_path_factory.mktemp("plain")
    train_run(load_config(write_run(folder, 3)), CPU)
    return folder


def test_a_profile_changes_neither_losses_nor_weights(plain: Path, tmp_path: Path) -> None:
    train_run(load_config(write_run(tmp_path, 3)), CPU, profile="2")
    assert len(steps_in(tmp_path / "run" / "profile" / "trace_step_2-3.json.gz")) == 2
    losses = [
        [record["loss"] for record in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in record]
        for folder in (plain, tmp_path)
    ]
    assert losses[0] == losses[1]
    states = [load_checkpoint(folder / "checkpoints" / "checkpoint_step_3.pt") for folder in (plain, tmp_path)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert all(torch.equal(weight, states[1]["model"][name]) for name, weight in states[0]["model"].items())
    table = (tmp_path / "run" / "profile" / "kernels.txt").read_text(encoding="utf-8")
    found = set(re.findall(r"^([a-z]+(?: [a-z]+)?)  ", table, re.MULTILINE))
    assert found >= {"matrix products", "attention", "optimizer", "memory movement"}


def test_a_resumed_run_profiles_what_is_left(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(plain / "run.yaml")
    train_run(config, CPU, str(plain / "checkpoints" / "checkpoint_step_2.pt"), profile="2-3")
    assert len(steps_in(plain / "run" / "profile" / "trace_step_3-3.json.gz")) == 1
    assert "Profiling step 3, after 0 steps of warm-up" in caplog.text


def test_only_rank_0_profiles(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, checkpoint = load_config(plain / "run.yaml"), str(plain / "checkpoints" / "checkpoint_step_2.pt")
    for rank in (1, 0):
        assert "Profiling" not in caplog.text
        Trainer(config, CPU, checkpoint, ParallelMesh(config.parallel, rank), profile="1")
    assert "Profiling step 3" in caplog.text
