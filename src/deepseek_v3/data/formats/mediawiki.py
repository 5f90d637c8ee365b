"""Reading XML dumps of MediaWiki, such as those of Wikipedia: pages of the main namespace as plain text.

A scanner cuts the stream into pages, and expat parses one page at a time. So memory is bounded, a damaged page
costs itself alone, and declarations at the beginning of the file, which could define entities, are never parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from xml.parsers import expat

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END_OF_FILE,
    BatchBuilder,
    FileRange,
    ReadBatch,
    ReadOptions,
)
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream, InputFile
from deepseek_v3.data.formats.wikitext import WikitextCleaner

_HEAD_BYTES = 2**16
_CHUNK_BYTES = 2**18
_ROOT = re.compile(rb"<mediawiki[\s>]")
_PAGE, _PAGE_END = b"<page>", b"</page>"
_ROOT_END = b"</mediawiki>"
_PAGE_TAG = re.compile(rb"</?page>")
_NAMESPACE = re.compile(rb'<namespace key="(?:6|14)"[^<>]*>([^<>]*)</namespace>')  # of files and of categories
_MAX_DEPTH = 20  # elements in each other; a page has 5


def mediawiki_fault(file: InputFile) -> str | None:
    """Why an XML file is no dump of MediaWiki; None if it is one, or cannot be read."""
    with ByteStream(file) as stream:
        head = stream.read(_HEAD_BYTES)
        is_dump = stream.damage or not head or _ROOT.search(head)
    return None if is_dump else "is XML, but no dump of MediaWiki"


def read_mediawiki(file_range: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the pages from byte `start` on. The id of a document is that of its page."""
    file, begin = file_range.file, start or 0
    with ByteStream(file) as stream:
        names = _NAMESPACE.findall(stream.read(_HEAD_BYTES))
    cleaner = WikitextCleaner([name.decode(errors="replace") for name in names])
    with ByteStream(file, begin) as stream:
        scanner = _PageScanner(stream, begin, options.max_record_bytes)
        while not scanner.at_end:
            builder = BatchBuilder(file.name, options)
            stop = scanner.offset + BATCH_BYTES
            for _ in range(BATCH_RECORDS):
                if page := scanner.next_page():
                    _add(page, builder, cleaner)
                if scanner.at_end or scanner.offset >= stop:
                    break
            if scanner.at_end and scanner.offset == 0 and not stream.damage:
                builder.reject(0, InvalidRecord("empty", "holds no bytes"), offset=0, length=0, records=0)
            if not builder.is_empty:
                yield builder.batch(END_OF_FILE if scanner.at_end else scanner.offset)


class _Page(NamedTuple):
    """A page of `length` bytes at byte `offset`: its XML, or why it cannot be read."""

    offset: int
    length: int
    data: bytes | InvalidRecord


class _PageScanner:
    """Finds the pages of a stream. `offset` is the byte after the last page."""

    def __init__(self, stream: ByteStream, offset: int, max_bytes: int) -> None:
        self.offset, self.at_end = offset, False
        self._stream, self._max_bytes = stream, max_bytes
        self._data = bytearray()  # from byte `offset` on

    def next_page(self) -> _Page | None:
        """The next page, or why the dump is not whole; None at the end."""
        is_closed = False
        while (at := self._data.find(_PAGE)) < 0:
            is_closed = is_closed or _ROOT_END in self._data
            self._drop(max(len(self._data) - len(_ROOT_END) + 1, 0))
            if not self._advance():
                self._drop(len(self._data))
                cut = (
                    None if is_closed or not self.offset else InvalidRecord("truncated", "the dump has no end tag")
                )
                why = self._stream.damage or cut
                return _Page(self.offset, 0, why) if why else None
        self._drop(at)
        begin, dropped, at = self.offset, 0, len(_PAGE)
        while not (tag := _PAGE_TAG.search(self._data, at)):
            at = max(len(self._data) - len(_PAGE_END) + 1, at)
            if at > self._max_bytes:
                dropped += at - len(_PAGE)
                del self._data[len(_PAGE) : at]
                at = len(_PAGE)
            if not self._advance():
                break
        is_whole = tag is not None and tag[0] == _PAGE_END
        end = len(self._data) if tag is None else tag.end() if is_whole else tag.start()
        data, length = bytes(self._data[:end]), dropped + end
        self.offset += dropped
        self._drop(end)
        if tag is None:
            return _Page(
                begin, length, self._stream.damage or InvalidRecord("truncated", "the file ends in this page")
            )
        if not is_whole:
            return _Page(begin, length, InvalidRecord("damaged", "another page begins before the end of this one"))
        if length > self._max_bytes:
            error = f"the page has {length} bytes, expected at most {self._max_bytes} (max_record_bytes)"
            return _Page(begin, length, InvalidRecord("too_long", error))
        return _Page(begin, length, data)

    def _drop(self, count: int) -> None:
        del self._data[:count]
        self.offset += count

    def _advance(self) -> bool:
        """Reads the next chunk of the stream, and returns whether there is one."""
        chunk = self._stream.read(_CHUNK_BYTES)
        self._data += chunk
        self.at_end = not chunk
        return bool(chunk)


def _add(page: _Page, builder: BatchBuilder, cleaner: WikitextCleaner) -> None:
    """Adds a page as a document, counts it if it is none, and rejects it if it is damaged."""
    offset, length, data = page
    try:
        if isinstance(data, InvalidRecord):
            raise data
        fields = _parse(data)
        if fields.get("ns", "0") != "0":
            builder.skip("namespace")
        elif "redirect" in fields:
            builder.skip("redirect")
        elif fields.get("revision/model", "wikitext") != "wikitext":
            builder.skip("content_model")
        elif not fields.get("revision/text"):
            raise InvalidRecord("text_missing", "the page has no text; a dump of stubs holds none")
        else:
            names = {"title": "title", "timestamp": "revision/timestamp"}
            metadata = {name: fields[field] for name, field in names.items() if field in fields}
            id_ = fields.get("id") or f"{builder.source}:{offset}"
            builder.add_text(offset, id_, cleaner.to_text(fields["revision/text"]), metadata)
    except InvalidRecord as why:
        raw = data if isinstance(data, bytes) else None
        builder.reject(offset, why, offset=offset, length=length, raw=raw)


def _parse(data: bytes) -> dict[str, str]:
    """The text of each element of a page by its path, such as "revision/text"; of several revisions, the last.

    Raises InvalidRecord if it is not XML.
    """
    path: list[str] = []
    values: dict[str, list[str]] = {}

    def start(name: str, _: dict[str, str]) -> None:
        path.append(name)
        if len(path) > _MAX_DEPTH:
            raise InvalidRecord("not_xml", f"the page has more than {_MAX_DEPTH} elements in each other")
        values["/".join(path[1:])] = []

    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: path.pop()
    parser.CharacterDataHandler = lambda text: values["/".join(path[1:])].append(text)
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InvalidRecord(
            "not_xml", f"the page is not XML: {error}; nothing but XML's own entities may occur"
        ) from None
    return {name: "".join(parts) for name, parts in values.items()}
