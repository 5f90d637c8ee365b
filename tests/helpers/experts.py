"""Mixture layers with experts sharded over several ranks, and the same layers in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_v3.moe.all_to_all import AllToAllDispatcher
from deepseek_v3.moe.dispatch import DispatchedTokens, Dispatcher, LocalDispatcher
from deepseek_v3.moe.exchange import exchange_steps
from deepseek_v3.moe.expert_parallel import Fp8Dispatch
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.fp8 import FP8_QUANTIZE, dequantize_1x128, quantize_1x128
from deepseek_v3.ops.moe_permute import gather_rows, sum_rows
from helpers.models import fill_with_noise, small_config

ALL_TO_ALL = dist.all_to_all_single


@dataclass(frozen=True)
class Case:
    """The number of tokens on each rank, and how the layers are built.

    The router prefers `favoured` experts to all others. `model` holds fields of the layers' config.
    """

    lengths: tuple[int, ...]
    seed: int = 0
    dtype: torch.dtype = torch.float64
    favoured: tuple[int, ...] = ()
    ranks_per_node: int | None = None
    fp8: bool = False
    recomputed: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def fp8_dispatch(self) -> Fp8Dispatch | None:
        """How the dispatcher sends tokens in FP8, if it does."""
        return Fp8Dispatch(FP8_QUANTIZE.backends["reference"].load()) if self.fp8 else None

    def layers(self) -> nn.ModuleList:
        """Two layers with all experts, filled with noise from the seed."""
        torch.manual_seed(self.seed)
        layers = nn.ModuleList([MixtureOfExperts(small_config(**self.model)) for _ in range(2)])
        fill_with_noise(layers)
        for layer in layers:
            layer.gate.e_score_correction_bias[list(self.favoured)] += 100
        return layers.to(self.dtype)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The tokens of all ranks and the gradient of the output, each (1, T, D)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, 1, sum(self.lengths), small_config(**self.model).hidden_size)
        x_BSD, upstream_BSD = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x_BSD.to(self.dtype), upstream_BSD.to(self.dtype)


def run_layers(layers: nn.ModuleList, x_BSD: Tensor, upstream_BSD: Tensor, recomputed: bool) -> dict[str, Tensor]:
    """Runs the layers one after the other; returns the output and the gradients of tokens and weights by name."""
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD = x_BSD
    for layer in layers:
        moved_BSD, _ = checkpoint(layer, y_BSD, use_reentrant=False) if recomputed else layer(y_BSD)
        y_BSD = y_BSD + moved_BSD
    y_BSD.backward(upstream_BSD)
    assert x_BSD.grad is not None
    gradients = {name: weight.grad for name, weight in layers.named_parameters() if weight.grad is not None}
    return {"y": y_BSD.detach(), "x": x_BSD.grad} | gradients


def run_single_process(case: Case, layers: int = 2) -> dict[str, Tensor]:
    """The results of one process with all experts and the tokens of all ranks."""
    modules = case.layers()[:layers]
    if case.fp8:
        for layer in modules:
            layer.dispatcher = RoundingDispatcher(layer.config.n_routed_experts)
    return run_layers(modules, *case.tokens(), recomputed=False)


class RoundingDispatcher(LocalDispatcher):
    """Rounds the rows for the experts to FP8; gradients ignore the rounding."""

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> DispatchedTokens:
        rounded_TD = dequantize_1x128(*quantize_1x128(x_TD.detach()), x_TD.dtype)
        return super().dispatch(x_TD + (rounded_TD - x_TD.detach()), gates_TK, experts_TK)


def run_this_rank(case: Case, dispatcher: Dispatcher | None = None) -> dict[str, Tensor]:
    """The results of this rank with its tokens and its experts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layers = case.layers()
    for layer in layers:
        way = exchange_steps(dist.group.WORLD, case.ranks_per_node)
        layer.dispatcher = dispatcher or AllToAllDispatcher(layer.config.n_routed_experts, way, case.fp8_dispatch)
        layer.experts.keep_shard(rank, world)
    x_BSD, upstream_BSD = (tensor.split(case.lengths, dim=1)[rank] for tensor in case.tokens())
    return run_layers(layers, x_BSD, upstream_BSD, case.recomputed)


def run_cases_with_nan_memory(cases: list[Case]) -> list[dict[str, Tensor]]:
    """The results of this rank for each case; new memory holds NaN until it is written."""
    with fill_new_memory_with_nan() as count:
        results = [run_this_rank(case) for case in cases]
    assert count
    return results


