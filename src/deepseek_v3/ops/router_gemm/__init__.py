"""The product of the router, which is computed in float32 in a model of any type."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle
from deepseek_v3.ops.router_gemm.reference import raised_logits
from deepseek_v3.ops.router_gemm.reference import router_logits as reference_router_logits

RouterLogits = Callable[[Tensor, Tensor], Tensor]

__all__ = ["ROUTER_GEMM", "RouterLogits", "raised_logits", "reference_router_logits"]


def _triton() -> RouterLogits:
    from deepseek_v3.ops.router_gemm.triton import router_logits

    return router_logits


def _triton_obstacle(target: Target) -> str | None:
    return triton_obstacle(target) or (None if target.dtype == torch.bfloat16 else "needs bfloat16")


ROUTER_GEMM: Operation[RouterLogits] = Operation(
    "router_gemm",
    Backend("triton", _triton, _triton_obstacle),
    Backend("reference", lambda: reference_router_logits),
)
