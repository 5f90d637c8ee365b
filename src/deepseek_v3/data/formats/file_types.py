"""Which format a file is in, told by its name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal, NamedTuple

Kind = Literal["json_lines", "json", "parquet", "arrow", "text", "warc"]
Compression = Literal["gz", "zst", "xz", "bz2"]

_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
_KINDS: dict[str, Kind] = {
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".warc": "warc",
    ".wet": "warc",
}
_PROSE = "txt text md markdown mdx rst adoc asciidoc org tex html htm xhtml"
_CODE = (
    "c h cc cpp cxx hh hpp hxx cu cuh m mm java kt kts scala groovy clj cljs cs fs fsx vb go rs zig d nim v sv "
    "vhd vhdl py pyi pyx rb pl pm php lua tcl r jl m4 js jsx mjs cjs ts tsx vue svelte css scss sass less dart "
    "swift hs lhs ml mli elm erl hrl ex exs lisp cl el scm rkt f f77 f90 f95 f03 for ada adb ads pas asm s sh "
    "bash zsh fish ps1 bat cmd sql graphql proto thrift cmake mk gradle bzl nix tf yaml yml toml ini cfg conf "
    "sol lean thy"
)
# A name without a suffix, such as README or Makefile, is text as well.
_TEXT = frozenset(["", *(f".{suffix}" for suffix in f"{_PROSE} {_CODE}".split())])

READABLE = (
    ".jsonl, .ndjson, .json, .warc, .wet or text such as .txt, .md, .rst and source code, each perhaps with "
    ".gz, .zst, .xz or .bz2; .parquet, .arrow, .feather or .ipc"
)


class Format(NamedTuple):
    """How a file holds documents, and how it is compressed, if at all."""

    kind: Kind
    compression: Compression | None


def format_of(name: str) -> Format | None:
    """The format of a file of this name, or None where no reader knows its suffix."""
    path = PurePosixPath(name.lower())
    compression = _COMPRESSIONS.get(path.suffix)
    suffix = PurePosixPath(path.stem).suffix if compression else path.suffix
    kind = "text" if suffix in _TEXT else _KINDS.get(suffix)
    if kind is None or (compression and kind in ("parquet", "arrow")):
        return None
    return Format(kind, compression)
