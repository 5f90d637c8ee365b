"""Experts and feed-forward networks in FP8 against loops in float64 over dequantized operands."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_v3.moe.dispatch import Fp8Tokens
from deepseek_v3.moe.experts import FeedForward, RoutedExperts
from deepseek_v3.moe.fp8_experts import run_fp8_experts
from deepseek_v3.moe.fp8_feed_forward import fp8_hidden, fp8_output
from deepseek_v3.ops.fp8 import reference
from deepseek_v3.ops.fp8.linear import Fp8Recipe
from deepseek_v3.ops.fp8_gemm import reference as products
from deepseek_v3.ops.moe_permute import RowCopies, sort_by_expert
from helpers.models import fill_with_noise, small_config

EXACT, FLOAT32 = 1e-12, 1e-6
ROUNDED = 0.12  # outputs and gradients follow from three to five rounded operands
WIDTH, HIDDEN, EXPERTS = 144, 128, 4
CHOICES = {
    "mixed": [[0, 3], [3, 1], [2, 0], [3, 2], [1, 2]],
    "empty experts": [[1, 3], [3, 1], [1, 3]],
    "all to one": [[2], [2], [2], [2]],
    "no tokens": [],
}


def with_fp8(module: nn.Module, keeps_weights: bool = True) -> Any:
    """A module that computes in FP8 by the reference."""
    recipe = Fp8Recipe(reference, products, keeps_weights=keeps_weights)
    if isinstance(module, RoutedExperts):
        module.run_experts = partial(run_fp8_experts, recipe=recipe)
    elif isinstance(module, FeedForward):
        module.run_hidden = partial(fp8_hidden, recipe=recipe)
        module.run_output = partial(fp8_output, recipe=recipe)
    return module


def rounded_rows(x_TD: Tensor) -> Tensor:
    return reference.dequantize_1x128(*reference.quantize_1x128(x_TD), torch.float64)


def rounded_columns(x_TD: Tensor) -> Tensor:
    return rounded_rows(x_TD.T).T


def rounded_weight(w_OI: Tensor) -> Tensor:
    return reference.dequantize_128x128(*reference.quantize_128x128(w_OI), torch.float64)


class NetworkByHand:
    """One expert or feed-forward network in float64, with the roundings of FP8 at their places."""

    def __init__(self, gate_up_GD: Tensor, down_DF: Tensor, gates_X1: Tensor) -> None:
        self.gate_up_GD, self.down_DF, self.gates_X1 = gate_up_GD, down_DF, gates_X1

    def forward(self, x_XD: Tensor) -> Tensor:
        self.x_XD = x_XD
        gate_up_XG = rounded_rows(x_XD) @ self.gate_up_GD.T
        self.kept_XG = rounded_rows(gate_up_XG)
        return rounded_rows(self._hidden(gate_up_XG, self.gates_X1)) @ self.down_DF.T

    def backward(self, grad_XD: Tensor) -> dict[str, Tensor]:
        kept_XG, gates_X1 = self.kept_XG.clone().requires_grad_(), self.gates_X1.clone().requires_grad_()
        hidden_XF = self._hidden(kept_XG, gates_X1)
        grad_hidden_XF = rounded_rows(grad_XD) @ self.down_DF
        grad_XG, grad_gates_X1 = torch.autograd.grad(hidden_XF, (kept_XG, gates_X1), grad_hidden_XF)
        return {
            "x": rounded_rows(grad_XG) @ self.gate_up_GD,
            "gates": grad_gates_X1[:, 0],
            "gate_up": rounded_columns(grad_XG).T @ rounded_columns(self.x_XD),
            "down": rounded_columns(grad_XD).T @ rounded_columns(hidden_XF.detach()),
        }

    def _hidden(self, gate_up_XG: Tensor, gates_X1: Tensor) -> Tensor:
        gate_XF, up_XF = gate_up_XG.chunk(2, -1)
        return F.silu(gate_XF) * up_XF * gates_X1


def check_near(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert one.shape == expected[name].shape, name
        difference = (one - expected[name]).detach().norm()
        assert difference <= bound * expected[name].detach().norm(), name


def routed_case(choice: list[list[int]]) -> tuple[RoutedExperts, Tensor, Tensor, RowCopies, Tensor]:
    """Experts, tokens, the gate of each row, the rows as copies of tokens, and the end of each expert's rows."""
    config = small_config(
        hidden_size=WIDTH, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS, n_group=1, topk_group=1
    )
    experts = RoutedExperts(config).double()
    fill_with_noise(experts)
    experts_TK = torch.tensor(choice, dtype=torch.int64).view(len(choice), -1 if choice else 2)
    order = sort_by_expert(experts_TK, EXPERTS)
    x_TD = torch.randn(len(choice), WIDTH, dtype=torch.float64, requires_grad=True)
    gates_X = torch.rand(experts_TK.numel(), requires_grad=True)
    return experts, x_TD, gates_X, order.copies(), order.ends_E


