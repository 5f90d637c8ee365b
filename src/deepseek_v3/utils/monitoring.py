"""The reports of a training run: the log line of a step, the metrics on disk, and the peak memory."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.fault_points import reach
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.trackers.tracker import scalars

_log = get_logger("Metrics")

_COLUMNS = 80 - len("[Trainer] ")
_LARGE_RUN = 10**9  # tokens
_UNITS = (("B", 10**9), ("M", 10**6), ("K", 10**3))


def step_line(
    step: int,
    total_steps: int,
    loss: float,
    learning_rate: float,
    tokens: int,
    steps_per_second: float,
    *more: tuple[str, str],
    total_tokens: int = _LARGE_RUN,
) -> str:
    """`Step 100/42036 | Loss: 3.2451 | LR: 1.80e-04 | Tokens: 0.42B | Steps/sec: 2.15`, then `Name: value | …`.

    `loss` is in nats per token, `tokens` is the number of tokens trained on so far, `more` holds pairs of a name
    and a formatted value. A run of less than a billion `total_tokens` shows tokens in millions or thousands, and
    all its lines fit into 80 columns after `[Trainer] `.
    """
    letter, unit = next(((letter, unit) for letter, unit in _UNITS if total_tokens >= unit), _UNITS[-1])
    first = [
        f"Step {step}/{total_steps}",
        f"Loss: {loss:.4f}",
        f"LR: {learning_rate:.2e}",
        f"Tokens: {tokens / unit:.2f}{letter}",
        f"Steps/sec: {steps_per_second:.2f}",
    ]
    rest = [f"{name}: {value}" for name, value in more]
    if total_tokens >= _LARGE_RUN:
        return "\n".join([" | ".join(first), *_lines(rest)])
    return "\n".join(_lines([*first, *rest]))


def time_left(steps: int, steps_per_second: float) -> str:
    """The time that `steps` more steps take, as `0:05`, `2:07:09` or `3d 04:00:00`."""
    seconds = int(steps / max(steps_per_second, 1e-9) + 0.5)
    days, (hours, minutes, seconds) = seconds // 86_400, (seconds // 3600 % 24, seconds // 60 % 60, seconds % 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _lines(fields: Sequence[str]) -> list[str]:
    """Joins the fields with ` | ` into as few lines of at most 70 columns as possible."""
    lines: list[str] = []
    for field in fields:
        if lines and len(lines[-1]) + 3 + len(field) <= _COLUMNS:
            lines[-1] += f" | {field}"
        else:
            lines.append(field)
    return lines


class MetricsWriter:
    """Appends records to `directory/metrics.jsonl`, and to TensorBoard files in `directory/tensorboard`.

    A run that resumes from the checkpoint of `resume_step` drops the records of later steps, so that both read like
    one uninterrupted run. A new run (`resume_step=None`) renames the metrics of a previous run in the same folder
    to `metrics.<n>.jsonl`. Lines of the file to continue that are damaged are left out, and the file as it was is
    kept under such a name, too. Raises DataError if `directory` cannot be written.

    A write that fails later does not end the run: the failure is logged once, and so is the recovery. Until the
    recovery, records wait in memory; those of TensorBoard are lost.
    """

    def __init__(self, directory: Path, tensorboard: bool, resume_step: int | None) -> None:
        self._path, self._unwritten, self._is_failing = directory / "metrics.jsonl", b"", False
        self._tensorboard: SummaryWriter | None = None
        self._events = directory / "tensorboard" if tensorboard else None
        self._thread_hook = threading.excepthook
        threading.excepthook = partial(_report_thread_failure, self._thread_hook)
        try:
            self._file = _open_metrics(self._path, resume_step)
            self._open_tensorboard(0 if resume_step is None else resume_step + 1)
        except DataError:
            threading.excepthook = self._thread_hook
            raise
        except OSError as error:
            threading.excepthook = self._thread_hook
            raise DataError(
                f"{directory}: cannot be written: {error.strerror}; "
                "choose another folder with --set logging.directory=..."
            ) from error

    def write(
        self, step: int, values: Mapping[str, float | list[float]], more: Mapping[str, float | str] | None = None
    ) -> None:
        """Appends `{"step": step, **values, **more}` and flushes it, with null for NaN and infinity in `values`.

        A list has one value per layer; TensorBoard shows them as `name/layer_00`, `name/layer_01` and so on.
        `more`, finite numbers and texts, goes to the file alone.
        """
        numbers = {name: _without_infinities(value) for name, value in values.items()}
        record = {"step": step, **numbers, **(more or {})}
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            reach("metrics")
            self._append()
            if self._is_failing:
                self._recover(step)
        except OSError as error:
            self._fail(error)
        if self._tensorboard:
            with self._tolerating_tensorboard():
                for name, value in scalars(values).items():
                    self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes the records that still wait, if possible, and closes all files."""
        try:
            self._append()
            self._file.close()
        except OSError as error:
            self._fail(error)
        if self._tensorboard:
            with self._tolerating_tensorboard():
                self._tensorboard.close()
        threading.excepthook = self._thread_hook

    def _append(self) -> None:
        """Writes the records that wait. After an error it continues at the byte where it stopped."""
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _fail(self, error: OSError) -> None:
        if not self._is_failing:
            _log.warning(f"{self._path}: cannot be written: {error.strerror}; training continues, make room for it")
        self._is_failing = True

    def _recover(self, step: int) -> None:
        _log.warning(f"{self._path}: can be written again; no record is missing")
        self._is_failing = False
        if self._tensorboard is None:
            with self._tolerating_tensorboard():
                self._open_tensorboard(step)

    def _open_tensorboard(self, first_step: int) -> None:
        if self._events:
            self._tensorboard = SummaryWriter(str(self._events), purge_step=first_step)

    @contextmanager
    def _tolerating_tensorboard(self) -> Iterator[None]:
        """After an error, stops writing to TensorBoard until metrics.jsonl recovers: its thread has ended."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- its back ends raise many types
            _log.warning(f"{self._events}: cannot be written: {error}; training continues, see metrics.jsonl")
            self._tensorboard = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics file, without a last line that a crash cut short.

    Raises DataError if the file cannot be read or another line is not a record.
    """
    records, damaged = _read_records(path)
    if damaged:
        raise DataError(
            f'{path}:{damaged[0]}: is not a record such as {{"step": 1, "loss": 2.5}}; remove this line'
        )
    return records


