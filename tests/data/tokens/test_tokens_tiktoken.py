"""tiktoken gives the same ids as the tokenizers library, or is not used."""

import json
import logging
import random
import sys
import unicodedata
from functools import cache

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from deepseek_v3.data.sample_corpora import stdlib_documents
from deepseek_v3.data.tokens.tiktoken_encoder import (
    DEEPSEEK,
    NotExpressibleError,
    TiktokenEncoder,
    single_regex,
    unicode_disagreements,
)
from deepseek_v3.data.tokens.tokenizer import Tokenizer

# The patterns of the releases.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RELEASES = {
    "ours": DEEPSEEK,
    "DeepSeek-V3": tuple(pattern.replace(r"\r\n", "\r\n") for pattern in DEEPSEEK),
    "Llama 3": (LLAMA3,),
    "Qwen 2": (LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "GPT-2": (),
}
EVERY_CHARACTER = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]

# Characters at which splits are decided: all white space, digits, the borders of Chinese and Japanese, their
# symbols and unassigned code points, marks, symbols, controls, contractions, and letters that fold to others.
NASTY = [
    *" \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\u200d\ufeff\x00\x07\xad\ufffe\ue000\U000e0001",
    *"09²½Ⅷ٣〇㈠𝟙" + "aZßſKé世丂一龥龦あアゖ゙゚゛゜ゝ゠ァ・ー\u3040\u3097\u3098ｱ",
    *"\u0301\u064b\u0903\u20dd" + "!#'\"_-|~^`$+=<>@\\/.…€™©😀🏽" + "กาعربיתहिन्दी한글",
    *["'s", "'ſ", "'LL", "'re", "  ", "\n\n", "\r\n", " \n ", "<|endoftext|>", "def ", "World", "١٢٣"],
]
nasty_text = st.lists(st.sampled_from(NASTY) | st.characters(exclude_categories=["Cs"]), max_size=40).map("".join)


def pre_tokenizer(release: str):
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in RELEASES[release]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cuts)
    return pre_tokenizers.Sequence([*cuts, to_bytes]) if cuts else to_bytes


def pieces(release: str, text: str) -> list[bytes]:
    """The text as the tokenizers library splits it."""
    cut = pre_tokenizer(release).pre_tokenize_str(text)
    return [text[start:stop].encode() for _, (start, stop) in cut]


def cut_by_tiktoken(release: str, text: str) -> list[bytes]:
    """The text as tiktoken splits it with our regex, if the tokenizers library splits it the same.

    Each piece of the tokenizers library is a token here, and tiktoken looks tokens up before it merges anything.
    """
    regex = single_regex(json.loads(pre_tokenizer(release).__getstate__()))
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces(release, text):
        ranks.setdefault(piece, len(ranks))
    encoding = tiktoken.Encoding("pieces", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(id_) for id_ in encoding.encode_ordinary(text)]


@cache
def stdlib_texts() -> list[str]:
    return [document.text for document in stdlib_documents()]


@cache
def trained(release: str) -> Tokenizer:
    """A tokenizer trained on code, prose and the scripts of all nasty texts, with merges for each."""
    chooser = random.Random(0)
    texts = ["".join(chooser.choices(NASTY, k=40)) for _ in range(300)]
    texts += stdlib_texts()[::40]
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(release)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=6000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Tokenizer.from_json(tokenizer.to_str())


