"""Compares every quantizing kernel with the reference, on random rows on a GPU: bit by bit, but for SwiGLU.

Axes: those of `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import (
    BLOCK,
    ColumnBlocks,
    Fp8Quantize,
    cuda,
    dequantize_1x128,
    dequantize_columns,
    group_starts,
    reference,
)

_SIZES = (3, 0, 129, 128)  # rows of each expert
_WIDTH = 384


def check(device: torch.device, quantize: Fp8Quantize = cuda) -> Iterator[tuple[str, bool]]:
    """Yields the name of each comparison, and whether the results agree. The reference runs on the CPU."""
    torch.manual_seed(0)
    ends_E = torch.tensor(_SIZES).cumsum(0).int()
    rows = sum(_SIZES)
    x_XD = (torch.randn(rows, _WIDTH) * torch.randn(rows, 1).exp()).bfloat16()
    gather, places = (x_XD, torch.randperm(rows), ends_E), _places(ends_E)
    for power_of_two in (False, True):
        scales = "scales that are powers of two" if power_of_two else "any scales"
        columns = _run(device, quantize.quantize_columns, x_XD, power_of_two)
        yield f"quantize_columns, {scales}", _same(columns, reference.quantize_columns(x_XD, power_of_two))

        both = _run(device, quantize.quantize_both, x_XD, power_of_two)
        yield f"quantize_both, {scales}", all(map(_same, both, reference.quantize_both(x_XD, power_of_two)))

        gathered = _run(device, quantize.gather_columns, *gather, power_of_two)
        expected = reference.gather_columns(*gather, power_of_two)
        yield f"gather_columns, {scales}", _same(_used(gathered, places), _used(expected, places))

        yield f"swiglu_backward, {scales}", _swiglu_agrees(device, quantize, ends_E, power_of_two)


def _swiglu_agrees(device: torch.device, quantize: Fp8Quantize, ends_E: Tensor, power_of_two: bool) -> bool:
    """Whether the gradients are as near to those in float64 as the format allows, and a little for the rounding."""
    rows = sum(_SIZES)
    kept = reference.quantize_rows(3 * torch.randn(rows, 2 * _WIDTH), power_of_two)
    grad_hidden_XF, gates_X = torch.randn(rows, _WIDTH).bfloat16(), torch.rand(rows)
    given = (gates_X, ends_E, power_of_two)
    found = _run(device, quantize.swiglu_backward, kept, grad_hidden_XF, *given)
    (found_XG2, scales_XG), by_columns, hidden_by_columns, grad_gates_X = found
    expected = reference.swiglu_backward(kept, grad_hidden_XF.double(), *given)
    exact_XG2, exact_XF, exact_X = reference.swiglu_gradients(kept, grad_hidden_XF.double(), gates_X)
    expected_scales_XG2 = expected[0].scales_XG.repeat_interleave(BLOCK, 1)
    if grad_gates_X is None or exact_X is None:
        return False
    return (
        _near(dequantize_1x128(found_XG2, scales_XG, torch.float64), exact_XG2, expected_scales_XG2)
        and _columns_near(by_columns, exact_XG2, expected[1], ends_E)
        and _columns_near(hidden_by_columns, exact_XF, expected[2], ends_E)
        and torch.allclose(grad_gates_X, exact_X, rtol=1e-4, atol=1e-4)
    )


def _columns_near(found: ColumnBlocks, exact_XD: Tensor, expected: ColumnBlocks, ends_E: Tensor) -> bool:
    rows_X = torch.arange(len(exact_XD), dtype=torch.int32)
    padding_E = group_starts(ends_E) - ends_E + ends_E.diff(prepend=ends_E.new_zeros(1))  # before each group
    places_X = (rows_X + padding_E[torch.searchsorted(ends_E, rows_X, right=True)]).long()
    places = _places(ends_E)
    exact_PD = exact_XD.new_zeros(places, exact_XD.shape[1]).index_copy(0, places_X, exact_XD)
    scales_PD = expected.scales_BD[: places // BLOCK].repeat_interleave(BLOCK, 0)
    return _near(dequantize_columns(_used(found, places), torch.float64).T, exact_PD, scales_PD)


def _near(found: Tensor, exact: Tensor, scales: Tensor) -> bool:
    """An e4m3 is within 1/16 of its number, or 2⁻¹⁰ of its scale."""
    return bool(((found - exact).abs() <= 1.001 * (exact.abs() / 16 + scales * 2.0**-10)).all())


def _run(device: torch.device, function: Callable[..., Any], *given: Any) -> Any:
    """The results on the CPU of a function on a device."""
    return _moved(function(*(_moved(each, device) for each in given)), torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors of a tuple, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not isinstance(value, tuple):
        return value
    parts = (_moved(part, device) for part in value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _places(ends_E: Tensor) -> int:
    """The places that the groups use; behind them columns are undefined."""
    return sum(-(-size // BLOCK) * BLOCK for size in ends_E.diff(prepend=ends_E.new_zeros(1)).tolist())


def _used(columns: ColumnBlocks, places: int) -> ColumnBlocks:
    return ColumnBlocks(columns.values_DP[:, :places].contiguous(), columns.scales_BD[: places // BLOCK])


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(one.shape == other.shape and torch.equal(_bytes(one), _bytes(other)) for one, other in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
