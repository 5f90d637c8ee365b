"""Routing, moving rows, the experts' activation, the loss, and the optimizer's update.

Axes: T tokens, K experts per token, X routed copies, D width, V vocabulary, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.benchmark.ops_cases.case import Case, Prepared, Run, Work, backends, rotated
from deepseek_v3.ops.cross_entropy import CROSS_ENTROPY, LinearCrossEntropy, reference_linear_cross_entropy
from deepseek_v3.ops.moe_permute import MOE_PERMUTE, MoePermute, sort_by_expert
from deepseek_v3.ops.moe_permute import reference as permute_reference
from deepseek_v3.ops.multi_tensor import MULTI_TENSOR, AdamWStep, MultiTensor
from deepseek_v3.ops.multi_tensor import reference as multi_tensor_reference
from deepseek_v3.ops.operation import Target
from deepseek_v3.ops.router_gemm import ROUTER_GEMM, RouterLogits, reference_router_logits
from deepseek_v3.ops.swiglu import SWIGLU, PackedSwiGLU, packed_swiglu
from deepseek_v3.ops.top_k import TOP_K, TopK, top_k

_ROWS = ((8192, 8, 16, 7168), (32768, 6, 64, 1024))  # tokens, experts per token, experts, width
_LOSS = ((16384, 1024, 129280), (8192, 7168, 16160))  # tokens, width, vocabulary
_SWIGLU = ((65536, 2048), (196608, 512))  # rows, expert width
_PARAMETERS = (64, 16 * 2**20)  # tensors, numbers in each
_CPU_ROWS, _CPU_LOSS, _CPU_SWIGLU, _CPU_PARAMETERS = ((64, 2, 4, 128),), ((64, 128, 512),), ((128, 128),), (2, 4096)

_ROUTERS, _SCORES = ((8192, 7168, 256), (32768, 1024, 64)), ((8192, 256, 8), (32768, 64, 6))
_CPU_ROUTERS, _CPU_SCORES = ((64, 128, 8),), ((64, 8, 2),)

_BF16_BOUND, _FP32_BOUND = 6e-3, 1e-5
_STEP = AdamWStep(decay=0.999, size=1e-3, correction=1.0, beta1=0.9, beta2=0.95, eps=1e-8)


def permute_cases(device: torch.device) -> Iterator[Case]:
    """Copying each token's row to its experts, and summing the copies again."""
    for tokens, chosen, experts, width in _ROWS if device.type == "cuda" else _CPU_ROWS:
        size = f"{tokens} tokens, top {chosen} of {experts}, {width}"
        work = Work(num_bytes=2.0 * tokens * width * (chosen + 1))
        for function in ("gather_rows", "sum_rows"):
            prepare = partial(_prepare_permute, function, tokens, chosen, experts, width, work)
            yield Case("moe_permute", function, size, work, prepare)


def _prepare_permute(
    function: str, tokens: int, chosen: int, experts: int, width: int, work: Work, device: torch.device
) -> Prepared:
    gathers = function == "gather_rows"
    copies = sort_by_expert(torch.rand(tokens, experts, device=device).topk(chosen).indices, experts).copies()

    def make() -> Tensor:
        return torch.randn(tokens * (1 if gathers else chosen), width, device=device, dtype=torch.bfloat16)

    inputs = rotated(device, make, work.num_bytes)

    def apply(backend: MoePermute, rows: Tensor) -> Sequence[Tensor]:
        return [backend.gather_rows(rows, copies) if gathers else backend.sum_rows(rows, copies.slots_TM)]

    def run_of(backend: MoePermute) -> Run:
        return lambda call: apply(backend, inputs(call))

    systems = _runs(run_of, backends(MOE_PERMUTE, Target(device, torch.bfloat16, (width,))))
    bound = 0.0 if gathers else _BF16_BOUND
    return Prepared(systems, lambda: apply(permute_reference, inputs(0).double()), bound)


def router_cases(device: torch.device) -> Iterator[Case]:
    """The router's logits, at the precision of float32."""
    for tokens, width, experts in _ROUTERS if device.type == "cuda" else _CPU_ROUTERS:
        work = Work(2.0 * tokens * width * experts, 2.0 * tokens * width + 4.0 * experts * (width + tokens))
        prepare = partial(_prepare_router, tokens, width, experts, work)
        yield Case("router_gemm", "forward", f"{tokens}×{width}×{experts}", work, prepare)


