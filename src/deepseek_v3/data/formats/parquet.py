"""Reading Parquet: its row groups, each some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow.parquet as pq

from deepseek_v3.data.formats.columnar import Group, rows_per_batch

_BUFFER_BYTES = 2**20  # of each column that are read at a time


def parquet_groups(raw: BinaryIO) -> Iterator[Group]:
    """The row groups of a file, whose pages are checked against their checksums where they have some."""
    with pq.ParquetFile(
        raw, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    ) as parquet:
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            size = rows_per_batch(group.total_byte_size, group.num_rows)
            yield Group(group.num_rows, parquet.iter_batches(size, row_groups=[index], use_threads=False))
