"""What a document holds, by its own account: HTML, source code or prose, from a file's suffix or a media type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

# None: the document does not say; its text has to be looked at.
Content: TypeAlias = Literal["html", "code", "prose"] | None

_HTML_SUFFIXES = frozenset("html htm xhtml".split())
PROSE_SUFFIXES = frozenset("md markdown mdx rst adoc asciidoc org pod tex".split())
CODE_SUFFIXES = frozenset(
    (
        "c h cc cpp cxx hh hpp hxx cu cuh m mm java kt kts scala groovy clj cljs cs fs fsx vb go rs zig d nim v sv "
        "vhd vhdl py pyi pyx rb pl pm php lua tcl r jl m4 js jsx mjs cjs ts tsx vue svelte css scss sass less dart "
        "swift hs lhs ml mli elm erl hrl ex exs lisp cl el scm rkt f f77 f90 f95 f03 for ada adb ads pas asm s sh "
        "bash zsh fish ps1 bat cmd sql graphql proto thrift cmake mk gradle bzl nix tf yaml yml toml ini cfg conf "
        "sol lean thy"
    ).split()
)
# The suffixes of text files that are read, each as one document. That of `.txt` does not say what it holds.
TEXT_SUFFIXES = tuple(
    f".{suffix}" for suffix in sorted({*CODE_SUFFIXES, *PROSE_SUFFIXES, *_HTML_SUFFIXES, "txt", "text"})
)
# Suffixes that records name, and that are not read as files.
_OTHER_CODE = frozenset(
    "xml svg rss atom xsd xsl xslt json jsonc ipynb astro ejs erb hbs jinja jinja2 j2 jsp liquid "
    "mustache njk phtml pug tmpl tpl twig csv tsv diff patch awk sed vim rest po pot".split()
)
_CODE_NAMES = frozenset(
    "makefile gnumakefile dockerfile containerfile jenkinsfile vagrantfile gemfile rakefile kconfig kbuild "
    "build workspace cmakelists.txt".split()
)

# Fields of a record that name its file, its suffix or its media type, in the order in which they are believed.
_PATH_FIELDS = ("path", "file_path", "filepath", "filename", "file_name", "max_stars_repo_path", "ext", "extension")
_TYPE_FIELDS = ("content_type", "mime_type", "media_type")
_MENTIONS = re.compile("|".join(f'"{field}":' for field in (*_TYPE_FIELDS, *_PATH_FIELDS)))
_HTML_TYPE = re.compile(r"text/html|application/xhtml\+xml", re.IGNORECASE)
_CODE_TYPE = re.compile(
    r"text/(?:x-(?!markdown|rst|org)|css|javascript|ecmascript|xml|csv)"
    r"|application/(?:[\w.-]+\+(?:xml|json)|xml|json|x-|(?:java|ecma|type)script)"
    r"|image/svg",
    re.IGNORECASE,
)
_PROSE_TYPE = re.compile(r"text/(?:x-)?(?:markdown|rst|org)", re.IGNORECASE)
_COMPRESSED = frozenset((".gz", ".zst", ".zstd", ".xz", ".bz2"))
_RECORD_FILES = frozenset(
    (
        ".jsonl .ndjson .json .csv .tsv .tab .parquet .arrow .feather .ipc .warc .wet "
        ".xml .tar .tgz .tzst .txz .tbz2 .tbz .ipynb"
    ).split()
)  # a notebook is read as Markdown, and says so


def contents_of(batch: pa.RecordBatch | pa.Table) -> list[Content]:
    """What each document of `RECORDS` holds. Metadata that are no text, from a caller's table, say nothing."""
    sources, metadata = batch.column("source").to_pylist(), batch.column("metadata")
    contents = [_by_source(str(source or ""))[0] for source in sources]
    if not pa.types.is_string(metadata.type):
        return contents
    telling = pc.fill_null(pc.match_substring_regex(metadata, _MENTIONS.pattern), False)
    for row in np.flatnonzero(telling.to_numpy(zero_copy_only=False) if len(telling) else []).tolist():
        contents[row] = content_of(sources[row], metadata[row].as_py())
    return contents


