"""Streaming gives the same text as decoding all ids at once, for every kind of decoder."""

import argparse
import inspect
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from deepseek_v3.data.tokens.stream_decoder import StreamDecoder
from deepseek_v3.data.tokens.tokenizer import Tokenizer

any_text = st.text(st.characters(exclude_categories=["Cs"]))
# Tokens of usual vocabularies: words with and without a space, ends of words, spaces, punctuation, characters
# of several bytes, U+FFFD itself.
TOKENS = [
    "\u2581good",
    "\u2581day",
    "s",
    "\u2581",
    "\u2581\u2581",
    " ",
    "##ly",
    "end</w>",
    ".",
    "'s",
    "é",
    "😀",
    "\ufffd",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = decoders.Replace("\u2581", " ")
DECODERS = {
    "Llama": decoders.Sequence([SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "Gemma": decoders.Sequence([SPACE, decoders.ByteFallback(), decoders.Fuse()]),
    "bytes alone": decoders.ByteFallback(),
    "two spaces dropped": decoders.Sequence([SPACE, decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "Metaspace": decoders.Metaspace(),
    "Metaspace, never prepended": decoders.Metaspace(prepend_scheme="never"),
    "Metaspace in a sequence": decoders.Sequence(
        [decoders.Sequence([decoders.ByteFallback()]), decoders.Metaspace()]
    ),
    "WordPiece": decoders.WordPiece(),
    "WordPiece, not cleaned up": decoders.WordPiece(cleanup=False),
    "BPE": decoders.BPEDecoder(),
    "CTC": decoders.CTC(pad_token="s", word_delimiter_token="\u2581"),
    "byte-level": decoders.ByteLevel(),
    "byte-level, stripped": decoders.Sequence([decoders.ByteLevel(), decoders.Strip("s", 1, 0)]),
    "words rewritten across tokens": decoders.Sequence([decoders.Fuse(), decoders.Replace("s.", "!")]),
    "dots rewritten across tokens": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(r"\.+"), "…")]),
    "none": None,
}


@cache
def trained() -> Tokenizer:
    return Tokenizer.train([inspect.getsource(argparse), "Grüße, 世界! 😀 " * 9], 1000)


@cache
def of_pieces(decoder: str) -> Tokenizer:
    """A tokenizer of words and bytes with a decoder, and with Llama's normalizer, which prepends a space."""
    vocabulary = {token: id_ for id_, token in enumerate(["<unk>", "</s>", *TOKENS, *BYTES])}
    theirs = HuggingFaceTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    if DECODERS[decoder]:
        theirs.decoder = DECODERS[decoder]
    theirs.add_special_tokens(["</s>"])
    return Tokenizer.from_json(theirs.to_str())


def ids_of(*tokens: str) -> list[int]:
    return [["<unk>", "</s>", *TOKENS, *BYTES].index(token) for token in tokens]


# Mostly words, so that runs of bytes have all lengths; an id outside the vocabulary has no text.
piece_ids = st.lists(
    st.integers(0, len(TOKENS) + 1)
    | st.sampled_from(ids_of("<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x41>"))
    | st.just(999),
    max_size=12,
)


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> tuple[list[str], str]:
    decoder = StreamDecoder(tokenizer, prompt or [])
    return [decoder.push(id_) for id_ in ids], decoder.flush()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_continues_its_prompt_as_decoding_all_at_once(decoder):
    tokenizer = of_pieces(decoder)

    @settings(max_examples=40)
    @given(piece_ids, piece_ids)
    def continues(prompt, ids):
        pushed, rest = streamed(tokenizer, ids, prompt)
        assert "".join(pushed) + rest == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]

    continues()


@given(any_text, st.lists(st.integers(0, 1003)))
def test_a_byte_level_stream_continues_its_prompt(prompt, ids):
    tokenizer = trained()
    before = tokenizer.encode(prompt)
    pushed, rest = streamed(tokenizer, ids, before)
    assert prompt + "".join(pushed) + rest == tokenizer.decode(before + ids)


@pytest.mark.parametrize("decoder", ["Llama", "Metaspace"])
def test_a_word_after_a_prompt_keeps_its_space(decoder):
    tokenizer = of_pieces(decoder)
    prompt = ids_of("\u2581good")
    assert streamed(tokenizer, ids_of("\u2581day", "s"), prompt) == ([" day", "s"], "")
    assert streamed(tokenizer, ids_of("\u2581day", "s")) == (["day", "s"], "")


def test_a_run_of_byte_tokens_is_shown_when_it_has_ended():
    tokenizer = of_pieces("Llama")
    whole = ids_of("s", "<0xC3>", "<0xA9>", "s")
    assert streamed(tokenizer, whole) == (["s", "", "", "és"], "")
    assert streamed(tokenizer, whole[:3]) == (["s", "", ""], "é")
    broken = ids_of("s", "<0xC3>", "<0xA9>", "<0xC3>", "s")
    assert streamed(tokenizer, broken) == (["s", "", "", "", "\ufffd\ufffd\ufffds"], "")


def test_a_decoder_that_rewrites_across_tokens_waits_for_the_end():
    assert streamed(of_pieces("words rewritten across tokens"), ids_of("s", ".", "s")) == (["", "", ""], "!s")


@given(any_text)
def test_a_stream_is_the_text_and_never_half_a_character(text):
    pushed, rest = streamed(trained(), trained().encode(text))
    assert "".join(pushed) + rest == text
    assert rest.strip("\ufffd") == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in pushed)


@given(st.lists(st.integers(0, 1003)))
def test_a_stream_of_any_ids_is_what_decode_shows(ids):
    pushed, rest = streamed(trained(), ids)
    assert "".join(pushed) + rest == trained().decode(ids)


def test_text_is_shown_as_soon_as_it_is_whole():
    tokenizer = Tokenizer.train([], 260)
    pushed, rest = streamed(tokenizer, tokenizer.encode("aé😀b"))
    assert pushed == ["a", "", "é", "", "", "", "😀", "b"]
    assert rest == ""


def test_flush_shows_what_stayed_incomplete_and_begins_anew():
    tokenizer = Tokenizer.train([], 260)
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(id_) for id_ in tokenizer.encode("a😀")[:-1]] == ["a", "", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert [decoder.push(id_) for id_ in tokenizer.encode("é")] == ["", "é"]


def test_a_long_stream_decodes_few_ids_at_a_time(monkeypatch):
    tokenizer = trained()
    ids = tokenizer.encode("all is well " * 200)
    longest = 0

    def decode(self: Tokenizer, ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return original(self, ids)

    original = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", decode)
    prompt = tokenizer.encode("is all well?")
    pushed, _ = streamed(tokenizer, ids, prompt)
    assert "".join(pushed) == "all is well " * 200
    assert longest == len(prompt) + 1