def results(experts: RoutedExperts, tokens: Any, x_TD: Tensor, *rest: Any) -> dict[str, Tensor]:
    y_TD = experts(tokens, *rest)
    upstream_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=torch.float64).view_as(y_TD)
    inputs = (x_TD, rest[0], experts.gate_up_proj, experts.down_proj)
    gradients = torch.autograd.grad(y_TD, inputs, upstream_TD)
    return dict(zip(("y", "x", "gates", "gate_up", "down"), (y_TD, *gradients), strict=True))


def experts_by_hand(
    experts: RoutedExperts, x_TD: Tensor, gates_X: Tensor, copies: RowCopies, ends_E: Tensor
) -> dict[str, Tensor]:
    """The same results by a loop over the experts."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("gates", "gate_up", "down")}
    y_TD, grad_x_TD = (torch.zeros_like(x_TD) for _ in range(2))
    upstream_TD = torch.linspace(-1, 1, x_TD.numel(), dtype=torch.float64).view_as(x_TD)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        source_X = copies.source_X[start:end]
        weights = (rounded_weight(stack[expert]) for stack in (experts.gate_up_proj, experts.down_proj))
        network = NetworkByHand(*weights, gates_X[start:end, None].double())
        y_TD.index_add_(0, source_X, network.forward(x_TD[source_X]))
        gradients = network.backward(upstream_TD[source_X])
        grad_x_TD.index_add_(0, source_X, gradients.pop("x"))
        for name, gradient in gradients.items():
            parts[name].append(gradient)
        start = end
    stacked = {name: torch.stack(each) for name, each in parts.items() if name != "gates"}
    return {"y": y_TD, "x": grad_x_TD, "gates": torch.cat(parts["gates"]), **stacked}


@pytest.mark.parametrize("keeps_weights", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
def test_experts_equal_a_loop_over_their_rounded_operands(choice: str, keeps_weights: bool) -> None:
    experts, x_TD, *rest = routed_case(CHOICES[choice])
    exact = results(experts, x_TD, x_TD, *rest)
    found = results(with_fp8(experts, keeps_weights), x_TD, x_TD, *rest)
    check_near(found, exact, ROUNDED)
    gates_X, copies, ends_E = rest
    expected = experts_by_hand(experts, x_TD.detach(), gates_X.detach(), copies, ends_E)
    check_near({"gates": found.pop("gates")}, {"gates": expected.pop("gates")}, FLOAT32)
    check_near(found, expected, EXACT)


def test_experts_take_tokens_in_fp8_as_they_are() -> None:
    """Only the columns of the tokens are rounded twice."""
    experts, x_TD, gates_X, copies, ends_E = routed_case(CHOICES["mixed"])
    with_fp8(experts)
    expected = results(experts, x_TD, x_TD, gates_X, copies, ends_E)
    rows = reference.quantize_rows(x_TD.detach(), False)
    stand_in_TD = torch.full((), torch.nan, dtype=torch.float64).expand_as(x_TD).requires_grad_()
    found = results(experts, Fp8Tokens(stand_in_TD, rows), stand_in_TD, gates_X, copies, ends_E)
    check_near(found, expected, ROUNDED)
    for name in ("y", "x", "gates", "down"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("keeps_weights", [True, False])
def test_a_network_equals_one_by_hand(keeps_weights: bool) -> None:
    network = FeedForward(WIDTH, HIDDEN).double()
    fill_with_noise(network)
    x_BSD = torch.randn(2, 70, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream_BSD = torch.randn_like(x_BSD)
    names = ("y", "x", "gate", "up", "down")

    def outcome() -> dict[str, Tensor]:
        y_BSD = network(x_BSD)
        gradients = torch.autograd.grad(y_BSD, (x_BSD, *network.parameters()), upstream_BSD)
        return dict(zip(names, (y_BSD.detach(), *gradients), strict=True))

    exact = outcome()
    with_fp8(network, keeps_weights)
    found = outcome()
    gate_FD, up_FD, down_DF = (rounded_weight(weight.detach()) for weight in network.parameters())
    by_hand = NetworkByHand(torch.cat([gate_FD, up_FD]), down_DF, torch.ones(140, 1, dtype=torch.float64))
    y_TD = by_hand.forward(x_BSD.detach().flatten(0, 1))
    gradients = by_hand.backward(upstream_BSD.flatten(0, 1))
    gate_FD, up_FD = gradients["gate_up"].chunk(2)
    whole = {"y": y_TD.view_as(x_BSD), "x": gradients["x"].view_as(x_BSD), "gate": gate_FD, "up": up_FD}
    check_near(found, {**whole, "down": gradients["down"]}, EXACT)
    check_near(found, exact, ROUNDED)


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj", "x"])
def test_a_network_with_frozen_parts_has_the_other_gradients(frozen: str) -> None:
    network = with_fp8(FeedForward(WIDTH, HIDDEN))
    fill_with_noise(network)
    x_TD = torch.randn(9, WIDTH, requires_grad=True)
    inputs = {"x": x_TD, **{name.removesuffix(".weight"): value for name, value in network.named_parameters()}}
    expected = dict(zip(inputs, torch.autograd.grad(network(x_TD).square().sum(), [*inputs.values()]), strict=True))
    inputs.pop(frozen).requires_grad_(False)
    found = torch.autograd.grad(network(x_TD).square().sum(), [*inputs.values()])
    assert all(torch.equal(one, expected[name]) for name, one in zip(inputs, found, strict=True))


def test_nothing_is_allocated_for_gradients_that_do_not_exist() -> None:
    """Of the hidden layer and the SwiGLU's input in FP8, which have none."""
    network = with_fp8(FeedForward(WIDTH, HIDDEN))
    fill_with_noise(network)
    y_TD = network(torch.randn(9, WIDTH, requires_grad=True))
    zeros: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.zeros.default:
                zeros.append(args[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        y_TD.sum().backward()
    assert zeros == []


def test_a_layer_keeps_less_than_in_bfloat16() -> None:
    """Tokens in bfloat16 once each, the SwiGLU's input and weights in FP8; no rows in expert order in 16 bits."""

    def kept(run: Any) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(found.values())

    tokens, per_token = 512, 4
    choice = [[(t + k) % EXPERTS for k in range(per_token)] for t in range(tokens)]
    experts, x_TD, *rest = routed_case(choice)
    experts, x_TD = experts.float(), x_TD.detach().bfloat16().requires_grad_()
    in_bfloat16 = kept(lambda: experts(x_TD, *rest))
    in_fp8 = kept(lambda: with_fp8(experts)(x_TD, *rest))
    rows = tokens * per_token
    weights = EXPERTS * 3 * WIDTH * HIDDEN
    scales = 4 * rows * 2 * HIDDEN // 128 + 4 * EXPERTS * (2 * 2 + 2)
    plan = rows * (8 + 8 + 4) + 4 * EXPERTS  # of the copies, and the gates
    assert in_fp8 == 2 * tokens * WIDTH + rows * 2 * HIDDEN + weights + scales + plan
    assert in_fp8 < 0.4 * in_bfloat16
