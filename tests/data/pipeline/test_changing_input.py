"""A file that changes while a run reads it stops the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.formats.streams import InputFile
from deepseek_v3.data.pipeline import range_reading
from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.utils.errors import DataError
from helpers.pipeline import pipeline_config, write_lines

ROWS = [{"text": f"Text number {number} of a file that someone else writes."} for number in range(200)]


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "One more."}\n')


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    other = path.with_name(".other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def rewrite(path: Path) -> None:
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes().replace(b"someone", b"anybody"))
    os.utime(path, ns=times)


@pytest.mark.parametrize("change", [append, truncate, replace, rewrite, Path.unlink])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_a_file_that_changes_while_it_is_read_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "in" / name
    write_lines(path, ROWS)
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=50)
    monkeypatch.setattr(range_reading, "check_unchanged", after(lambda: change(path)))
    with pytest.raises(DataError, match=rf"{name}: (changed|vanished) while it was read; .*\.work"):
        run_pipeline(pipeline_config(str(tmp_path / "in"), tmp_path / "out", ["exact_deduplication"]))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_object_that_changes_while_it_is_read_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/changing/a.jsonl", write_lines(tmp_path / "a.jsonl", ROWS).read_bytes())
    change = after(lambda: store.pipe("/changing/a.jsonl", b'{"text": "Other."}\n'))
    monkeypatch.setattr(range_reading, "check_unchanged", change)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        run_pipeline(pipeline_config("memory://changing", tmp_path / "out", ["exact_deduplication"]))


def after(change: Callable[[], None]) -> Callable[[InputFile], None]:
    """The check of a file that was read, in whole or in part, after `change`."""
    check = range_reading.check_unchanged

    def change_and_check(file: InputFile) -> None:
        if not changed:
            changed.append(change())
        check(file)

    changed: list[None] = []
    return change_and_check
