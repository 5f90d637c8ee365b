"""Tokenizing a corpus loses no document, keeps the splits apart, and leaves no incomplete output."""

import hashlib
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deepseek_v3.data.documents import Document
from deepseek_v3.data.tokens.holdout import is_held_out
from deepseek_v3.data.tokens.index import SPLITS
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.data.tokens.tokenize_corpus import CorpusSummary, tokenize_corpus
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError

TEXTS = [f"Document {i}: " + "Grüße, <|endoftext|> 世界! " * (i % 7) for i in range(300)]


def write_lines(path: Path, texts=TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_lines(tmp_path / "corpus.jsonl")


def build(source: str, output: Path, **options) -> CorpusSummary:
    defaults = {"vocab_size": 300, "tokenizer": None, "holdout": 0.2, "fim_rate": 0.0, "seed": 0}
    defaults["sequence_length"] = 32
    return tokenize_corpus(source, output, **{**defaults, **options})


def documents_of(shards: TokenShards, split) -> list[str]:
    """Reads the shards with nothing but the documented format."""
    tokenizer = shards.load_tokenizer()
    tokens = shards.read(split, 0, shards.num_tokens(split))
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def error_of(source: str, output: Path, **options) -> str:
    """The message of the error; checks that nothing is left at `output` or beside it."""
    before = set(output.parent.iterdir())
    with pytest.raises(DataError) as caught:
        build(source, output, **options)
    assert set(output.parent.iterdir()) == before
    return str(caught.value)


def test_every_document_comes_back_on_its_side_in_its_order(source, tmp_path):
    summary = build(source, tmp_path / "out", shard_tokens=500)
    shards = TokenShards.open(tmp_path / "out")
    held_out = [is_held_out(text, 0.2) for text in TEXTS]
    for split, wanted in (("train", False), ("holdout", True)):
        texts = [text for text, held in zip(TEXTS, held_out, strict=True) if held == wanted]
        assert documents_of(shards, split) == texts
        totals = getattr(summary, split)
        assert totals.documents == shards.num_documents(split) == len(texts)
        assert totals.bytes == shards.num_bytes(split) == sum(len(text.encode()) for text in texts)
        assert totals.tokens == shards.num_tokens(split)
    assert len(shards.index.train) > 3
    assert summary.output == tmp_path / "out"
    assert summary.vocab_size == shards.load_tokenizer().vocab_size <= 300
    assert shards.index.options.source == source


@pytest.mark.parametrize(("asked", "warned"), [(260, False), (300, False), (5000, True)])
def test_a_tokenizer_smaller_than_was_asked_for_is_named(source, tmp_path, caplog, asked, warned):
    found = build(source, tmp_path / "out", vocab_size=asked).vocab_size
    expected = f"the tokenizer has {found:,} ids where {asked:,} were asked for"
    assert [expected in message for message in caplog.messages].count(True) == warned


def test_batches_do_not_change_the_written_bytes(source, tmp_path, monkeypatch):
    build(source, tmp_path / "one", fim_rate=0.5)
    monkeypatch.setattr("deepseek_v3.data.tokens.tokenize_corpus._BATCH_CHARACTERS", 100)
    build(source, tmp_path / "other", fim_rate=0.5)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_the_tokenizer_never_sees_the_hold_out(source, tmp_path):
    build(source, tmp_path / "out")
    expected = Tokenizer.train([text for text in TEXTS if not is_held_out(text, 0.2)], 300)
    assert TokenShards.open(tmp_path / "out").load_tokenizer().to_json() == expected.to_json()
    assert expected.to_json() != Tokenizer.train(TEXTS, 300).to_json()


def test_a_given_tokenizer_is_used_as_it_is(source, tmp_path):
    Tokenizer.train([], 260).save(tmp_path / "tokenizer.json")
    summary = build(source, tmp_path / "out", vocab_size=None, tokenizer=tmp_path / "tokenizer.json")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    for totals in (summary.train, summary.holdout):
        assert totals.tokens == totals.bytes + totals.documents  # one token for each byte


def test_copies_of_a_text_stand_on_one_side(tmp_path):
    source = write_lines(tmp_path / "corpus.jsonl", TEXTS + TEXTS[::-1] + TEXTS[:50])
    build(source, tmp_path / "out")
    train, holdout = (set(documents_of(TokenShards.open(tmp_path / "out"), split)) for split in SPLITS)
    assert train.isdisjoint(holdout)
    assert train | holdout == set(TEXTS)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0.01, 0.98), st.floats(0, 0.01))
