"""The folders of a run below its output folder, and the parts in them.

A part is a folder of finished work with a marker, `part.json`, that holds the checksums of its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import xxhash

from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write

_MARKER = "part.json"
_CHUNK_BYTES = 2**22
_REPEAT = "run the same command again, which does that work again, or remove the folder .work first if it cannot"

RECORDS_FILE = "records.arrow"
DROPPED_FILE = "dropped.arrow"
QUARANTINED_FILE = "quarantined.arrow"
STATS_FILE = "tally.json"
SHARD_PREFIX = "part-"
KEYS_PREFIX = "keys/"  # the keys of a part for a global stage, each in a folder with the name of the stage
IDS_FILE = "ids.arrow"  # the ids of a previous run's documents, beside their keys


@dataclass(frozen=True)
class Part:
    """A folder of finished work.

    It held `rows` documents with `text_bytes` bytes of text when it was written. `resume` is the place from which
    reading the work unit continues, as (index of the file range, position in it), or None if the unit is completely
    read. `checksums` maps the name of each file to its XXH3-128.
    """

    folder: Path
    rows: int
    text_bytes: int
    resume: tuple[int, int] | None
    checksums: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.name


def finish_part(folder: Path, partial: Path, rows: int, text_bytes: int, resume: tuple[int, int] | None) -> Part:
    """Writes the marker of a part whose files are complete in `partial`, which will be renamed to `folder`."""
    files = [path for path in _files(partial) if path.name != _MARKER]  # of an attempt that was killed
    checksums = {path.relative_to(partial).as_posix(): checksum(path) for path in files}
    part = Part(folder, rows, text_bytes, resume, checksums)
    fields = {name: value for name, value in asdict(part).items() if name != "folder"}
    marker = {**fields, "self": _checksum_of(fields)}
    (partial / _MARKER).write_bytes(orjson.dumps(marker, option=orjson.OPT_SORT_KEYS))
    return part


def _checksum_of(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))


def read_part(folder: Path) -> Part | None:
    """Reads the marker of the part in `folder`; None if there is no finished part, or if the marker is damaged."""
    try:
        fields: dict[str, Any] = orjson.loads((folder / _MARKER).read_bytes())
        if fields.pop("self") != _checksum_of(fields):
            return None
        resume = fields["resume"]
        return Part(
            folder, fields["rows"], fields["text_bytes"], resume and (resume[0], resume[1]), fields["checksums"]
        )
    except (OSError, ValueError, KeyError):
        return None


def is_intact(part: Part, *, is_released: bool = False) -> bool:
    """Whether all files of a part exist and have their checksums; a released part has no documents and keys."""
    return all(
        (is_released and _is_released(name)) or _has_checksum(part.folder / name, expected)
        for name, expected in part.checksums.items()
    )


def verify_part(folder: Path, prefixes: Sequence[str]) -> None:
    """Raises DataError unless the files of a part whose names begin with one of `prefixes` have their checksums."""
    part = read_part(folder)
    if part is None:
        raise DataError(f"{folder}: its marker is damaged; {_REPEAT}")
    for name, expected in part.checksums.items():
        if name.startswith(tuple(prefixes)) and not _has_checksum(folder / name, expected):
            raise DataError(f"{folder / name}: was changed or removed since the run wrote it; {_REPEAT}")


def _is_released(name: str) -> bool:
    return name == RECORDS_FILE or name.startswith(KEYS_PREFIX)


def _has_checksum(path: Path, expected: str) -> bool:
    try:
        return checksum(path) == expected
    except FileNotFoundError:
        return False


def write_checksum(path: Path, file: Path | None = None) -> None:
    """Writes the checksum of `path`, or of `file`, which will be renamed to it, beside it."""
    with atomic_write(_sidecar(path)) as partial:
        partial.write_text(checksum(file or path))


def has_own_checksum(path: Path) -> bool:
    """Whether a file exists and has the checksum that `write_checksum` wrote."""
    try:
        return checksum(path) == _sidecar(path).read_text()
    except FileNotFoundError:
        return False


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh3")


def checksum(path: Path) -> str:
    """The XXH3-128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_table(table: pa.Table, path: Path) -> None:
    """Writes an uncompressed Arrow file, which can be memory-mapped."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_table(path: Path) -> pa.Table:
    """Memory-maps an Arrow file. Raises DataError if it is damaged."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: a file of the unfinished run is damaged: {error}; remove the folder .work and run again"
        ) from None


def single_batch(table: pa.Table) -> pa.RecordBatch:
    """The rows of a table in one batch."""
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class RunFolder:
    """The folders of a run. `work` is removed once the run is complete."""

    output: Path

    @property
    def work(self) -> Path:
        return self.output / ".work"

    @property
    def run_file(self) -> Path:
        return self.work / "run.json"

    @property
    def manifest(self) -> Path:
        return self.output / "manifest.json"

    def parts(self, number: int) -> Path:
        """The folder with the parts of a pass."""
        return self.work / f"pass-{number}"

    def decisions(self, number: int, stage: str) -> Path:
        """The folder with the decisions of a global stage at the start of pass `number`."""
        return self.work / f"decisions-{number}" / stage

    @property
    def shards(self) -> Path:
        """The folder with the finished output files until the run is complete."""
        return self.work / "shards"
