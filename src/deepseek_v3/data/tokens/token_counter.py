"""Counts the tokens of documents, with a tokenizer or by an estimate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens with the tokenizer.json at `tokenizer`; if it is None, estimates them by `bytes_per_token`."""

    tokenizer: Path | None
    bytes_per_token: float

    def total(self, texts: pa.Array) -> int:
        """The tokens of all texts."""
        return int(self.per_document(texts).sum())

    def per_document(self, texts: pa.Array) -> Int64Array:
        """The tokens of each text, including end-of-text: int64 [n]."""
        if self.tokenizer is None:
            lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False)
            return np.ceil(lengths / self.bytes_per_token).astype(np.int64) + 1
        encoded = _load_cached(self.tokenizer).encode_batch(texts.to_pylist())
        return np.array([len(ids) + 1 for ids in encoded], np.int64)


@lru_cache(maxsize=1)
def _load_cached(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
