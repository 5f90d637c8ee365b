"""What a `tokenizer.json` must say for text to go in whole, and for its ids to fit a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_v3.data.tokens.tiktoken_encoder import BYTE_OF_CHARACTER
from deepseek_v3.utils.errors import DataError

# Ids may have gaps, but each id up to the largest takes a row of the embedding and of many a table.
_MOST_PER_TOKEN, _MOST_BESIDES = 2, 2**16
# These bytes stand in no UTF-8 text.
_NEVER = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
_MOST_NAMED = 5
# Pre-tokenizers that always remove what they cut at.
_REMOVE = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")


def check_ids(text: str, source: str) -> None:
    """Raises DataError where ids are too sparse or stand for two tokens, before a library makes tables for them.

    `text` is that of a `tokenizer.json`. What is no such file is left to the tokenizers library, which refuses it.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return
    model = fields.get("model") if isinstance(fields, dict) else None
    if isinstance(model, dict):
        _check_ids(_ids(model.get("vocab")), _added(fields.get("added_tokens")), source)


def check_complete(fields: Mapping[str, Any], source: str) -> None:
    """Raises DataError where some text would be dropped.

    `fields` are those of a `tokenizer.json` as the tokenizers library writes it, with every type named.
    """
    model = fields["model"]
    if reason := _drops(fields, model, _ids(model["vocab"])):
        raise DataError(
            f"{source}: {reason}; expected a tokenizer that has a token for every text, such as any complete "
            "byte-level BPE"
        )


def removing_step(fields: Mapping[str, Any]) -> str | None:
    """The type of the pre-tokenizer's first step that removes what it cuts at, such as white space."""
    for step in flatten_steps(fields["pre_tokenizer"]):
        if step["type"] in _REMOVE or step.get("behavior") == "Removed":
            return str(step["type"])
    return None


def flatten_steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder: one, or sequences of them in any depth."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [dict(part)]
    inner = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders") or []
    return [step for each in inner for step in flatten_steps(each)]


def _ids(vocabulary: Any) -> dict[str, int]:
    """The ids of tokens; those of a list of pairs, as Unigram has it, are their places."""
    if isinstance(vocabulary, list):
        return {pair[0]: place for place, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    if isinstance(vocabulary, dict):
        return {token: id_ for token, id_ in vocabulary.items() if isinstance(id_, int)}
    return {}


def _added(tokens: Any) -> dict[str, int]:
    found = [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
    return {
        token["content"]: token["id"]
        for token in found
        if isinstance(token.get("id"), int) and isinstance(token.get("content"), str)
    }


def _check_ids(vocabulary: Mapping[str, int], added: Mapping[str, int], source: str) -> None:
    everything = {**vocabulary, **added}
    if not everything:
        return
    token, largest = max(everything.items(), key=lambda item: item[1])
    most = _MOST_PER_TOKEN * len(everything) + _MOST_BESIDES
    if largest >= most:
        raise DataError(
            f"{source}: token {token[:40]!r} has id {largest:,} among {len(everything):,} tokens, expected ids "
            f"below {most:,}; number the tokens one after another from 0"
        )
    counts = Counter(vocabulary.values())
    if len(counts) < len(vocabulary):
        twice = next(id_ for id_, count in counts.items() if count > 1)
        both = [repr(token[:40]) for token, id_ in vocabulary.items() if id_ == twice][:2]
        raise DataError(f"{source}: id {twice} stands for two tokens, {' and '.join(both)}; give each its own id")


def _drops(fields: Mapping[str, Any], model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str | None:
    """Why some text would be dropped without a word, or would stop the tokenizers library; None where none is."""
    kind = model["type"]
    if kind == "Unigram":
        return "its model is Unigram and names no unk_id" if model.get("unk_id") is None else None
    unknown = model.get("unk_token")
    if unknown in vocabulary:
        return None
    lacking = _lacking_bytes(fields, model, vocabulary) if kind == "BPE" else f"its model is {kind}"
    if not lacking or not unknown:
        return lacking and f"{lacking}, and it names no unk_token"
    return f"{lacking}, and its unk_token {unknown!r} is not in its vocabulary"


def _lacking_bytes(
    fields: Mapping[str, Any], model: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> str | None:
    """Why BPE does not know every byte that stands in text; None where it does."""
    used = [*flatten_steps(fields.get("pre_tokenizer")), *flatten_steps(fields.get("normalizer"))]
    if any(step["type"] == "ByteLevel" for step in used):
        spellings = ((byte, token) for sign, byte in BYTE_OF_CHARACTER.items() for token in _spellings(sign, model))
        return _lacking((byte, token) for byte, token in spellings if token not in vocabulary)
    if model.get("byte_fallback"):
        return _lacking((byte, f"<0x{byte:02X}>") for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary)
    return "its BPE is not of bytes, so that characters which it does not know would be dropped"


def _spellings(sign: str, model: Mapping[str, Any]) -> list[str]:
    """How BPE spells a byte at the start, inside and at the end of a word."""
    starts = dict.fromkeys(["", model.get("continuing_subword_prefix") or ""])
    ends = dict.fromkeys(["", model.get("end_of_word_suffix") or ""])
    return [start + sign + end for start in starts for end in ends]


def _lacking(missing: Iterable[tuple[int, str]]) -> str | None:
    lacks: dict[int, str] = {}
    for byte, token in missing:
        if byte not in _NEVER:
            lacks.setdefault(byte, token)
    if not lacks:
        return None
    named = ", ".join(f"0x{byte:02X} ({token!r})" for byte, token in sorted(lacks.items())[:_MOST_NAMED])
    more = ", …" if len(lacks) > _MOST_NAMED else ""
    return f"its vocabulary lacks {len(lacks)} of the 256 bytes, which would be dropped from text: {named}{more}"
