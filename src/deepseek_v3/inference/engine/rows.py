"""The tokens of one forward pass on the CPU, and where their latents lie in the cache.

Axes: M rows, N of them that are tokens (the others are padding), L width of a cached row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.inference.engine.row_counts import padded
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.mla.kv_compression import PagePool, pages_of
from deepseek_v3.ops.mla_decode.formats import PAGE


class Chunk(NamedTuple):
    """Consecutive tokens of a sequence that are computed now; `start` is the position of the first one.

    The sequence has room for them already, and may have more. `is_prompt`: whether they are of the request's
    prompt; then `start` is a multiple of `PAGE`.
    """

    sequence: CachedSequence
    start: int
    ids: Sequence[int]
    is_prompt: bool

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.ids)


class Rows(NamedTuple):
    """The rows of one pass, all int64: tokens and positions, 0 for padding, and slots, page · `PAGE` + row."""

    chunks: list[Chunk]
    tokens_M: Tensor
    positions_M: Tensor
    slots_N: Tensor
    cached: list[CachedRows]

    @property
    def number(self) -> int:
        """N."""
        return self.slots_N.shape[0]


class CachedRows(NamedTuple):
    """The cached rows of a sequence up to position `end`: `pages` int64, or None if they follow each other."""

    first: int
    end: int
    pages_M: Tensor | None

    def read(self, pool: PagePool, layer: int, dtype: torch.dtype) -> Tensor:
        """The rows of a layer, (end, L), in `dtype`; without a copy if they are stored so and follow each other."""
        if self.pages_M is None:
            rows = pool.pages[layer].flatten(0, 1)[self.first * PAGE : self.first * PAGE + self.end]
        else:
            rows = pool.pages[layer].index_select(0, self.pages_M).flatten(0, 1)[: self.end]
        return pool.layout.unpack(rows, dtype)


def rows_of(chunks: list[Chunk], counts: Sequence[int]) -> Rows:
    """The rows of some chunks, padded to one of `counts`."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for sequence, start, ids, _ in chunks:
        places = range(start, start + len(ids))
        tokens += ids
        positions += places
        slots += [sequence.pages[place // PAGE] * PAGE + place % PAGE for place in places]
    padding = [0] * (padded(len(tokens), counts) - len(tokens))
    tokens_M, positions_M = torch.tensor([tokens + padding, positions + padding]).unbind()
    return Rows(chunks, tokens_M, positions_M, torch.tensor(slots), [_cached_rows(chunk) for chunk in chunks])


def _cached_rows(chunk: Chunk) -> CachedRows:
    pages = chunk.sequence.pages[: pages_of(chunk.end)]
    first = pages[0]
    follow = pages[-1] - first == len(pages) - 1 and all(page == first + i for i, page in enumerate(pages))
    return CachedRows(first, chunk.end, None if follow else torch.tensor(pages))
