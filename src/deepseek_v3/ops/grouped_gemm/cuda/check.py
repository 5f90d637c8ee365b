"""Compares the kernel of the weight gradients with the reference in float64, on random rows on a GPU.

Axes: X rows, E experts, O output width, I input width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepseek_v3.ops.grouped_gemm import cuda, reference

WeightGradient = Callable[[Tensor, Tensor, Tensor], Tensor]

# Rows of each group, rows that belong to none, and widths.
_CASES = (
    ((1, 0, 63, 64, 0, 65, 400, 0), 100, 40, 72),
    ((130, 7), 0, 264, 520),
    ((0, 1000), 1, 128, 256),
    ((20,) * 64, 0, 128, 256),
)
# Hopper's tensor cores add 16 products and the sum so far, each cut off at 2^-25 of the largest one, and cut the
# sum off at 2^-23. So each 16 rows err by at most 17 · 2^-25 + 2^-23 of the sum of the magnitudes.
_STEP, _ERROR_OF_STEP = 16, 17 * 2.0**-25 + 2.0**-23


def check(
    device: torch.device, weight_gradient: WeightGradient = cuda.weight_gradient
) -> Iterator[tuple[str, bool]]:
    """Yields the name of each comparison, and whether the results agree. Rows of no group are NaN."""
    torch.manual_seed(0)
    for sizes, behind, output, width in _CASES:
        ends_E = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
        grad_XO, x_XI = (_rows(device, sum(sizes), behind, columns) for columns in (output, width))
        found = weight_gradient(grad_XO, x_XI, ends_E)
        yield f"{len(sizes)} groups, {output} × {width}", agree(found, grad_XO, x_XI, ends_E)


def agree(found_EOI: Tensor, grad_XO: Tensor, x_XI: Tensor, ends_E: Tensor) -> bool:
    """Whether a result is that of the reference in float64, but for the errors of the tensor cores' sums."""
    grad_XO, x_XI = grad_XO.double(), x_XI.double()
    exact_EOI = reference.weight_gradient(grad_XO, x_XI, ends_E)
    magnitudes_EOI = reference.weight_gradient(grad_XO.abs(), x_XI.abs(), ends_E)
    steps_E11 = (ends_E.diff(prepend=ends_E.new_zeros(1)) + _STEP - 1).div(_STEP, rounding_mode="floor")[
        :, None, None
    ]
    bound_EOI = _ERROR_OF_STEP * steps_E11 * magnitudes_EOI
    return found_EOI.dtype == torch.float32 and bool(((found_EOI - exact_EOI).abs() <= bound_EOI).all())


def _rows(device: torch.device, number: int, behind: int, columns: int) -> Tensor:
    rows = torch.randn(number + behind, columns, device=device, dtype=torch.bfloat16)
    rows[number:] = torch.nan
    return rows
