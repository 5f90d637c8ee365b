"""Rows of several tensors as one, and their exchange in one collective.

The exchange is one of bytes: the back ends of torch.distributed take different number formats, and gloo neither
8-bit floats nor 16-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_WORD = torch.int64  # rows are copied in words; every tensor begins at one


class Columns(NamedTuple):
    """The columns of one tensor among others."""

    dtype: torch.dtype
    width: int

    @property
    def num_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def num_words(self) -> int:
        return -(-self.num_bytes // _WORD.itemsize)


def columns_of(parts: Sequence[Tensor]) -> list[Columns]:
    """The columns of tensors (rows, width) with equally many rows, in order."""
    return [Columns(part.dtype, part.shape[1]) for part in parts]


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (rows, width) side by side, (rows, words) int64; one alone stays as it is."""
    if len(parts) == 1:
        return parts[0]
    columns = columns_of(parts)
    packed = torch.empty(len(parts[0]), sum(c.num_words for c in columns), dtype=_WORD, device=parts[0].device)
    for place, part in zip(unpack(packed, columns), parts, strict=True):
        place.copy_(part)
    return packed


def unpack(packed: Tensor, columns: Sequence[Columns]) -> list[Tensor]:
    """The tensors again, as views."""
    if len(columns) == 1:
        return [packed]
    places = packed.view(torch.uint8).split([c.num_words * _WORD.itemsize for c in columns], dim=1)
    return [place[:, : c.num_bytes].view(c.dtype) for place, c in zip(places, columns, strict=True)]


class Flight:
    """Rows on their way through one collective: how many go to each rank of the group, and come from it."""

    def __init__(self, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(received), rows.shape[1])
        work = dist.all_to_all_single(
            arriving.view(torch.uint8), rows.view(torch.uint8), received, sent, group=group, async_op=True
        )
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = work, rows, arriving

    def land(self) -> Tensor:
        """Waits, once, for what has been sent here. On a GPU it is the current stream that waits."""
        assert self._under_way is not None
        work, _, arriving = self._under_way
        work.wait()
        self._under_way = None  # what was sent needs to be kept no longer
        return arriving
