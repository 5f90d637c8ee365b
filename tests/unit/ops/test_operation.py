"""Selecting back ends: auto takes the fastest that can run and says why others cannot, a name is binding."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from deepseek_v3.model.backends import select_backends
from deepseek_v3.ops import grouped_gemm
from deepseek_v3.ops.attention import ATTENTION, cudnn_attention, sdpa_attention
from deepseek_v3.ops.cross_entropy import CROSS_ENTROPY, linear_cross_entropy, reference_linear_cross_entropy
from deepseek_v3.ops.fp8 import FP8_QUANTIZE
from deepseek_v3.ops.fp8_gemm import FP8_GEMM
from deepseek_v3.ops.grouped_gemm import (
    GROUPED_GEMM,
    reference_grouped_linear,
    torch_grouped_linear,
    wide_gradient_grouped_linear,
)
from deepseek_v3.ops.linear import LINEAR
from deepseek_v3.ops.moe_permute import MOE_PERMUTE
from deepseek_v3.ops.moe_permute import reference as reference_permute
from deepseek_v3.ops.multi_tensor import MULTI_TENSOR
from deepseek_v3.ops.multi_tensor import reference as reference_multi_tensor
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle
from deepseek_v3.ops.router_gemm import ROUTER_GEMM
from deepseek_v3.ops.swiglu import SWIGLU
from deepseek_v3.ops.top_k import TOP_K
from deepseek_v3.utils.errors import ConfigError
from helpers.models import small_config, small_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPERATIONS = [
    ATTENTION,
    CROSS_ENTROPY,
    FP8_GEMM,
    FP8_QUANTIZE,
    GROUPED_GEMM,
    LINEAR,
    MOE_PERMUTE,
    MULTI_TENSOR,
    ROUTER_GEMM,
    SWIGLU,
    TOP_K,
]


def needs_float32(target: Target) -> str | None:
    return None if target.dtype == torch.float32 else "needs float32"


ADD: Operation[str] = Operation(
    "add", Backend("fast", lambda: "fast addition", needs_float32), Backend("reference", lambda: "addition")
)


def test_auto_selects_the_first_back_end_that_can_run() -> None:
    selection = ADD.select(Target(CPU))
    assert (selection.run, str(selection)) == ("fast addition", "add fast")


def test_auto_falls_back_and_says_why() -> None:
    selection = ADD.select(Target(CPU, torch.bfloat16))
    assert (selection.run, str(selection)) == ("addition", "add reference (fast needs float32)")


def test_a_named_back_end_is_selected_even_if_it_is_slower() -> None:
    assert ADD.select(Target(CPU), "reference").run == "addition"


def test_a_named_back_end_that_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="add: back end fast needs float32; choose auto or another back end"):
        ADD.select(Target(CPU, torch.bfloat16), "fast")


def test_an_unknown_back_end_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="add: has no back end 'quick'; choose auto or one of fast, reference"):
        ADD.select(Target(CPU), "quick")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_can_run_its_reference_everywhere(operation: Operation[object]) -> None:
    assert list(operation.backends)[-1] == "reference"
    assert operation.select(Target(CPU, torch.float64, (7,)), "reference").backend == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_ends_on_a_cpu(dtype: torch.dtype) -> None:
    assert ATTENTION.select(Target(CPU, dtype, (192, 128))).run is sdpa_attention
    assert GROUPED_GEMM.select(Target(CPU, dtype, (64, 64))).run is reference_grouped_linear
    assert CROSS_ENTROPY.select(Target(CPU, dtype)).run is linear_cross_entropy
    assert CROSS_ENTROPY.select(Target(CPU, dtype), "reference").run is reference_linear_cross_entropy
    assert MOE_PERMUTE.select(Target(CPU, dtype)).run is reference_permute
    assert MULTI_TENSOR.select(Target(CPU, dtype)).run is reference_multi_tensor


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "expected"),
    [
        ((9, 0), torch.bfloat16, (192, 128), cudnn_attention),
        ((10, 0), torch.float16, (192, 128), cudnn_attention),
        ((8, 0), torch.bfloat16, (192, 128), sdpa_attention),
        ((9, 0), torch.float32, (192, 128), sdpa_attention),
        ((9, 0), torch.bfloat16, (192, 100), sdpa_attention),
    ],
)
def test_attention_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    widths: tuple[int, ...],
    expected: object,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert ATTENTION.select(Target(CUDA, dtype, widths)).run is expected


@pytest.mark.parametrize(
    ("capability", "nvrtc", "dtype", "widths", "expected", "obstacle"),
    [
        ((9, 0), None, torch.bfloat16, (64, 24), wide_gradient_grouped_linear, None),
        ((9, 0), "needs NVRTC", torch.bfloat16, (64, 24), torch_grouped_linear, "needs NVRTC"),
        ((10, 0), None, torch.bfloat16, (64, 24), torch_grouped_linear, "needs a GPU of compute capability 9.0"),
        ((9, 0), None, torch.float32, (64, 24), reference_grouped_linear, "needs bfloat16"),
        (
            *((9, 0), None, torch.bfloat16, (64, 20), reference_grouped_linear),
            "needs row widths that are multiples of 8",
        ),
    ],
)
def test_grouped_products_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    nvrtc: str | None,
    dtype: torch.dtype,
    widths: tuple[int, ...],
    expected: object,
    obstacle: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(grouped_gemm, "nvrtc_obstacle", lambda _: nvrtc)
    target = Target(CUDA, dtype, widths)
    assert GROUPED_GEMM.select(target).run is expected
    assert GROUPED_GEMM.backends["cuda"].obstacle(target) == obstacle


def test_without_triton_a_gpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    obstacle = triton_obstacle(Target(CUDA))
    assert obstacle is not None
    assert obstacle.startswith("needs Triton, which cannot be imported")
    assert MULTI_TENSOR.select(Target(CUDA)).run is reference_multi_tensor
    assert MOE_PERMUTE.select(Target(CUDA)).run is reference_permute


@pytest.mark.parametrize(
    "operation", [CROSS_ENTROPY, MOE_PERMUTE, MULTI_TENSOR, SWIGLU, TOP_K], ids=lambda op: op.name
)
def test_with_triton_a_gpu_runs_its_kernels(operation: Operation[object]) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    assert operation.select(Target(CUDA)).backend == "triton"


@pytest.mark.parametrize(
    ("capability", "shared_kib", "dtype", "widths", "expected"),
    [
        ((9, 0), 228, torch.bfloat16, (64, 48), None),
        ((10, 0), 228, torch.bfloat16, (64, 48), None),
        ((8, 9), 100, torch.bfloat16, (64, 48), "needs a GPU of compute capability 9.0 or newer"),
        ((12, 0), 100, torch.bfloat16, (64, 48), "needs a GPU with more than 128 KiB of shared memory"),
        ((9, 0), 228, torch.float64, (64, 48), "needs float32 or bfloat16"),
        ((9, 0), 228, torch.bfloat16, (64, 40), "needs row widths that are multiples of 16"),
    ],
)
def test_obstacles_of_fp8_products_in_triton(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    shared_kib: int,
    dtype: torch.dtype,
    widths: tuple[int, ...],
    expected: str | None,
) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    properties = SimpleNamespace(shared_memory_per_multiprocessor=1024 * shared_kib)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert FP8_GEMM.backends["triton"].obstacle(Target(CUDA, dtype, widths)) == expected


def test_triton_does_not_sum_rows_in_float64() -> None:
    selection = MOE_PERMUTE.select(Target(CUDA, torch.float64))
    assert str(selection) == "moe_permute reference (triton needs float32 or bfloat16)"


def test_a_model_selects_its_back_ends_once_and_describes_them() -> None:
    model = small_model(small_config())
    expected = (
        "cross_entropy chunked (triton needs a CUDA device), attention sdpa (cudnn needs a CUDA device), "
        "mla_decode reference (cuda needs a CUDA device; triton needs a CUDA device), "
        "rotary reference (triton needs a CUDA device), "
        "linear reference (wide_gradient needs a CUDA device), "
        "router_gemm reference (triton needs a CUDA device), top_k reference (triton needs a CUDA device), "
        "moe_permute reference (triton needs a CUDA device), "
        "grouped_gemm reference (cuda needs a CUDA device; torch needs a CUDA device), "
        "swiglu reference (triton needs a CUDA device)"
    )
    assert select_backends(model, CPU) == expected
    assert model.model.layers[0].self_attn.attend is sdpa_attention
    assert model.model.layers[1].mlp.experts.grouped_linear is reference_grouped_linear
