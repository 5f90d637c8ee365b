"""Decoding over a latent cache at one size: its inputs, its work, and what a result must be.

The cache has the published model's widths, rank 512 and 64 rotated numbers. Its pages lie in memory in random
order. Every row that no query may see, and a page that no table lists, hold NaN.

Axes: B batch, S queries, H heads, M pages of a sequence, L = C + R cached numbers, C kv rank, T tokens of a page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.benchmark.ops_cases.case import Work
from deepseek_v3.ops.fp8 import E4M3
from deepseek_v3.ops.mla_decode import reference
from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat

RANK, ROPE = 512, 64
SCALE = (RANK + ROPE) ** -0.5  # scores of random numbers have a standard deviation of 1
LAYOUTS = {"bf16": LatentFormat(RANK, ROPE, torch.bfloat16), "fp8": LatentFormat(RANK, ROPE, E4M3)}

_NAN_BYTE = 255  # a number whose bytes are all 255 is NaN in bfloat16, float32 and e4m3
_CHECKED_SEQUENCES = 16


@dataclass(frozen=True)
class DecodeShape:
    """Sequences of one length, and the heads and the newest tokens (queries) that attend to each of them."""

    batch: int
    context: int
    heads: int
    queries: int

    def __str__(self) -> str:
        return f"{self.batch} × {self.context}, {self.heads}, {self.queries}"

    def work(self, row_bytes: int, query_bytes: int, in_fp8: bool) -> Work:
        """Two products with every visible row; every cached row is read once, queries once, outputs written once.

        Query s of S sees `context - (S - 1 - s)` rows. `row_bytes` of a cached token, `query_bytes` of a number of
        a query. An output has bfloat16 numbers and a float32 log-sum-exp.
        """
        pairs = self.heads * sum(self.context - later for later in range(self.queries))
        query = self.heads * ((RANK + ROPE) * query_bytes + 2 * RANK + 4)
        return Work(
            operations=2.0 * self.batch * pairs * ((RANK + ROPE) + RANK),
            num_bytes=float(self.batch * (self.context * row_bytes + self.queries * query)),
            in_fp8=in_fp8,
        )


SHAPES = tuple(
    DecodeShape(*numbers)
    for numbers in (
        (128, 4096, 128, 1),
        (64, 16384, 128, 1),
        (128, 8192, 128, 2),
        (128, 4096, 64, 1),
        (128, 4096, 16, 1),
        (128, 1024, 16, 1),
        (16, 4096, 128, 1),
        (32, 4096, 8, 1),
        (1, 131072, 128, 1),
        (1, 32768, 128, 1),
        (1, 4096, 128, 1),
    )
)
CPU_SHAPES = (DecodeShape(3, 256, 4, 2), DecodeShape(1, 320, 16, 1))


class DecodeInputs(NamedTuple):
    """The arguments of `mla_decode`, apart from the scale."""

    q_BSHL: Tensor
    pages: Tensor
    table_BM: Tensor
    lengths_B: Tensor
    layout: LatentFormat


Outputs = tuple[Tensor, Tensor]  # output (B, S, H, C), log-sum-exp (B, S, H)
Bind = Callable[[DecodeInputs], Callable[[], Outputs]]


def make_inputs(
    shape: DecodeShape, layout: LatentFormat, device: torch.device, ragged: bool = False, rounded: bool = False
) -> DecodeInputs:
    """Random inputs; queries and the numbers of the cache are normal, of variance 1.

    With `ragged` the sequences are up to 63 tokens shorter, each by another number, and tables have a column more.
    With `rounded` every number is one that e4m3 represents.
    """
    batch, columns = shape.batch, -(-shape.context // PAGE)
    numbers = batch * columns + 1
    rows = torch.randn(numbers * PAGE, layout.width, device=device, dtype=torch.bfloat16)
    q_BSHL = torch.randn(batch, shape.queries, shape.heads, layout.width, device=device, dtype=torch.bfloat16)
    if rounded:
        rows, q_BSHL = (each.to(E4M3).to(torch.bfloat16) for each in (rows, q_BSHL))
    pages = layout.pack(*rows.split((layout.rank, layout.rope), -1)).unflatten(0, (numbers, PAGE))
    pages_of_all = torch.randperm(numbers, device=device)
    table_BM = pages_of_all[:-1].view(batch, columns)
    unlisted = pages_of_all[-1]
    lengths_B = shape.context - torch.arange(1, batch + 1, device=device) % PAGE * int(ragged)
    _spoil_unused_rows(pages, table_BM, lengths_B, unlisted)
    if ragged:
        table_BM = torch.cat((table_BM, unlisted.expand(batch, 1)), dim=1)
    return DecodeInputs(q_BSHL, pages, table_BM.int(), lengths_B.int(), layout)


def _spoil_unused_rows(pages: Tensor, table_BM: Tensor, lengths_B: Tensor, unlisted: Tensor) -> None:
    """Makes NaN of the rows behind the end of each sequence, and of the page that no table lists."""
    bytes_of_pages = pages.view(torch.uint8)
    bytes_of_pages[unlisted] = _NAN_BYTE
    last_B = table_BM[:, -1]
    places_BT = (table_BM.shape[1] - 1) * PAGE + torch.arange(PAGE, device=pages.device).expand(len(last_B), -1)
    unused_BT = places_BT >= lengths_B[:, None]
    bytes_of_pages[last_B] = bytes_of_pages[last_B].masked_fill(unused_BT[..., None], _NAN_BYTE)


def checked_outputs(inputs: DecodeInputs, found: Outputs) -> tuple[Outputs, Outputs]:
    """The outputs of up to 16 sequences, evenly spread, and what the reference finds for these in float64."""
    batch = len(inputs.lengths_B)
    chosen = torch.linspace(0, batch - 1, min(batch, _CHECKED_SEQUENCES)).round().long().tolist()
    pairs = [
        reference.mla_decode(
            inputs.q_BSHL[one : one + 1].double(),
            inputs.pages,
            inputs.table_BM[one : one + 1],
            inputs.lengths_B[one : one + 1],
            inputs.layout,
            SCALE,
        )
        for one in chosen
    ]
    out, sums = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return (found[0][chosen], found[1][chosen]), (out, sums)


class DecodeError(NamedTuple):
    """How far a result is from the expected one. All are infinite if a number is not finite or the shape is wrong.

    `output`: the largest error of a number of the output, as a share of what is allowed. `cosine`: 1 less twice the
    product of both outputs over the sum of their squares. `log_sum`: as `output`, of the log-sum-exp.
    """

    output: float
    cosine: float
    log_sum: float


@dataclass(frozen=True)
class Tolerance:
    """What is allowed: an error of a number may reach an absolute or a relative bound, whichever is larger.

    `output` None allows any error of a single number. The defaults are those of FlashMLA's own tests.
    """

    output: tuple[float, float] | None = (8e-4, 2.01 / 128)
    cosine: float = 5e-6
    log_sum: tuple[float, float] = (1e-6, 8.01 / 65536)

    def measure(self, found: Outputs, expected: Outputs) -> DecodeError:
        """The error of outputs and log-sum-exps."""
        if any(one.shape != other.shape for one, other in zip(found, expected, strict=True)):
            return DecodeError(*(float("inf"),) * 3)
        if not all(bool(each.isfinite().all()) for each in found):
            return DecodeError(*(float("inf"),) * 3)
        return DecodeError(
            output=0.0 if self.output is None else _share_of_allowed(found[0], expected[0], *self.output),
            cosine=_cosine_difference(found[0].double(), expected[0].double()),
            log_sum=_share_of_allowed(found[1], expected[1], *self.log_sum),
        )

    def problem(self, error: DecodeError) -> str | None:
        """What is wrong with a result; None if nothing is."""
        if not error.output <= 1:
            return f"its largest error of an output is {error.output:.2f} times what is allowed"
        if not error.cosine <= self.cosine:
            return f"the cosine difference of its outputs is {error.cosine:.1e}, expected at most {self.cosine:g}"
        if not error.log_sum <= 1:
            return f"its largest error of a log-sum-exp is {error.log_sum:.2f} times what is allowed"
        return None


def _share_of_allowed(found: Tensor, expected: Tensor, absolute: float, relative: float) -> float:
    wide = expected.double()
    errors = (found.double() - wide).abs()
    return (errors / (relative * wide.abs()).clamp(min=absolute)).amax().item()


def _cosine_difference(one: Tensor, other: Tensor) -> float:
    squares = (one * one + other * other).sum().clamp(min=1e-12)
    return 1 - (2 * (one * other).sum() / squares).item()
