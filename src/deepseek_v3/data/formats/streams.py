"""Input files as streams of decompressed bytes, from a disk or a store.

A damaged file yields every byte before its damage. Decompression takes bounded memory, whatever the file holds. To
add a compression, add a line to `COMPRESSIONS`.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import fsspec
import zstandard

from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.utils.errors import DataError, resource_problem
from deepseek_v3.utils.redaction import redact

_CHUNK_BYTES = 2**20  # the most bytes that a decoder returns at a time, except for Zstandard
_SKIP_BYTES = 2**20
_CORRUPT = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, ValueError, EOFError)


class _Decoder(Protocol):
    """Decompresses one member (gzip), stream (xz, bzip2) or frame (Zstandard), as lzma and bz2 do."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """zlib behind the interface of lzma and bz2."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


class _ZstdDecoder:
    """Zstandard behind the interface of lzma and bz2. It ignores `max_length`: a byte gives at most 32 KB."""

    needs_input = True

    def __init__(self) -> None:
        # Windows up to 2 GiB, as `zstd --long=31` writes them.
        self._zstd = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    @property
    def eof(self) -> bool:
        return self._zstd.eof

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:  # noqa: ARG002
        return self._zstd.decompress(data)


class Compression(NamedTuple):
    """A compression: its name, suffixes and decoder, which gets `feed_bytes` compressed bytes at a time."""

    name: str
    suffixes: tuple[str, ...]
    decoder: Callable[[], Any]
    feed_bytes: int = 2**16


COMPRESSIONS = (
    Compression("gz", (".gz",), _GzipDecoder),
    Compression("zst", (".zst", ".zstd"), _ZstdDecoder, feed_bytes=2**12),
    Compression("xz", (".xz",), lzma.LZMADecompressor),
    Compression("bz2", (".bz2",), bz2.BZ2Decompressor),
)
_SHORT = {".tgz": ".tar.gz", ".tzst": ".tar.zst", ".txz": ".tar.xz", ".tbz2": ".tar.bz2", ".tbz": ".tar.bz2"}
_PART_OF_DUMP = re.compile(r"\.xml-p\d+p\d+")  # of MediaWiki: the numbers of its first and last page
_BY_SUFFIX = {suffix: compression for compression in COMPRESSIONS for suffix in compression.suffixes}


def split_suffix(name: str) -> tuple[str, Compression | None]:
    """The suffix of a file's name in lower case, without that of a compression, and the compression."""
    stem, suffix = _split_off_suffix(name.rpartition("/")[2].lower())
    if suffix in _SHORT:
        stem, suffix = _split_off_suffix(stem + _SHORT[suffix])
    compression = _BY_SUFFIX.get(suffix)
    suffix = _split_off_suffix(stem)[1] if compression else suffix
    return ".xml" if _PART_OF_DUMP.fullmatch(suffix) else suffix, compression


