"""What a run will read: the files, cut into units of work, and what that takes in memory and on disk."""

from __future__ import annotations

import os
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
from deepseek_v3.utils.cgroups import usable_memory
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.text import format_value

_WORKER_BYTES = 500 * 10**6  # the interpreter with its libraries, and a model or two
_COPIES = 6  # of a piece's text that a worker holds at a time: as read, parsed, judged, as tokens and hashes
_EXPANSION = 4  # text over compressed text
_KEYS_PER_TEXT_BYTE = 0.35  # signatures and band keys, 0.7 KB for a document of 2 KB
_MOST_UNITS = 10**6
_RECORDS_PER_TEXT_BYTE = 1.1


def split_into_work_units(files: Sequence[InputFile], piece_bytes: int) -> list[WorkUnit]:
    """Cuts the files, in their order, into units of about `piece_bytes` on disk; small files share a unit.

    Raises ConfigError where there would be more than a million.
    """
    pieces_at_least = sum(file.size for file in files) // piece_bytes
    if pieces_at_least > _MOST_UNITS:
        raise ConfigError(
            f"work_unit_size = {piece_bytes}: cuts the input into {pieces_at_least:,} pieces, expected at most "
            f"{_MOST_UNITS:,}; make the pieces larger"
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
        pieces = split_file(file, piece_bytes)
        for span in pieces:
            size = file.size // len(pieces)
            if waiting_bytes + size > piece_bytes:
                close()
            waiting.append(span)
            waiting_bytes += size
    close()
    return units


def count_workers(config: PreprocessConfig) -> int:
    """As many workers as are wanted and as the memory allows.

    Raises ConfigError where it does not even allow one.
    """
    wanted = config.workers or os.cpu_count() or 1
    each = worker_memory(config)
    allowed = memory_limit(config) // each
    if allowed < 1:
        raise ConfigError(
            f"memory = {format_value(config.memory)}: one worker takes about {each:,} bytes "
            f"(work_unit_size = {config.work_unit_size}, "
            f"max_record_size = {config.max_record_size}); allow more, or make the pieces smaller"
        )
    return min(wanted, allowed)


def worker_memory(config: PreprocessConfig) -> int:
    """Bytes that one worker needs at most."""
    return _WORKER_BYTES + _COPIES * max(config.work_unit_size, config.max_record_size)


def memory_limit(config: PreprocessConfig) -> int:
    """Bytes that the run may take: as configured, or half of what this process may take of the machine."""
    return config.memory or usable_memory() // 2


class DiskEstimate(NamedTuple):
    """Bytes of text in the input as estimated, and of disk that the run takes at its widest, output included."""

    text: int
    disk: int


def estimate_disk(files: Sequence[InputFile], config: PreprocessConfig) -> DiskEstimate:
    """Estimates what a run takes on disk: at most two passes' documents lie there at a time, with their keys."""
    text = sum(file.size * (_EXPANSION if _is_compressed(file) else 1) for file in files)
    has_keys = {"deduplication", "exact_deduplication"} & {*config.pipeline}
    per_byte = 2 * _RECORDS_PER_TEXT_BYTE + (_KEYS_PER_TEXT_BYTE if has_keys else 0)
    return DiskEstimate(text, int(text * per_byte))


def check_disk(need: DiskEstimate, output: Path) -> None:
    """Raises DataError where the disk that `output` will stand on has too little room."""
    place = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if need.disk > free:
        raise DataError(
            f"{output}: about {need.text / 1e9:,.2f} GB of text need {need.disk / 1e9:,.2f} GB on disk "
            f"during the run, and {free / 1e9:,.2f} GB are free; make room, or choose another output_dir"
        )


def _is_compressed(file: InputFile) -> bool:
    return file.compression is not None or known_format(file).name == "parquet"