@cache
def theirs_of(json: str) -> HuggingFaceTokenizer:
    tokenizer = HuggingFaceTokenizer.from_str(json)
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of the tokenizers library alone."""
    encodings = theirs_of(tokenizer.to_json()).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@cache
def encoder(tokenizer: Tokenizer) -> TiktokenEncoder:
    return TiktokenEncoder(theirs_of(tokenizer.to_json()))


@pytest.mark.parametrize("release", RELEASES)
def test_every_character_is_split_alike(release):
    texts = [f"abc{c}abc   {c}世界{c}\n{c}\x00{c}123{c}!!!" for c in EVERY_CHARACTER[:0x3400:3] + NASTY]
    for text in ("".join(texts[start : start + 2000]) for start in range(0, len(texts), 2000)):
        assert cut_by_tiktoken(release, text) == pieces(release, text)


@pytest.mark.parametrize("release", RELEASES)
@given(text=nasty_text)
def test_nasty_text_is_split_alike(release, text):
    assert cut_by_tiktoken(release, text) == pieces(release, text)


@pytest.mark.parametrize("release", RELEASES)
@given(texts=st.lists(nasty_text, max_size=4))
def test_nasty_text_has_the_same_ids(release, texts):
    assert trained(release).encode_batch(texts) == ids_of(trained(release), texts)


@pytest.mark.parametrize("release", RELEASES)
def test_real_text_has_the_same_ids(release):
    texts = stdlib_texts()[7::40]
    assert encoder(trained(release)).can_encode(texts[0])
    assert trained(release).encode_batch(texts) == ids_of(trained(release), texts)


def test_characters_of_every_block_are_encoded_alike():
    """Encodes characters between letters, after a space, and twice before a letter.

    Every character up to U+3400, then every eighth and those at which the general category changes.
    """
    tokenizer = trained("ours")
    chosen = EVERY_CHARACTER[:0x3400]
    for before, c, after in zip(*(EVERY_CHARACTER[0x3400 + i : 0x34000 + i] for i in (-1, 0, 1)), strict=True):
        if ord(c) % 8 == 0 or len({unicodedata.category(near) for near in (before, c, after)}) > 1:
            chosen.append(c)
    texts = [" ".join(f"a{c}a {c} {c}{c}a" for c in chosen[i : i + 5000]) for i in range(0, len(chosen), 5000)]
    assert tokenizer.encode_batch(texts) == ids_of(tokenizer, texts)


def test_characters_the_libraries_class_differently_are_known():
    assert all(ord(c) > 0x2FF for c in unicode_disagreements())
    assert unicode_disagreements((r"\w",)) == set(
        "²³¹¼½¾\u200c\u200d"
    )  # as Oniguruma 6.9 and Rust's regex 1 differ


def test_text_that_is_classed_differently_avoids_tiktoken(monkeypatch):
    apart = frozenset("é")
    monkeypatch.setattr("deepseek_v3.data.tokens.tiktoken_encoder.unicode_disagreements", lambda: apart)
    assert not encoder(trained("ours")).can_encode("café")
    assert encoder(trained("ours")).can_encode("cafè")
    assert trained("ours").encode_batch(["café", "cafè"]) == ids_of(trained("ours"), ["café", "cafè"])


@pytest.mark.parametrize("run", [" ", "\u3000", "\t ", "\x00", "\u3040"])
def test_endless_runs_avoid_tiktoken(run):
    """tiktoken panics on runs of a million characters."""
    tokenizer = trained("ours")
    longest = "word" + run * (2**17 // len(run)) + "x"
    assert not encoder(tokenizer).can_encode(longest)
    assert tokenizer.encode(longest) == ids_of(tokenizer, [longest])[0]
    shorter = ("word" + run * (2**16 // len(run) - 3) + "x") * 3
    assert encoder(tokenizer).can_encode(shorter)
    assert tokenizer.encode(shorter) == ids_of(tokenizer, [shorter])[0]


@pytest.mark.parametrize(
    "text", ["世" * 300_000, "acgt" * 80_000, "-" * 300_000, "\u0301" * 300_000, "7" * 300_000]
)
def test_long_pieces_are_merged_alike(text):
    assert encoder(trained("ours")).can_encode(text)
    assert trained("ours").encode(text) == ids_of(trained("ours"), [text])[0]


def alphabet_and(*tokens: str, **options) -> dict:
    """The fields of a byte-level tokenizer with further tokens; `a+b` is a token merged from `a` and `b`."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*signs, *(token.replace("+", "") for token in tokens)]
    vocabulary = {name: id_ for id_, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(token.split("+")) for token in tokens if "+" in token]
    tokenizer = HuggingFaceTokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return json.loads(tokenizer.to_str())


def test_a_token_that_merges_never_reach_does_not_occur():
    """`b+c` comes before `a+b`, so `abc` becomes `a bc`; a search by bytes would find the token `abc`."""
    tokenizer = Tokenizer.from_json(json.dumps(alphabet_and("b+c", "a+b", "ab+c")))
    assert encoder(tokenizer).can_encode("abc")
    for text in ("abc", "abcabc abc", "ab c"):
        assert tokenizer.encode(text) == ids_of(tokenizer, [text])[0]
    assert tokenizer.decode(tokenizer.encode("abc")[:1]) == "a"


def test_a_token_with_several_merges_has_the_same_ids():
    """Converters from tiktoken list every pair of tokens that together are the token."""
    tokenizer = Tokenizer.from_json(json.dumps(alphabet_and("b+c", "a+b", "a+bc", "ab+c")))
    assert encoder(tokenizer).can_encode("abc")
    for text in ("abc", "abcab cabca"):
        assert tokenizer.encode(text) == ids_of(tokenizer, [text])[0]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12), st.text("abc ", max_size=40))
