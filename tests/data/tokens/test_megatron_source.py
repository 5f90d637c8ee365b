"""Megatron-LM datasets as a run reads them: splits, tokenizers, options, and what `dsv3 tokenize` writes."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.data_config import TokenFiles
from deepseek_v3.data.tokens.open_source import open_source
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.data.tokens.tokenize_corpus import TokenFormat, tokenize_corpus
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError
from helpers.megatron import CODES, their_read, their_write

pytestmark = pytest.mark.usefixtures("no_fsync")

TOKENIZER = Tokenizer.train([], 260)
DOCUMENTS = [[[4 + (7 * i + j) % 250 for j in range(i % 9)], [9, 0]] for i in range(400)]
TOKENS = [token for document in DOCUMENTS for sequence in document for token in sequence]
TEXTS = [f"Document {i}: " + "Grüße, 世界! " * (i % 7) for i in range(300)]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    return their_write(tmp_path / "code_text_document", DOCUMENTS, "uint16")


def all_of(source, split) -> list[int]:
    return source.read(split, 0, source.num_tokens(split)).tolist()


def error_of(**fields) -> str:
    with pytest.raises(DataError) as caught:
        open_source(TokenFiles(**fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def documents_in(tokens: list[int]) -> list[tuple[int, ...]]:
    """The documents of tokens in which 0 is end-of-text."""
    ends = [-1, *(place for place, token in enumerate(tokens) if token == 0)]
    assert ends[-1] == len(tokens) - 1
    return [tuple(tokens[a + 1 : b + 1]) for a, b in pairwise(ends)]


@pytest.mark.parametrize("dtype", CODES)
def test_a_dataset_of_any_type_is_split_by_documents(tmp_path, dtype):
    documents = [[[1 + i % 120] * (i % 5), [7, 0]] for i in range(300)]
    TOKENIZER.save(tmp_path / "tokenizer.json")
    source = open_source(TokenFiles(path=their_write(tmp_path / "x", documents, dtype), holdout=0.1))
    train, held_out = (documents_in(all_of(source, split)) for split in ("train", "holdout"))
    wanted = [tuple(a + b) for a, b in documents]
    assert sorted(train + held_out) == sorted(wanted)
    assert 0.09 < source.num_tokens("holdout") / sum(map(len, wanted)) < 0.11
    assert source.num_bytes("holdout") == sum(TOKENIZER.byte_lengths[[*each]].sum() for each in held_out)


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(1, 30), st.data())
def test_any_share_of_any_documents(tmp_path_factory, count, share, longest, data):
    folder = tmp_path_factory.mktemp("any")
    TOKENIZER.save(folder / "tokenizer.json")
    documents = [[[4 + i] * data.draw(st.integers(0, longest)), [0]] for i in range(count)]
    tokens = [token for document in documents for sequence in document for token in sequence]
    prefix = their_write(folder / "x", documents, "int16")
    try:
        source = open_source(TokenFiles(path=prefix, holdout=share))
    except DataError:
        assert "leaves no whole document to one of the splits" in error_of(path=prefix, holdout=share)
        return
    parts = [all_of(source, split) for split in ("train", "holdout")]
    assert sorted(sum(map(documents_in, parts), [])) == sorted(documents_in(tokens))  # noqa: RUF017
    start = data.draw(st.integers(0, len(parts[0]) - 1))
    length = data.draw(st.integers(1, len(parts[0]) - start))
    assert source.read("train", start, length).tolist() == parts[0][start : start + length]


def test_the_hold_out_comes_from_every_part(prefix):
    source = open_source(TokenFiles(path=prefix, holdout=0.2))
    stretches = source._parts["holdout"].stretches
    assert len(stretches) == 10
    borders = [len(TOKENS) * (number + 1) / 10 for number in range(10)]
    assert [stop for _, stop in stretches] == pytest.approx(borders, abs=20)


def test_more_stretches_than_tokens_do_not_overlap(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    prefix = their_write(tmp_path / "x", [[[]]] * 300 + [[[0]]] * 40 + [[[]]] * 300)
    source = open_source(TokenFiles(path=prefix, holdout=0.5))
    parts = [source._parts[split].stretches for split in ("train", "holdout")]
    assert parts == [((0, 10), (20, 30)), ((10, 20), (30, 40))]


def test_one_document_cannot_be_split(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    prefix = their_write(tmp_path / "x", [[[5] * 100, [0]]])
    message = error_of(path=prefix)
    assert message.startswith(f"{prefix}.idx: holdout = 0.02 of its 1 document leaves no whole document")
    assert "holdout_path" in message


def test_a_second_dataset_is_held_out(prefix, tmp_path):
    other = their_write(tmp_path / "other" / "x", [[[5, 6], [7]], [[8, 0]]], "int64")
    source = open_source(TokenFiles(path=prefix, holdout_path=other))
    assert all_of(source, "train") == TOKENS
    assert "is both data.path and data.holdout_path" in error_of(path=prefix, holdout_path=prefix)
    assert all_of(source, "holdout") == [5, 6, 7, 8, 0]
    with pytest.raises(ValueError, match="tokens 3 to 9 of 'holdout': expected a range within 0 to 5"):
        source.read("holdout", 3, 6)
    assert (source.name, source.vocab_size, source.end_of_text) == (str(prefix), 260, 0)


@pytest.mark.parametrize("named", ["tokenizer.json", "."])
def test_the_tokenizer_is_the_one_named(prefix, tmp_path, named):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "theirs" / "tokenizer.json")
    assert f"{prefix}: no tokenizer.json lies beside this" in error_of(path=prefix)
    source = open_source(TokenFiles(path=prefix, tokenizer=tmp_path / "theirs" / named))
    assert source.load_tokenizer().to_json() == TOKENIZER.to_json()
    assert "cannot be read" in error_of(path=prefix, tokenizer=tmp_path / "nowhere.json")


@pytest.mark.parametrize("bad", [-1, 260, 2**40, -(2**62)])
def test_an_id_beyond_the_vocabulary_is_named(tmp_path, bad):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    other = their_write(tmp_path / "good", [[[5, 0]]])
    prefix = their_write(tmp_path / "x", [[[5] * 30, [bad, 4, bad, 0]]], "int64")
    message = error_of(path=prefix, holdout_path=other)
    assert message.startswith(f"{prefix}.bin: token 30 has id {bad}, expected 0 to 259, the ids of {tmp_path}")
    assert error_of(path=other, holdout_path=prefix) == message
    source = open_source(TokenFiles(path=prefix, holdout_path=other), verify=False)
    assert source.read("train", 20, 10).tolist() == [5] * 10
    with pytest.raises(DataError, match=rf"x\.bin: token 30 has id {bad}"):
        source.read("train", 25, 6)


def test_the_place_of_an_id_is_counted_through_the_dataset(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    documents = [[[5] * 9 + [0]]] * 99 + [[[300, 0]], [[5, 0]], [[5] * 8 + [0]]]
    source = open_source(TokenFiles(path=their_write(tmp_path / "x", documents), holdout=0.3), verify=False)
    tokens = source.num_tokens("train") + source.num_tokens("holdout")
    assert tokens == 990 + 2 + 2 + 9
    with pytest.raises(DataError, match=r"x\.bin: token 990 has id 300"):
        all_of(source, "holdout")


def test_documents_without_end_of_text_are_warned_of(tmp_path, caplog):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    good = their_write(tmp_path / "good", [[[5], [0]], [[6, 0]]])
    other = their_write(tmp_path / "other", [[[5, 0]]])
    open_source(TokenFiles(path=good, holdout_path=other))
    assert caplog.messages == []
    bad = their_write(tmp_path / "bad", [[[5, 0]], [[6]]], modes=[0, 1])
    open_source(TokenFiles(path=bad, holdout_path=good))
    modes, ends = caplog.messages
    assert "bad.idx: some of its sequences have a mode other than 0" in modes
    assert "bad.bin: holds 2 documents and 1 end-of-text marker (id 0)" in ends


def test_a_folder_of_the_name_of_a_dataset_is_not_in_its_way(prefix):
    prefix.mkdir()
    (prefix / "raw.txt").write_text("text")
    assert open_source(TokenFiles(path=prefix, holdout=0.1)).name == str(prefix)


def test_options_of_datasets_are_refused_for_shards(tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n".join(TEXTS))
    build(corpus, tmp_path / "shards")
    assert isinstance(open_source(TokenFiles(path=tmp_path / "shards")), TokenShards)
    message = error_of(path=tmp_path / "shards", tokenizer=tmp_path, holdout=0.1)
    assert "leave data.tokenizer and data.holdout out, which are for Megatron-LM datasets" in message


def build(source: Path, output: Path, token_format=TokenFormat.SHARDS, tokenizer: Path | None = None):
    vocab_size = None if tokenizer else 300
    options = {"holdout": 0.2, "fim_rate": 0.0, "seed": 0, "sequence_length": 32, "token_format": token_format}
    return tokenize_corpus(str(source), output, vocab_size=vocab_size, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("small_vocabulary", [100, 65_500])
def test_tokenized_datasets_hold_the_documents_of_shards(tmp_path, monkeypatch, small_vocabulary):
    monkeypatch.setattr("deepseek_v3.data.tokens.megatron_writer._SMALL_VOCABULARY", small_vocabulary)
    corpus = tmp_path / "text"
    corpus.mkdir()
    for number, text in enumerate(TEXTS):
        (corpus / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    shards, ours = tmp_path / "shards", tmp_path / "megatron"
    first, second = build(corpus, shards), build(corpus, ours, TokenFormat.MEGATRON)
    assert (first.train, first.holdout) == (second.train, second.holdout)
    assert sorted(path.name for path in ours.iterdir()) == [
        "holdout.bin",
        "holdout.idx",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.bin",
        "train.idx",
    ]
    expected, found = TokenShards.open(shards), open_source(TokenFiles(path=ours))
    for split in ("train", "holdout"):
        documents, dtype, modes = their_read(ours / split)
        assert [tuple(only) for (only,) in documents] == documents_in(all_of(expected, split))
        assert (dtype, modes) == ("int32" if small_vocabulary == 100 else "uint16", [])
        assert all_of(found, split) == all_of(expected, split)
        assert found.num_bytes(split) == expected.num_bytes(split)
    assert found.load_tokenizer().to_json() == expected.load_tokenizer().to_json()
    assert found.identity[0] == expected.identity[0]
    assert "leave data.holdout and data.holdout_path out" in error_of(path=ours, holdout=0.1)


def test_an_unusual_end_of_text_is_written_beside(tmp_path):
    fields = json.loads(TOKENIZER.to_json().replace("<|endoftext|>", "<|the_end|>"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"eos_token": "<|the_end|>"}')
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n".join(TEXTS))
    build(corpus, tmp_path / "out", TokenFormat.MEGATRON, tmp_path / "theirs")
    assert open_source(TokenFiles(path=tmp_path / "out")).end_of_text == 0


def test_a_failed_tokenization_leaves_no_dataset(tmp_path, monkeypatch):
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n".join(TEXTS))
    monkeypatch.setattr("deepseek_v3.data.tokens.megatron_writer._copy", lambda *_: os.close(-1))
    with pytest.raises(DataError, match="cannot be written"):
        build(corpus, tmp_path / "out", TokenFormat.MEGATRON)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_the_identity_follows_tokens_and_split(prefix, tmp_path):
    identities = [open_source(TokenFiles(path=prefix, holdout=share)).identity for share in (0.1, 0.2)]
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("code_text_document.bin", "code_text_document.idx", "tokenizer.json"):
        (tmp_path / name).rename(moved / name)
    again = moved / "code_text_document"
    assert open_source(TokenFiles(path=again, holdout=0.1), verify=False).identity == identities[0]
    data = np.fromfile(f"{again}.bin", "<u2")
    data[5] ^= 1
    data.tofile(f"{again}.bin")
    identities.append(open_source(TokenFiles(path=again, holdout=0.1)).identity)
    assert len({train for _, train in identities}) == 3
    assert len({tokenizer for tokenizer, _ in identities}) == 1
