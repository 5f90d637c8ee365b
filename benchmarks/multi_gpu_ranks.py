"""The measurements on the ranks of `multi_gpu.py`: the link, dispatch and combine, and their overlap.

    torchrun --nproc_per_node=2 benchmarks/multi_gpu_ranks.py --output result.json

Every figure is the slowest rank's median. Bandwidth counts what leaves a rank for others.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from environment import select_gpu
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.moe.deepep import BufferShape
from deepseek_v3.moe.dispatch import Dispatcher
from deepseek_v3.moe.expert_parallel import Fp8Dispatch
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.moe.select_dispatcher import select_dispatcher
from deepseek_v3.ops.fp8 import FP8_QUANTIZE
from deepseek_v3.ops.grouped_gemm import GROUPED_GEMM
from deepseek_v3.ops.operation import Target
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.distributed.launch import World, process_group
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import configure_logging

TOKENS = 8192  # of each rank
MESSAGE = 256 * 2**20  # bytes
# Widths of mixture layers: of configs/deepseek_v3_15b.yaml, and of the released model with fewer experts.
SHAPES = {
    "15b": {"hidden_size": 2048, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6},
    "v3": {"hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 32, "num_experts_per_tok": 8},
}
# Fields of a model that a single mixture layer does not use, small.
WIDTHS_OF_THE_REST: dict[str, Any] = {
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_shared_experts": 1,
}
BACK_ENDS = [("torch", "activations"), ("torch", "fp8"), ("deepep", "activations"), ("deepep", "fp8")]


class AtOnce:
    """A dispatcher that waits for what it sends, so that nothing is computed meanwhile."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Any:
        return self.inner.wait_dispatch(self.inner.dispatch(x_TD, gates_TK, experts_TK))

    def wait_dispatch(self, sent: Any) -> Any:
        return sent

    def combine(self, y_RD: Tensor, handle: Any) -> Any:
        return self.inner.wait_combine(self.inner.combine(y_RD, handle))

    def wait_combine(self, returned: Any) -> Any:
        return returned


