"""Encoding loses no text, and text that looks like a marker never becomes one."""

import argparse
import inspect
import json
import os
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer

from deepseek_v3.data.tokens.tokenizer import FimMarkers, Tokenizer
from deepseek_v3.utils.errors import DataError

any_text = st.text(st.characters(exclude_categories=["Cs"]))
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DEEPSEEK_FIM = tuple(f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end"))


@cache
def trained(vocab_size: int = 1000) -> Tokenizer:
    return Tokenizer.train([inspect.getsource(argparse), "Grüße, 世界! 😀 " * 9], vocab_size)


def published(end_of_text: str | None, *names: str, special: bool = True) -> HuggingFaceTokenizer:
    """A byte-level tokenizer like published ones: without merges, and with markers after the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HuggingFaceTokenizer(models.BPE({byte: id_ for id_, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=special) for name in (end_of_text, *names) if name])
    return tokenizer


@given(any_text)
def test_decoding_gives_the_text_back(text):
    assert trained().decode(trained().encode(text)) == text


@given(st.lists(st.sampled_from(["<|endoftext|>", "<|fim_hole|>", "<|", "|>", "endoftext", "x ", "<|fim_"])))
def test_text_that_spells_a_marker_is_text(parts):
    text = "".join(parts)
    ids = trained().encode(text)
    assert not {trained().end_of_text, *trained().fim} & set(ids)
    assert trained().decode(ids) == text


@given(st.lists(any_text, max_size=5))
def test_a_batch_is_its_texts_one_by_one(texts):
    assert trained().encode_batch(texts) == [trained().encode(text) for text in texts]


@given(st.text(st.characters(categories=["Nd"]), min_size=1, max_size=9))
def test_digits_are_cut_in_threes(digits):
    assert all(len(trained().decode([id_])) <= 3 for id_ in trained().encode(digits))


def test_markers_are_shown_by_name_and_unknown_ids_not_at_all():
    tokenizer = trained()
    assert (
        tokenizer.decode([tokenizer.end_of_text, *tokenizer.fim])
        == "<|endoftext|><|fim_begin|><|fim_hole|><|fim_end|>"
    )
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_a_lone_surrogate_is_refused_by_name():
    with pytest.raises(DataError, match=r"lone surrogate '\\udc80' at character 1"):
        trained().encode("a\udc80")


def test_training_reaches_the_size_or_stops_where_text_ends():
    assert trained(1000).vocab_size == 1000
    assert Tokenizer.train([], 5000).vocab_size == 260
    assert Tokenizer.train(["abababab"], 5000).vocab_size < 270


def test_merges_follow_the_counts():
    """Counted by hand: the pair `ab` is the most frequent, then `ab`+`ab`; no other pair occurs twice."""
    tokenizer = Tokenizer.train(["abab abab"], 10_000)
    merges = json.loads(tokenizer.to_json())["model"]["merges"]
    assert merges[:2] == [["a", "b"], ["ab", "ab"]]


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 259])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocab_size):
    with pytest.raises(DataError, match=f"vocab_size = {vocab_size} is too small.* 260"):
        Tokenizer.train(["text"], vocab_size)


def test_an_error_while_texts_are_read_is_raised_as_it_is():
    def texts():
        yield "good"
        raise DataError("the second text is bad")

    with pytest.raises(DataError, match="the second text is bad"):
        Tokenizer.train(texts(), 300)


def test_training_is_deterministic_on_any_number_of_threads():
    program = (
        "import argparse, inspect, hashlib; from deepseek_v3.data.tokens.tokenizer import Tokenizer\n"
        "texts = inspect.getsource(argparse).split('\\n\\n')\n"
        "print(hashlib.sha256(Tokenizer.train(texts, 800).to_json().encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "4")
    ]
    assert runs[0] == runs[1]


def test_json_and_files_give_the_tokenizer_back(tmp_path):
    tokenizer = trained()
    tokenizer.save(tmp_path / "folder" / "tokenizer.json")
    text = "def main() -> None: # <|endoftext|>"
    for other in (
        Tokenizer.from_json(tokenizer.to_json()),
        Tokenizer.load(tmp_path / "folder" / "tokenizer.json"),
        Tokenizer.load(tmp_path / "folder"),
    ):
        assert other.to_json() == tokenizer.to_json()
        assert other.encode(text) == tokenizer.encode(text)
        assert (other.vocab_size, other.end_of_text, other.fim) == (1000, tokenizer.end_of_text, tokenizer.fim)


@pytest.mark.parametrize("name", ["<|endoftext|>", DEEPSEEK_END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]"])
@pytest.mark.parametrize("special", [True, False])
def test_end_of_text_is_found_by_name_and_kept_out_of_text(name, special):
    tokenizer = Tokenizer.from_json(published("<pad>", name, "<|im_start|>", special=special).to_str())
    assert tokenizer.end_of_text == 257
    assert tokenizer.vocab_size == 259
    assert tokenizer.fim is None
    text = f"{name} a <|im_start|> b"
    ids = tokenizer.encode(text)
    assert max(ids) < 256
    assert tokenizer.decode([*ids, 257]) == text + name


@pytest.mark.parametrize(
    "names",
    [
        DEEPSEEK_FIM,
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ],
)
def test_fim_markers_are_found_by_name_in_the_order_of_their_use(names):
    begin, hole, end = names
    tokenizer = Tokenizer.from_json(published("<|endoftext|>", end, begin, hole).to_str())
    assert tokenizer.fim == FimMarkers(begin=258, hole=259, end=257)


def test_added_white_space_stays_a_token():
    tokenizer = Tokenizer.from_json(published("<|endoftext|>", "    ", special=False).to_str())
    assert 257 in tokenizer.encode("    return")
    assert tokenizer.decode(tokenizer.encode("    return")) == "    return"


def test_truncation_padding_and_added_markers_are_switched_off():
    theirs = published("</s>", "<s>")
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 257), ("</s>", 256)]
    )
    theirs.enable_truncation(4)
    theirs.enable_padding(length=100)
    ids = Tokenizer.from_json(theirs.to_str()).encode("ten letters")
    assert len(ids) == 11
    assert max(ids) < 256


def test_the_highest_id_counts_even_where_ids_have_gaps():
    theirs = json.loads(published("</s>").to_str())
    theirs["model"]["vocab"]["far"] = 999
    assert Tokenizer.from_json(json.dumps(theirs)).vocab_size == 1000


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(published(None, "<s>").to_str())
    with pytest.raises(DataError, match=r"tokenizer\.json: has no end-of-text marker; expected one of "):
        Tokenizer.load(path)


def test_a_tokenizer_that_reads_its_marker_in_text_is_refused():
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "</s>a")]
    theirs = HuggingFaceTokenizer(models.Unigram(vocabulary, unk_id=0))
    theirs.add_special_tokens(["</s>"])
    with pytest.raises(DataError, match="encodes the text '</s>' as the marker"):
        Tokenizer.from_json(theirs.to_str())


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"version": "1.0"', b"\xff", b"null"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: is not "):
        Tokenizer.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read: No such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, 0),
        ({"eos_token": "<|endoftext|>"}, 0),
        ({"bos_token": "<|fim_begin|>", "add_bos_token": False}, 1),
        ({"bos_token": {"content": "<|fim_hole|>"}}, 2),
        ({"bos_token": "unknown"}, 0),
    ],
)
def test_a_scored_text_follows_the_marker_that_begins_texts(
    config: dict[str, object] | None, expected: int
) -> None:
    assert Tokenizer(Tokenizer.train([], 260).to_json(), config=config).text_start == expected
