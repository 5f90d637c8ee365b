"""A machine that lacks memory, disk, descriptors or permission stops the run; no data count as damaged for that."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from deepseek_v3.data.formats import columnar, streams
from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.utils.errors import ResourceError, resource_problem
from helpers.pipeline import digests, pipeline_config, undisturbed, write_lines

PIPELINE = ["preliminary_cleaning", "exact_deduplication"]
TEXTS = [f"Text number {number} of a file that is in good order." for number in range(900)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "in"
    lines = write_lines(folder / "a.jsonl", [{"text": f"a {text}"} for text in TEXTS]).read_bytes()
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines.replace(b'"a ', b'"b ')))
    pq.write_table(pa.table({"text": [f"c {text}" for text in TEXTS]}), folder / "c.parquet", row_group_size=100)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return undisturbed(corpus, tmp_path_factory.mktemp("output") / "clean", PIPELINE)


def failing(original: Callable[..., Any], error: Exception, calls: int) -> Callable[..., Any]:
    """The function `original`, which raises `error` after that many calls."""
    left = [calls]

    def fail_or_call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(*arguments, **options)

    return fail_or_call


OUT_OF_MEMORY = "out of memory"
FAULTS = [
    (streams._ZstdDecoder, "decompress", zstandard.ZstdError("decompress: Allocation error : not enough memory")),
    (streams._ZstdDecoder, "decompress", MemoryError()),
    (columnar, "_add_rows", pa.ArrowMemoryError("malloc of size 4194304 failed")),
    (columnar, "rows_per_batch", MemoryError()),
    (streams, "open_raw", OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x")),
    (columnar, "open_raw", OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    (streams, "open_raw", PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x")),
    (columnar, "open_raw", PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x")),
]


@pytest.mark.parametrize(("owner", "name", "error"), FAULTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("calls", [0, 3, 7])
def test_a_lack_while_reading_stops_the_run_and_loses_nothing(
    corpus: Path, expected: dict[str, str], tmp_path: Path, owner: Any, name: str, error: Exception, calls: int
) -> None:
    config = pipeline_config(str(corpus), tmp_path / "out", PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), error, calls))
        problem = None
        try:
            run_pipeline(config)
        except ResourceError as stopped:
            problem = str(stopped)
    assert (problem is None) <= (calls > 0)  # some of the functions are not called that often
    if problem is not None:
        assert "\n" not in problem
        number = getattr(error, "errno", None) or errno.ENOMEM
        assert (OUT_OF_MEMORY if number == errno.ENOMEM else os.strerror(number)) in problem
        assert "run the same command again" in problem
    run_pipeline(config)
    assert digests(tmp_path / "out") == expected


@contextmanager
def longest_file(num_bytes: int) -> Iterator[None]:
    """Lets no file grow beyond this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [100, 3_000, 30_000, 60_000])
def test_a_full_disk_stops_the_run_and_loses_nothing(
    corpus: Path, expected: dict[str, str], tmp_path: Path, num_bytes: int
) -> None:
    config = pipeline_config(str(corpus), tmp_path / "out", PIPELINE)
    with (
        longest_file(num_bytes),
        pytest.raises(ResourceError, match=rf"^{tmp_path}/out.*(File too large|No space left).*again"),
    ):
        run_pipeline(config)
    run_pipeline(config)
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (MemoryError(), OUT_OF_MEMORY),
        (pa.ArrowMemoryError("malloc of size 4096 failed"), OUT_OF_MEMORY),
        (pa.ArrowMemoryError(f"malloc of size {2**60} failed"), None),  # only damaged data ask for that
        (RuntimeError("can't start new thread"), OUT_OF_MEMORY),
        (OSError("1000 requested and 12 written"), os.strerror(errno.ENOSPC)),
        (OSError(errno.EROFS, "x", "a"), f"a: {os.strerror(errno.EROFS)}"),
        (OSError(errno.EIO, "x", "a"), None),
        (FileNotFoundError(errno.ENOENT, "x"), None),
        (ValueError("not JSON"), None),
    ],
)
def test_only_a_lack_of_the_machine_is_a_resource_problem(error: Exception, problem: str | None) -> None:
    assert resource_problem(error) == problem