def _prepare_router(tokens: int, width: int, experts: int, work: Work, device: torch.device) -> Prepared:
    weight_ED = 0.02 * torch.randn(experts, width, device=device)

    def make() -> Tensor:
        return torch.randn(tokens, width, device=device, dtype=torch.bfloat16)

    inputs = rotated(device, make, work.num_bytes)

    def run_of(logits: RouterLogits) -> Run:
        return lambda call: [logits(inputs(call), weight_ED)]

    systems = _runs(run_of, backends(ROUTER_GEMM, Target(device, torch.bfloat16, (width,))))
    return Prepared(systems, lambda: run_of(_logits_in_float64)(0), _FP32_BOUND)


def _logits_in_float64(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The router's logits from float64 inputs."""
    return reference_router_logits(x_TD.double(), weight_ED)


def top_k_cases(device: torch.device) -> Iterator[Case]:
    """The experts of the largest scores; of equal scores any may be chosen."""
    for tokens, experts, chosen in _SCORES if device.type == "cuda" else _CPU_SCORES:
        work = Work(num_bytes=4.0 * tokens * experts + 8.0 * tokens * chosen)
        prepare = partial(_prepare_top_k, tokens, experts, chosen, work)
        yield Case("top_k", "forward", f"{chosen} of {experts}, {tokens} rows", work, prepare)


def _prepare_top_k(tokens: int, experts: int, chosen: int, work: Work, device: torch.device) -> Prepared:
    inputs = rotated(device, lambda: torch.rand(tokens, experts, device=device), work.num_bytes)

    def run_of(select: TopK) -> Run:
        return lambda call: select(inputs(call), chosen)

    systems = _runs(run_of, backends(TOP_K, Target(device, torch.float32, (experts,))))
    return Prepared(
        systems, lambda: run_of(top_k)(0), bound=0.0, comparable=lambda places: [inputs(0).gather(1, places)]
    )


def swiglu_cases(device: torch.device) -> Iterator[Case]:
    """The experts' activation with the gate values, and its backward pass."""
    for rows, hidden in _SWIGLU if device.type == "cuda" else _CPU_SWIGLU:
        for function, numbers in (("forward", 3), ("backward", 5)):
            work = Work(num_bytes=2.0 * numbers * rows * hidden)
            prepare = partial(_prepare_swiglu, function == "backward", rows, hidden, work)
            yield Case("swiglu", function, f"{rows}×{hidden}", work, prepare)


def _prepare_swiglu(backward: bool, rows: int, hidden: int, work: Work, device: torch.device) -> Prepared:
    gates_X = torch.rand(rows, device=device)
    grad_XF = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)

    def make() -> Tensor:
        return torch.randn(rows, 2 * hidden, device=device, dtype=torch.bfloat16)

    inputs = rotated(device, make, work.num_bytes)

    def run_of(activation: PackedSwiGLU) -> Run:
        return (
            _differentiated(activation, inputs, gates_X, grad_XF)
            if backward
            else (lambda call: [activation(inputs(call), gates_X)])
        )

    def expected() -> Sequence[Tensor]:
        wide = inputs(0).double()
        if not backward:
            return [packed_swiglu(wide, gates_X.double())]
        return _differentiated(packed_swiglu, lambda _: wide, gates_X.double(), grad_XF.double())(0)

    systems = _runs(run_of, backends(SWIGLU, Target(device, torch.bfloat16, (hidden,))))
    return Prepared(systems, expected, _BF16_BOUND)


def _differentiated(activation: PackedSwiGLU, inputs: Any, gates_X: Tensor, grad_XF: Tensor) -> Run:
    """The backward pass alone, of graphs that are built once for each input."""
    graphs: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def run(call: int) -> Sequence[Tensor]:
        x = inputs(call)
        if id(x) not in graphs:
            leaves = [x.detach().requires_grad_(), gates_X.detach().requires_grad_()]
            with torch.enable_grad():
                graphs[id(x)] = activation(*leaves), leaves
        out, leaves = graphs[id(x)]
        return torch.autograd.grad(out, leaves, grad_XF, retain_graph=True)

    return run


