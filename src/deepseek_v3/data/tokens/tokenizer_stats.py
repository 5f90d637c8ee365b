"""What a tokenizer makes of a corpus: bytes per token, texts that it does not keep, ids that it never uses."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepseek_v3.data.arrays import BoolArray
from deepseek_v3.data.documents import Document
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.data.tokens.vocabulary import flatten_steps, removing_step
from deepseek_v3.utils.errors import DataError

MAX_SOURCES = 1000
_SHOWN = 12  # characters of a text before and after the place where it changes


@dataclass
class SourceCounts:
    """The counts of one source, or of all; tokens are those of the texts, without end-of-text."""

    documents: int = 0
    characters: int = 0
    num_bytes: int = 0
    tokens: int = 0
    changed: int = 0  # documents that do not decode to their text

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text for each token: the larger, the fewer tokens a text takes."""
        return self.num_bytes / self.tokens if self.tokens else 0.0

    @property
    def characters_per_token(self) -> float:
        """Unicode characters for each token."""
        return self.characters / self.tokens if self.tokens else 0.0

    def add(self, text: str, num_tokens: int, is_kept: bool) -> None:
        """Counts a document."""
        self.documents += 1
        self.characters += len(text)
        self.num_bytes += len(text.encode())
        self.tokens += num_tokens
        self.changed += not is_kept


@dataclass
class TokenizerStats:
    """The counts of one tokenizer, by source. `first_change` says where and why the first text is not kept."""

    name: str
    tokenizer: Tokenizer
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    total: SourceCounts = field(default_factory=SourceCounts)
    first_change: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.tokenizer.encode("é")  # builds the tables of the encoder, which the speed should not include
        self._is_used: BoolArray = np.zeros(self.tokenizer.vocab_size, np.bool_)

    def add(self, batch: Sequence[tuple[str, Document]]) -> None:
        """Encodes and decodes documents, each with the name of its source; DataError for too many sources."""
        texts = [document.text for _, document in batch]
        start = time.perf_counter()
        encoded = self.tokenizer.encode_batch(texts)
        self.seconds += time.perf_counter() - start
        for (source, document), ids in zip(batch, encoded, strict=True):
            decoded = self.tokenizer.decode(ids)
            is_kept = decoded == document.text
            if not is_kept and self.first_change is None:
                self.first_change = _change(source, document, decoded, self.tokenizer)
            for counts in (self.sources.setdefault(source, SourceCounts()), self.total):
                counts.add(document.text, len(ids), is_kept)
            self._is_used[ids] = True
        if len(self.sources) > MAX_SOURCES:
            raise DataError(f"found more than {MAX_SOURCES:,} sources; name a field with fewer different values")

    @property
    def bytes_per_second(self) -> float:
        """Bytes of text encoded in a second, by one process."""
        return self.total.num_bytes / self.seconds if self.seconds else 0.0

    @property
    def vocabulary(self) -> int:
        """The ids that have a token. It may be less than the tokenizer's `vocab_size`, the largest id and one."""
        return sum(self.tokenizer.token(id_) is not None for id_ in range(self.tokenizer.vocab_size))

    def unused_ids(self) -> list[int]:
        """The ids of tokens, markers aside, that no document has, ascending."""
        markers = self.tokenizer.markers
        return [
            id_
            for id_ in np.flatnonzero(~self._is_used).tolist()
            if id_ not in markers and self.tokenizer.token(id_) is not None
        ]

    def as_json(self) -> dict[str, Any]:
        """All counts and ratios."""
        tokenizer = self.tokenizer
        return {
            "name": self.name,
            "vocabulary": self.vocabulary,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": {"id": tokenizer.end_of_text, "token": tokenizer.token(tokenizer.end_of_text)},
            "ends": list(tokenizer.ends),
            "special_tokens": {name: id_ for id_, name in tokenizer.markers.items()},
            "unused_ids": self.unused_ids(),
            "bytes_per_second": self.bytes_per_second,
            "first_change": self.first_change,
            "sources": {name: _counts_as_json(counts) for name, counts in self.sources.items()},
            "total": _counts_as_json(self.total),
        }


def _counts_as_json(counts: SourceCounts) -> dict[str, float]:
    return {
        "documents": counts.documents,
        "characters": counts.characters,
        "bytes": counts.num_bytes,
        "tokens": counts.tokens,
        "bytes_per_token": counts.bytes_per_token,
        "characters_per_token": counts.characters_per_token,
        "changed_documents": counts.changed,
    }


def _change(source: str, document: Document, decoded: str, tokenizer: Tokenizer) -> str:
    """Where a decoded text first differs from its document, and the likely reason."""
    text = document.text
    pairs = enumerate(zip(text, decoded, strict=False))
    place = next((at for at, (one, other) in pairs if one != other), min(len(text), len(decoded)))
    before, after = (
        repr(each[max(0, place - _SHOWN) : place + _SHOWN]) if each[place:] else f"nothing after {place} characters"
        for each in (text, decoded)
    )
    return f"{source}, document {document.id}, character {place}: {before} becomes {after}; {_reason(tokenizer)}"


def _reason(tokenizer: Tokenizer) -> str:
    fields = json.loads(tokenizer.to_json())
    if normalizers := flatten_steps(fields.get("normalizer")):
        return f"its normalizer ({', '.join(step['type'] for step in normalizers)}) changes text"
    if step := removing_step({"pre_tokenizer": fields.get("pre_tokenizer")}):
        return f"its pre-tokenizer ({step}) removes the characters at which it cuts"
    if unknown := fields["model"].get("unk_token"):
        return f"its vocabulary lacks some characters, which become {unknown!r}"
    steps = [step["type"] for step in flatten_steps(fields.get("decoder"))]
    return f"its decoder ({', '.join(steps) or 'none'}) does not restore what its pre-tokenizer changes"
