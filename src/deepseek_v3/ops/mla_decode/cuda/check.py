"""Compares every variant of the decoding kernel with the reference in float64, on random pages on a GPU.

Axes: B batch, S new tokens, H heads, M pages of a sequence, L width of a query.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek_v3.ops.fp8.formats import E4M3
from deepseek_v3.ops.mla_decode import MlaDecode, cuda, reference
from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat

_LENGTHS = [0, 1, 63, 64, 65, 700, 3000]  # of sequences without tokens, with one page, and with several parts
_LAYOUTS = [
    LatentFormat(512, 64, torch.bfloat16),
    LatentFormat(512, 64, E4M3),
    LatentFormat(256, 32, torch.bfloat16),
]


def check(
    device: torch.device, decode: MlaDecode = cuda, lengths: list[int] | None = None
) -> Iterator[tuple[str, bool]]:
    """Yields the name of each comparison, and whether the results agree."""
    torch.manual_seed(0)
    for layout in _LAYOUTS:
        for queries, heads in ((1, 16), (2, 128)):
            kind = "FP8" if layout.is_fp8 else "bfloat16"
            name = f"{layout.rank} + {layout.rope} in {kind}, {queries} × {heads} queries"
            yield name, _agree(decode, device, layout, lengths or _LENGTHS, queries, heads)


def _agree(
    decode: MlaDecode, device: torch.device, layout: LatentFormat, lengths: list[int], queries: int, heads: int
) -> bool:
    pages, table_BM = _cached(device, layout, lengths)
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    q_BSHL = torch.randn(len(lengths), queries, heads, layout.width, device=device).bfloat16()
    cache, scale = (pages, table_BM, lengths_B, layout), layout.width**-0.5
    found, sums = decode.mla_decode(q_BSHL, *cache, scale)
    exact, exact_sums = reference.mla_decode(q_BSHL.double(), *cache, scale)
    hidden = exact_sums.isneginf()
    if not (sums.isneginf().equal(hidden) and found[hidden].eq(0).all()):
        return False
    # Weights, and in FP8 the cached numbers too, are rounded to bfloat16.
    error = (found.double() - exact).norm() / exact.norm()
    return bool(error < 2**-7 and (sums - exact_sums)[~hidden].abs().max() < (2e-2 if layout.is_fp8 else 1e-4))


def _cached(device: torch.device, layout: LatentFormat, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Pages in random order, whose unused rows hold NaN, and their table."""
    width = -(-max(lengths) // PAGE)
    pages = layout.empty_pages(len(lengths) * width, device)
    pages.view(torch.uint8).fill_(0x7F if layout.is_fp8 else 0xFF)
    table_BM = torch.randperm(len(pages), device=device).int().unflatten(0, (-1, width))
    for table_M, length in zip(table_BM.tolist(), lengths, strict=True):
        numbers_NL = torch.randn(length, layout.width, device=device)
        rows = layout.pack(*numbers_NL.split((layout.rank, layout.rope), -1))
        for page, part in zip(table_M, rows.split(PAGE), strict=False):
            pages[page, : len(part)] = part
    return pages, table_BM
