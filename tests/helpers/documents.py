"""Record batches of texts, as the stages of the data pipeline take them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from deepseek_v3.data.documents import record_batch


def batch_of(texts: Sequence[str], first: int = 0) -> pa.RecordBatch:
    """Returns a batch of documents with the ids `d0`, `d1` and so on, counted from `first`."""
    ids = [f"d{first + i}" for i in range(len(texts))]
    return record_batch(ids, texts, ["corpus"] * len(texts), range(1, len(texts) + 1), [None] * len(texts))
