"""Weights, gradients and moments shared out over ranks by PyTorch's fully sharded data parallelism (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.moe.routing import Router
from deepseek_v3.ops.layers import RMSNorm
from deepseek_v3.training.parallel.mesh import ParallelMesh


def apply_fsdp(root: nn.Module, model: DeepSeekV3, mesh: ParallelMesh, layers: Sequence[int]) -> None:
    """Shards the model inside `root`, of which this rank has `layers`; nothing happens where one rank has it all.

    Each layer is gathered by itself, its experts over the ranks that hold the same ones. Weights travel in the
    compute type, gradients are summed in float32 and not divided: losses must be shares of the whole batch.

    Routers and norms compute with float32 weights, as in one process, so FSDP leaves them whole on every rank;
    `all_reduce_replicated_gradients` sums their gradients.
    """
    data_mesh = mesh.dense_mesh()
    if data_mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A pipeline's schedules find the weights that a backward pass is about on the modules.
    lets_go = mesh.parallel.zero_stage == 3 and mesh.parallel.pipeline == 1
    wrap = partial(fully_shard, mp_policy=policy, reshard_after_forward=lets_go)
    whole = set(float32_parameters(model))
    chosen = [model.model.layers[number] for number in layers]
    for layer in chosen:
        whole |= _shard_experts(layer, mesh, wrap)
        wrap(layer, mesh=data_mesh, ignored_params=whole)
    if not model.config.tie_word_embeddings and not isinstance(model.model.embed_tokens, nn.Identity):
        wrap(model.model.embed_tokens, mesh=data_mesh)
    wrap(root, mesh=data_mesh, ignored_params=whole)
    for module in fsdp_modules(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    _prefetch(chosen)


def float32_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of routers and norms in the order of the modules: those that compute in float32."""
    small = [module for module in model.modules() if isinstance(module, (Router, RMSNorm))]
    return [parameter for module in small for parameter in module.parameters()]


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    """Every module of `root` that gathers and reduces by itself."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def set_gradient_sync(root: nn.Module, zero_stage: int, is_last: bool) -> None:
    """Leaves to the last micro-batch of a step what need not be done for each.

    Copies of a shard are summed once. At stage 1 gradients are also shared out once, in float32, and weights stay
    gathered until then.
    """
    if isinstance(root, FSDPModule):
        root.set_is_last_backward(is_last)
        root.set_requires_all_reduce(is_last)
        if zero_stage == 1:
            root.set_requires_gradient_sync(is_last)
            root.set_reshard_after_backward(is_last)


@torch.no_grad()
def all_reduce_replicated_gradients(models: Iterable[nn.Module], mesh: ParallelMesh) -> None:
    """Sums the gradients of routers and norms over the ranks with other data, all in one buffer.

    Call it once a step, after the last micro-batch's backward pass.
    """
    data_mesh = mesh.dense_mesh()
    whole = [parameter.grad for model in models for parameter in float32_parameters(model)]
    gradients = [gradient for gradient in whole if gradient is not None]
    if data_mesh is None or not gradients:
        return
    summed = torch.cat([gradient.flatten() for gradient in gradients])
    for group in data_mesh.get_all_groups():
        dist.all_reduce(summed, group=group)
    parts = summed.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def _shard_experts(layer: nn.Module, mesh: ParallelMesh, wrap: Callable[..., Any]) -> set[nn.Parameter]:
    """Shards the experts of a layer that live apart on several ranks; returns those that a rank has for itself."""
    if mesh.parallel.expert == 1 or not isinstance(layer.mlp, MixtureOfExperts):
        return set()
    experts, expert_mesh = layer.mlp.experts, mesh.expert_mesh()
    if expert_mesh is None:
        return set(experts.parameters())
    shards = mesh.parallel.expert_shard
    wrap(experts, mesh=expert_mesh, shard_placement_fn=lambda stack: _cut(stack, shards))
    return set()


def _cut(stack: nn.Parameter, shards: int) -> Shard:
    """Whole experts where they divide evenly; else a part of each, where that does."""
    return Shard(1) if stack.shape[0] % shards and stack.shape[1] % shards == 0 else Shard(0)


def _prefetch(layers: Sequence[nn.Module]) -> None:
    """Gathers the next layer while one computes, in both directions."""
    units = [fsdp_modules(layer) for layer in layers]
    for (before, *_), following in pairwise(units):
        before.set_modules_to_forward_prefetch(following)
    for preceding, (after, *_) in pairwise(units):
        after.set_modules_to_backward_prefetch(preceding[::-1])
