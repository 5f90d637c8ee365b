"""The log line of a step, metrics on disk and in TensorBoard, and peak memory."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import sys
import threading
from io import FileIO
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.monitoring import (
    MetricsWriter,
    device_memory_bytes,
    read_metrics,
    step_line,
    time_left,
)

# The log line


def test_step_line() -> None:
    line = step_line(100, 42036, 3.24512, 1.8e-4, 419_430_400, 2.149)
    assert line == "Step 100/42036 | Loss: 3.2451 | LR: 1.80e-04 | Tokens: 0.42B | Steps/sec: 2.15"


def test_more_fields_follow_below_the_line() -> None:
    line = step_line(1, 2, math.nan, 0.0, 14_800_000_000_000, 0.001, ("Tokens/sec", "1,024"), ("MFU", "41.0%"))
    assert line.splitlines() == [
        "Step 1/2 | Loss: nan | LR: 0.00e+00 | Tokens: 14800.00B | Steps/sec: 0.00",
        "Tokens/sec: 1,024 | MFU: 41.0%",
    ]


@pytest.mark.parametrize(
    ("total", "tokens", "shown"),
    [
        (4_538_368, 245_760, "0.25M"),
        (999_999_999, 999_999_999, "1000.00M"),
        (10**9, 245_760, "0.00B"),
        (768, 768, "0.77K"),
        (10**6 - 1, 8192, "8.19K"),
    ],
)
def test_tokens_are_counted_in_the_unit_of_the_budget(total: int, tokens: int, shown: str) -> None:
    assert f"| Tokens: {shown}" in step_line(30, 40, 5.0, 1e-3, tokens, 3.3, total_tokens=total).replace(
        "\n", " | "
    )


def test_the_lines_of_a_small_run_fit_eighty_columns() -> None:
    more = [("Left", "0:12"), ("Tokens/sec", "27,010"), ("Tokens/param", "1.08"), ("Grad norm", "2.36")]
    more += [("Memory", "0.47 GiB"), ("MTP loss", "5.2194"), ("Skipped", "3")]
    lines = step_line(1100, 1554, 5.0278, 2.25e-3, 4_245_760, 113.30, *more, total_tokens=4_538_368).splitlines()
    assert len(lines) == 4
    assert all(len(line) <= 70 for line in lines)
    fields = " | ".join(lines).split(" | ")
    assert [field.split(":")[0] for field in fields][-7:] == [name for name, _ in more]


@pytest.mark.parametrize(
    ("steps", "rate", "shown"),
    [(0, 1.0, "0:00"), (10, 2.0, "0:05"), (7629, 1.0, "2:07:09"), (273_600, 1.0, "3d 04:00:00"), (59, 0.1, "9:50")],
)
def test_time_left(steps: int, rate: float, shown: str) -> None:
    assert time_left(steps, rate) == shown


# Metrics


def write_steps(directory: Path, steps: range, resume_step: int | None = None, tensorboard: bool = False) -> None:
    with MetricsWriter(directory, tensorboard, resume_step) as metrics:
        for step in steps:
            metrics.write(step, {"loss": 10.0 / step})


def recorded_steps(directory: Path) -> list[int]:
    return [record["step"] for record in read_metrics(directory / "metrics.jsonl")]


def test_each_record_is_flushed_to_disk(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", tensorboard=False, resume_step=None) as metrics:
        metrics.write(10, {"loss": 2.5, "tokens": 5120, "load": [0.5, 1.5]})
        expected = {"step": 10, "loss": 2.5, "tokens": 5120, "load": [0.5, 1.5]}
        assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [expected]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_nan_and_infinity_are_written_as_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.write(1, {"loss": math.nan, "norm": math.inf, "load": [1.0, -math.inf]})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"step": 1, "loss": None, "norm": None, "load": [1.0, None]}


def test_a_resumed_run_reads_as_one_uninterrupted_run(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole", range(1, 21))
    write_steps(tmp_path / "resumed", range(1, 16))
    write_steps(tmp_path / "resumed", range(11, 21), resume_step=10)
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_cut_short_by_a_crash_is_dropped(cut: int, tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    complete = [1, 2, 3] if cut == 1 else [1, 2]  # the line's end alone is no loss
    assert recorded_steps(tmp_path) == complete
    write_steps(tmp_path, range(4, 5), resume_step=3)
    assert recorded_steps(tmp_path) == [*complete, 4]


def test_zeros_after_a_power_failure_are_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100)
    assert recorded_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"loss": 1.0}', '{"step": null}'])
def test_damage_inside_the_file_is_named_and_kept(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: is not a record"):
        read_metrics(path)
    write_steps(tmp_path, range(4, 5), resume_step=3)
    assert recorded_steps(tmp_path) == [1, 3, 4]
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == before
    assert "line 2 is damaged and left out; the file as it was is kept as metrics.1.jsonl" in caplog.text


def test_missing_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be read: No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_resuming_without_metrics_starts_a_file(tmp_path: Path) -> None:
    write_steps(tmp_path, range(6, 8), resume_step=5)
    assert recorded_steps(tmp_path) == [6, 7]


@pytest.mark.parametrize("resume_step", [None, 5])
def test_a_folder_that_cannot_be_written_is_named(resume_step: int | None, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match="taken: cannot be written: File exists; choose another folder"):
        MetricsWriter(tmp_path / "taken", tensorboard=False, resume_step=resume_step)


def test_a_new_run_keeps_the_metrics_of_previous_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for length in (2, 3, 4):
        write_steps(tmp_path, range(1, length))
    assert recorded_steps(tmp_path) == [1, 2, 3]
    assert len(read_metrics(tmp_path / "metrics.1.jsonl")) == 1
    assert len(read_metrics(tmp_path / "metrics.2.jsonl")) == 2
    assert "kept as metrics.2.jsonl" in caplog.messages[-1]


def test_an_invalid_value_leaves_no_partial_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.write(1, {"loss": 1.0})
        with pytest.raises(TypeError):
            metrics.write(2, {"loss": "low"})  # type: ignore[dict-item]
    assert recorded_steps(tmp_path) == [1]


def test_tensorboard_drops_the_steps_that_are_run_again(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=None) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": float(step), "load": [step + 0.25, step + 0.5]})
    write_steps(tmp_path, range(3, 5), resume_step=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["load/layer_00", "load/layer_01", "loss"]
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, pytest.approx(10 / 3)), (4, 2.5)]
    assert [(event.step, event.value) for event in events.Scalars("load/layer_01")] == [(1, 1.5), (2, 2.5)]


# Writes that fail


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_full_disk_loses_no_record_and_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.write(1, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        try:
            for step in (2, 3):
                metrics.write(step, {"loss": float(step)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert recorded_steps(tmp_path) == [1]
        (warning,) = warnings_of(caplog)
        assert warning.startswith(f"{path}: cannot be written: File too large; training continues")
        metrics.write(4, {"loss": 4.0})
        assert warnings_of(caplog)[1:] == [f"{path}: can be written again; no record is missing"]
    assert read_metrics(path) == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]


def test_records_that_can_never_be_written_end_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics._file = FileIO("/dev/full", "ab")
        for step in range(3):
            metrics.write(step, {"loss": 1.0})
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"{tmp_path / 'metrics.jsonl'}: cannot be written: No space left on device")


def test_tensorboard_that_fails_ends_no_run_and_comes_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hook = threading.excepthook
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=None) as metrics:
        metrics.write(1, {"loss": 1.0})
        with monkeypatch.context() as broken:
            broken.setattr(RecordWriter, "write", full)
            while metrics._tensorboard is not None:  # a thread of its own finds out
                metrics.write(2, {"loss": 2.0})
            metrics._fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        metrics.write(3, {"loss": 3.0})
        metrics.write(4, {"loss": 4.0})
    failed, *others = warnings_of(caplog)
    assert f"{tmp_path / 'tensorboard'}: cannot be written: [Errno 28]" in failed
    assert len(others) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[-1].step == 4


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_failing_write_at_the_start_is_an_error(name: str, tmp_path: Path) -> None:
    if name == "tensorboard":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).symlink_to(tmp_path / "nowhere" / "else")
    hook = threading.excepthook
    with pytest.raises(DataError, match=r"cannot be written: (File exists|No such file or directory); choose"):
        MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    assert threading.excepthook is hook


# Memory


def test_memory_of_the_process_grows_with_its_tensors() -> None:
    device = torch.device("cpu")
    before = device_memory_bytes(device)
    assert 20 * 2**20 < before < 2**40
    held = torch.ones(before // 4 + 2**24)
    assert device_memory_bytes(device) > held.nbytes


def test_memory_units_of_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    kibibytes = device_memory_bytes(torch.device("cpu")) // 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert device_memory_bytes(torch.device("cpu")) < 2 * kibibytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_is_the_peak_of_its_tensors() -> None:
    device = torch.device("cuda")
    freed = torch.ones(2**20, device=device)
    del freed
    assert device_memory_bytes(device) >= 2**22
