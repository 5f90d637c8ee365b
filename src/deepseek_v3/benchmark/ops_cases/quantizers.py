"""The quantizers of FP8 training; a faster back end must return the numbers of the reference.

Axes: T tokens, X rows in expert order, D width, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_v3.benchmark.ops_cases.case import Case, Outputs, Prepared, Run, Work, backends, rotated
from deepseek_v3.ops.fp8 import (
    BLOCK,
    FP8_QUANTIZE,
    ColumnBlocks,
    Fp8Quantize,
    RowBlocks,
    WeightBlocks,
    dequantize_1x128,
    dequantize_columns,
    dequantize_weight,
    group_starts,
)
from deepseek_v3.ops.fp8 import reference as fp8_reference
from deepseek_v3.ops.operation import Target


class _Sizes(NamedTuple):
    """Tokens, experts of each token, experts, model width, expert width."""

    tokens: int
    chosen: int
    experts: int
    width: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, top {self.chosen} of {self.experts}, {self.width}, {self.hidden}"


_SIZES = (_Sizes(8192, 8, 16, 7168, 2048), _Sizes(32768, 6, 64, 1024, 512))
_CPU_SIZES = (_Sizes(64, 2, 4, 256, 128),)


class _Inputs(NamedTuple):
    """What the quantizers read, made once for a size."""

    x_TD: Tensor
    rows: Any
    source_X: Tensor
    ends_E: Tensor
    gates_X: Tensor
    weight_EOI: Tensor
    gate_up_XG: Tensor
    kept: Any
    grad_XF: Tensor


# Name, call, and the bytes that one size must move at least; scales, a 32nd part, are left out.
_Call = Callable[[Fp8Quantize, _Inputs], Any]
_FUNCTIONS: dict[str, tuple[_Call, Callable[[_Sizes], float]]] = {
    "quantize_rows": (lambda op, i: op.quantize_rows(i.x_TD, False), lambda s: 3 * s.tokens * s.width),
    "quantize_columns": (lambda op, i: op.quantize_columns(i.x_TD, False), lambda s: 3 * s.tokens * s.width),
    "quantize_both": (lambda op, i: op.quantize_both(i.x_TD, False), lambda s: 4 * s.tokens * s.width),
    "gather_rows": (
        lambda op, i: op.gather_rows(i.rows, i.source_X),
        lambda s: (1 + s.chosen) * s.tokens * s.width,
    ),
    "gather_columns": (
        lambda op, i: op.gather_columns(i.x_TD, i.source_X, i.ends_E, False),
        lambda s: (2 + s.chosen) * s.tokens * s.width,
    ),
    "requantize_columns": (
        lambda op, i: op.requantize_columns(i.rows, i.source_X, i.ends_E, False, torch.bfloat16),
        lambda s: (1 + s.chosen) * s.tokens * s.width,
    ),
    "quantize_weight": (
        lambda op, i: op.quantize_weight(i.weight_EOI, False),
        lambda s: (4 + 2) * s.experts * 2 * s.hidden * s.width,
    ),
    "swiglu": (
        lambda op, i: op.swiglu(i.gate_up_XG, i.gates_X, False),
        lambda s: s.chosen * s.tokens * s.hidden * (2 * 2 + 1 + 2),
    ),
    "swiglu_backward": (
        lambda op, i: op.swiglu_backward(i.kept, i.grad_XF, i.gates_X, i.ends_E, False),
        lambda s: s.chosen * s.tokens * s.hidden * (2 + 2 + 2 + 2 + 1),
    ),
}

# SwiGLU's exponential differs in its last bit between kernels, which now and then rounds a number to its neighbour.
_BOUNDS = {"swiglu": 2e-3, "swiglu_backward": 2e-3}


def quantizer_cases(device: torch.device) -> Iterator[Case]:
    """Every quantizer at the sizes of the published model's layers and of shape 1b's."""
    for sizes in _SIZES if device.type == "cuda" else _CPU_SIZES:
        for name, (_, num_bytes) in _FUNCTIONS.items():
            work = Work(num_bytes=float(num_bytes(sizes)))
            yield Case("fp8_quantize", name, str(sizes), work, partial(_prepare, name, sizes))


def _prepare(name: str, sizes: _Sizes, device: torch.device) -> Prepared:
    call, num_bytes = _FUNCTIONS[name]
    inputs = rotated(device, partial(_make, sizes, device), num_bytes(sizes))
    ends_E = inputs(0).ends_E
    used_places = int(group_starts(ends_E)[-1] + ends_E.diff(prepend=ends_E.new_zeros(1))[-1])

    def run_of(backend: Fp8Quantize) -> Run:
        return lambda number: call(backend, inputs(number))

    systems: dict[str, Run | str] = {
        system: run_of(backend)
        for system, backend in backends(FP8_QUANTIZE, Target(device, torch.bfloat16, (sizes.width, sizes.hidden)))
    }
    return Prepared(
        systems,
        lambda: call(fp8_reference, inputs(0)),
        bound=_BOUNDS.get(name, 0.0),
        comparable=partial(_defined, used_places=used_places),
    )


def _make(sizes: _Sizes, device: torch.device) -> _Inputs:
    """Random inputs; every token chooses different experts, at random."""
    count = sizes.tokens * sizes.chosen
    scores_TE = torch.rand(sizes.tokens, sizes.experts, device=device)
    chosen_X = scores_TE.topk(sizes.chosen).indices.flatten()
    sorted_X, order_X = chosen_X.sort(stable=True)
    ends_E = torch.searchsorted(sorted_X, torch.arange(sizes.experts, device=device), right=True, out_int32=True)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x_TD, gate_up_XG = draw(sizes.tokens, sizes.width), draw(count, 2 * sizes.hidden)
    return _Inputs(
        x_TD=x_TD,
        rows=fp8_reference.quantize_rows(x_TD, False),
        source_X=order_X // sizes.chosen,
        ends_E=ends_E,
        gates_X=torch.rand(count, device=device),
        weight_EOI=draw(sizes.experts, 2 * sizes.hidden, sizes.width, dtype=torch.float32),
        gate_up_XG=gate_up_XG,
        kept=fp8_reference.quantize_rows(gate_up_XG, False),
        grad_XF=draw(count, sizes.hidden),
    )


def _defined(result: Any, used_places: int) -> Outputs:
    """Every tensor of a result, dequantized to float64, without the places behind the last group."""
    if isinstance(result, RowBlocks):
        return [dequantize_1x128(*result, torch.float64)]
    if isinstance(result, WeightBlocks):
        return [dequantize_weight(result, torch.float64)]
    if isinstance(result, ColumnBlocks):
        used = min(used_places, result.values_DP.shape[1])
        blocks = ColumnBlocks(result.values_DP[:, :used], result.scales_BD[: -(-used // BLOCK)])
        return [dequantize_columns(blocks, torch.float64)]
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result or () for tensor in _defined(part, used_places)]