def loss_cases(device: torch.device) -> Iterator[Case]:
    """The head and its loss, forward and backward, of bfloat16 states and float32 weights."""
    for tokens, width, vocabulary in _LOSS if device.type == "cuda" else _CPU_LOSS:
        work = Work(operations=6.0 * tokens * vocabulary * width)
        prepare = partial(_prepare_loss, tokens, width, vocabulary)
        yield Case("cross_entropy", "both passes", f"{tokens}×{width}×{vocabulary}", work, prepare)


def _prepare_loss(tokens: int, width: int, vocabulary: int, device: torch.device) -> Prepared:
    hidden_TD = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    weight_VD = 0.02 * torch.randn(vocabulary, width, device=device)
    targets_T = torch.randint(vocabulary, (tokens,), device=device)

    def run_of(loss: LinearCrossEntropy) -> Run:
        return lambda _: _loss_and_gradients(loss, hidden_TD, weight_VD, targets_T)

    def expected() -> Sequence[Tensor]:
        return _chunked_loss(hidden_TD.float(), weight_VD, targets_T)

    systems = _runs(run_of, backends(CROSS_ENTROPY, Target(device, torch.bfloat16, (width,))))
    return Prepared(systems, expected, 1e-2)


def _loss_and_gradients(
    loss: LinearCrossEntropy, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor
) -> Sequence[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    with torch.enable_grad():
        value = loss(leaves[0], leaves[1], targets_T)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _chunked_loss(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Sequence[Tensor]:
    """The reference in float32, 1,024 tokens at a time, because its logits of all tokens would not fit."""
    parts = [
        _loss_and_gradients(reference_linear_cross_entropy, rows, weight_VD, targets)
        for rows, targets in zip(hidden_TD.split(1024), targets_T.split(1024), strict=True)
    ]
    losses, hidden, weights = zip(*parts, strict=True)
    return [torch.stack(losses).sum(), torch.cat(hidden), torch.stack(weights).sum(0)]


def optimizer_cases(device: torch.device) -> Iterator[Case]:
    """AdamW on float32 weights with bfloat16 moments, and the norm of the gradients."""
    tensors, numbers = _PARAMETERS if device.type == "cuda" else _CPU_PARAMETERS
    size, total = f"{tensors} tensors of {numbers}", float(tensors * numbers)
    yield Case("optimizer", "adamw", size, Work(num_bytes=20 * total), partial(_prepare_adamw, tensors, numbers))
    yield Case("optimizer", "norm", size, Work(num_bytes=4 * total), partial(_prepare_norm, tensors, numbers))


def _prepare_adamw(tensors: int, numbers: int, device: torch.device) -> Prepared:
    start = [torch.randn(numbers, device=device) for _ in range(tensors)]
    gradients = [torch.randn(numbers, device=device) for _ in range(tensors)]
    scale = torch.ones((), device=device)

    def run_of(backend: MultiTensor) -> Run:
        weights = [tensor.clone() for tensor in start]
        means, squares = ([torch.zeros_like(t, dtype=torch.bfloat16) for t in start] for _ in range(2))

        def run(call: int) -> Sequence[Tensor]:
            backend.adamw_(weights, gradients, means, squares, scale, _STEP)
            return [*weights, *means, *squares] if call == 0 else []

        return run

    systems = _runs(run_of, backends(MULTI_TENSOR, Target(device)))
    return Prepared(systems, lambda: run_of(multi_tensor_reference)(0), 1e-3)


def _prepare_norm(tensors: int, numbers: int, device: torch.device) -> Prepared:
    gradients = [torch.randn(numbers, device=device) for _ in range(tensors)]
    ones = [1.0] * tensors

    def run_of(backend: MultiTensor) -> Run:
        return lambda _: [backend.sum_of_squares(gradients, ones)]

    def expected() -> Sequence[Tensor]:
        return [torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()]

    systems = _runs(run_of, backends(MULTI_TENSOR, Target(device)))
    return Prepared(systems, expected, 1e-5)


def _runs(run_of: Any, found: Iterator[tuple[str, Any]]) -> dict[str, Run | str]:
    return {name: run_of(backend) for name, backend in found}
