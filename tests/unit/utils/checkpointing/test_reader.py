"""Blocks of tensors that are stored in chunks."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.utils.checkpointing.checks import tensor_infos
from deepseek_v3.utils.checkpointing.reader import CheckpointReader

SHAPE = (5, 4, 3)
WHOLE = torch.arange(60.0).view(SHAPE)


class InChunks(CheckpointReader):
    """Holds one tensor, cut along two axes."""

    def __init__(self, rows: int, columns: int) -> None:
        self.path, self.plain, self.files = Path("memory"), {}, []
        self.tensors = tensor_infos({"w": WHOLE})
        self._cuts = [(0, rows), (rows, SHAPE[0])], [(0, columns), (columns, SHAPE[1])]

    def verify_file(self, name: str) -> None:
        raise NotImplementedError

    def chunks(self, name: str) -> list[tuple[Any, Any]]:  # noqa: ARG002 -- there is one tensor
        return [
            ((top, left, 0), (bottom - top, right - left, SHAPE[2]))
            for top, bottom in self._cuts[0]
            for left, right in self._cuts[1]
        ]

    def chunk(self, name: str, offsets: tuple[int, ...]) -> Tensor:
        sizes = dict(self.chunks(name))[offsets]
        return WHOLE[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    """The first and the last position of a block along each axis; it may be empty."""
    return [tuple(sorted(draw(st.tuples(*2 * [st.integers(0, size)])))) for size in SHAPE]


@given(spans(), st.integers(0, SHAPE[0]), st.integers(0, SHAPE[1]))
def test_a_block_is_read_from_all_chunks_that_it_touches(
    block: list[tuple[int, int]], rows: int, columns: int
) -> None:
    target = torch.full([last - first for first, last in block], torch.nan)
    InChunks(rows, columns).read_into(target, "w", [first for first, _ in block])
    assert torch.equal(target, WHOLE[tuple(slice(first, last) for first, last in block)])


def test_a_whole_tensor_is_put_together() -> None:
    assert torch.equal(InChunks(2, 3).read("w"), WHOLE)
