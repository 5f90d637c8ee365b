"""Megatron-LM's datasets, compared with a reader and a writer made from the description of the format alone."""

import os
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.tokens.megatron_dataset import MegatronDataset
from deepseek_v3.data.tokens.megatron_index import MegatronIndex
from deepseek_v3.data.tokens.megatron_writer import MegatronWriter
from deepseek_v3.utils.errors import DataError
from helpers.megatron import CODES, DOCUMENTS, their_read, their_write

pytestmark = pytest.mark.usefixtures("no_fsync")


def our_write(prefix: Path, documents=DOCUMENTS, dtype: str = "int32", modes: list[int] | None = None) -> Path:
    left = iter(modes or [])
    with MegatronWriter(prefix, dtype, multimodal=modes is not None) as writer:
        for document in documents:
            for sequence in document:
                writer.add(sequence, next(left, 0))
            writer.end_document()
    return prefix


def our_read(prefix: Path) -> list[list[list[int]]]:
    dataset = MegatronDataset(prefix)
    index = dataset.index
    sequences = [dataset.sequence(number).tolist() for number in range(index.num_sequences)]
    starts = [index.sequence_start(number) for number in range(index.num_sequences + 1)]
    assert starts == [sum(map(len, sequences[:number])) for number in range(index.num_sequences + 1)]
    return sequences


def error_of(prefix: Path) -> str:
    with pytest.raises(DataError) as caught:
        MegatronDataset(prefix)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return their_write(tmp_path / "v1.5_text_document")


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [None, [0, 1, 0, 2, 0, 127]])
def test_files_of_every_type_are_those_of_the_format(tmp_path, dtype, modes):
    theirs, ours = (
        their_write(tmp_path / "theirs", dtype=dtype, modes=modes),
        our_write(tmp_path / "ours", dtype=dtype, modes=modes),
    )
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
    assert their_read(ours) == (DOCUMENTS, dtype, modes or [])
    dataset = MegatronDataset(theirs)
    assert our_read(theirs) == [sequence for document in DOCUMENTS for sequence in document]
    assert [dataset.document(number).tolist() for number in range(4)] == [[*chain(*each)] for each in DOCUMENTS]
    assert dataset.read(3, 5).tolist() == [4, 5, 6, 7, 8]
    assert dataset.index.dtype == np.dtype(dtype)
    assert dataset.index.modes(0, 6).tolist() == (modes or [0] * 6)
    assert dataset.index.has_other_modes() == bool(modes)


@given(st.lists(st.lists(st.lists(st.integers(-128, 127), max_size=5), max_size=4), max_size=8), st.integers(1, 3))
def test_any_documents_come_back(tmp_path_factory, documents, block):
    documents = [*documents, [[9]]]
    tokens = [token for document in documents for sequence in document for token in sequence]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("index", "writer"):
            patch.setattr(f"deepseek_v3.data.tokens.megatron_{module}._BLOCK", block)
        prefix = our_write(tmp_path_factory.mktemp("any") / "x", documents, "int8")
        assert their_read(prefix)[0] == documents
        index = MegatronDataset(prefix).index
        starts = [index.document_start(number) for number in range(len(documents) + 1)]
        assert starts == [sum(len(s) for d in documents[:n] for s in d) for n in range(len(documents) + 1)]
        for token in range(len(tokens)):
            found = index.document_at(token)
            assert starts[found] <= token < starts[found + 1]


def test_a_large_index_takes_little_memory(tmp_path, monkeypatch):
    """Entries are read in blocks, and none is kept."""
    prefix, count, most = tmp_path / "many", 30_000, []
    with MegatronWriter(prefix, "uint8") as writer:
        for _ in range(count):
            writer.add([7])
            writer.end_document()
    monkeypatch.setattr("deepseek_v3.data.tokens.megatron_index._BLOCK", 512)
    read = os.pread
    monkeypatch.setattr("os.pread", lambda file, size, at: most.append(size) or read(file, size, at))
    index = MegatronIndex(prefix, count)
    assert max(most) <= 8 * 512
    assert index.document_at(count - 1) == count - 1
    held = [value for value in vars(index).values() if isinstance(value, list | tuple | np.ndarray | bytes)]
    assert held == []