def test_a_larger_hold_out_contains_the_smaller(text, holdout, more):
    assert is_held_out(text, holdout + more) >= is_held_out(text, holdout)


def test_the_hold_out_is_its_share_and_stays_the_same():
    held_out = [i for i in range(20_000) if is_held_out(f"text {i}", 0.1)]
    assert abs(len(held_out) - 2000) < 5 * 1800**0.5
    digest = hashlib.blake2b(b"text 0", digest_size=8).digest()
    share = int.from_bytes(digest, "little") / 2**64
    assert not is_held_out("text 0", share - 1e-9)
    assert is_held_out("text 0", share + 1e-9)


def test_fim_rearranges_training_documents_alone(source, tmp_path):
    build(source, tmp_path / "out", fim_rate=1.0)
    shards = TokenShards.open(tmp_path / "out")
    assert documents_of(shards, "holdout") == [text for text in TEXTS if is_held_out(text, 0.2)]
    restored = []
    for text in documents_of(shards, "train"):
        begin, prefix_suffix_middle = text.split("<|fim_begin|>")
        prefix, suffix_middle = prefix_suffix_middle.split("<|fim_hole|>")
        suffix, middle = suffix_middle.split("<|fim_end|>")
        assert begin == ""
        restored.append(prefix + middle + suffix)
    assert restored == [text for text in TEXTS if not is_held_out(text, 0.2)]


def test_the_seed_of_fim_does_not_move_the_hold_out(source, tmp_path):
    for seed in (1, 2):
        build(source, tmp_path / str(seed), fim_rate=0.5, seed=seed)
    one, other = (TokenShards.open(tmp_path / str(seed)) for seed in (1, 2))
    assert documents_of(one, "holdout") == documents_of(other, "holdout")
    assert documents_of(one, "train") != documents_of(other, "train")


def test_a_folder_of_files_is_a_corpus(tmp_path):
    for i, text in enumerate(TEXTS[:40]):
        path = tmp_path / "corpus" / str(i % 3) / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    build(str(tmp_path / "corpus"), tmp_path / "new" / "out")
    shards = TokenShards.open(tmp_path / "new" / "out")
    assert sorted(documents_of(shards, "train") + documents_of(shards, "holdout")) == sorted(TEXTS[:40])


def test_the_standard_library_is_a_corpus(tmp_path, monkeypatch):
    few = [Document(str(i), text) for i, text in enumerate(TEXTS[:40])]
    monkeypatch.setattr("deepseek_v3.data.tokens.tokenize_corpus.stdlib_documents", lambda: iter(few))
    summary = build("python-stdlib", tmp_path / "out")
    assert summary.train.documents + summary.holdout.documents == 40
    assert TokenShards.open(tmp_path / "out").index.options.source == "python-stdlib"


@pytest.mark.parametrize("kind", ["full", "empty", "file", "dangling link"])
def test_an_existing_output_is_left_as_it_is(source, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("precious")
    elif kind == "dangling link":
        output.symlink_to(tmp_path / "nowhere")
    else:
        output.mkdir()
        if kind == "full":
            (output / "precious").write_text("precious")
    before = files_of(tmp_path)
    assert f"{output}: exists and is left as it is; remove it, or choose another" in error_of(source, output)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"vocab_size": None}, "expected one of the two"),
        ({"tokenizer": Path("tokenizer.json")}, "expected one of the two"),
        ({"vocab_size": 259}, "vocab_size = 259 is too small"),
        ({"vocab_size": None, "tokenizer": Path("nowhere.json")}, "nowhere.json: cannot be read"),
        ({"holdout": 0.0}, "holdout = 0.0: expected a share between 0 and 1"),
        ({"holdout": 1.0}, "holdout = 1.0"),
        ({"holdout": float("nan")}, "holdout = nan"),
        ({"fim_rate": 1.5}, "fim_rate = 1.5: expected a share from 0 to 1"),
        ({"fim_rate": -0.1}, "fim_rate = -0.1"),
        ({"text_field": "body"}, "corpus.jsonl:1: has no field 'body'"),
        ({"holdout": 1e-9}, "holdout = 1e-09 leaves less than one window of 32 tokens to one of the splits"),
    ],
)
def test_a_wrong_option_is_named_and_leaves_nothing(source, tmp_path, options, complaint):
    assert complaint in error_of(source, tmp_path / "out", **options)


