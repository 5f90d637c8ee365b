"""Decompressing piece by piece, in bounded memory, up to the very byte at which a file is damaged."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import zstandard

from deepseek_v3.data.formats.names import Compression
from deepseek_v3.data.formats.quarantine import Rejected


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

    def next_piece(self) -> bytes:
        """The next bytes, some hundred KB; none at the end.

        Raises Rejected where the data are truncated or damaged, and OSError where the file cannot be read.
        """
        piece = self._next(_FEED_BYTES[self._compression])
        self._pieces += 1
        return piece

    def rest_before_damage(self, raw: BinaryIO) -> bytes:
        """What a failed `next_piece` might have given, feeding byte after byte of the file opened anew."""
        again = Decompressor(raw, self._compression)
        for _ in range(self._pieces):
            again.next_piece()
        rest = []
        try:
            while byte := again._next(1):
                rest.append(byte)
        except Rejected:
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
                raise Rejected("truncated", f"the {self._compression} data end before their end")
            if piece:
                return piece
        return b""

    def _decompress(self, decoder: _Decoder, data: bytes) -> bytes:
        try:
            return decoder.decompress(data, _PIECE_BYTES)
        except _CORRUPT as error:
            where = f"behind member {self._members}: " if self._members else ""
            raise Rejected("damaged", f"the {self._compression} data are corrupt: {where}{error}") from None

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
