"""The members of a tar archive (V7, ustar, GNU and pax), found in a stream of bytes.

`tarfile` parses single headers and checks their sums. It is not given the stream, because it keeps every member in
memory, reads extended headers of any size, and ends at the first damaged header.
"""

from __future__ import annotations

import tarfile
from typing import NamedTuple

from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream

_BLOCK = 512
_CHUNK_BYTES = 2**18
_MAX_EXTENDED_BYTES = 2**20  # of a header with a long name or with pax fields
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS_AND_DEVICES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_WITHOUT_DATA = (*_LINKS_AND_DEVICES, tarfile.DIRTYPE)
# Bytes of GNU's map of a sparse file that say whether another block of the map follows: in a header, in a block.
_MORE_IN_HEADER, _MORE_IN_BLOCK = 482, 504


class TarMember(NamedTuple):
    """A member whose first header is at byte `offset`.

    `path` holds a lone surrogate for each byte that is not UTF-8. A regular file (`is_file`) has `size` bytes of
    data, which come next in the stream; the data of any other member were passed.
    """

    offset: int
    path: str
    size: int
    is_file: bool
    is_folder: bool


class TarScanner:
    """Reads the members of an archive one after the other.

    `offset` is the byte after what was read. `at_end` says that nothing follows.
    """

    def __init__(self, stream: ByteStream, offset: int) -> None:
        self.offset, self.at_end = offset, False
        self._stream = stream

    def next_member(self) -> TarMember | None:
        """The next member; `read` or `skip` must take the data of a file. None at the end.

        Raises InvalidRecord where there is no whole header; the next call continues at the next one.
        """
        begin = None
        name: bytes | None = None
        fields: dict[str, bytes] = {}
        while found := self._next_header():
            header, block = found
            begin = self.offset - _BLOCK if begin is None else begin
            if header.type in _LONG:
                value = self._extended(header).partition(b"\0")[0]
                name = value if header.type == tarfile.GNUTYPE_LONGNAME else name
            elif header.type in _PAX:
                fields = _pax_fields(self._extended(header))
            elif header.type == tarfile.XGLTYPE:
                self.skip(header.size)
            else:
                return self._member(header, block, begin, fields.get("path", name), fields)
        return None

    def read(self, size: int) -> bytes:
        """Takes the data of a file. Raises InvalidRecord if the archive ends before their end."""
        data = self._stream.read(size)
        self.offset += len(data)
        self._require(size - len(data))
        self.offset += len(self._stream.read(-size % _BLOCK))
        return data

    def skip(self, size: int) -> None:
        """Passes the data of a file. Raises InvalidRecord if the archive ends before their end."""
        missing = size + -size % _BLOCK
        while missing > 0 and (part := self._stream.read(min(missing, _CHUNK_BYTES))):
            self.offset += len(part)
            missing -= len(part)
        self._require(missing)

    def _require(self, missing: int) -> None:
        if missing > 0:
            self.at_end = True
            cut = InvalidRecord("truncated", f"the archive ends {missing} bytes before the end of this member")
            raise self._stream.damage or cut

    def _next_header(self) -> tuple[tarfile.TarInfo, bytes] | None:
        """The next header with its bytes, after any blocks of zeros; None at the end.

        Raises InvalidRecord after passing everything that is neither, and if no zeros mark the end.
        """
        begin = self.offset
        is_marked = self.offset == 0  # an empty file has no end that could be marked
        while block := self._stream.read(_BLOCK):
            header, is_blank = _parse_header(block), not block.strip(b"\0")
            if (header or is_blank) and begin < self.offset:
                self._stream.unread(len(block))
                break
            self.offset += len(block)
            if header:
                return header, block
            if is_blank:
                begin, is_marked = self.offset, True
        self.at_end = not block
        if self.at_end and self._stream.damage:
            raise self._stream.damage
        if lost := self.offset - begin:
            raise InvalidRecord("damaged", f"expected a header of a tar archive, found {lost} other bytes")
        if self.at_end and not is_marked:
            raise InvalidRecord("truncated", "the archive has no mark of its end; members may be missing")
        return None

    def _extended(self, header: tarfile.TarInfo) -> bytes:
        if header.size > _MAX_EXTENDED_BYTES:
            self.skip(header.size)
            raise InvalidRecord(
                "damaged", f"a name or header has {header.size} bytes, expected at most {_MAX_EXTENDED_BYTES}"
            )
        return self.read(header.size)

    def _member(
        self, header: tarfile.TarInfo, block: bytes, begin: int, name: bytes | None, fields: dict[str, bytes]
    ) -> TarMember:
        path = header.name if name is None else name.decode("utf-8", "surrogateescape")
        size = int(fields.get("size", header.size))
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in fields)
        more = header.type == tarfile.GNUTYPE_SPARSE and block[_MORE_IN_HEADER]
        while more:
            more = self.read(_BLOCK)[_MORE_IN_BLOCK]
        is_file = header.type in _REGULAR and not is_sparse
        if not is_file and header.type not in _WITHOUT_DATA:
            self.skip(size)
        return TarMember(begin, path, size, is_file, header.type == tarfile.DIRTYPE)


def _parse_header(block: bytes) -> tarfile.TarInfo | None:
    """A header with the right checksum; None for anything else."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _pax_fields(data: bytes) -> dict[str, bytes]:
    """The fields of a pax header: `length key=value` each. Raises InvalidRecord if they are malformed."""
    fields: dict[str, bytes] = {}
    at = 0
    try:
        while data[at : at + 1].strip(b"\0"):
            space = data.index(b" ", at, at + 20)
            end = at + int(data[at:space])
            key, equals, value = data[space + 1 : end - 1].partition(b"=")
            if not equals or data[end - 1 : end] != b"\n":
                raise ValueError
            fields[key.decode("utf-8", "replace")] = value
            at = end
        if int(fields.get("size", 0)) < 0:
            raise ValueError
    except ValueError:
        raise InvalidRecord(
            "damaged", f"byte {at} of a pax header begins no field of the form `length key=value`"
        ) from None
    return fields
