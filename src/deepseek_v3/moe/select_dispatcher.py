"""Selects how a run reaches experts on other ranks: once, when the model is built, and with a log line."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist

from deepseek_v3.moe.all_to_all import AllToAllDispatcher
from deepseek_v3.moe.deepep import (
    Buffer,
    BufferShape,
    CannotRunError,
    DeepEPDispatcher,
    ElasticBuffer,
    LegacyBuffer,
)
from deepseek_v3.moe.dispatch import Dispatcher
from deepseek_v3.moe.exchange import exchange_steps
from deepseek_v3.moe.expert_parallel import Fp8Dispatch
from deepseek_v3.ops.fp8 import BLOCK
from deepseek_v3.ops.moe_permute import MOE_PERMUTE
from deepseek_v3.ops.operation import Target
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger

_BFLOAT16_PER_COPY = 8  # DeepEP copies rows in units of 16 bytes


def select_dispatcher(
    backend: Literal["auto", "torch", "deepep"],
    num_experts: int,
    group: dist.ProcessGroup,
    shape: BufferShape,
    device: torch.device,
    *,
    fp8: Fp8Dispatch | None = None,
    ranks_per_node: int | None = None,
) -> Dispatcher:
    """The dispatcher of layers on `device` with experts sharded over `group`; each of its ranks must call this.

    `auto` takes DeepEP if it can run. With `fp8`, rows are sent to the experts in FP8. With `ranks_per_node`
    the `torch` back end sends each token once to each node; DeepEP does so by itself. Raises ConfigError if the
    experts do not divide over the ranks, or the ranks over nodes, and if `deepep` is named and cannot run.
    """
    if num_experts % group.size():
        raise ConfigError(
            f"parallel.expert: {num_experts} experts do not divide over {group.size()} ranks; "
            "choose a degree that divides model.n_routed_experts"
        )
    permute = MOE_PERMUTE.select(Target(device, shape.dtype, (shape.width,)))
    details = f"dispatched rows in {'FP8' if fp8 is not None else 'the type of the activations'}, {permute}"
    log = get_logger("Experts")
    if backend != "torch":
        try:
            buffer = _deepep_buffer(num_experts, group, shape, fp8 is not None)
        except CannotRunError as error:
            if backend == "deepep":
                message = f"parallel.expert_back_end = deepep: {error}; use --set parallel.expert_back_end=torch"
                raise ConfigError(message) from error
            log.info(f"DeepEP cannot run: {error}")
        else:
            log.info(f"sharded over {group.size()} ranks, reached through DeepEP's {buffer.name}, {details}")
            return DeepEPDispatcher(num_experts // group.size(), buffer, fp8, permute.run)
    steps = exchange_steps(group, ranks_per_node)
    num_steps = "one step" if len(steps) == 1 else "two steps"
    log.info(f"sharded over {group.size()} ranks, reached through torch.distributed in {num_steps}, {details}")
    return AllToAllDispatcher(num_experts, steps, fp8, permute.run)


def _deepep_buffer(num_experts: int, group: dist.ProcessGroup, shape: BufferShape, fp8: bool) -> Buffer:
    if not torch.cuda.is_available() or "nccl" not in dist.get_backend_config(group):
        raise CannotRunError("it needs CUDA devices, one per rank, and NCCL between them")
    multiple = BLOCK if fp8 else _BFLOAT16_PER_COPY
    if shape.dtype != torch.bfloat16:
        raise CannotRunError(f"it sends bfloat16, the model computes in {shape.dtype}")
    if shape.width % multiple:
        raise CannotRunError(f"hidden_size = {shape.width} is not a multiple of {multiple}")
    library = _import_deepep()
    buffer_class = ElasticBuffer if hasattr(library, "ElasticBuffer") else LegacyBuffer
    return buffer_class(library, num_experts, group, shape)


def _import_deepep() -> ModuleType:
    try:
        import deep_ep
    except (ImportError, OSError) as error:  # OSError: built for other versions of CUDA, NCCL or NVSHMEM
        raise CannotRunError(f"deep_ep cannot be imported ({error})") from error
    if not hasattr(deep_ep, "ElasticBuffer") and not hasattr(deep_ep, "Buffer"):
        version = getattr(deep_ep, "__version__", "of unknown version")
        raise CannotRunError(f"deep_ep {version} has neither Buffer nor ElasticBuffer")
    if getattr(deep_ep, "topk_idx_t", torch.int64) != torch.int64:
        raise CannotRunError(f"deep_ep was built for expert numbers of type {deep_ep.topk_idx_t}, not torch.int64")
    return deep_ep