def content_of(source: str, metadata: str | None) -> Content:
    """What a document holds, from the name of its file and the fields of its record; None if neither says.

    A text file is one document, so its own suffix counts. Records of other files may name a file or a media type.
    """
    by_name, holds_records = _by_source(source)
    if not holds_records or not metadata or not _MENTIONS.search(metadata):
        return by_name
    fields = orjson.loads(metadata)
    return _by_type(_strings(fields, _TYPE_FIELDS)) or _by_paths(_strings(fields, _PATH_FIELDS))


@lru_cache(maxsize=2**12)
def _by_source(source: str) -> tuple[Content, bool]:
    """What a file holds by its name, and whether it holds many records."""
    path = PurePosixPath(source)
    path = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    holds_records = path.suffix.lower() in _RECORD_FILES or not source
    return None if holds_records else _by_name(path.name), holds_records


def _by_name(name: str) -> Content:
    """What a file of this name, or with this suffix, holds."""
    lower = name.lower()
    suffix = lower.rpartition(".")[2]
    if lower in _CODE_NAMES or suffix in CODE_SUFFIXES or suffix in _OTHER_CODE:
        return "code"
    if suffix in _HTML_SUFFIXES:
        return "html"
    return "prose" if suffix in PROSE_SUFFIXES else None


def _strings(fields: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [value for name in names if isinstance(value := fields.get(name), str)]


def _by_type(types: Sequence[str]) -> Content:
    for type_ in types:
        if _HTML_TYPE.match(type_):
            return "html"
        if _CODE_TYPE.match(type_):
            return "code"
        if _PROSE_TYPE.match(type_):
            return "prose"
    return None


def _by_paths(paths: Sequence[str]) -> Content:
    return next((found for path in paths if (found := _by_name(PurePosixPath(path).name)) is not None), None)


_HEAD = 1000  # characters of a text that are looked at
_FEWEST_LINES = 4
# A line of source code ends with one of these, or is an assignment, a call, an import, a directive, or begins with
# a keyword, before a colon if it begins a block.
_CODE_ENDS = frozenset(";{}[(\\")
_CODE_LINE = re.compile(
    r"[)\]},;]+"
    r"|[\w.$>\[\]'\"-]{1,60} ?(?:[-+*/|&:?]?=|=>) ?\S.*|[\w.$]{1,60}\(.*\)"
    r"|import [\w., ]+|from [\w.]+ import .+|# ?(?:include|define|ifn?def|if|endif|pragma)\b.*|#!/.*"
    r"|@[\w.]+|(?:def|class|if|elif|else|for|while|try|except|with|async|case|switch|finally)\b.*:"
    r"|(?:return|raise|yield)\b.*|pass|break|continue|end|endif|fi|done|esac"
)
_SIGNS = ";{}()=[]:"
_FEWEST_SIGNS = 40  # one per this number of characters
# The comments before the code: a licence, a docstring. What follows is looked at.
_COMMENTS = re.compile(
    r"(?:\s*(?:/\*[^*]*(?:\*(?!/)[^*]*)*\*/|[rR]?\"{3}[^\"]*(?:\"(?!\"\")[^\"]*)*\"{3}"
    r"|(?:///?|#|--|;)(?!include)[^\n]*\n))+"
)


def looks_like_code(text: str) -> bool:
    """Whether at least half of the lines at the beginning of a text are those of source code."""
    comments = _COMMENTS.match(text, 0, 8 * _HEAD)
    start = comments.end() if comments else 0
    head = text[start : start + _HEAD]
    if sum(map(head.count, _SIGNS)) * _FEWEST_SIGNS < len(head):
        return False
    lines = [line for line in map(str.strip, head.split("\n")) if line]
    return len(lines) >= _FEWEST_LINES and 2 * sum(map(_is_code, lines)) >= len(lines)


def _is_code(line: str) -> bool:
    return line[-1] in _CODE_ENDS or _CODE_LINE.fullmatch(line) is not None
