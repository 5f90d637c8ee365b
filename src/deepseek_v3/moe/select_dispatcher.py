"""Which way to experts on other ranks a run takes: chosen once, at its start, and logged."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist

from deepseek_v3.moe.all_to_all import AllToAllDispatcher
from deepseek_v3.moe.deepep import (
    Buffer,
    CannotRunError,
    DeepEPDispatcher,
    FirstGeneration,
    SecondGeneration,
    Traffic,
)
from deepseek_v3.moe.dispatch import Dispatcher
from deepseek_v3.moe.exchange import hops
from deepseek_v3.ops.fp8 import BLOCK
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger

# DeepEP copies rows in pieces of 16 bytes.
_BFLOAT16_PER_PIECE = 8


def expert_dispatcher(
    kind: Literal["auto", "torch", "deepep"],
    num_experts: int,
    group: dist.ProcessGroup,
    traffic: Traffic,
    *,
    precision: Literal["activations", "fp8"] = "activations",
    ranks_per_node: int | None = None,
) -> Dispatcher:
    """The dispatcher of a layer whose experts lie in equal runs on the ranks of `group`; every rank has to ask.

    `auto` is DeepEP where it can run. `precision` is that of rows on the way to experts. `ranks_per_node`, for the
    `torch` back end, sends each token once to each node; DeepEP does so by itself. Raises ConfigError where experts
    or ranks do not divide, and where DeepEP is asked for by name and cannot run.
    """
    if num_experts % group.size():
        raise ConfigError(
            f"parallel.expert: {num_experts} experts do not divide over {group.size()} ranks; "
            "choose a degree that divides model.n_routed_experts"
        )
    fp8, on_the_way = precision == "fp8", f"{precision} on the way there"
    log = get_logger("Experts")
    if kind != "torch":
        try:
            buffer = _deepep_buffer(num_experts, group, traffic, fp8)
        except CannotRunError as error:
            if kind == "deepep":
                message = f"parallel.expert_back_end = deepep: {error}; use --set parallel.expert_back_end=torch"
                raise ConfigError(message) from error
            log.info(f"DeepEP cannot run: {error}")
        else:
            log.info(f"on {group.size()} ranks, reached by DeepEP's {buffer.name}, {on_the_way}")
            return DeepEPDispatcher(num_experts // group.size(), buffer, fp8)
    way = hops(group, ranks_per_node)
    log.info(f"on {group.size()} ranks, reached by torch.distributed in {len(way)} hop(s), {on_the_way}")
    return AllToAllDispatcher(num_experts, way, fp8)


def _deepep_buffer(num_experts: int, group: dist.ProcessGroup, traffic: Traffic, fp8: bool) -> Buffer:
    if not torch.cuda.is_available() or "nccl" not in dist.get_backend_config(group):
        raise CannotRunError("it needs CUDA devices, one per rank, and NCCL between them")
    multiple = BLOCK if fp8 else _BFLOAT16_PER_PIECE
    if traffic.dtype != torch.bfloat16:
        raise CannotRunError(f"it carries bfloat16, the model computes in {traffic.dtype}")
    if traffic.width % multiple:
        raise CannotRunError(f"hidden_size = {traffic.width} is no multiple of {multiple}")
    library = _deepep()
    generation = SecondGeneration if hasattr(library, "ElasticBuffer") else FirstGeneration
    return generation(library, num_experts, group, traffic)


def _deepep() -> ModuleType:
    try:
        library = import_module("deep_ep")
    except (ImportError, OSError) as error:  # OSError: built for other versions of CUDA, NCCL or NVSHMEM
        raise CannotRunError(f"deep_ep cannot be imported ({error})") from error
    if not hasattr(library, "ElasticBuffer") and not hasattr(library, "Buffer"):
        version = getattr(library, "__version__", "of unknown version")
        raise CannotRunError(f"deep_ep {version} has neither Buffer nor ElasticBuffer")
    if getattr(library, "topk_idx_t", torch.int64) != torch.int64:
        raise CannotRunError(f"deep_ep was built for {library.topk_idx_t} numbers of experts, not torch.int64")
    return library
