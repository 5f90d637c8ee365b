"""Mixture layers whose experts lie on several ranks, beside the same layers in one process."""

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
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.fp8 import dequantize_1x128, quantize_1x128
from helpers.models import fill_with_noise, small_config

ALL_TO_ALL = dist.all_to_all_single


@dataclass(frozen=True)
class Case:
    """Tokens on each rank, and the layer that they meet.

    `favoured` experts are those that the router prefers to all others. `model` are fields of its config.
    """

    lengths: tuple[int, ...]
    seed: int = 0
    dtype: torch.dtype = torch.float64
    favoured: tuple[int, ...] = ()
    ranks_per_node: int | None = None
    fp8: bool = False
    recomputed: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    def layers(self) -> nn.ModuleList:
        """Two layers with all experts, filled with noise from the seed."""
        torch.manual_seed(self.seed)
        layers = nn.ModuleList([MixtureOfExperts(small_config(**self.model)) for _ in range(2)])
        fill_with_noise(layers)
        for layer in layers:
            layer.gate.e_score_correction_bias[list(self.favoured)] += 100
        return layers.to(self.dtype)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The tokens of all ranks, (1, T, D), and what the gradient of the output is to be."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, 1, sum(self.lengths), small_config(**self.model).hidden_size)
        x_BSD, upstream_BSD = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x_BSD.to(self.dtype), upstream_BSD.to(self.dtype)


def run_layers(layers: nn.ModuleList, x_BSD: Tensor, upstream_BSD: Tensor, recomputed: bool) -> dict[str, Tensor]:
    """Output, and gradients of the tokens and of every weight, of layers one after the other."""
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD = x_BSD
    for layer in layers:
        moved_BSD, _ = checkpoint(layer, y_BSD, use_reentrant=False) if recomputed else layer(y_BSD)
        y_BSD = y_BSD + moved_BSD
    y_BSD.backward(upstream_BSD)
    assert x_BSD.grad is not None
    gradients = {name: weight.grad for name, weight in layers.named_parameters() if weight.grad is not None}
    return {"y": y_BSD.detach(), "x": x_BSD.grad} | gradients


def alone(case: Case, layers: int = 2) -> dict[str, Tensor]:
    """What one process with all experts computes of the tokens of all ranks."""
    modules = case.layers()[:layers]
    if case.fp8:
        for layer in modules:
            layer.dispatcher = Rounding(layer.config.n_routed_experts)
    return run_layers(modules, *case.tokens(), recomputed=False)


class Rounding(LocalDispatcher):
    """Experts see rows as they are after a journey in 8 bits; gradients pass the rounding by."""

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> DispatchedTokens:
        rounded_TD = dequantize_1x128(*quantize_1x128(x_TD.detach()), x_TD.dtype)
        return super().dispatch(x_TD + (rounded_TD - x_TD.detach()), gates_TK, experts_TK)


def on_this_rank(case: Case, dispatcher: Dispatcher | None = None) -> dict[str, Tensor]:
    """What this rank computes of its tokens with its experts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layers = case.layers()
    for layer in layers:
        way = exchange_steps(dist.group.WORLD, case.ranks_per_node)
        layer.dispatcher = dispatcher or AllToAllDispatcher(layer.config.n_routed_experts, way, case.fp8)
        layer.experts.keep_shard(rank, world)
    x_BSD, upstream_BSD = (tensor.split(case.lengths, dim=1)[rank] for tensor in case.tokens())
    return run_layers(layers, x_BSD, upstream_BSD, case.recomputed)


def poisoned_on_this_rank(cases: list[Case]) -> list[dict[str, Tensor]]:
    """The same for some cases, with every buffer full of NaN until it is written."""
    with not_a_number_in_new_memory() as count:
        results = [on_this_rank(case) for case in cases]
    assert count
    return results


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all ranks as one process would have them: tokens and experts in a row, all else summed."""
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
def not_a_number_in_new_memory() -> Iterator[list[int]]:
    """Fills what is allocated without a value with bytes of ones, which is NaN in every float format."""
    filled: list[int] = []

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*arguments: Any, **options: Any) -> Tensor:
            memory = allocate(*arguments, **options)
            if memory.numel() and memory.dtype != torch.bool:
                memory.view(torch.uint8).fill_(255)
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
    """For every exchange of rows in the first pass through one layer, rows to and from each rank."""
    exchanges: list[tuple[list[int], list[int]]] = []

    def watched(output: Tensor, input_: Tensor, received: Any, sent: Any, **options: Any) -> Any:
        if options.get("async_op"):
            assert (len(output), len(input_)) == (sum(received), sum(sent))
            exchanges.append((sent, received))
        return ALL_TO_ALL(output, input_, received, sent, **options)

    with patch.object(dist, "all_to_all_single", watched):
        on_this_rank(case)
    return exchanges


def order_of_events(case: Case) -> tuple[list[str], dict[str, Tensor]]:
    """What happened in which order in one layer, with rows that move only once somebody waits for them."""
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

    def tell(name: str) -> Callable[..., None]:
        return lambda *_: events.append(name)

    rank, world = dist.get_rank(), dist.get_world_size()
    layers = case.layers()[:1]
    layer = layers[0]
    layer.dispatcher = AllToAllDispatcher(layer.config.n_routed_experts, exchange_steps(dist.group.WORLD))
    layer.experts.keep_shard(rank, world)
    for name, module in (("hidden", layer.shared_experts.up_proj), ("down", layer.shared_experts.down_proj)):
        module.register_forward_hook(tell(f"shared {name}"))
        module.register_full_backward_hook(tell(f"shared {name} backward"))
    layer.experts.register_forward_hook(tell("routed"))
    layer.experts.register_full_backward_hook(tell("routed backward"))
    x_BSD, upstream_BSD = (tensor.split(case.lengths, dim=1)[rank] for tensor in case.tokens())
    with patch.object(dist, "all_to_all_single", delayed), not_a_number_in_new_memory():
        result = run_layers(layers, x_BSD, upstream_BSD, recomputed=False)
    return events, result


def sums_of_constants(values: list[float], ranks_per_node: int | None) -> tuple[list[float], list[float]]:
    """A token whose experts, one on each rank, answer with the value of theirs, and have it for gradient."""
    value = values[dist.get_rank()]
    experts_TK = torch.arange(len(values)).unsqueeze(0)
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dispatcher = AllToAllDispatcher(len(values), exchange_steps(dist.group.WORLD, ranks_per_node))
    dispatched = dispatcher.wait_dispatch(dispatcher.dispatch(x_TD, torch.ones(1, len(values)), experts_TK))
    results_XD = dispatched.rows_XD * value + value
    y_TD = dispatcher.wait_combine(dispatcher.combine(results_XD, dispatched.handle))
    (gradient_TD,) = torch.autograd.grad(y_TD, x_TD, torch.ones_like(y_TD))
    return y_TD.flatten().tolist(), gradient_TD.flatten().tolist()
