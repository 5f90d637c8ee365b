"""Shards return every token, and any damage to them is found."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.tokens.index import CorpusOptions, Shard, ShardIndex
from deepseek_v3.data.tokens.shards import ShardWriter, TokenShards
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.text import format_value

pytestmark = pytest.mark.usefixtures("no_fsync")

OPTIONS = CorpusOptions(source="corpus", text_field="text", holdout=0.1, fim_rate=0.0, seed=0)
TOKENIZER = Tokenizer.train([], 260)
DOCUMENTS = [[4 + (7 * i + j) % 256 for j in range(i % 11)] for i in range(60)]


def write(directory: Path, documents=DOCUMENTS, shard_tokens: int = 50, tokenizer: Tokenizer = TOKENIZER) -> Path:
    """Writes documents to the training split, and two to the hold-out; n tokens have 3·n + 1 bytes of text."""
    with ShardWriter(directory, tokenizer, shard_tokens) as writer:
        for ids in documents:
            writer.add("train", ids, 3 * len(ids) + 1)
        writer.add("holdout", [5, 6], 2)
        writer.add("holdout", [7], 4)
        writer.finish(OPTIONS)
    return directory


def flat(documents) -> list[int]:
    return [token for ids in documents for token in [*ids, TOKENIZER.end_of_text]]


def error_of(directory: Path, verify: bool = True) -> str:
    with pytest.raises(DataError) as caught:
        TokenShards.open(directory, verify)
    return str(caught.value)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(tmp_path)


def edit_index(directory: Path, **changes: object) -> None:
    """Removes the checksum of the index and sets fields; `train__tokens` is that of the first shard."""
    path = directory / "index.json"
    index = json.loads(path.read_text())
    index.pop("index_sha256", None)
    for name, value in changes.items():
        split, _, field = name.partition("__")
        (index[split][0] if field else index)[field or split] = value
    path.write_text(json.dumps(index))


def test_written_shards_can_be_read(directory):
    shards = TokenShards.open(directory)
    assert shards.num_documents("train") == 60
    assert shards.num_tokens("train") == len(flat(DOCUMENTS))
    assert shards.num_bytes("train") == sum(3 * len(ids) + 1 for ids in DOCUMENTS)
    assert shards.read("train", 0, shards.num_tokens("train")).tolist() == flat(DOCUMENTS)
    assert shards.read("holdout", 0, 5).tolist() == [5, 6, 0, 7, 0]
    assert shards.load_tokenizer().to_json() == TOKENIZER.to_json()


def test_the_files_follow_the_format(directory):
    index = json.loads((directory / "index.json").read_text())
    assert {key: index[key] for key in ("format_version", "dtype", "vocab_size", "end_of_text")} == {
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": 260,
        "end_of_text": 0,
    }
    assert index["options"] == OPTIONS.model_dump()
    assert index["tokenizer_sha256"] == hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
    files = [directory / shard["file"] for shard in index["train"]]
    assert files == sorted((directory / "train").iterdir())
    for file, shard in zip(files, index["train"], strict=True):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"]
        tokens = np.fromfile(file, "<u2").tolist()
        assert (len(tokens), tokens.count(0), tokens[-1]) == (shard["tokens"], shard["documents"], 0)


def test_a_shard_ends_with_the_document_that_fills_it(directory):
    for shard in TokenShards.open(directory).index.train[:-1]:
        tokens = np.fromfile(directory / shard.file, "<u2").tolist()
        last_document = tokens[:-1][::-1].index(0) + 1
        assert len(tokens) >= 50 > len(tokens) - last_document


def test_large_vocabularies_take_four_bytes(tmp_path):
    theirs = json.loads(TOKENIZER.to_json())
    theirs["model"]["vocab"]["far"] = 2**16
    write(tmp_path, [[2**16, 4]], tokenizer=Tokenizer.from_json(json.dumps(theirs)))
    shards = TokenShards.open(tmp_path)
    assert shards.index.dtype == "uint32"
    assert (tmp_path / "train/00000.bin").read_bytes() == np.array([2**16, 4, 0], "<u4").tobytes()
    assert shards.read("train", 0, 3).tolist() == [2**16, 4, 0]


@given(
    st.lists(st.lists(st.integers(1, 259), max_size=9), min_size=1, max_size=20),
    st.integers(1, 30),
    st.data(),
)
def test_any_range_is_that_slice_of_the_corpus(tmp_path_factory, documents, shard_tokens, data):
    shards = TokenShards.open(write(tmp_path_factory.mktemp("shards"), documents, shard_tokens))
    tokens = flat(documents)
    start = data.draw(st.integers(0, len(tokens) - 1))
    length = data.draw(st.integers(1, len(tokens) - start))
    assert shards.read("train", start, length).tolist() == tokens[start : start + length]


def test_more_shards_than_stay_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_v3.data.tokens.shards._MAX_OPEN_FILES", 2)
    shards = TokenShards.open(write(tmp_path))
    tokens = flat(DOCUMENTS)
    assert len(shards.index.train) > 3
    assert shards.read("train", 0, len(tokens)).tolist() == tokens
    assert shards.read("train", 0, len(tokens)).tolist() == tokens


@pytest.mark.parametrize(("start", "length"), [(-1, 3), (0, 0), (0, 10**6), (10**6, 1), (5, -2)])
def test_a_range_outside_the_split_is_refused(directory, start, length):
    with pytest.raises(ValueError, match=f"tokens {start} to {start + length} of 'train'"):
        TokenShards.open(directory).read("train", start, length)


def test_tokens_on_disk_cannot_be_changed_through_a_reader(directory):
    with pytest.raises(ValueError, match="read-only"):
        TokenShards.open(directory).read("train", 0, 5)[0] = 1


def test_an_empty_split_is_not_finished(tmp_path):
    with ShardWriter(tmp_path, TOKENIZER) as writer:
        writer.add("train", [5], 1)
        with pytest.raises(DataError, match="corpus: the split 'holdout' holds no document"):
            writer.finish(OPTIONS)
    assert "index.json: cannot be read" in error_of(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_shard_is_found(directory, verify):
    path = directory / "train/00001.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    message = error_of(directory, verify)
    assert f"{path}: holds {size - 1} bytes, expected {size}" in message
    assert "dsv3 tokenize" in message


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_shard_is_found(directory, verify):
    path = directory / "holdout/00000.bin"
    path.unlink()
    expected = f"{path}: cannot be read: No such file or directory; expected a file of 10 bytes"
    assert expected in error_of(directory, verify)


@pytest.mark.parametrize("name", ["train/00000.bin", "train/00002.bin", "holdout/00000.bin", "tokenizer.json"])
def test_one_flipped_bit_is_found(directory, name):
    path = directory / name
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = error_of(directory)
    assert f"{path}: is damaged: its SHA-256 is {hashlib.sha256(data).hexdigest()}, expected {sha256}" in message


def test_a_missing_tokenizer_is_found(directory):
    (directory / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read: No such file" in error_of(directory)


def test_a_shard_that_cannot_be_read_is_named(directory, monkeypatch):
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("deepseek_v3.data.tokens.shards.sha256_of_file", fail)
    assert "tokenizer.json: cannot be read: Input/output error" in error_of(directory)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "file", ["../secret.bin", "/etc/passwd", "train/../../x.bin", "C:\\x.bin", "train/0.bin\n", "other/0.bin", ""]
)
def test_file_names_stay_inside_the_directory(directory, file, verify):
    edit_index(directory, train__file=file)
    message = error_of(directory, verify)
    assert f"{directory / 'index.json'}: train.0.file: found {format_value(file)}" in message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format_version": 2}, "format_version"),
        ({"dtype": "uint32"}, "dtype = 'uint32' does not go with vocab_size = 260, expected 'uint16'"),
        ({"dtype": "float16"}, "dtype"),
        ({"vocab_size": "260"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"train__file": "train/00001.bin"}, "train.0.file = 'train/00001.bin', expected 'train/00000.bin'"),
        ({"train__file": "holdout/00000.bin"}, "expected 'train/00000.bin'"),
        ({"end_of_text": 260}, "end_of_text = 260 is not below vocab_size = 260"),
        ({"train": []}, "train"),
        ({"train": None}, "train"),
        ({"options": {}}, "options.source: missing"),
        ({"surprise": 1}, "surprise: unknown field"),
        ({"train__tokens": -1}, "train.0.tokens"),
        ({"train__tokens": 1}, "train/00000.bin: holds "),
        ({"train__tokens": 10**30}, "train/00000.bin: holds "),
        ({"train__documents": True}, "train.0.documents"),
        ({"train__bytes": 1.5}, "train.0.bytes"),
        ({"train__sha256": "abc"}, "train.0.sha256"),
        ({"train__sha256": "0" * 64}, "train/00000.bin: is damaged"),
        ({"tokenizer_sha256": "0" * 64}, "tokenizer.json: is damaged"),
    ],
)
def test_an_altered_index_is_found(directory, changes, complaint):
    edit_index(directory, **changes)
    assert complaint in error_of(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"null", b"[" * 100_000, b"{}"])
def test_an_index_of_any_content_is_an_error_that_names_it(directory, content):
    (directory / "index.json").write_bytes(content)
    assert f"{directory / 'index.json'}: " in error_of(directory)


def test_a_missing_directory_names_the_command_that_makes_one(tmp_path):
    message = error_of(tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere/index.json'}: cannot be read: No such file" in message
    assert "dsv3 tokenize" in message


def test_an_index_comes_back_as_it_was_written(directory):
    index = ShardIndex.read(directory)
    assert isinstance(index.train[0], Shard)
    before = (directory / "index.json").read_bytes()
    index.write(directory)
    assert (directory / "index.json").read_bytes() == before


def test_a_flipped_bit_anywhere_in_an_index_is_found(tmp_path):
    path = write(tmp_path, DOCUMENTS[:1]) / "index.json"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        flipped = bytes([content[place] ^ 1 << place % 8])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        with pytest.raises(DataError, match=r"index\.json: "):
            ShardIndex.read(tmp_path)


def test_an_edited_index_is_found(directory):
    path = directory / "index.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert "index.json: is damaged or was edited: its SHA-256 is " in error_of(directory)


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Shards of an older version, whose index had no checksum."""
    with ShardWriter(tmp_path, TOKENIZER, 50) as writer:
        for split in ("train", "holdout"):
            for ids in DOCUMENTS[1:9]:
                writer.add(split, ids, len(ids))
        writer.finish(OPTIONS)
    edit_index(tmp_path)
    return tmp_path