def test_any_merges_give_the_same_ids(pairs, text):
    """Random merges over tokens that overlap in every way."""
    tokens = ["a", "b", "c"]
    merges = []
    for left, right in pairs:
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
            merges.append("+".join(pair))
    tokenizer = Tokenizer.from_json(json.dumps(alphabet_and(*merges)))
    assert encoder(tokenizer).can_encode(text)
    assert tokenizer.encode(text) == ids_of(tokenizer, [text])[0]


def with_fields(**fields) -> str:
    return json.dumps({**alphabet_and("a+b"), **fields})


def without_byte() -> str:
    fields = alphabet_and()
    del fields["model"]["vocab"]["z"]
    return json.dumps(fields)


def pre_tokenizer_of(*steps) -> dict:
    return json.loads(pre_tokenizers.Sequence(list(steps)).__getstate__())


WORDS = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
TO_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (with_fields(normalizer=json.loads(normalizers.NFC().__getstate__())), "it normalizes text"),
        (with_fields(pre_tokenizer=None), "no known single regex"),
        (with_fields(pre_tokenizer=pre_tokenizer_of()), "no known single regex"),
        (with_fields(pre_tokenizer=pre_tokenizer_of(WORDS)), "no known single regex"),
        (with_fields(pre_tokenizer=pre_tokenizer_of(TO_BYTES, TO_BYTES)), "no known single regex"),
        (
            with_fields(pre_tokenizer=pre_tokenizer_of(pre_tokenizers.Split(" ", "isolated"), TO_BYTES)),
            "no known single regex",
        ),
        (
            with_fields(
                pre_tokenizer=pre_tokenizer_of(pre_tokenizers.Split(Regex(LLAMA3), "removed", True), TO_BYTES)
            ),
            "no known single regex",
        ),
        (with_fields(pre_tokenizer=pre_tokenizer_of(WORDS, pre_tokenizers.ByteLevel())), "no known single regex"),
        (json.dumps(alphabet_and("a+b", dropout=0.1)), "dropout = 0.1"),
        (json.dumps(alphabet_and("a+b", unk_token="a")), "unk_token = a"),
        (json.dumps(alphabet_and("a+b", byte_fallback=True)), "byte_fallback = true"),
        (json.dumps(alphabet_and("ab", "bc", "b+c", "a+b")), "its ids do not grow with its merges"),
        (json.dumps(alphabet_and("abc", ignore_merges=True)), "tokens that its merges do not reach"),
        (without_byte(), "lacks some of the 256 bytes"),
    ],
)
def test_the_reason_against_tiktoken_is_named(theirs, reason):
    with pytest.raises(NotExpressibleError, match=reason):
        TiktokenEncoder(HuggingFaceTokenizer.from_str(theirs))


def test_other_models_are_not_expressible():
    theirs = HuggingFaceTokenizer(models.Unigram([("a", -1.0)]))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(NotExpressibleError, match="its model is Unigram"):
        TiktokenEncoder(theirs)


def test_ids_are_the_same_where_tiktoken_cannot_be_used(caplog):
    theirs = alphabet_and("a+b")
    theirs["added_tokens"].append(
        {**theirs["added_tokens"][0], "id": 258, "content": "    ", "special": False, "normalized": True}
    )
    tokenizer = Tokenizer.from_json(json.dumps(theirs))
    with caplog.at_level(logging.DEBUG, "deepseek_v3"):
        assert tokenizer.encode_batch(["ab    b", "b"]) == [[*tokenizer.encode("ab"), 258, 65], [65]]
    assert [record.getMessage() for record in caplog.records] == [
        "text is encoded by the tokenizers library, not by tiktoken: white space is among its added tokens"
    ]


def test_ignore_merges_is_harmless_if_merges_reach_every_token():
    tokenizer = Tokenizer.from_json(json.dumps(alphabet_and("a+b", "ab+c", ignore_merges=True)))
    assert encoder(tokenizer).can_encode("abc")
    assert tokenizer.encode("abc abc ab") == ids_of(tokenizer, ["abc abc ab"])[0]


def test_an_added_name_is_text_for_tiktoken_too():
    theirs = published = alphabet_and("a+b")
    theirs["added_tokens"] += [{**published["added_tokens"][0], "id": 259, "content": "<|im_start|>"}]
    tokenizer = Tokenizer.from_json(json.dumps(theirs))
    assert encoder(tokenizer).can_encode("<|im_start|>")
    assert max(tokenizer.encode("<|im_start|> a<|endoftext|>")) < 256


def test_added_tokens_do_not_hide_white_space():
    theirs = HuggingFaceTokenizer.from_str(json.dumps(alphabet_and("a+b")))
    theirs.add_tokens([AddedToken("\n\n")])
    with pytest.raises(NotExpressibleError, match="white space"):
        TiktokenEncoder(theirs)
