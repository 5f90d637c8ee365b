"""The product of the router, which is computed in float32 in a model of any type."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation, Target
from deepseek_v3.ops.router_gemm.reference import router_logits as reference_router_logits
from deepseek_v3.ops.router_gemm.split import router_logits as split_router_logits

RouterLogits = Callable[[Tensor, Tensor], Tensor]

__all__ = ["ROUTER_GEMM", "RouterLogits", "reference_router_logits", "split_router_logits"]


def _split_obstacle(target: Target) -> str | None:
    if target.device.type != "cuda":
        return "needs a CUDA device"
    return None if target.dtype == torch.bfloat16 else "needs bfloat16"


ROUTER_GEMM: Operation[RouterLogits] = Operation(
    "router_gemm",
    Backend("split", lambda: split_router_logits, _split_obstacle),
    Backend("reference", lambda: reference_router_logits),
)