def test_an_index_without_a_checksum_is_read_and_named_once(older, caplog):
    for _ in range(2):
        assert TokenShards.open(older).num_tokens("train") == len(flat(DOCUMENTS[1:9]))
    assert [line for line in caplog.messages if "has no checksum" in line] == caplog.messages[:1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"end_of_text": 1}, "end_of_text = 1, and that of tokenizer.json is 0"),
        ({"vocab_size": 261}, "vocab_size = 261, and that of tokenizer.json is 260"),
        ({"train__documents": 9}, "documents = 9 of train/00000.bin, which holds 8"),
        ({"holdout__bytes": 37}, "bytes = 37 of holdout/00000.bin, which holds 36"),
    ],
)
def test_an_index_without_a_checksum_is_compared_with_the_shards(older, changes, complaint):
    edit_index(older, **changes)
    assert f"{older / 'index.json'}: {complaint}" in error_of(older)


def test_shards_that_are_removed_or_replaced_stay_as_they_were(directory):
    shards = TokenShards.open(directory)
    shutil.rmtree(directory)
    write(directory, DOCUMENTS[::-1])
    assert shards.read("train", 0, shards.num_tokens("train")).tolist() == flat(DOCUMENTS)


def test_a_removed_shard_that_could_not_be_held_open_is_named(directory, monkeypatch):
    monkeypatch.setattr("deepseek_v3.data.tokens.shards._MAX_OPEN_FILES", 1)
    shards = TokenShards.open(directory)
    shutil.rmtree(directory)
    with pytest.raises(DataError, match=rf"{directory}/train/0000\d\.bin: can no longer be read: No such file"):
        shards.read("train", shards.num_tokens("train") - 1, 1)


def test_a_shard_that_is_replaced_before_it_is_opened_is_named(directory, monkeypatch):
    monkeypatch.setattr("deepseek_v3.data.tokens.shards._MAX_OPEN_FILES", 1)
    shards = TokenShards.open(directory)
    path = directory / "holdout/00000.bin"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match=rf"{path}: holds 20 bytes, expected 10"):
        shards.read("holdout", 0, 1)


@pytest.mark.parametrize("kept", [0, 7, 39])
def test_a_shard_that_becomes_shorter_while_it_is_open_is_named(directory, kept):
    shards = TokenShards.open(directory)
    assert len(shards.read("train", 0, 20)) == 20
    os.truncate(directory / "train/00000.bin", kept)
    message = rf"{directory}/train/00000\.bin: has become shorter .* holds {kept} bytes, expected at least 40"
    with pytest.raises(DataError, match=message):
        shards.read("train", 10, 10)