def _split_off_suffix(name: str) -> tuple[str, str]:
    """What `PurePath.stem` and `PurePath.suffix` give, in a tenth of the time: folders hold many files."""
    at = name.rfind(".")
    return (name[:at], name[at:]) if 0 < at < len(name) - 1 else (name, "")


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    `name` is its path below the input and unique among all files, `path` an absolute local path or an address such
    as s3://bucket/key, `size` its size in bytes, `modified` its modification time in ns, or what the store gives as
    the version of the object. `state` is the inode of a local file and the time in ns at which its content, name or
    permissions changed last, which no program can set back.
    """

    name: str
    path: str
    size: int
    modified: str
    state: str = ""

    @property
    def compression(self) -> Compression | None:
        """How the file is compressed, by its suffix."""
        return split_suffix(self.name)[1]

    @property
    def is_remote(self) -> bool:
        """Whether `path` is an address, which fsspec opens."""
        return "://" in self.path


class Decompressor:
    """Decompresses a file of one or more members, one after the other."""

    def __init__(self, raw: BinaryIO, compression: Compression) -> None:
        self._raw, self._compression = raw, compression
        self._decoder: _Decoder | None = None
        self._input = b""
        self._chunks = 0
        self._members = 0

    def next_chunk(self) -> bytes:
        """The next bytes, usually some hundred KB; empty at the end.

        Raises InvalidRecord if the data are truncated or damaged, and OSError if the file cannot be read.
        """
        chunk = self._next(self._compression.feed_bytes)
        self._chunks += 1
        return chunk

    def rest_before_damage(self, raw: BinaryIO) -> bytes:
        """The bytes before the damage that made `next_chunk` fail.

        `raw` is the same file, opened again. The failed chunk is decompressed again, byte by byte.
        """
        again = Decompressor(raw, self._compression)
        for _ in range(self._chunks):
            again.next_chunk()
        rest = []
        try:
            while byte := again._next(1):
                rest.append(byte)
        except InvalidRecord:
            pass
        return b"".join(rest)

    def _next(self, feed: int) -> bytes:
        while self._decoder is not None or self._begins_member(feed):
            assert self._decoder is not None
            if self._decoder.needs_input and not self._input:
                self._input = self._raw.read(feed)
            at_end = self._decoder.needs_input and not self._input
            data, self._input = (self._input, b"") if self._decoder.needs_input else (b"", self._input)
            chunk = self._decompress(self._decoder, data)
            if self._decoder.eof:
                self._input, self._decoder = self._decoder.unused_data, None
                self._members += 1
            elif at_end and not chunk:
                raise InvalidRecord("truncated", f"the {self._compression.name} data end before their end")
            if chunk:
                return chunk
        return b""

    def _decompress(self, decoder: _Decoder, data: bytes) -> bytes:
        try:
            return decoder.decompress(data, _CHUNK_BYTES)
        except _CORRUPT as error:
            if resource_problem(error):
                raise
            where = f"after member {self._members}: " if self._members else ""
            raise InvalidRecord(
                "damaged", f"the {self._compression.name} data are corrupt: {where}{error}"
            ) from None

    def _begins_member(self, feed: int) -> bool:
        """Starts the next member, and returns whether there is one. Zeros may pad a file after its first member."""
        while True:
            if self._members:
                self._input = self._input.lstrip(b"\0")
            if self._input:
                self._decoder = self._compression.decoder()
                return True
            self._input = self._raw.read(feed)
            if not self._input:
                return False


def open_raw(file: InputFile) -> BinaryIO:
    """Opens a file without decompressing it. Raises OSError, and DataError if a store fails in another way."""
    if file.is_remote:
        try:
            return cast(BinaryIO, fsspec.open(file.path, "rb").open())
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 -- each store's library raises its own types of errors
            raise _store_failure(file, error) from None
    return Path(file.path).open("rb")


def read_failure(file: InputFile, error: OSError) -> InvalidRecord:
    """The quarantine entry for a file that vanished, or that the disk cannot read.

    Raises the error itself if the machine lacks a resource or a permission, and DataError for any other failure of
    a store, which may be temporary.
    """
    if not file.is_remote and resource_problem(error):
        raise error
    if file.is_remote and not isinstance(error, (FileNotFoundError, PermissionError)):
        raise _store_failure(file, error) from None
    return InvalidRecord("unreadable", redact(f"cannot be read: {error.strerror or error}", file.path))


def _store_failure(file: InputFile, error: Exception) -> DataError:
    problem = f"{file.path}: cannot be read: {error}; start again once the store answers"
    return DataError(redact(problem, file.path))


class ByteStream:
    """The decompressed bytes of a file from byte `start` on, inside a `with` block.

    In a damaged file the stream ends before the damage, and `damage` then describes it.
    """

    def __init__(self, file: InputFile, start: int = 0) -> None:
        self.damage: InvalidRecord | None = None
        self._file = file
        self._raw: BinaryIO | None = None
        self._decompressor: Decompressor | None = None
        self._buffer, self._at = b"", 0  # bytes read ahead, and the index of the next one to return
        try:
            self._raw = open_raw(file)
            if file.compression:
                self._decompressor = Decompressor(self._raw, file.compression)
            else:
                self._raw.seek(start)
        except OSError as error:
            self.damage = read_failure(file, error)
        if self._decompressor:
            self._skip(start)

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._raw is not None:
            self._raw.close()

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        missing = self._at + size - len(self._buffer)
        if missing > 0:
            parts = [self._buffer[self._at :]] if self._at < len(self._buffer) else []
            while missing > 0 and (chunk := self._next(missing)):
                parts.append(chunk)
                missing -= len(chunk)
            self._buffer, self._at = b"".join(parts), 0
        data = self._buffer[self._at : self._at + size]
        self._at += len(data)
        return data

    def unread(self, count: int) -> None:
        """Goes back `count` bytes, at most as many as the last `read` returned."""
        self._at -= count

    def _skip(self, size: int) -> None:
        while size > 0 and (data := self.read(min(size, _SKIP_BYTES))):
            size -= len(data)

    def _next(self, size: int) -> bytes:
        if self._raw is None or self.damage:
            return b""
        try:
            return self._decompressor.next_chunk() if self._decompressor else self._raw.read(size)
        except OSError as error:
            self.damage = read_failure(self._file, error)
        except InvalidRecord as damage:
            self.damage = damage
            if damage.reason == "damaged" and self._decompressor:
                with open_raw(self._file) as raw:
                    return self._decompressor.rest_before_damage(raw)
        except Exception as error:
            if not self._file.is_remote:
                raise
            raise _store_failure(self._file, error) from None
        return b""
