"""Pages of a latent cache for tests: shuffled, with NaN in every unused row and nonsense in every unused entry."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.ops.mla_decode import PAGE, LatentFormat, MlaDecode

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
HEADS = [1, 2, 8, 16, 20, 64, 128]
NONSENSE = (2**31 - 1, -(2**31), -1)  # entries of a page table behind the last page of a sequence


class Cached(NamedTuple):
    """Sequences in pages; `rows`: the float64 numbers (tokens, L) that the pages hold of each of them."""

    layout: LatentFormat
    pages: Tensor
    table_BM: Tensor
    lengths_B: Tensor
    rows: list[Tensor]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, LatentFormat]:
        """What `mla_decode` takes between the queries and the scale."""
        return self.pages, self.table_BM, self.lengths_B, self.layout

    def of(self, sequences: list[int], more_pages: int = 0) -> Cached:
        """Some of the sequences in this order, with a wider page table."""
        table_BM = torch.nn.functional.pad(self.table_BM[sequences], (0, more_pages), value=NONSENSE[0])
        rows = [self.rows[sequence] for sequence in sequences]
        return self._replace(table_BM=table_BM, lengths_B=self.lengths_B[sequences], rows=rows)

    def to(self, device: torch.device) -> Cached:
        moved = (self.pages.to(device), self.table_BM.to(device), self.lengths_B.to(device))
        return Cached(self.layout, *moved, [rows.to(device) for rows in self.rows])


def cached(layout: LatentFormat, lengths: list[int], size: float = 0.1) -> Cached:
    """Random rows of this standard deviation."""
    counts = [-(-length // PAGE) for length in lengths]
    pages = layout.empty_pages(sum(counts) + 2, torch.device("cpu"))
    pages.view(torch.uint8).fill_(0xFF)  # NaN in every float format
    order = torch.randperm(len(pages)).int()
    table_BM = torch.tensor(NONSENSE, dtype=torch.int32).repeat(len(lengths), max(counts, default=0) + 1)
    rows = []
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own, order = order[:count], order[count:]
        table_BM[sequence, :count] = own
        packed = layout.pack(size * torch.randn(length, layout.rank), size * torch.randn(length, layout.rope))
        for number, page in enumerate(own.tolist()):
            part = packed[number * PAGE : (number + 1) * PAGE]
            pages[page, : len(part)] = part
        rows.append(layout.unpack(packed, torch.float64))
    return Cached(layout, pages, table_BM, torch.tensor(lengths, dtype=torch.int32), rows)


def scale_of(layout: LatentFormat) -> float:
    """With which the scores of random queries, and of rows of a tenth of their size, have a deviation of 1."""
    return 10 / math.sqrt(layout.width)


def exact(q_BSHL: Tensor, cache: Cached, scale: float) -> tuple[Tensor, Tensor]:
    """Each query of each head by itself in float64: its output, and its log-sum-exp."""
    batch, new, heads, _ = q_BSHL.shape
    out_BSHC = q_BSHL.new_zeros(batch, new, heads, cache.layout.rank, dtype=torch.float64)
    sums_BSH = q_BSHL.new_full((batch, new, heads), -torch.inf, dtype=torch.float64)
    for b, rows_TL in enumerate(cache.rows):
        for s in range(new):
            seen_TL = rows_TL[: max(0, len(rows_TL) - (new - 1 - s))]
            for h in range(heads if len(seen_TL) else 0):
                scores_T = scale * (seen_TL @ q_BSHL[b, s, h].double())
                weights_T = torch.exp(scores_T - scores_T.max())
                out_BSHC[b, s, h] = (weights_T / weights_T.sum()) @ seen_TL[:, : cache.layout.rank]
                sums_BSH[b, s, h] = scores_T.max() + weights_T.sum().log()
    return out_BSHC, sums_BSH


def check_tolerances(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Those that FlashMLA publishes for bfloat16."""
    (out, sums), (exact_out, exact_sums) = [tuple(x.double() for x in pair) for pair in (found, expected)]
    error = (out - exact_out).abs()
    assert ((error < 8e-4) | (error < 2.01 / 128 * exact_out.abs())).all(), error.max()
    cosine = 2 * (out * exact_out).sum() / (out.square() + exact_out.square()).sum().clamp(min=1e-30)
    assert not exact_out.any() or 1 - cosine < 5e-6
    empty = exact_sums.isneginf()
    assert torch.equal(sums.isneginf(), empty)
    assert not out[empty].any()
    error = (sums - exact_sums)[~empty].abs()
    assert ((error < 1e-5) | (error < 8.01 / 65536 * exact_sums[~empty].abs())).all(), error.max()


def queries(batch: int, new: int, heads: int, layout: LatentFormat, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, new, heads, layout.width).to(dtype)


def write(
    kernels: MlaDecode,
    pages: Tensor,
    slots_N: Tensor,
    kv_NL: Tensor,
    layout: LatentFormat,
    device: torch.device,
    norm_C: Tensor | None = None,
) -> None:
    """Writes rows with the angles of one seed."""
    torch.manual_seed(1)
    angles_NZ = torch.randn(len(slots_N), layout.rope // 2)
    norm_C = torch.ones(layout.rank) if norm_C is None else norm_C
    tensors = (slots_N, kv_NL, norm_C)
    tables = (angles_NZ.cos().to(device), angles_NZ.sin().to(device))
    kernels.write_latents(pages, *(x.to(device) for x in tensors), 1e-6, *tables, layout)
