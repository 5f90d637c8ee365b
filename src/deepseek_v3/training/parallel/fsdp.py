"""Sharding weights, gradients and moments over ranks with PyTorch's fully sharded data parallelism (FSDP2)."""

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
from deepseek_v3.training.parallel.gradient_reduction import (
    narrow_form,
    replica_reductions,
    shard_with_narrow_reduction,
)
from deepseek_v3.training.parallel.mesh import ParallelMesh


def apply_fsdp(
    root: nn.Module, model: DeepSeekV3, mesh: ParallelMesh, layers: Sequence[int], device: torch.device
) -> None:
    """Shards the model inside `root`, of which this rank has `layers`; does nothing if there is one data rank.

    Each layer is gathered by itself, its experts over the ranks that hold the same ones. Weights are gathered in
    the compute dtype. Gradients are summed in float32 and not divided, so each loss must be a share of the batch's;
    they travel in the type that `parallel.gradient_reduction` gives.

    Routers and norms compute with float32 weights, as in one process, so every rank keeps them whole, and
    `all_reduce_replicated_gradients` sums their gradients.
    """
    data_mesh = mesh.dense_mesh
    if data_mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    shard: Callable[..., Any] = fully_shard
    if mesh.parallel.gradient_reduction != "fp32":
        form = narrow_form(mesh.parallel.gradient_reduction, device)
        shard = partial(shard_with_narrow_reduction, form=form)
    wrap = partial(shard, mp_policy=policy, reshard_after_forward=reshards_weights(mesh))
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
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    _prefetch(chosen)


def reshards_weights(mesh: ParallelMesh) -> bool:
    """Whether ranks free the gathered weights of a layer between its forward and its backward pass.

    Pipeline schedules look up the weights of a backward pass on the modules, so these must stay gathered.
    """
    return mesh.dense_mesh is not None and mesh.parallel.zero_stage == 3 and mesh.parallel.pipeline == 1


def float32_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of routers and norms, which compute in float32, in the order of the modules."""
    small = [module for module in model.modules() if isinstance(module, (Router, RMSNorm))]
    return [parameter for module in small for parameter in module.parameters()]


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    """Every FSDP unit in `root`: a module that gathers its weights and reduces its gradients by itself."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def set_gradient_sync(root: nn.Module, zero_stage: int, is_last: bool) -> None:
    """Postpones communication that is needed once per step to the last micro-batch.

    Gradients are all-reduced over replicas once. At ZeRO stage 1 they are also reduce-scattered once, in float32,
    and weights stay gathered until then.
    """
    if isinstance(root, FSDPModule):
        root.set_is_last_backward(is_last)
        root.set_requires_all_reduce(is_last)
        for hook in replica_reductions(root):
            hook.is_last = is_last
        if zero_stage == 1:
            root.set_requires_gradient_sync(is_last)
            root.set_reshard_after_backward(is_last)


@torch.no_grad()
def all_reduce_replicated_gradients(models: Iterable[nn.Module], mesh: ParallelMesh) -> None:
    """Sums the gradients of routers and norms over the data-parallel ranks, all in one buffer.

    Call it once per step, after the last micro-batch's backward pass.
    """
    data_mesh = mesh.dense_mesh
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
    """Shards a layer's experts, which expert parallelism has divided; returns those that only one rank holds."""
    if mesh.parallel.expert == 1 or not isinstance(layer.mlp, MixtureOfExperts):
        return set()
    experts, expert_mesh = layer.mlp.experts, mesh.expert_mesh
    if expert_mesh is None:
        return set(experts.parameters())
    shards = mesh.parallel.expert_shard
    wrap(experts, mesh=expert_mesh, shard_placement_fn=lambda stack: _cut(stack, shards))
    return set()


def _cut(stack: nn.Parameter, shards: int) -> Shard:
    """Shards whole experts if they divide evenly, else the rows of each expert if these do."""
    return Shard(1) if stack.shape[0] % shards and stack.shape[1] % shards == 0 else Shard(0)


def _prefetch(layers: Sequence[nn.Module]) -> None:
    """Prefetches the next layer while one computes, in the forward and the backward pass."""
    units = [fsdp_modules(layer) for layer in layers]
    for (before, *_), following in pairwise(units):
        before.set_modules_to_forward_prefetch(following)
    for preceding, (after, *_) in pairwise(units):
        after.set_modules_to_backward_prefetch(preceding[::-1])
