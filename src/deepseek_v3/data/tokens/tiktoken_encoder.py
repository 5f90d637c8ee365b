"""Encoding with tiktoken: the same ids as the tokenizers library, more than ten times as fast, for byte-level BPE.

Before it merges, a byte-level tokenizer splits text into pre-tokens by regexes. The tokenizers library runs the
regex of each `Split` step with Oniguruma on the pre-tokens of the step before it, and keeps text between matches as
pre-tokens. tiktoken runs a single regex with fancy-regex, and drops text between matches. So each known
pre-tokenizer has a hand-written single regex here that splits the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import tiktoken
from tokenizers import Regex, Tokenizer, models, normalizers

from deepseek_v3.data.tokens.long_pieces import CUT, may_have_long_pieces
from deepseek_v3.utils.text import format_value

# The splits of DeepSeek-V3: digits in groups of three; runs of Chinese and Japanese; then words with one character
# before them, punctuation with the line breaks after it, and white space.
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# The released tokenizer.json has the line break characters themselves in its patterns.
_DEEPSEEK_RELEASE = tuple(pattern.replace(r"\r\n", "\r\n") for pattern in DEEPSEEK)

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_SPACE = r"\s+(?!\S)|\s+"
_GPT2, _LLAMA3, _QWEN2 = (f"{words}|{_SPACE}" for words in (_GPT2_WORDS, _LLAMA3_WORDS, _QWEN2_WORDS))

# Chinese and Japanese, as in the second split: all characters, letters and marks, symbols, unassigned code points.
_CJK = "\u4e00-\u9fa5\u3040-\u30ff"
_CJK_LETTERS = "\u4e00-\u9fa5\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
_CJK_SIGNS = "\u309b\u309c\u30a0\u30fb"
_CJK_UNASSIGNED = "\u3040\u3097\u3098"
_LETTERS = rf"[\p{{L}}\p{{M}}&&[^{_CJK}]]"


def _deepseek_single() -> str:
    """DeepSeek-V3's three splits as one regex: no match may cross the border of Chinese and Japanese, or of digits.

    Therefore the alternatives of the third split occur twice, once on each side of that border; white space before
    the border ends its pre-token. Characters that no alternative matches, such as control characters, form a
    pre-token, except for the last one before a letter, which belongs to the letter. Alternatives without lookahead
    are grouped, so that one automaton runs them all.
    """
    words = "|".join(
        [
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
            rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{_CJK}]?{_LETTERS}+",
            rf" ?[\p{{P}}\p{{S}}&&[^{_CJK}]]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\p{N}{1,3}",
            rf"[{_CJK_UNASSIGNED}]?[{_CJK_LETTERS}]+",
            rf"[{_CJK_SIGNS}]+",
        ]
    )
    rest = "|".join(
        [
            rf"\s+(?![^\s\p{{N}}{_CJK}])",
            r"\s+",
            rf"[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{_CJK}]+(?!{_LETTERS})",
            rf"[{_CJK_UNASSIGNED}]+(?![{_CJK_LETTERS}])",
        ]
    )
    return f"(?:{words})|{rest}"


_SINGLE: dict[tuple[str, ...], str] = {
    DEEPSEEK: _deepseek_single(),
    _DEEPSEEK_RELEASE: _deepseek_single(),
    (_GPT2,): f"(?:{_GPT2_WORDS})|{_SPACE}",
    (_LLAMA3,): f"(?:{_LLAMA3_WORDS})|{_SPACE}",
    (_QWEN2,): f"(?:{_QWEN2_WORDS})|{_SPACE}",
}


def single_regex(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The regex that splits text like the `pre_tokenizer` of a `tokenizer.json`, or None if none is known.

    The known pre-tokenizers are those of DeepSeek-V3, Llama 3, Qwen 2 and GPT-2, each ending in a `ByteLevel` step.
    The regex does not cut long pre-tokens, as tokenizers that are trained here do.
    """
    *cuts, last = _steps(pre_tokenizer) or [None]
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if any(cut["type"] != "Split" or cut["behavior"] != "Isolated" or cut["invert"] for cut in cuts):
        return None
    patterns = _cut_patterns(pre_tokenizer)
    if patterns == [*DEEPSEEK, CUT]:
        patterns.pop()
    return _SINGLE.get((*patterns, _GPT2) if last["use_regex"] else tuple(patterns))


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Any]:
    steps: list[Any] = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return steps


def _cut_patterns(pre_tokenizer: Mapping[str, Any] | None) -> list[str]:
    """The regexes of the `Split` steps, in order; empty for a step that splits at a fixed text."""
    splits = [step for step in _steps(pre_tokenizer) if step is not None and step["type"] == "Split"]
    return [split["pattern"].get("Regex", "") for split in splits]


_CLASSES = (r"\p{L}", r"\p{M}", r"\p{N}", r"\p{P}", r"\p{S}", r"\s")
# Unicode has assigned nothing in planes 4 to 13, and planes 15 and 16 are for private use.
_PLANES = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xF0000))


