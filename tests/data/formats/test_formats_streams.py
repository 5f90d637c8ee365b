"""Compressed files: every byte before damage is read, and the damage is one entry."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import zlib

import pytest
import zstandard

from deepseek_v3.data.formats import streams
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import Decompressor
from helpers.formats import read, reasons, texts, write

WORDS = random.Random(0)
LINES = [json.dumps({"text": f"{number} " + WORDS.randbytes(20).hex()}).encode() for number in range(60)]
COMPRESSIONS = {compression.name: compression for compression in streams.COMPRESSIONS}
DATA = b"\n".join(LINES) + b"\n"
COMPRESS = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}
DECODERS = {
    "gz": lambda: zlib.decompressobj(31),
    "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "xz": lzma.LZMADecompressor,
    "bz2": bz2.BZ2Decompressor,
}


def decodable(kind: str, data: bytes) -> bytes:
    """The output of the library for a single member, fed byte by byte until it fails."""
    decoder, parts = DECODERS[kind](), []
    try:
        for value in data:
            if decoder.eof:
                break
            parts.append(decoder.decompress(bytes([value])))
    except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError):
        pass
    return b"".join(parts)


def decompress(kind: str, data: bytes, **changes: int) -> tuple[bytes, str | None]:
    """Everything that can be decompressed, and the reason of a damage."""
    decompressor, parts = Decompressor(io.BytesIO(data), COMPRESSIONS[kind]._replace(**changes)), []
    try:
        while chunk := decompressor.next_chunk():
            parts.append(chunk)
    except InvalidRecord as damage:
        if damage.reason == "damaged":
            parts.append(decompressor.rest_before_damage(io.BytesIO(data)))
        return b"".join(parts), damage.reason
    return b"".join(parts), None


@pytest.mark.parametrize("kind", COMPRESS)
def test_several_members_and_trailing_zeros_are_read(kind):
    half = len(DATA) // 2
    packed = COMPRESS[kind](DATA[:half]) + COMPRESS[kind](b"") + COMPRESS[kind](DATA[half:])
    assert decompress(kind, packed) == (DATA, None)
    assert decompress(kind, packed + b"\0" * 100) == (DATA, None)
    assert decompress(kind, packed + b"junk")[0] == DATA
    assert decompress(kind, packed + b"junk behind the end")[1] == "damaged"
    assert decompress(kind, b"") == (b"", None)


@pytest.mark.parametrize("kind", COMPRESS)
def test_output_is_bounded_at_any_compression_ratio(kind, monkeypatch):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 1000)
    data = b"a" * 10**6
    decompressor = Decompressor(io.BytesIO(COMPRESS[kind](data)), COMPRESSIONS[kind])
    sizes = []
    while chunk := decompressor.next_chunk():
        sizes.append(len(chunk))
    assert sum(sizes) == len(data)
    if kind != "zst":
        assert max(sizes) <= 1000


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_file_cut_short_gives_all_that_can_be_decoded(kind):
    packed = COMPRESS[kind](DATA)
    for cut in range(1, len(packed), 17):
        assert decompress(kind, packed[:cut]) == (decodable(kind, packed[:cut]), "truncated")


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("feed", [50, 2**16])
def test_a_corrupt_file_gives_all_that_can_be_decoded(kind, feed):
    packed = COMPRESS[kind](DATA)
    found = set()
    for place in range(0, len(packed), 23):
        corrupt = bytearray(packed)
        corrupt[place] ^= 0x55
        data, reason = decompress(kind, bytes(corrupt), feed_bytes=feed)
        assert data == decodable(kind, bytes(corrupt))
        found.add(reason)
    assert "damaged" in found


@pytest.mark.parametrize("kind", COMPRESS)
def test_records_before_a_damage_are_kept(tmp_path, kind):
    packed = COMPRESS[kind](DATA) * 2
    cut = len(packed) - len(packed) // 4
    expected = DATA + decodable(kind, packed[len(packed) // 2 : cut])
    records, quarantined = read(write(tmp_path / f"a.jsonl.{kind}", packed[:cut]))
    assert texts(records) == [json.loads(line)["text"] for line in expected.split(b"\n")[:-1]]
    (entry,) = quarantined
    assert entry["reason"] == "truncated"
    unfinished = expected[expected.rindex(b"\n") + 1 :]
    assert (entry["raw"] or b"") == unfinished
    assert entry["offset"] == len(expected) - len(unfinished)


def test_a_whole_last_line_before_damage_is_a_record(tmp_path):
    packed = gzip.compress(DATA[:-1])
    corrupt = packed[:-5] + bytes([packed[-5] ^ 1]) + packed[-4:]
    records, quarantined = read(write(tmp_path / "a.jsonl.gz", corrupt))
    assert len(records) == len(LINES)
    assert reasons(quarantined) == ["damaged"]
    assert quarantined[0]["place"] == len(DATA) - 1


def test_a_wrong_suffix_is_quarantined(tmp_path):
    for kind in COMPRESS:
        records, quarantined = read(write(tmp_path / f"a.jsonl.{kind}", DATA))
        assert (records, reasons(quarantined)) == ([], ["damaged"])
        assert kind in quarantined[0]["error"]


def test_frames_with_long_windows_and_skippable_frames_are_read():
    long = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    )
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    packed = (
        skippable
        + long.compressobj().compress(b"")
        + b"".join((lambda stream: [stream.compress(DATA), stream.flush()])(long.compressobj()))
    )
    assert decompress("zst", packed) == (DATA, None)
