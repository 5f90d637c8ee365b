"""tiktoken as a faster way to the same ids: for byte-level BPE that it can express, ten times and more."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import tiktoken
from tokenizers import Tokenizer, models

from deepseek_v3.data.tokens.splits import as_one_regex, characters_apart
from deepseek_v3.utils.printing import value_text

_BLOCK = 2**16  # the longest run that tiktoken's regex can take is 10^6 characters


class NotExpressibleError(Exception):
    """What a tokenizer has that tiktoken cannot express."""


class TiktokenEncoder:
    """Gives the ids that a tokenizer of the tokenizers library gives, for every text that it `takes`.

    Both merge the pair of the lowest rank, the leftmost first. tiktoken merges whatever two pieces spell a token,
    the other library those pairs alone that its list of merges names. These are the same pairs if each token,
    spelled in bytes, is merged to itself: while two pieces spell a token, no merge has crossed their outer borders,
    so they are what the token alone is merged to at some step, and the last step of that merges a listed pair.
    Tokens that are not merged to themselves never arise, by the same reason, and are left out here.

    Raises NotExpressibleError where that does not hold or where text goes through more than cuts and merges.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        fields = json.loads(tokenizer.to_str())
        regex = as_one_regex(fields["pre_tokenizer"])
        if regex is None:
            raise NotExpressibleError("its pre-tokenizer has no known single regex")
        if fields["normalizer"] not in (None, {"type": "Sequence", "normalizers": []}):
            raise NotExpressibleError("it normalizes text")
        if any(token["content"].isspace() for token in fields["added_tokens"]):
            raise NotExpressibleError("white space is among its added tokens")
        ranks = _ranks(fields["model"])
        self._encoding = tiktoken.Encoding("same", pat_str=regex, mergeable_ranks=ranks, special_tokens={})

    def takes(self, text: str) -> bool:
        """Whether this text is safe to encode: no character that the libraries class apart, no endless run."""
        return (text.isascii() or _is_classed_alike(text)) and not _has_long_run(text)

    def encode(self, text: str) -> list[int]:
        """The ids of a text without lone surrogates."""
        return self._encoding.encode_ordinary(text)


def _ranks(model: dict[str, Any]) -> dict[bytes, int]:
    """The ids of tokens by their bytes, which as ranks give the model's merges."""
    if model["type"] != "BPE":
        raise NotExpressibleError(f"its model is {model['type']}")
    used = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for option in used:
        if model[option]:
            raise NotExpressibleError(f"its model has {option} = {value_text(model[option])}")
    vocabulary: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]
    merged = [vocabulary[left + right] for left, right in merges]
    if any(one > next_ for one, next_ in pairwise(merged)):
        raise NotExpressibleError("its ids do not grow with its merges")
    spelled = [token for token in vocabulary if token and BYTES.keys() >= set(token)]
    encodings = Tokenizer(models.BPE(vocabulary, merges)).encode_batch_fast(spelled, add_special_tokens=False)
    ranks = {
        bytes(BYTES[sign] for sign in token): vocabulary[token]
        for token, encoding in zip(spelled, encodings, strict=True)
        if encoding.ids == [vocabulary[token]]
    }
    if sum(len(token) == 1 for token in ranks) < 256:
        raise NotExpressibleError("it lacks some of the 256 bytes")
    if model["ignore_merges"] and len(ranks) < len(spelled):
        raise NotExpressibleError("it has tokens that its merges do not reach, and ignores merges")
    return ranks


def _byte_signs() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies: itself, or if not printable from U+0100.

    As GPT-2's encoder.py sets it (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_signs()


def _is_classed_alike(text: str) -> bool:
    apart = characters_apart()
    return not apart or apart.isdisjoint(text)


def _has_long_run(text: str) -> bool:
    """Whether some 65,536 characters are one run of white space, or of characters that are not printed.

    tiktoken's regex steps back through such a run one by one and panics if it is too long.
    """
    blocks = (text[stop - _BLOCK : stop] for stop in range(_BLOCK, len(text) + 1, _BLOCK))
    return any(block.isspace() or not any(map(str.isprintable, block)) for block in blocks)