def merge_ranks(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merges the results of all ranks: concatenates tokens and experts, and sums all other gradients."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("x", "y"):
            whole[name] = torch.cat(values, dim=1)
        elif ".experts." in name:
            whole[name] = torch.cat(values)
        else:
            whole[name] = torch.stack(values).sum(0)
    return whole


@contextmanager
def fill_new_memory_with_nan() -> Iterator[list[int]]:
    """Sets all bits of memory that is allocated without a value, which is NaN in every float format."""
    filled: list[int] = []
    with torch.device("cpu"):  # torch lists the functions that a default device concerns once, at their first use
        torch.empty(())

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*arguments: Any, **options: Any) -> Tensor:
            memory = allocate(*arguments, **options)
            if memory.numel() and memory.dtype != torch.bool:
                (memory if memory.ndim else memory.view(1)).view(torch.uint8).fill_(255)
                filled.append(memory.numel())
            return memory

        return allocated

    with (
        patch.object(torch, "empty", filling(torch.empty)),
        patch.object(torch, "empty_like", filling(torch.empty_like)),
        patch.object(Tensor, "new_empty", filling(Tensor.new_empty)),
    ):
        yield filled


def rows_sent_and_received(case: Case) -> list[tuple[list[int], list[int]]]:
    """For every exchange of rows, in order, the number of rows sent to and received from each rank."""
    exchanges: list[tuple[list[int], list[int]]] = []

    def watched(output: Tensor, input_: Tensor, received: Any, sent: Any, **options: Any) -> Any:
        if options.get("async_op"):
            assert (len(output), len(input_)) == (sum(received), sum(sent))
            exchanges.append((sent, received))
        return ALL_TO_ALL(output, input_, received, sent, **options)

    with patch.object(dist, "all_to_all_single", watched):
        run_this_rank(case)
    return exchanges


def order_of_events(case: Case) -> tuple[list[str], dict[str, Tensor]]:
    """The order of events in one layer, with exchanges that move rows only when something waits for them."""
    events: list[str] = []

    class Delayed:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.exchange = lambda: ALL_TO_ALL(*arguments, **options)

        def wait(self) -> None:
            events.append("wait")
            self.exchange()

    def delayed(*arguments: Any, async_op: bool = False, **options: Any) -> Any:
        if not async_op:
            return ALL_TO_ALL(*arguments, **options)
        events.append("start")
        return Delayed(*arguments, **options)

    def record(name: str) -> Callable[..., None]:
        return lambda *_: events.append(name)

    rank, world = dist.get_rank(), dist.get_world_size()
    layers = case.layers()[:1]
    layer = layers[0]
    layer.dispatcher = AllToAllDispatcher(layer.config.n_routed_experts, exchange_steps(dist.group.WORLD))
    layer.experts.keep_shard(rank, world)
    for name, module in (("hidden", layer.shared_experts.up_proj), ("down", layer.shared_experts.down_proj)):
        module.register_forward_hook(record(f"shared {name}"))
        module.register_full_backward_hook(record(f"shared {name} backward"))
    layer.experts.register_forward_hook(record("routed"))
    layer.experts.register_full_backward_hook(record("routed backward"))
    x_BSD, upstream_BSD = (tensor.split(case.lengths, dim=1)[rank] for tensor in case.tokens())
    with patch.object(dist, "all_to_all_single", delayed), fill_new_memory_with_nan():
        result = run_layers(layers, x_BSD, upstream_BSD, recomputed=False)
    return events, result


def sums_of_constants(values: list[float], ranks_per_node: int | None) -> tuple[list[float], list[float]]:
    """Output and gradient of a token whose experts, one per rank, each add and multiply by their rank's value."""
    value = values[dist.get_rank()]
    experts_TK = torch.arange(len(values)).unsqueeze(0)
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dispatcher = AllToAllDispatcher(len(values), exchange_steps(dist.group.WORLD, ranks_per_node))
    dispatched = dispatcher.wait_dispatch(dispatcher.dispatch(x_TD, torch.ones(1, len(values)), experts_TK))
    results_XD = gather_rows(dispatched.x_RD, dispatched.copies) * value + value
    returned = dispatcher.combine(sum_rows(results_XD, dispatched.copies), dispatched.handle)
    y_TD = dispatcher.wait_combine(returned)
    (gradient_TD,) = torch.autograd.grad(y_TD, x_TD, torch.ones_like(y_TD))
    return y_TD.flatten().tolist(), gradient_TD.flatten().tolist()