def test_fim_needs_a_tokenizer_with_its_markers(source, tmp_path):
    theirs = Tokenizer.train([], 260).to_json().replace("fim_", "other_")
    Tokenizer.from_json(theirs).save(tmp_path / "tokenizer.json")
    options = {"vocab_size": None, "tokenizer": tmp_path / "tokenizer.json"}
    assert "fim_rate = 0.1 needs a tokenizer" in error_of(source, tmp_path / "out", fim_rate=0.1, **options)
    build(source, tmp_path / "out", **options)


def test_a_fault_late_in_the_corpus_leaves_nothing(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_lines(tmp_path / "corpus" / "a.jsonl")
    (tmp_path / "corpus" / "z.txt").write_bytes(b"\xff")
    Tokenizer.train([], 260).save(tmp_path / "tokenizer.json")
    for options in ({}, {"vocab_size": None, "tokenizer": tmp_path / "tokenizer.json"}):
        assert "z.txt: byte 0xff at offset 0" in error_of(str(tmp_path / "corpus"), tmp_path / "out", **options)


def test_an_interrupted_build_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepseek_v3.data.tokens.shards.ShardWriter.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_disk_that_refuses_is_named(source, tmp_path, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    message = error_of(source, tmp_path / "out")
    assert f"{tmp_path / 'out'}: cannot be written: [Errno 28] No space left" in message


def test_each_pass_leaves_a_line_in_the_log(source, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "deepseek_v3"):
        summary = build(source, tmp_path / "out")
    train, tokens = (record.getMessage() for record in caplog.records)
    assert train.startswith(f"Training the tokenizer: {summary.train.documents} documents, ")
    assert tokens.startswith(
        f"Tokenizing: 300 documents, {summary.train.tokens + summary.holdout.tokens:,} tokens in "
    )


def test_a_terminal_shows_the_progress(source, tmp_path, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr("deepseek_v3.utils.progress.get_console", lambda: terminal)
    build(source, tmp_path / "out")
    assert "Tokenizing: 300 documents, " in terminal.file.getvalue()


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A folder as of Hugging Face, whose tokenizer ends texts by markers with names of their own."""
    text = Tokenizer.train([], 260).to_json().replace("<|endoftext|>", "<EOT>").replace("fim_end", "turn_end")
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    return folder


def test_a_folder_names_what_ends_its_documents(source, named, tmp_path):
    fields = {"eos_token": {"content": "<EOT>"}, "chat_template": "{{ messages }}", "auto_map": {"x": "run.py"}}
    (named / "tokenizer_config.json").write_text(json.dumps(fields))
    (named / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    assert Tokenizer.load(named).ends == (0, 3)
    build(source, tmp_path / "out", vocab_size=None, tokenizer=named)
    tokenizer = TokenShards.open(tmp_path / "out").load_tokenizer()
    assert tokenizer.token(tokenizer.end_of_text) == "<EOT>"
    assert tokenizer.config == {key: value for key, value in fields.items() if key != "auto_map"}


def test_an_option_names_what_ends_documents(source, named, tmp_path):
    file = named / "tokenizer.json"
    assert "has no end-of-text marker" in error_of(source, tmp_path / "out", vocab_size=None, tokenizer=file)
    wrong = error_of(source, tmp_path / "out", vocab_size=None, tokenizer=file, end_of_text="</s>")
    assert "has no token '</s>'" in wrong
    assert "none is given" in error_of(source, tmp_path / "out", end_of_text="<EOT>")
    build(source, tmp_path / "out", vocab_size=None, tokenizer=file, end_of_text="<|turn_end|>", workers=2)
    shards = TokenShards.open(tmp_path / "out")
    assert shards.index.end_of_text == 3
    assert sorted(documents_of(shards, "train") + documents_of(shards, "holdout")) == sorted(TEXTS)
