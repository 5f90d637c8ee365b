"""Looks at the first records of an input before a run reads all of it: is there text, and which field holds it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow.compute as pc

from deepseek_v3.data.formats.batches import ReadBatch, ReadOptions
from deepseek_v3.data.formats.file_types import known_format
from deepseek_v3.data.formats.reading import find_text_field, read_head
from deepseek_v3.data.formats.streams import InputFile
from deepseek_v3.data.pipeline.executors import RESUME_ADVICE
from deepseek_v3.utils.errors import DataError, translate_resource_errors
from deepseek_v3.utils.logging import get_logger

_FILES = 8  # the most files to look at, spread over the input
_MIN_READABLE = 0.01  # a smaller share of readable records is a mistake of the configuration or of the input
_ENOUGH = 20  # records; fewer broken ones may be all that a small input holds
_WRONG_FIELD = {"text_missing", "text_null", "text_type"}

_log = get_logger("Preprocess")


def preview_input(files: Sequence[InputFile], options: ReadOptions) -> None:
    """Reads the first records of up to 8 files, and logs which fields hold the text if none is configured.

    Raises DataError, with the first problem and the names of the fields found, if hardly any of the records can be
    read. A handful of broken records is no reason: these go to quarantine.
    """
    sample = [files[number * len(files) // _FILES] for number in range(_FILES)] if len(files) > _FILES else files
    heads = [(file, head) for file in sample if (head := _read_head(file, options)) is not None]
    readable = sum(head.records.num_rows for _, head in heads)
    broken = sum(int(pc.sum(head.quarantined.column("records")).as_py() or 0) for _, head in heads)
    reasons = Counter(reason for _, head in heads for reason in head.quarantined.column("reason").to_pylist())
    is_wrong_field = bool(reasons) and reasons.keys() <= _WRONG_FIELD
    if readable < _MIN_READABLE * (readable + broken) and (is_wrong_field or broken >= _ENOUGH):
        raise DataError(_problem(heads, readable, broken))
    if options.text_field is None:
        _log_text_fields(sample, options)


def _read_head(file: InputFile, options: ReadOptions) -> ReadBatch | None:
    with translate_resource_errors(file.path, RESUME_ADVICE):
        return read_head(file, options)


def _problem(heads: Sequence[tuple[InputFile, ReadBatch]], readable: int, broken: int) -> str:
    file, entries = next((file, head.quarantined) for file, head in heads if head.quarantined.num_rows)
    entry = entries.slice(0, 1).to_pylist()[0]
    return (
        f"{file.path}: place {entry['place']}: {entry['error']}; of the first {readable + broken:,} records of the "
        f"input {readable:,} can be read: set text_field to the field that holds the text, or change input_path"
    )


def _log_text_fields(sample: Sequence[InputFile], options: ReadOptions) -> None:
    """Logs the field of the text and the files in which it has that name."""
    found: dict[str, list[str]] = {}
    for file in sample:
        if known_format(file).has_fields and (name := find_text_field(file, options)):
            found.setdefault(name, []).append(file.name)
    for name, names in found.items():
        more = f" and {len(names) - 1} other files" if len(names) > 1 else ""
        _log.info("text_field is not given: the text of %s%s is in the field %s", names[0], more, repr(name))