def test_a_dataset_that_is_removed_is_still_read(prefix):
    dataset = MegatronDataset(prefix)
    before = dataset.checksum()
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").unlink()
    assert dataset.document(3).tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert dataset.checksum() == before


def test_the_checksum_knows_every_byte_of_a_small_dataset(tmp_path):
    checksums = {MegatronDataset(their_write(tmp_path / "x", dtype="int64")).checksum()}
    for number in range(11):
        data = bytearray(Path(tmp_path / "x.bin").read_bytes())
        data[8 * number] ^= 1
        (tmp_path / "x.bin").write_bytes(data)
        checksums.add(MegatronDataset(tmp_path / "x").checksum())
    assert len(checksums) == 12


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_the_checksum_reads_the_ends_of_a_large_dataset(tmp_path, monkeypatch, blocks):
    monkeypatch.setattr("deepseek_v3.data.tokens.megatron_dataset._BLOCK_BYTES", 3)
    monkeypatch.setattr("deepseek_v3.data.tokens.megatron_dataset._BLOCKS", blocks)
    prefix = their_write(tmp_path / "x", [[[5] * 31]], "uint8")
    before = MegatronDataset(prefix).checksum()
    for place in [0, 30] if blocks > 1 else [0]:
        data = bytearray([5] * 31)
        data[place] = 6
        Path(f"{prefix}.bin").write_bytes(data)
        assert MegatronDataset(prefix).checksum() != before


def edit(prefix: Path, layout: str, at: int, value: int) -> None:
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into(layout, index, at, value)
    Path(f"{prefix}.idx").write_bytes(index)


# The index of DOCUMENTS has 6 sequences and 5 entries of documents: sizes at 34, pointers at 58, documents at 106.
@pytest.mark.parametrize(
    ("layout", "at", "value", "expected"),
    [
        ("<B", 0, 77 + 1, "begins with b'NMIDIDX"),
        ("<Q", 9, 2, "has version 2, expected 1"),
        ("<B", 17, 7, "type float32 (code 7), expected an integer type: uint8 (1), int8 (2)"),
        ("<B", 17, 6, "type float64 (code 6)"),
        ("<B", 17, 9, "type code 9"),
        ("<B", 17, 0, "type code 0"),
        ("<B", 17, 5, "sequence 1 begins at byte 12, expected 24"),
        ("<Q", 18, 5, "holds 146 bytes, expected"),
        ("<Q", 18, 2**63, "holds 146 bytes, expected"),
        ("<Q", 26, 0, "holds no document"),
        ("<Q", 26, 1, "holds no document"),
        ("<Q", 26, 2**64 - 1, "holds 146 bytes, expected"),
        ("<i", 34, -3, "sequence 0 has -3 tokens, expected 0 or more"),
        ("<i", 34, 4, "sequence 1 begins at byte 12, expected 16"),
        ("<i", 34, 2**31 - 1, "sequence 0 takes the bytes 0 to 8589934588 of"),
        ("<i", 54, 5, "sequence 5 takes the bytes 28 to 48 of"),
        ("<i", 54, 3, "its sizes add up to 40 bytes, and"),
        ("<q", 58, 4, "sequence 0 begins at byte 4, expected 0"),
        ("<q", 66, -8, "sequence 1 takes the bytes -8 to -8 of"),
        ("<q", 98, 2**62, "which holds 44"),
        ("<q", 106, 1, "document 0 begins with sequence 1, expected 0"),
        ("<q", 114, 4, "entry 2 of its documents is sequence 3, expected 4 to 6"),
        ("<q", 114, 7, "entry 1 of its documents is sequence 7, expected 0 to 6"),
        ("<q", 122, -1, "entry 2 of its documents is sequence -1, expected 1 to 6"),
        ("<q", 138, 5, "its documents end with sequence 5, expected the last, 6"),
    ],
)
def test_a_damaged_index_is_refused_by_name(prefix, layout, at, value, expected):
    edit(prefix, layout, at, value)
    message = error_of(prefix)
    assert message.startswith(f"{prefix}.idx: ")
    assert expected in message