@lru_cache(1)
def unicode_disagreements(classes: tuple[str, ...] = _CLASSES) -> frozenset[str]:
    """The characters that the regex engines of the two libraries put into different classes.

    They differ because each library has its own version of Unicode. The first call takes 0.2 s.
    """
    characters = "".join(chr(code) for codes in _PLANES for code in codes)
    in_bytes = {bytes([byte]): byte for byte in range(256)}
    apart: set[str] = set()
    for name in classes:
        scan = tiktoken.Encoding("scan", pat_str=f"{name}+", mergeable_ranks=in_bytes, special_tokens={})
        matched = set(bytes(scan.encode_ordinary(characters)).decode("utf-8"))
        unmatched = normalizers.Replace(Regex(f"{name}+"), "").normalize_str(characters)
        if len(matched) + len(unmatched) != len(characters) or not matched.isdisjoint(unmatched):
            apart |= set(characters) - (matched ^ set(unmatched))
    return frozenset(apart)


_BLOCK = 2**16  # characters; tiktoken's regex fails on runs of more than 10^6


class NotExpressibleError(Exception):
    """A tokenizer has a feature that tiktoken does not support; the message names it."""


class TiktokenEncoder:
    """Gives the ids of a tokenizer of the tokenizers library, for every text that passes `can_encode`.

    Both libraries merge the pair of lowest rank first, and of equal pairs the leftmost. tiktoken merges any two
    adjacent symbols that together are a token; the tokenizers library merges only the pairs in its list of merges.
    These are the same pairs if merging the bytes of each token gives this token: when two adjacent symbols together
    are a token, no merge has crossed their outer borders, so merging the token's bytes alone passes through the
    same two symbols, and its last step merges a listed pair. For the same reason a token that its own bytes do not
    merge to never occurs, and it is left out here.

    Raises NotExpressibleError if that does not hold, or if text goes through more than splits and merges.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        fields = json.loads(tokenizer.to_str())
        regex = single_regex(fields["pre_tokenizer"])
        if regex is None:
            raise NotExpressibleError("its pre-tokenizer has no known single regex")
        if fields["normalizer"] not in (None, {"type": "Sequence", "normalizers": []}):
            raise NotExpressibleError("it normalizes text")
        if any(token["content"].isspace() for token in fields["added_tokens"]):
            raise NotExpressibleError("white space is among its added tokens")
        ranks = _ranks(fields["model"])
        self._cuts_long_pieces = CUT in _cut_patterns(fields["pre_tokenizer"])
        self._encoding = tiktoken.Encoding("same", pat_str=regex, mergeable_ranks=ranks, special_tokens={})

    def can_encode(self, text: str) -> bool:
        """Whether both libraries encode a text the same: no long runs, no characters classed differently."""
        if self._cuts_long_pieces and may_have_long_pieces(text):
            return False
        return (text.isascii() or _has_agreed_classes(text)) and not _has_long_run(text)

    def encode(self, text: str) -> list[int]:
        """The ids of a text without lone surrogates."""
        return self._encoding.encode_ordinary(text)


def _ranks(model: dict[str, Any]) -> dict[bytes, int]:
    """The ids of tokens by their bytes; as ranks, they reproduce the merges of the model."""
    if model["type"] != "BPE":
        raise NotExpressibleError(f"its model is {model['type']}")
    used = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for option in used:
        if model[option]:
            raise NotExpressibleError(f"its model has {option} = {format_value(model[option])}")
    vocabulary: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]
    merged = [vocabulary[left + right] for left, right in merges]
    if any(one > next_ for one, next_ in pairwise(merged)):
        raise NotExpressibleError("its ids do not grow with its merges")
    of_bytes = [token for token in vocabulary if token and BYTE_OF_CHARACTER.keys() >= set(token)]
    encodings = Tokenizer(models.BPE(vocabulary, merges)).encode_batch_fast(of_bytes, add_special_tokens=False)
    ranks = {
        bytes(BYTE_OF_CHARACTER[sign] for sign in token): vocabulary[token]
        for token, encoding in zip(of_bytes, encodings, strict=True)
        if encoding.ids == [vocabulary[token]]
    }
    if sum(len(token) == 1 for token in ranks) < 256:
        raise NotExpressibleError("it lacks some of the 256 bytes")
    if model["ignore_merges"] and len(ranks) < len(of_bytes):
        raise NotExpressibleError("it has tokens that its merges do not reach, and ignores merges")
    return ranks


def _byte_signs() -> dict[str, int]:
    """The byte of each character in byte-level vocabularies.

    A printable byte is written as the character of the same code, any other as a character from U+0100 on, as in
    GPT-2's encoder.py (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_signs()


def _has_agreed_classes(text: str) -> bool:
    apart = unicode_disagreements()
    return not apart or apart.isdisjoint(text)


def _has_long_run(text: str) -> bool:
    """Whether some block of 65,536 characters is a single run of white space, or of unprintable characters.

    tiktoken's regex backtracks through such a run character by character, and panics if it is too long.
    """
    blocks = (text[stop - _BLOCK : stop] for stop in range(_BLOCK, len(text) + 1, _BLOCK))
    return any(block.isspace() or not any(map(str.isprintable, block)) for block in blocks)