def main(output: Annotated[Path, typer.Option(help="Where rank 0 writes its JSON.")]) -> None:
    """Measure on all GPUs that the launcher started a process for."""
    world = World.from_environment()
    configure_logging(logging.WARNING)
    device = select_gpu(world)
    with process_group(world, device, timedelta(minutes=5)):
        results = {"link": link(device), "experts": [experts(name, device) for name in SHAPES]}
        if world.rank == 0:
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def link(device: torch.device) -> dict[str, float]:
    """GB/s that each rank sends in NCCL's own collectives on large messages, after a check of their sums."""
    rank, size = dist.get_rank(), dist.get_world_size()
    check = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(check)
    assert check.eq(size * (size + 1) / 2).all(), "NCCL sums wrongly"
    part = torch.randn(MESSAGE // 2 // size, device=device).bfloat16()
    whole = torch.empty(part.numel() * size, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(whole)
    moved = MESSAGE * (size - 1) / size
    ways: dict[str, tuple[float, Callable[[], object]]] = {
        "all_gather": (moved, lambda: dist.all_gather_into_tensor(whole, part)),
        "all_reduce": (2 * moved, lambda: dist.all_reduce(whole)),
        "all_to_all": (moved, lambda: dist.all_to_all_single(other, whole)),
    }
    return {name: bytes_ / seconds_of(run) / 1e9 for name, (bytes_, run) in ways.items()}


def experts(shape: str, device: torch.device) -> dict[str, Any]:
    """A mixture layer whose experts lie on all ranks: its exchanges, and all of it, with each back end."""
    config = ModelConfig.model_validate({**WIDTHS_OF_THE_REST, **SHAPES[shape]})
    found: dict[str, Any] = {"shape": shape, "tokens": TOKENS, **SHAPES[shape], "back_ends": []}
    for kind, precision in BACK_ENDS:
        try:
            dispatcher = _dispatcher(config, kind, precision)
        except ConfigError as error:
            found["back_ends"].append(
                {"back_end": kind, "precision": precision, "not_run": str(error).split(";")[0]}
            )
            continue
        figures = {"back_end": kind, "precision": precision, **exchange(config, dispatcher, device, precision)}
        found["back_ends"].append(figures | whole_layer(config, dispatcher, device))
    return found


def whole_layer(config: ModelConfig, dispatcher: Dispatcher, device: torch.device) -> dict[str, float]:
    """Milliseconds of both passes of a layer, where the shared experts compute while rows travel and where not."""
    layer = _layer(config, dispatcher, device)
    overlapped = seconds_of(lambda: _train(layer, config, device))
    layer.dispatcher = AtOnce(dispatcher)
    return {
        "layer_ms": 1e3 * overlapped,
        "layer_ms_without_overlap": 1e3 * seconds_of(lambda: _train(layer, config, device)),
    }


def exchange(config: ModelConfig, dispatcher: Dispatcher, device: torch.device, precision: str) -> dict[str, float]:
    """Milliseconds and GB/s of rows to experts and of results back, for tokens that choose experts at random."""
    x_TD, gates_TK, experts_TK = _tokens(config, device)
    there = seconds_of(lambda: dispatcher.wait_dispatch(dispatcher.dispatch(x_TD, gates_TK, experts_TK)))

    def both() -> None:
        again = dispatcher.wait_dispatch(dispatcher.dispatch(x_TD, gates_TK, experts_TK))
        assert isinstance(again.x_RD, Tensor)
        dispatcher.wait_combine(dispatcher.combine(again.x_RD, again.handle))

    back = seconds_of(both) - there
    here = config.n_routed_experts // dist.get_world_size()
    ranks_TK = experts_TK // here
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    num_sent = sum(int((ranks_TK == rank).any(1).sum()) for rank in others)
    number = 1 + 4 / 128 if precision == "fp8" else 2
    return {
        "dispatch_ms": 1e3 * there,
        "dispatch_gb_per_s": num_sent * config.hidden_size * number / there / 1e9,
        "combine_ms": 1e3 * back,
        "combine_gb_per_s": num_sent * config.hidden_size * 2 / back / 1e9,
    }


def seconds_of(run: Callable[[], object], repeats: int = 15) -> float:
    """Median seconds of a call, of the slowest rank; every call starts on all ranks at the same time."""
    for _ in range(4):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    slowest = torch.tensor(median(times), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _dispatcher(config: ModelConfig, kind: Any, precision: Any) -> Dispatcher:
    in_groups = config.topk_group < config.n_group
    shape = BufferShape(TOKENS, config.hidden_size, config.num_experts_per_tok, torch.bfloat16, in_groups)
    group = dist.group.WORLD
    assert group is not None
    device = torch.device("cuda")
    fp8 = Fp8Dispatch(FP8_QUANTIZE.select(Target(device, torch.bfloat16)).run) if precision == "fp8" else None
    return select_dispatcher(kind, config.n_routed_experts, group, shape, device, fp8=fp8)


def _layer(config: ModelConfig, dispatcher: Dispatcher, device: torch.device) -> MixtureOfExperts:
    with torch.device("meta"):
        layer = MixtureOfExperts(config)
    layer.experts.keep_shard(dist.get_rank(), dist.get_world_size())
    layer.to_empty(device=device).bfloat16()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer.gate.e_score_correction_bias.zero_()
    widths = config.hidden_size, config.moe_intermediate_size
    layer.experts.grouped_linear = GROUPED_GEMM.select(Target(device, torch.bfloat16, widths)).run
    layer.dispatcher = dispatcher
    return layer


def _train(layer: MixtureOfExperts, config: ModelConfig, device: torch.device) -> None:
    """Forward and backward pass of the layer on other tokens than those of other ranks."""
    torch.manual_seed(dist.get_rank())
    x_BSD = torch.randn(1, TOKENS, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    y_BSD, _ = layer(x_BSD)
    y_BSD.sum().backward()


def _tokens(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1 + dist.get_rank())
    x_TD = torch.randn(TOKENS, config.hidden_size, device=device, dtype=torch.bfloat16)
    scores_TE = torch.rand(TOKENS, config.n_routed_experts, device=device)
    gates_TK, experts_TK = scores_TE.topk(config.num_experts_per_tok)
    return x_TD, gates_TK, experts_TK


if __name__ == "__main__":
    run_command(main)
