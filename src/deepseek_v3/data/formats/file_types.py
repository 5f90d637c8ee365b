"""The file formats that can be read: one entry of `FORMATS` for each.

To add a format, write a module in this folder with a `Reader`, and add an entry. Everything else follows from the
entry: which files of a folder are read, how a file is split into ranges, whether it may be compressed, and how
messages name a place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from deepseek_v3.data.content import TEXT_SUFFIXES
from deepseek_v3.data.formats.batches import BatchBuilder, FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.columnar import arrow_groups, parquet_groups, read_columnar, split_columnar
from deepseek_v3.data.formats.csv_files import read_csv
from deepseek_v3.data.formats.json_files import read_json
from deepseek_v3.data.formats.json_lines import read_json_lines, split_json_lines
from deepseek_v3.data.formats.mediawiki import mediawiki_fault, read_mediawiki
from deepseek_v3.data.formats.notebooks import parse_notebook
from deepseek_v3.data.formats.plain_text import FileParser, add_file, parse_text, read_file
from deepseek_v3.data.formats.streams import COMPRESSIONS, InputFile, split_suffix
from deepseek_v3.data.formats.tar_files import read_tar
from deepseek_v3.data.formats.warc import read_warc, require_fastwarc

_NO_SUFFIX = ""  # README, Makefile

# Reads a range from its start, or from the position that came with an earlier batch of it.
Reader: TypeAlias = Callable[[FileRange, ReadOptions, "int | None"], Iterator[ReadBatch]]
FileAdder: TypeAlias = Callable[[FileRange, BatchBuilder, ReadOptions], None]
# Splits a file into ranges of about the given size in bytes, which together hold all of it.
Splitter: TypeAlias = Callable[[InputFile, int], list[FileRange]]


def _whole(file: InputFile, range_bytes: int) -> list[FileRange]:  # noqa: ARG001
    return [FileRange(file)]


@dataclass(frozen=True)
class FileFormat:
    """How files with one of `suffixes` hold documents.

    `read` reads a range of a file, and `split` splits a file into ranges, by default into one. `place` says what
    the `place` of a record counts: bytes, bytes to the start of a line, or rows; "file" if a file is one record.
    Then `parse` parses its bytes, and `add_file` adds the document to a batch of several files.
    `is_compressible` says whether the file may be compressed as a whole, and `has_fields` whether its records have
    fields with names, one of which holds the text. `require` raises DataError if a library that `read` needs is
    missing. `fault` looks into a file, and returns why it holds something else than its suffix says, or None.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Reader
    split: Splitter = _whole
    place: Literal["line", "byte", "row", "file"] = "byte"
    is_compressible: bool = True
    has_fields: bool = True
    require: Callable[[InputFile], None] = lambda _: None
    fault: Callable[[InputFile], str | None] = lambda _: None
    parse: FileParser | None = None

    @property
    def add_file(self) -> FileAdder | None:
        """Adds the only document of a file to a batch of several files; None if a file holds several."""
        return None if self.parse is None else partial(add_file, self.parse)


def _parser_of(name: str) -> FileParser | None:
    """How a member of an archive is parsed, if it is one document; None if it is not."""
    found = format_of(name)
    return None if found is None else found.parse


def _one_document(name: str, suffixes: tuple[str, ...], parse: FileParser) -> FileFormat:
    return FileFormat(name, suffixes, partial(read_file, parse), place="file", has_fields=False, parse=parse)


_read_parquet, _split_parquet = partial(read_columnar, parquet_groups), partial(split_columnar, parquet_groups)
_read_arrow, _split_arrow = partial(read_columnar, arrow_groups), partial(split_columnar, arrow_groups)

FORMATS = (
    FileFormat("json_lines", (".jsonl", ".ndjson"), read_json_lines, split_json_lines, place="line"),
    FileFormat("json", (".json",), read_json),
    FileFormat("csv", (".csv", ".tsv", ".tab"), read_csv, place="line"),
    FileFormat("warc", (".warc", ".wet"), read_warc, has_fields=False, require=require_fastwarc),
    FileFormat("mediawiki", (".xml",), read_mediawiki, has_fields=False, fault=mediawiki_fault),
    FileFormat("tar", (".tar",), partial(read_tar, _parser_of), has_fields=False),
    _one_document("text", (_NO_SUFFIX, *TEXT_SUFFIXES), parse_text),
    _one_document("notebook", (".ipynb",), parse_notebook),
    FileFormat("parquet", (".parquet",), _read_parquet, _split_parquet, "row", is_compressible=False),
    FileFormat("arrow", (".arrow", ".feather", ".ipc"), _read_arrow, _split_arrow, "row", is_compressible=False),
)
_BY_SUFFIX = {suffix: format_ for format_ in FORMATS for suffix in format_.suffixes}


def format_of(name: str) -> FileFormat | None:
    """The format of a file by the suffix of its name, or None if it is unknown."""
    suffix, compression = split_suffix(name)
    found = _BY_SUFFIX.get(suffix)
    return None if found is None or (compression and not found.is_compressible) else found


def known_format(file: InputFile) -> FileFormat:
    """The format of a file that `find_inputs` returned; every such file has one."""
    found = format_of(file.name)
    assert found is not None, f"{file.name} has no known format"
    return found


def readable_suffixes() -> str:
    """The known suffixes, for messages."""
    compressions = ", ".join(one.suffixes[0] for one in COMPRESSIONS)
    streams, columnar = (
        ", ".join(s for one in FORMATS if one.name != "text" and one.is_compressible is flag for s in one.suffixes)
        for flag in (True, False)
    )
    text = "text such as .txt, .md, .rst and source code"
    return f"{streams} or {text}, each of them also compressed ({compressions}); {columnar}"
