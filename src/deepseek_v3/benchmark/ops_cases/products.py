"""The matrix products of layers and experts, in bfloat16 and in FP8, at the sizes of the comparison.

Axes: X rows in expert order, E experts, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.benchmark.ops_cases.case import Case, Outputs, Prepared, Run, Work, backends, rotated
from deepseek_v3.benchmark.ops_cases.deep_gemm import columns_run, rows_run
from deepseek_v3.ops.fp8 import ColumnBlocks, RowBlocks, WeightBlocks, dequantize_1x128, dequantize_weight
from deepseek_v3.ops.fp8.reference import gather_columns, quantize_columns, quantize_rows, quantize_weight
from deepseek_v3.ops.fp8_gemm import FP8_GEMM, Fp8Gemm
from deepseek_v3.ops.fp8_gemm import reference as fp8_reference
from deepseek_v3.ops.grouped_gemm import GROUPED_GEMM, GroupedLinear, reference_grouped_linear
from deepseek_v3.ops.operation import Target

# Experts, rows of each, output and input width. The first two are the published model's, the others shape 1b's.
_GROUPED = ((16, 4096, 4096, 7168), (16, 4096, 7168, 2048), (64, 1536, 1024, 1024), (64, 1536, 1024, 512))
# Rows, output and input width of dense products.
_DENSE = (
    (16384, 1024, 1024),
    (8192, 7168, 16384),
    (8192, 18432, 7168),
    (8192, 24576, 1536),
    (4096, 4096, 7168),
    (4096, 2112, 7168),
)
_CPU_GROUPED, _CPU_DENSE = ((2, 128, 128, 256),), ((128, 128, 256),)

_WEIGHT_STD = 0.02
_BF16_BOUND, _FP32_BOUND = 4e-3, 1e-3  # of results rounded to bfloat16, and of sums in float32


def grouped_cases(device: torch.device) -> Iterator[Case]:
    """The experts' products in bfloat16: forward, input gradient, and the gradient of a float32 weight."""
    for experts, rows, out, inner in _GROUPED if device.type == "cuda" else _CPU_GROUPED:
        size = f"E{experts} m{rows} {out}×{inner}"
        for function in ("forward", "dgrad", "wgrad"):
            operations, num_bytes = _work(experts, rows, out, inner, 2, function)
            prepare = partial(_prepare_grouped, function, experts, rows, out, inner)
            yield Case("grouped_gemm", function, size, Work(operations, num_bytes), prepare)


def _prepare_grouped(
    function: str, experts: int, rows: int, out: int, inner: int, device: torch.device
) -> Prepared:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ends_E = _ends(experts, rows, device)
    x_XI = torch.randn(experts * rows, inner, device=device, dtype=dtype, requires_grad=function == "dgrad")
    weight_EOI = _WEIGHT_STD * torch.randn(experts, out, inner, device=device, dtype=dtype)
    if function == "wgrad":
        weight_EOI = weight_EOI.float().requires_grad_()
    grad_XO = torch.randn(experts * rows, out, device=device, dtype=dtype)
    target = Target(device, dtype, (inner, out))
    systems: dict[str, Run | str] = {}
    for name, grouped_linear in backends(GROUPED_GEMM, target):
        systems[name] = _grouped_run(function, grouped_linear, x_XI, weight_EOI, ends_E, grad_XO)

    def expected() -> Outputs:
        x, weight = (tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (x_XI, weight_EOI))
        return _grouped_run(function, reference_grouped_linear, x, weight, ends_E, grad_XO.double())(0)

    return Prepared(systems, expected, _BF16_BOUND)


def _grouped_run(
    function: str, grouped_linear: GroupedLinear, x_XI: Tensor, weight_EOI: Tensor, ends_E: Tensor, grad_XO: Tensor
) -> Run:
    """Forward, or one half of the backward pass, whose graph is kept."""
    if function == "forward":
        return lambda _: [grouped_linear(x_XI, weight_EOI, ends_E)]
    with torch.enable_grad():
        out_XO = grouped_linear(x_XI, weight_EOI, ends_E)
    leaf = x_XI if function == "dgrad" else weight_EOI
    return lambda _: list(torch.autograd.grad(out_XO, leaf, grad_XO, retain_graph=True))


def fp8_cases(device: torch.device) -> Iterator[Case]:
    """Products of FP8 training: of experts, and of dense layers, beside other products of the same operands."""
    on_gpu = device.type == "cuda"
    for experts, rows, out, inner in _GROUPED if on_gpu else _CPU_GROUPED:
        size = f"E{experts} m{rows} {out}×{inner}"
        yield from _fp8_cases(size, experts, rows, out, inner)
    for rows, out, inner in _DENSE if on_gpu else _CPU_DENSE:
        yield from _fp8_cases(f"{rows}×{out}×{inner}", 0, rows, out, inner)


