"""Cutting the files of an input into spans that can be read independently."""

from __future__ import annotations

from deepseek_v3.data.formats.arrow import arrow_groups
from deepseek_v3.data.formats.batches import Span
from deepseek_v3.data.formats.columnar import columnar_spans
from deepseek_v3.data.formats.inputs import InputFile
from deepseek_v3.data.formats.json_lines import json_lines_spans
from deepseek_v3.data.formats.parquet import parquet_groups


def spans(file: InputFile, span_bytes: int) -> list[Span]:
    """Cuts a file into spans of about `span_bytes`; one where its format has none.

    Local JSON lines are cut by bytes, a line belonging to the span that it starts in, Parquet by row groups and the
    Arrow file format by batches. Reading all spans in order gives the same as reading the whole.
    """
    kind = file.format.kind
    if kind == "json_lines":
        return json_lines_spans(file, span_bytes)
    if kind == "parquet":
        return columnar_spans(parquet_groups, file, span_bytes)
    if kind == "arrow":
        return columnar_spans(arrow_groups, file, span_bytes)
    return [Span(file)]
