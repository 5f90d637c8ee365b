"""Reading the spans of an input's files into batches of records and of what is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

from deepseek_v3.data.formats.arrow import arrow_groups
from deepseek_v3.data.formats.batches import END, ReadBatch, ReadOptions, Span
from deepseek_v3.data.formats.columnar import read_columnar
from deepseek_v3.data.formats.json_files import read_json
from deepseek_v3.data.formats.json_lines import read_json_lines
from deepseek_v3.data.formats.names import Kind
from deepseek_v3.data.formats.parquet import parquet_groups
from deepseek_v3.data.formats.plain_text import read_text
from deepseek_v3.data.formats.warc import read_warc

_Reader: TypeAlias = Callable[[Span, ReadOptions, "int | None"], Iterator[ReadBatch]]

_READERS: dict[Kind, _Reader] = {
    "json_lines": read_json_lines,
    "json": read_json,
    "parquet": partial(read_columnar, parquet_groups),
    "arrow": partial(read_columnar, arrow_groups),
    "text": read_text,
    "warc": read_warc,
}


def read_span(span: Span, options: ReadOptions, start: int | None = None) -> Iterator[ReadBatch]:
    """Reads a span from its beginning, or on from `start`, the position that came with one of its batches.

    A batch holds about 4 MiB or 10,000 records and depends on the content of the file alone, so reading on from a
    position gives the very batches that would have followed it. Whatever is no document is quarantined; nothing in
    a file raises. Raises DataError where a store fails, or where a library that the format needs is missing.
    """
    return iter(()) if start == END else _READERS[span.file.format.kind](span, options, start)
