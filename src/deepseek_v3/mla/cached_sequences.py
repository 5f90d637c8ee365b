"""Sequences whose tokens lie in the pages of a pool, and what a forward pass over several of them needs to know.

Axes: B batch, S new tokens, M pages of the longest sequence, T cached tokens, L width of a cached row.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepseek_v3.mla.kv_compression import PagePool, pages_of
from deepseek_v3.ops.mla_decode.formats import PAGE


class CachedSequence:
    """The cached tokens of one sequence: their number, and the pages that hold them, in order."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages = array("i")
        self.length = 0

    def fork(self) -> CachedSequence:
        """Another sequence that begins with the same tokens. It shares their pages.

        A shared page that is not full is copied when one of its owners adds tokens.
        """
        other = CachedSequence(self.pool)
        self.pool.share(self.pages)
        other.pages, other.length = self.pages[:], self.length
        return other

    def truncate(self, num_tokens: int) -> None:
        """Drops the last `num_tokens` tokens, and frees the pages that held nothing else."""
        if not 0 <= num_tokens <= self.length:
            raise ValueError(f"found {num_tokens} tokens to drop, expected 0 to the length of {self.length}")
        self.length -= num_tokens
        kept = pages_of(self.length)
        self.pool.free(self.pages[kept:])
        del self.pages[kept:]

    def free(self) -> None:
        """Drops all tokens."""
        self.truncate(self.length)

    @property
    def partial_page(self) -> int | None:
        """The page that the next token goes to if that page holds tokens already."""
        return self.pages[-1] if self.length % PAGE else None

    def grow(self, num_tokens: int) -> None:
        """Makes room for new tokens, and counts them as cached. Raises CacheFullError if pages are missing."""
        page = self.partial_page
        if num_tokens and page is not None and self.pool.owners(page) > 1:
            self.pages[-1] = self.pool.copy(page)
        if missing := pages_of(self.length + num_tokens) - len(self.pages):
            self.pages.extend(self.pool.allocate(missing))
        self.length += num_tokens


@dataclass(frozen=True)
class CacheView:
    """The cache as one forward pass sees it, which writes the S new tokens of each of B sequences.

    `table_BM` int32: the pages of each sequence, padded with 0. `lengths_B` int32: cached tokens, the new ones
    included. `slots_BS` int64: the row of each new token, page · `PAGE` + row of the page; -1 for padding, which
    stands on the right. `positions_BS` int64. `right_aligned_BS` int64, None if there is no padding: indices that
    rotate each sequence's tokens until its padding stands on the left. `longest`: the largest of the lengths.
    `is_new`: whether no sequence had cached tokens before.
    """

    pool: PagePool
    table_BM: Tensor
    lengths_B: Tensor
    slots_BS: Tensor
    positions_BS: Tensor
    right_aligned_BS: Tensor | None
    longest: int
    is_new: bool

    def read(self, layer: int, dtype: torch.dtype) -> Tensor:
        """The cached rows of a layer, (B, T, L) in `dtype`, T = `longest`; zeros behind the end of a sequence."""
        rows = self.pool.pages[layer][self.table_BM.long()].flatten(1, 2)[:, : self.longest]
        is_behind_BT = torch.arange(self.longest, device=rows.device) >= self.lengths_B[:, None]
        return self.pool.layout.unpack(rows, dtype).masked_fill(is_behind_BT[..., None], 0)


def extend(sequences: Sequence[CachedSequence], num_tokens: Sequence[int]) -> CacheView:
    """Makes room for new tokens of each sequence, of one pool, and counts them as cached.

    The caller must then run the forward pass that takes the view and writes them; it may drop some of them
    afterwards by `truncate`. Raises CacheFullError, and changes no sequence, if the pool has too few free pages.
    """
    pool = sequences[0].pool
    pool.require(_missing_pages(pool, sequences, num_tokens), sum(num_tokens))
    for sequence, number in zip(sequences, num_tokens, strict=True):
        sequence.grow(number)
    return view_of_new_tokens(sequences, num_tokens)


def view_of_new_tokens(
    sequences: Sequence[CachedSequence],
    num_tokens: Sequence[int],
    num_rows: int = 0,
    num_pages: int = 0,
    ends: Sequence[int] | None = None,
) -> CacheView:
    """The view of a forward pass over the last `num_tokens` tokens of each sequence, which is to write them.

    With `ends` they are the tokens before these positions, as if each sequence ended there.

    The view has at least `num_rows` rows, with empty sequences behind the others, and a table of at least
    `num_pages` columns: passes of equal shapes can then be captured once.
    """
    pool, missing = sequences[0].pool, max(0, num_rows - len(sequences))
    new_B = np.array([*num_tokens, *[0] * missing])
    ends = [sequence.length for sequence in sequences] if ends is None else ends
    cached_B = np.array([*ends, *[0] * missing]) - new_B
    widest = max(num_pages, *(len(sequence.pages) for sequence in sequences))
    table_BM = np.zeros((len(new_B), widest), dtype=np.int32)
    for table_M, sequence in zip(table_BM, sequences, strict=False):
        table_M[: len(sequence.pages)] = sequence.pages
    place_S = np.arange(new_B.max())
    positions_BS = cached_B[:, None] + place_S
    page_BS = np.take_along_axis(table_BM, np.minimum(positions_BS // PAGE, table_BM.shape[1] - 1), 1)
    slots_BS = np.where(place_S < new_B[:, None], page_BS.astype(np.int64) * PAGE + positions_BS % PAGE, -1)
    is_padded = len(place_S) > 1 and bool((new_B != len(place_S)).any())
    aligned_BS = (place_S + new_B[:, None]) % len(place_S) if is_padded else None

    def on_device(numbers: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(numbers).to(pool.device, non_blocking=True)

    return CacheView(
        pool,
        on_device(table_BM),
        on_device((cached_B + new_B).astype(np.int32)),
        on_device(slots_BS),
        on_device(positions_BS),
        None if aligned_BS is None else on_device(aligned_BS),
        longest=int((cached_B + new_B).max()),
        is_new=not cached_B.any(),
    )


def _missing_pages(pool: PagePool, sequences: Sequence[CachedSequence], num_tokens: Sequence[int]) -> int:
    """How many free pages the new tokens need: for themselves, and to copy shared pages that they go to."""
    growing = [(each, number) for each, number in zip(sequences, num_tokens, strict=True) if number]
    added = sum(pages_of(each.length + number) - len(each.pages) for each, number in growing)
    writers = Counter(each.partial_page for each, _ in growing)
    del writers[None]
    # The last owner of a page keeps it.
    return added + sum(min(count, pool.owners(page) - 1) for page, count in writers.items() if page is not None)