def test_documents_are_compared_across_blocks(prefix, monkeypatch):
    monkeypatch.setattr("deepseek_v3.data.tokens.megatron_index._BLOCK", 3)
    edit(prefix, "<q", 130, 2)
    assert "entry 3 of its documents is sequence 2, expected 3 to 6" in error_of(prefix)


def test_files_that_are_cut_short_are_refused(prefix):
    index, data = (Path(f"{prefix}{suffix}").read_bytes() for suffix in (".idx", ".bin"))
    for length in (*range(len(index)), len(index) + 1):
        Path(f"{prefix}.idx").write_bytes((index + b"\0")[:length])
        assert f"{prefix}.idx: " in error_of(prefix)
    Path(f"{prefix}.idx").write_bytes(index)
    for length in (*range(len(data)), len(data) + 1):
        Path(f"{prefix}.bin").write_bytes((data + b"\0")[:length])
        assert f"{prefix}.bin" in error_of(prefix)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, missing):
    Path(f"{prefix}{missing}").unlink()
    there = ".idx" if missing == ".bin" else ".bin"
    message = error_of(prefix)
    assert message.startswith(f"{prefix}{missing}: does not exist; expected both PREFIX.bin and PREFIX.idx")
    assert message.endswith(f"found {prefix}{there}")


def test_a_prefix_with_a_suffix_is_explained(prefix):
    message = error_of(Path(f"{prefix}.bin"))
    assert message == f"{prefix}.bin: expected the prefix of the dataset, {prefix}, without a suffix"
    assert "found neither" in error_of(prefix.parent / "nothing")
    assert "expected the prefix" in error_of(Path("/"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_pipe_or_a_folder_is_refused(prefix, suffix):
    path = Path(f"{prefix}{suffix}")
    path.unlink()
    os.mkfifo(path)
    assert error_of(prefix).startswith(f"{path}: is not a regular file")
    path.unlink()
    path.mkdir()
    assert error_of(prefix).startswith(f"{path}: is not a regular file")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(prefix):
    dataset = MegatronDataset(prefix)
    os.truncate(f"{prefix}.bin", 9)
    with pytest.raises(DataError, match=r"\.bin: has become shorter while it was in use"):
        dataset.document(3)


@pytest.mark.parametrize("documents", [[], [[]], [[[]], [[], []]]])
def test_a_dataset_without_tokens_is_refused(tmp_path, documents):
    prefix = our_write(tmp_path / "x", documents)
    assert their_read(prefix)[0] == documents
    expected = "hold no token" if documents else "holds no document"
    assert expected in error_of(prefix)


def test_an_entry_outside_the_dataset_is_refused(prefix):
    dataset = MegatronDataset(prefix)
    for number in (-1, 6):
        with pytest.raises(IndexError, match=f"number {number}, expected 0 to 5"):
            dataset.sequence(number)
    with pytest.raises(IndexError, match="number 4, expected 0 to 3"):
        dataset.document(4)


@pytest.mark.parametrize(("dtype", "ids"), [("uint16", [3, 2**16]), ("uint8", [-1]), ("int8", [128])])
def test_an_id_that_does_not_fit_is_not_written(tmp_path, dtype, ids):
    with pytest.raises(DataError, match=f"do not fit {dtype}"):
        our_write(tmp_path / "x", [[[1]], [ids]], dtype)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_failed_write(tmp_path):
    with pytest.raises(KeyboardInterrupt), MegatronWriter(tmp_path / "x", "int32") as writer:  # noqa: PT012
        writer.add([1])
        raise KeyboardInterrupt
    with (
        pytest.raises(DataError, match="the last document was not ended"),
        MegatronWriter(tmp_path / "x", "int32") as writer,
    ):
        writer.add([1])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="dtype = float32: expected one of uint8"):
        MegatronWriter(tmp_path / "x", "float32")