def _read_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a metrics file, and the numbers of the lines before the last one that are none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected the metrics.jsonl of a run") from error
    parsed = [_parse_record(line) for line in lines]
    damaged = [number for number, record in enumerate(parsed[:-1], start=1) if record is None]
    return [record for record in parsed if record is not None], damaged


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _open_metrics(path: Path, resume_step: int | None) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if resume_step is None:
            set_aside(path)
        else:
            _drop_after(path, resume_step)
    return path.open("ab", buffering=0)


def _report_thread_failure(
    hook: Callable[[threading.ExceptHookArgs], object], failure: threading.ExceptHookArgs
) -> None:
    """Passes the error of a thread to `hook`, except for TensorBoard's writer thread, whose next use raises it."""
    if type(failure.thread).__module__ != event_file_writer.__name__:
        hook(failure)


def _drop_after(path: Path, step: int) -> None:
    """Keeps the records up to `step`, and a copy of a damaged file: a log is no reason for a run to stop."""
    records, damaged = _read_records(path)
    if damaged:
        copy = _unused_name(path)
        shutil.copyfile(path, copy)
        _log.warning(
            f"{path}: line {damaged[0]} is damaged and left out; the file as it was is kept as {copy.name}"
        )
    kept = [record for record in records if record["step"] <= step]
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def set_aside(path: Path) -> None:
    """Renames NAME.jsonl of a previous run to the first free NAME.<n>.jsonl. Raises OSError."""
    kept = _unused_name(path)
    path.rename(kept)
    _log.info("%s holds the %s of a previous run; kept as %s", path, path.stem, kept.name)


def _unused_name(path: Path) -> Path:
    """The first free NAME.<n>.jsonl."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


def _without_infinities(value: float | list[float]) -> float | list[float | None] | None:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, list):
        return [entry if math.isfinite(entry) else None for entry in value]
    return value if math.isfinite(value) else None


def device_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of the tensors on a CUDA device, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes
