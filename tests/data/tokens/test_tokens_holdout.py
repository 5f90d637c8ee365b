"""The hold-out of few documents: at least a window, at most the given share, chosen before training."""

import json
import logging
import random
from contextlib import closing
from pathlib import Path

import pytest

from deepseek_v3.data.tokens.encoding import CorpusEncoder, encode_batches
from deepseek_v3.data.tokens.holdout import HoldoutRule, text_hash
from deepseek_v3.data.tokens.index import SPLITS, CorpusOptions
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.data.tokens.tokenize_corpus import CorpusSummary, tokenize_corpus
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError

WINDOW = 64


def prose(size: int, seed: int = 0) -> str:
    """`size` bytes of text in lines, all of them different."""
    chooser = random.Random(seed)
    words = ["".join(chooser.choices("abcdefghij", k=chooser.randint(2, 7))) for _ in range(60)]
    lines = (" ".join(chooser.choices(words, k=9)) + ".\n" for _ in range(size // 20))
    return "".join(lines)[:size]


def build(texts: list[str], folder: Path, **options) -> tuple[CorpusSummary, TokenShards]:
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    defaults = {"vocab_size": 300, "tokenizer": None, "holdout": None, "fim_rate": 0.0, "seed": 0}
    arguments = {**defaults, "sequence_length": WINDOW, **options}
    summary = tokenize_corpus(str(source), folder / "out", **arguments)
    return summary, TokenShards.open(folder / "out")


def documents_of(shards: TokenShards, split) -> list[str]:
    tokenizer = shards.load_tokenizer()
    text = tokenizer.decode(shards.read(split, 0, shards.num_tokens(split)).tolist())
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("size", [1000, 20_000, 60_000])
def test_one_document_is_cut_and_nothing_of_it_is_lost(tmp_path, size):
    text = prose(size)
    _, shards = build([text], tmp_path)
    (train,), (held_out,) = documents_of(shards, "train"), documents_of(shards, "holdout")
    assert train + held_out == text
    assert min(shards.num_tokens(split) for split in SPLITS) > WINDOW
    assert len(held_out) <= max(0.02 * size, 16 * WINDOW)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.95])
@pytest.mark.parametrize("number", [1, 2, 8, 50, 199])
def test_few_documents_hold_out_no_more_than_the_share(tmp_path, number, share):
    texts = [prose(20_000 // number, seed) for seed in range(number)]
    _, shards = build(texts, tmp_path, holdout=share)
    size = sum(map(len, texts))
    assert shards.num_bytes("train") + shards.num_bytes("holdout") == size
    assert 0.7 * share * size < shards.num_bytes("holdout") <= share * size
    assert min(shards.num_tokens(split) for split in SPLITS) > WINDOW
    joined = {a + b for a in ["", *documents_of(shards, "train")] for b in ["", *documents_of(shards, "holdout")]}
    assert joined >= set(texts)


def test_copies_of_a_document_that_is_cut_are_cut_alike(tmp_path):
    text = prose(6000)
    _, shards = build([text, prose(3000, 1), text, text], tmp_path, holdout=0.1)
    train, held_out = (documents_of(shards, split) for split in SPLITS)
    assert held_out
    assert set(held_out) == {held_out[0]}
    assert not any(held_out[0] in kept for kept in train)


def test_a_cut_falls_between_characters_of_several_bytes(tmp_path):
    text = "".join(random.Random(0).choices("äöüß€世界 ", k=4000))
    _, shards = build([text], tmp_path, holdout=0.11)
    assert documents_of(shards, "train")[0] + documents_of(shards, "holdout")[0] == text


def test_the_same_documents_in_another_order_are_split_alike(tmp_path):
    texts = [prose(2000, seed) for seed in range(8)]
    held_out = []
    for name, ordered in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).mkdir()
        held_out.append(documents_of(build(ordered, tmp_path / name)[1], "holdout"))
    assert held_out[0] == held_out[1]


def test_batches_do_not_move_the_cut(tmp_path, monkeypatch):
    texts = [prose(900, seed) for seed in range(9)]
    written = []
    for name, characters in (("a", 2**20), ("b", 1000)):
        monkeypatch.setattr("deepseek_v3.data.tokens.tokenize_corpus._BATCH_CHARACTERS", characters)
        (tmp_path / name).mkdir()
        _, shards = build(texts, tmp_path / name)
        written.append([documents_of(shards, split) for split in SPLITS])
    assert written[0] == written[1]
    assert sum(map(len, written[0])) == 10


def test_worker_processes_cut_where_this_one_does(monkeypatch):
    monkeypatch.setattr("deepseek_v3.data.tokens.encoding._ALONE_CHARACTERS", 1)
    options = CorpusOptions(source="x", text_field="text", holdout=0.1, fim_rate=0.0, seed=0)
    text = prose(900)
    encoder = CorpusEncoder(Tokenizer.train([], 260), options, HoldoutRule(0, text_hash(text), 300))
    with closing(encode_batches(encoder, iter([["a"], [text]]), 2)) as batches:
        _, last = batches
    assert last.splits == ["train", "holdout"]
    assert last.num_bytes == [300, 600]


def test_the_log_says_in_one_line_what_is_held_out(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "deepseek_v3"):
        summary, _ = build([prose(2000, seed) for seed in range(8)], tmp_path, holdout=0.1)
    lines = [line for line in caplog.messages if line.startswith("Hold-out")]
    size = f"{summary.holdout.bytes:,}"
    share = f"{summary.holdout.bytes / 16_000:.1%}"
    assert lines == [f"Hold-out: the last {size} bytes of 1 of 8 documents, {share} of the text"]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (120, {}, "holds 120 bytes of text in 1 document, at most 121 tokens; expected at least 130 tokens, about"),
        (9000, {"holdout": 0.005}, "holdout = 0.005 leaves less than one window of 64 tokens to one of the splits"),
        (9000, {"holdout": 0.005}, "expected a holdout such as 0.04"),
        (9000, {"holdout": 0.999}, "expected a holdout such as 0.936"),
        (9000, {"sequence_length": 4999}, "at most 9,001 tokens; expected at least 10,000 tokens"),
    ],
)
def test_too_small_is_said_before_a_tokenizer_is_trained(tmp_path, monkeypatch, size, options, message):
    monkeypatch.setattr(Tokenizer, "train", None)
    with pytest.raises(DataError) as caught:
        build([prose(size)], tmp_path, **options)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_suggested_hold_out_works(tmp_path):
    build([prose(9000)], tmp_path, holdout=0.04)


def test_a_given_tokenizer_is_counted_with_exactly(tmp_path):
    Tokenizer.train([], 260).save(tmp_path / "bytes.json")
    options = {"vocab_size": None, "tokenizer": tmp_path / "bytes.json", "holdout": 0.5}
    with pytest.raises(DataError, match="at most 129 tokens; expected at least 130"):
        build([prose(128)], tmp_path, **options)
    summary, _ = build([prose(128)], tmp_path, sequence_length=60, **options)
    assert summary.train.tokens + summary.holdout.tokens == 130


def test_text_of_few_tokens_is_refused_after_encoding(tmp_path):
    with pytest.raises(DataError, match=r"the split '\w+' holds \d+ tokens, made of .* expected at least 65"):
        build(["a" * 4000], tmp_path)
    assert not (tmp_path / "out").exists()
