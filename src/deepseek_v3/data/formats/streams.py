"""A file as the stream of its decompressed bytes, wherever it lies and however it is damaged.

FOLDED: Decompressing piece by piece, in bounded memory, up to the very byte at which a file is damaged.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, cast

import fsspec
import zstandard

from deepseek_v3.data.formats.file_types import Compression
from deepseek_v3.data.formats.inputs import InputFile
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.redaction import redact


class _Decoder(Protocol):
    """Decompresses one member (gzip), stream (xz, bzip2) or frame (Zstandard)."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gunzip:
    """zlib as lzma and bz2 offer themselves."""

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


class _Unzstd:
    """Zstandard as lzma and bz2 offer themselves; its output is bounded by its input alone: 32 KB for each byte."""

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


_DECODERS: dict[Compression, Callable[[], Any]] = {
    "gz": _Gunzip,
    "zst": _Unzstd,
    "xz": lzma.LZMADecompressor,
    "bz2": bz2.BZ2Decompressor,
}
_FEED_BYTES = {"gz": 2**16, "zst": 2**12, "xz": 2**16, "bz2": 2**16}
_PIECE_BYTES = 2**20
_CORRUPT = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, ValueError, EOFError)


class Decompressor:
    """Decompresses a file of any number of members, one after the other."""

    def __init__(self, raw: BinaryIO, compression: Compression) -> None:
        self._raw, self._compression = raw, compression
        self._decoder: _Decoder | None = None
        self._input = b""
        self._pieces = 0
        self._members = 0

    def next_chunk(self) -> bytes:
        """The next bytes, some hundred KB; none at the end.

        Raises InvalidRecord where the data are truncated or damaged, and OSError where the file cannot be read.
        """
        piece = self._next(_FEED_BYTES[self._compression])
        self._pieces += 1
        return piece

    def rest_before_damage(self, raw: BinaryIO) -> bytes:
        """What a failed `next_chunk` might have given, feeding byte after byte of the file opened anew."""
        again = Decompressor(raw, self._compression)
        for _ in range(self._pieces):
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
            piece = self._decompress(self._decoder, data)
            if self._decoder.eof:
                self._input, self._decoder = self._decoder.unused_data, None
                self._members += 1
            elif at_end and not piece:
                raise InvalidRecord("truncated", f"the {self._compression} data end before their end")
            if piece:
                return piece
        return b""

    def _decompress(self, decoder: _Decoder, data: bytes) -> bytes:
        try:
            return decoder.decompress(data, _PIECE_BYTES)
        except _CORRUPT as error:
            where = f"behind member {self._members}: " if self._members else ""
            raise InvalidRecord("damaged", f"the {self._compression} data are corrupt: {where}{error}") from None

    def _begins_member(self, feed: int) -> bool:
        """Whether there is a member more. Zeros may pad a file behind its first."""
        while True:
            if self._members:
                self._input = self._input.lstrip(b"\0")
            if self._input:
                self._decoder = _DECODERS[self._compression]()
                return True
            self._input = self._raw.read(feed)
            if not self._input:
                return False


_SKIP_BYTES = 2**20


def open_raw(file: InputFile) -> BinaryIO:
    """Opens a file as it is stored. Raises OSError."""
    if file.is_remote:
        try:
            return cast(BinaryIO, fsspec.open(file.path, "rb").open())
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 -- each store's library has errors of its own
            raise _unanswered(file, error) from None
    return Path(file.path).open("rb")


def read_failure(file: InputFile, error: OSError) -> InvalidRecord:
    """The entry for a file that the disk or the store does not give.

    Raises DataError instead where a store fails otherwise than by refusing the file: that may be over by and by.
    """
    if file.is_remote and not isinstance(error, (FileNotFoundError, PermissionError)):
        raise _unanswered(file, error) from None
    return InvalidRecord("unreadable", redact(f"cannot be read: {error.strerror or error}", file.path))


def _unanswered(file: InputFile, error: Exception) -> DataError:
    problem = f"{file.path}: cannot be read: {error}; start again once the store answers"
    return DataError(redact(problem, file.path))


class ByteStream:
    """The decompressed bytes of a file, from byte `start` on, inside a `with` block.

    Where the file is damaged the stream ends before the damage, which `damage` then names.
    """

    def __init__(self, file: InputFile, start: int = 0) -> None:
        self.damage: InvalidRecord | None = None
        self._file = file
        self._raw: BinaryIO | None = None
        self._decompressor: Decompressor | None = None
        self._held, self._at = b"", 0  # what was read of the file last, and how much of it was given
        compression = file.format.compression
        try:
            self._raw = open_raw(file)
            if compression:
                self._decompressor = Decompressor(self._raw, compression)
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
        missing = self._at + size - len(self._held)
        if missing > 0:
            parts = [self._held[self._at :]] if self._at < len(self._held) else []
            while missing > 0 and (piece := self._next(missing)):
                parts.append(piece)
                missing -= len(piece)
            self._held, self._at = b"".join(parts), 0
        data = self._held[self._at : self._at + size]
        self._at += len(data)
        return data

    def unread(self, count: int) -> None:
        """Goes back `count` bytes of what was read last."""
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
            raise _unanswered(self._file, error) from None
        return b""