def _fp8_cases(size: str, experts: int, rows: int, out: int, inner: int) -> Iterator[Case]:
    """`experts` 0 is a dense layer."""
    for function, prepare in (
        ("forward", partial(_prepare_rows, experts, rows, out, inner)),
        ("dgrad", partial(_prepare_rows, experts, rows, inner, out)),
        ("wgrad", partial(_prepare_columns, experts, rows, out, inner)),
    ):
        operations, num_bytes = _work(max(1, experts), rows, out, inner, 1, function)
        yield Case("fp8_gemm", function, size, Work(operations, num_bytes, in_fp8=True), prepare)


def _prepare_rows(experts: int, rows: int, out: int, inner: int, device: torch.device) -> Prepared:
    """`inner` is the width that is summed over."""
    ends_E = _ends(experts, rows, device) if experts else None
    groups = max(1, experts)

    def make() -> tuple[RowBlocks, WeightBlocks]:
        x_XI = torch.randn(groups * rows, inner, device=device, dtype=torch.bfloat16)
        w_EOI = _WEIGHT_STD * torch.randn(groups, out, inner, device=device, dtype=torch.bfloat16)
        return quantize_rows(x_XI, False), quantize_weight(w_EOI, False)[0]

    inputs = rotated(device, make, groups * (rows + out) * inner)
    a, w = inputs(0)

    def run_of(backend: Fp8Gemm) -> Run:
        def run(call: int) -> Outputs:
            return [backend.rows_product(*inputs(call), ends_E)]

        return run

    target = Target(device, torch.bfloat16, (inner, out))
    systems: dict[str, Run | str] = {name: run_of(backend) for name, backend in backends(FP8_GEMM, target)}
    if device.type == "cuda":
        systems["DeepGEMM"] = rows_run(a, w, ends_E)
        if not experts:
            systems["F.scaled_mm"] = _scaled_mm_run(a, w)
            systems["bf16"] = _bf16_run(a, w)
    return Prepared(systems, lambda: [fp8_reference.rows_product(a, w, ends_E, torch.float64)], _BF16_BOUND)


def _prepare_columns(experts: int, rows: int, out: int, inner: int, device: torch.device) -> Prepared:
    """The weight's gradient: sums over the rows."""
    groups = max(1, experts)
    total = groups * rows
    ends_E = _ends(experts, rows, device) if experts else None
    source_X = torch.arange(total, device=device)

    def columns(width: int) -> ColumnBlocks:
        x_XD = torch.randn(total, width, device=device, dtype=torch.bfloat16)
        return quantize_columns(x_XD, False) if ends_E is None else gather_columns(x_XD, source_X, ends_E, False)

    def make() -> tuple[ColumnBlocks, ColumnBlocks]:
        return columns(out), columns(inner)

    inputs = rotated(device, make, total * (out + inner))
    a, b = inputs(0)

    def run_of(backend: Fp8Gemm) -> Run:
        def run(call: int) -> Outputs:
            return [backend.columns_product(*inputs(call), ends_E, total)]

        return run

    target = Target(device, torch.float32, (inner, out))
    systems: dict[str, Run | str] = {name: run_of(backend) for name, backend in backends(FP8_GEMM, target)}
    if device.type == "cuda" and experts:
        systems["DeepGEMM"] = columns_run(a, b, [rows] * experts)
    return Prepared(
        systems,
        lambda: [fp8_reference.columns_product(a, b, ends_E, total, torch.float64)],
        _FP32_BOUND,
    )


def _scaled_mm_run(a: RowBlocks, w: WeightBlocks) -> Run:
    """The library's product of the same operands.

    It wants the scales of both column by column, and those of a weight with rows of zeros up to a multiple of four.
    """
    rows_kind, weight_kind = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    row_scales = a.scales_XG.T.contiguous().T
    weight, weight_scales = w.values_EOI[0].T, F.pad(w.scales[0], (0, -w.scales.shape[-1] % 4)).T
    return lambda _: [F.scaled_mm(a.values_XD, weight, row_scales, rows_kind, weight_scales, weight_kind)]


def _bf16_run(a: RowBlocks, w: WeightBlocks) -> Run:
    """The library's product of the same numbers, rounded to bfloat16."""
    x_XI = dequantize_1x128(*a, torch.bfloat16)
    w_OI = dequantize_weight(w, torch.bfloat16)[0]
    return lambda _: [x_XI @ w_OI.T]


def _ends(experts: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, (experts + 1) * rows, rows, dtype=torch.int32, device=device)


def _work(experts: int, rows: int, out: int, inner: int, width: int, function: str) -> tuple[float, float]:
    """Operations and bytes of a product: two operands of `width` bytes per number, and a result.

    Gradients of weights are float32, other results bfloat16.
    """
    sizes = {"x": rows * inner, "w": out * inner, "y": rows * out}
    result = {"forward": "y", "dgrad": "x", "wgrad": "w"}[function]
    result_width = 4 if function == "wgrad" else 2
    moved = sum(size * (result_width if name == result else width) for name, size in sizes.items())
    return 2.0 * experts * rows * out * inner, float(experts * moved)
