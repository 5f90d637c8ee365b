"""How many tokens texts are: counted with a tokenizer, or estimated from their bytes."""

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
    """Counts with the tokenizer.json at `tokenizer`; without one, a token is `bytes_per_token` bytes of text."""

    tokenizer: Path | None
    bytes_per_token: float

    def total(self, texts: pa.Array) -> int:
        """Tokens of all texts together."""
        return int(self.per_document(texts).sum())

    def per_document(self, texts: pa.Array) -> Int64Array:
        """Tokens of each text, with one more for the mark at its end; int64 [n]."""
        if self.tokenizer is None:
            lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False)
            return np.ceil(lengths / self.bytes_per_token).astype(np.int64) + 1
        encoded = _loaded(self.tokenizer).encode_batch(texts.to_pylist())
        return np.array([len(ids) + 1 for ids in encoded], np.int64)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
