"""The bytes that rows of Arrow data take once they are plain values, and cutting them into batches of bounded size.

Dictionaries, runs and views store a value once for many rows, so the size of their buffers says nothing about that.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.formats.batches import BATCH_BYTES, BATCH_RECORDS

_SLACK = 1.5  # a batch that is larger by less is not cut, which would give a small one
_ROW_BYTES = 16  # of a value without a length, such as a number, as a Python object in a list
_VARIABLE = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
_VIEWS = (pa.string_view(), pa.binary_view())


def cut_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Cuts a batch into slices of about 4 MiB of plain values, and at most 10,000 rows, without dictionaries."""
    sizes = sum((plain_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))
    if sizes.sum() <= _SLACK * BATCH_BYTES and batch.num_rows <= BATCH_RECORDS:
        yield _without_dictionaries(batch)
        return
    blocks = np.cumsum(sizes) // BATCH_BYTES + np.arange(batch.num_rows) // BATCH_RECORDS
    cuts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), batch.num_rows]
    for start, stop in pairwise(cuts):
        yield _without_dictionaries(batch.slice(start, stop - start))


def plain_sizes(column: pa.Array) -> Int64Array:
    """The bytes of each value without dictionaries, runs and views: int64 [rows]. Does not decode them."""
    type_ = column.type
    if pa.types.is_dictionary(type_):
        indices = pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        return np.where(is_null, _ROW_BYTES, _chosen(plain_sizes(column.dictionary), indices))
    if any(is_kind(type_) for is_kind in _VARIABLE):
        return _ROW_BYTES + pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(
            np.int64
        )
    if type_ in _VIEWS:
        views = column.buffers()[1]  # 16 bytes for each value, which begin with its length
        lengths = np.frombuffer(views, np.int32)[:: 16 // 4] if views is not None else np.zeros(0, np.int32)
        return _chosen(lengths.astype(np.int64), np.arange(column.offset, column.offset + len(column)))
    if pa.types.is_struct(type_):
        return sum((plain_sizes(field) for field in column.flatten()), np.full(len(column), _ROW_BYTES, np.int64))
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_map(type_):
        totals = np.append(np.zeros(1, np.int64), np.cumsum(plain_sizes(column.values)))
        return _ROW_BYTES + np.diff(_chosen(totals, column.offsets.to_numpy()))
    if pa.types.is_run_end_encoded(type_):
        rows = np.arange(column.offset, column.offset + len(column))
        return _chosen(plain_sizes(column.values), np.searchsorted(column.run_ends.to_numpy(), rows, side="right"))
    return np.full(len(column), _ROW_BYTES, np.int64)


def _chosen(sizes: Int64Array, rows: Int64Array) -> Int64Array:
    """The sizes of these rows; damaged indices, which are found later, are moved into the range."""
    return sizes[np.clip(rows, 0, len(sizes) - 1)] if len(sizes) else np.zeros(len(rows), np.int64)


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    if not any(pa.types.is_dictionary(type_) for type_ in batch.schema.types):
        return batch
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)
