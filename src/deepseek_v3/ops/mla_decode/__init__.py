"""Attention over the latent cache without expanding it to keys and values, and writing to this cache.

`LatentFormat` says how pages hold the rows; back ends attend to them and write them in place.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek_v3.ops.mla_decode import reference
from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat
from deepseek_v3.ops.nvrtc import nvrtc_obstacle
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

__all__ = ["MLA_DECODE", "PAGE", "LatentFormat", "MlaDecode", "reference"]

_WIDEST_LATENT, _WIDEST_ROPE = 512, 64  # whose sums and blocks of rows fit into registers and shared memory


class MlaDecode(Protocol):
    """The interface of a back end, as `reference.py` defines it."""

    def mla_decode(
        self, q_BSHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, layout: LatentFormat, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def write_latents(
        self,
        pages: Tensor,
        slots_N: Tensor,
        kv_NL: Tensor,
        norm_C: Tensor,
        eps: float,
        cos_NZ: Tensor,
        sin_NZ: Tensor,
        layout: LatentFormat,
    ) -> None: ...


def _triton() -> MlaDecode:
    from deepseek_v3.ops.mla_decode import triton

    return triton


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "needs float32, bfloat16 or float16"
    rank, rope = target.widths or (_WIDEST_LATENT, _WIDEST_ROPE)
    if rank > _WIDEST_LATENT or rope > _WIDEST_ROPE:
        return f"needs a latent of at most {_WIDEST_LATENT} numbers and a rotary key of at most {_WIDEST_ROPE}"
    obstacle = triton_obstacle(target)
    if obstacle is not None:
        return obstacle
    if torch.cuda.get_device_capability(target.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def _cuda() -> MlaDecode:
    from deepseek_v3.ops.mla_decode import cuda

    return cuda


def _cuda_obstacle(target: Target) -> str | None:
    obstacle = _triton_obstacle(target)
    if obstacle is not None:
        return obstacle
    if target.dtype != torch.bfloat16:
        return "needs bfloat16"
    if target.widths not in ((), (512, 64), (256, 32)):
        return "needs a latent of 512 numbers and a rotary key of 64, or of 256 and 32"
    if torch.cuda.get_device_capability(target.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    from deepseek_v3.ops.mla_decode import cuda

    return nvrtc_obstacle(cuda.kernels())


# The widths of its target are those of the latent and of the rotary key; its dtype is that of the queries.
MLA_DECODE: Operation[MlaDecode] = Operation(
    "mla_decode",
    Backend("cuda", _cuda, _cuda_obstacle),
    Backend("triton", _triton, _triton_obstacle),
    Backend("reference", lambda: reference),
)
