"""Cuts the input into work units, and estimates the workers, the memory and the disk space of a run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.formats.batches import FileRange
from deepseek_v3.data.formats.file_types import known_format
from deepseek_v3.data.formats.reading import split_file
from deepseek_v3.data.formats.streams import InputFile
from deepseek_v3.data.pipeline.tasks import WorkUnit
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.machine import usable_cores, usable_memory
from deepseek_v3.utils.text import format_value

_WORKER_BYTES = 500 * 10**6  # the interpreter with its libraries, and a model or two
_COPIES = 6  # copies of a work unit's text that a worker holds at once: read, parsed, filtered, tokens, hashes
_EXPANSION = 4  # bytes of text per byte of compressed text
_KEYS_PER_TEXT_BYTE = 0.35  # signatures and band keys, 0.7 KB for a document of 2 KB
_MAX_WORK_UNITS = 10**6
_RECORDS_PER_TEXT_BYTE = 1.1  # bytes of a part's documents on disk


def split_into_work_units(files: Sequence[InputFile], unit_bytes: int) -> list[WorkUnit]:
    """Cuts the files, in their order, into units of about `unit_bytes` on disk; small files share a unit.

    Raises ConfigError if that would be more than a million units.
    """
    units_at_least = sum(file.size for file in files) // unit_bytes
    if units_at_least > _MAX_WORK_UNITS:
        raise ConfigError(
            f"work_unit_size = {unit_bytes}: cuts the input into {units_at_least:,} work units, expected at most "
            f"{_MAX_WORK_UNITS:,}; make work_unit_size larger"
        )
    units: list[WorkUnit] = []
    waiting: list[FileRange] = []
    waiting_bytes = 0

    def close() -> None:
        nonlocal waiting, waiting_bytes
        if waiting:
            units.append(WorkUnit(len(units), tuple(waiting), waiting_bytes))
        waiting, waiting_bytes = [], 0

    for file in files:
        ranges = split_file(file, unit_bytes)
        for span in ranges:
            size = file.size // len(ranges)
            if waiting_bytes + size > unit_bytes:
                close()
            waiting.append(span)
            waiting_bytes += size
    close()
    return units


def count_workers(config: PreprocessConfig) -> int:
    """The number of workers: as configured, or fewer if the memory does not suffice for them.

    Raises ConfigError if it does not suffice for one.
    """
    wanted = config.workers or usable_cores()
    each = worker_memory(config)
    allowed = memory_limit(config) // each
    if allowed < 1:
        raise ConfigError(
            f"memory = {format_value(config.memory)}: one worker takes about {each:,} bytes "
            f"(work_unit_size = {config.work_unit_size}, "
            f"max_record_size = {config.max_record_size}); allow more, or make the work units smaller"
        )
    return min(wanted, allowed)


def worker_memory(config: PreprocessConfig) -> int:
    """The most bytes of memory that one worker needs."""
    return _WORKER_BYTES + _COPIES * max(config.work_unit_size, config.max_record_size)


def memory_limit(config: PreprocessConfig) -> int:
    """Bytes of memory that the run may use: as configured, or half of the memory that this process may use."""
    return config.memory or usable_memory() // 2


class DiskEstimate(NamedTuple):
    """Estimated bytes of text in the input, and of disk space at the peak of the run, with the output."""

    text: int
    disk: int


def estimate_disk(files: Sequence[InputFile], config: PreprocessConfig) -> DiskEstimate:
    """Estimates the disk space of a run, which at its peak holds the documents and keys of two passes."""
    text = sum(file.size * (_EXPANSION if _is_compressed(file) else 1) for file in files)
    has_keys = {"deduplication", "exact_deduplication"} & {*config.pipeline}
    per_byte = 2 * _RECORDS_PER_TEXT_BYTE + (_KEYS_PER_TEXT_BYTE if has_keys else 0)
    return DiskEstimate(text, int(text * per_byte))


def check_disk(need: DiskEstimate, output: Path) -> None:
    """Raises DataError if the disk of the folder `output` has too little free space."""
    place = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if need.disk > free:
        raise DataError(
            f"{output}: about {need.text / 1e9:,.2f} GB of text need {need.disk / 1e9:,.2f} GB on disk "
            f"during the run, and {free / 1e9:,.2f} GB are free; make room, or choose another output_dir"
        )


def _is_compressed(file: InputFile) -> bool:
    return file.compression is not None or known_format(file).name == "parquet"
