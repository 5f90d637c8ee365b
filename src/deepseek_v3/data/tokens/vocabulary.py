"""Checks of a `tokenizer.json`: every text must be encoded completely, and the ids must suit a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_v3.data.tokens.tiktoken_encoder import BYTE_OF_CHARACTER
from deepseek_v3.utils.errors import DataError

# Ids may have gaps, but every id up to the largest takes a row of the embedding: the largest id must be less than
# 2 for each token, plus 65,536.
_MAX_PER_TOKEN, _MAX_EXTRA = 2, 2**16
# Bytes that no UTF-8 text contains.
_UNUSED_BYTES = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
_NAMES_SHOWN = 5
# With these options of BPE the characters of a token are more than its bytes.
_AFFIX_OPTIONS = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")
# Pre-tokenizers that always remove the characters at which they split.
_REMOVE = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")


def check_ids(text: str, source: str) -> None:
    """Raises DataError if ids are too sparse or not unique, before a library allocates tables for them.

    `text` is the text of a `tokenizer.json`. Any other text passes; the tokenizers library refuses it later.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return
    model = fields.get("model") if isinstance(fields, dict) else None
    if isinstance(model, dict):
        _check_ids(_ids(model.get("vocab")), _added(fields.get("added_tokens")), source)


def check_complete(fields: Mapping[str, Any], source: str) -> None:
    """Raises DataError if the tokenizer would drop some text.

    `fields` is the content of a `tokenizer.json` as the tokenizers library writes it, with every type.
    """
    model = fields["model"]
    if reason := _drops(fields, model, _ids(model["vocab"])):
        raise DataError(
            f"{source}: {reason}; expected a tokenizer that has a token for every text, such as any complete "
            "byte-level BPE"
        )


def removing_step(fields: Mapping[str, Any]) -> str | None:
    """The type of the first step of the pre-tokenizer that removes text, such as white space; else None."""
    for step in flatten_steps(fields["pre_tokenizer"]):
        if step["type"] in _REMOVE or step.get("behavior") == "Removed":
            return str(step["type"])
    return None


def flatten_steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be sequences of any depth, as a flat list."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [dict(part)]
    inner = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders") or []
    return [step for each in inner for step in flatten_steps(each)]


def keeps_every_byte(fields: Mapping[str, Any]) -> bool:
    """Whether the tokens of a text have exactly its bytes: byte-level BPE that does not change text.

    `fields` is the content of a `tokenizer.json` as the tokenizers library writes it, with every type.
    """
    model = fields["model"]
    return (
        is_byte_level(fields)
        and model["type"] == "BPE"
        and model["vocab"].keys() >= set(BYTE_OF_CHARACTER)
        and not any(model.get(name) for name in _AFFIX_OPTIONS)
        and fields.get("normalizer") in (None, {"type": "Sequence", "normalizers": []})
        and all(_keeps_text(step) for step in flatten_steps(fields.get("pre_tokenizer")))
    )


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a step of a pre-tokenizer neither adds nor removes text."""
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space")
    return step["type"] == "Split" and step["behavior"] != "Removed"


def is_byte_level(fields: Mapping[str, Any]) -> bool:
    """Whether each byte is one character in the vocabulary."""
    return any(step["type"] == "ByteLevel" for step in flatten_steps(fields.get("decoder")))


def sentencepiece_bytes(piece: str) -> int:
    """The bytes of a SentencePiece token, in which `<0x0A>` is one byte and U+2581 is a space."""
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece.replace("\u2581", " ").encode())


def _ids(vocabulary: Any) -> dict[str, int]:
    """The id of each token. In a list of pairs, the form of Unigram, the id is the index."""
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
    most = _MAX_PER_TOKEN * len(everything) + _MAX_EXTRA
    if largest >= most:
        raise DataError(
            f"{source}: token {token[:40]!r} has id {largest:,} among {len(everything):,} tokens, expected ids "
            f"below {most:,}; number the tokens one after another from 0"
        )
    counts = Counter(vocabulary.values())
    if len(counts) < len(vocabulary):
        shared = next(id_ for id_, count in counts.items() if count > 1)
        both = [repr(token[:40]) for token, id_ in vocabulary.items() if id_ == shared][:2]
        raise DataError(f"{source}: id {shared} stands for two tokens, {' and '.join(both)}; give each its own id")


def _drops(fields: Mapping[str, Any], model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str | None:
    """Why the tokenizers library would silently drop some text, or fail on it; None if it would not."""
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
    """Why BPE does not know every byte that text may contain; None if it does."""
    used = [*flatten_steps(fields.get("pre_tokenizer")), *flatten_steps(fields.get("normalizer"))]
    if any(step["type"] == "ByteLevel" for step in used):
        tokens = ((byte, token) for sign, byte in BYTE_OF_CHARACTER.items() for token in _byte_tokens(sign, model))
        return _lacking((byte, token) for byte, token in tokens if token not in vocabulary)
    if model.get("byte_fallback"):
        return _lacking((byte, f"<0x{byte:02X}>") for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary)
    return "its BPE is not of bytes, so that characters which it does not know would be dropped"


def _byte_tokens(sign: str, model: Mapping[str, Any]) -> list[str]:
    """The tokens of a byte for BPE at the start, inside and at the end of a word."""
    starts = dict.fromkeys(["", model.get("continuing_subword_prefix") or ""])
    ends = dict.fromkeys(["", model.get("end_of_word_suffix") or ""])
    return [start + sign + end for start in starts for end in ends]


def _lacking(missing: Iterable[tuple[int, str]]) -> str | None:
    lacks: dict[int, str] = {}
    for byte, token in missing:
        if byte not in _UNUSED_BYTES:
            lacks.setdefault(byte, token)
    if not lacks:
        return None
    named = ", ".join(f"0x{byte:02X} ({token!r})" for byte, token in sorted(lacks.items())[:_NAMES_SHOWN])
    more = ", …" if len(lacks) > _NAMES_SHOWN else ""
    return f"its vocabulary lacks {len(lacks)} of the 256 bytes, which would be dropped from text: {named}{more}"
