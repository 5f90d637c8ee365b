"""Builds a model that is ready to train from a config, in one ordered list of steps.

`build_on_meta` and `build_model` are that list:

1. build the model on the meta device, and keep the layers of this rank's pipeline stage
2. select the compute dtype and the back end of every operation
3. give the layers that `parallel.precision` names their products in FP8
4. shard the experts over the expert-parallel ranks, and give the MoE layers their dispatcher
5. apply activation checkpointing (Chen et al. 2016, arXiv:1604.06174)
6. compile each layer
7. shard weights, gradients and moments over the data-parallel ranks (FSDP2)
8. materialise the weights, and initialise them; a checkpoint may overwrite them later

The modules themselves know nothing of ranks, recomputation or compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.backends import compute_dtype, select_backends
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.init import initial_values, reset_buffers
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.deepep import BufferShape
from deepseek_v3.moe.expert_parallel import Fp8Dispatch
from deepseek_v3.moe.experts import RoutedExperts, run_experts, run_hidden
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.moe.select_dispatcher import select_dispatcher
from deepseek_v3.ops.fp8 import FP8_QUANTIZE
from deepseek_v3.ops.grouped_gemm import reference_grouped_linear
from deepseek_v3.ops.operation import Target
from deepseek_v3.training.optimizer import local
from deepseek_v3.training.parallel.fp8_layers import compute_in_fp8
from deepseek_v3.training.parallel.fsdp import apply_fsdp, reshards_weights
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.sharding import local_shards
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger

# The layer kinds (dense, MoE, MTP), with and without gradient, and more for masks.
_COMPILED_VARIANTS = 16

Root = TypeVar("Root", bound=nn.Module)


def build_model(
    config: RunConfig,
    device: torch.device,
    mesh: ParallelMesh,
    wrap: Callable[[DeepSeekV3], Root],
    keep: Callable[[DeepSeekV3], Sequence[int]] | None = None,
) -> Root:
    """Builds this rank's part of the model on `device`, with float32 weights initialised from the run's seed.

    Arguments as for `build_on_meta`.
    """
    root, model = build_on_meta(config, device, mesh, wrap, keep)
    root.to_empty(device=device)
    _initialize(model, config, mesh)
    root.train()
    return root


def build_on_meta(
    config: RunConfig,
    device: torch.device,
    mesh: ParallelMesh,
    wrap: Callable[[DeepSeekV3], Root],
    keep: Callable[[DeepSeekV3], Sequence[int]] | None = None,
) -> tuple[Root, DeepSeekV3]:
    """Builds the root module and the model inside it, ready to train on `device` but without memory for weights.

    `wrap` makes the root module, which training calls, from the model. `keep` removes the layers of other pipeline
    stages from the model and returns the numbers of the remaining ones; None keeps all.
    """
    with torch.device("meta"):
        model = DeepSeekV3(config.model)
    layers = range(len(model.model.layers)) if keep is None else keep(model)
    model.compute_dtype = compute_dtype(config.parallel.precision, device)
    backends = select_backends(model, device)
    get_logger("Plan").info(f"{model.compute_dtype} compute, float32 weights, back ends\n{backends}")
    compute_in_fp8(model, config, device, reshards_weights(mesh))
    _shard_experts(model, config, device, mesh)
    apply_activation_checkpointing(model, config.parallel.recomputation)
    if _compiles(model, config, device):
        _compile_layers([model.model.layers[number] for number in layers], config.parallel)
        model.model.norm.compile(fullgraph=True, dynamic=False)
    root = wrap(model)
    apply_fsdp(root, model, mesh, layers, device)
    return root, model


def _shard_experts(model: DeepSeekV3, config: RunConfig, device: torch.device, mesh: ParallelMesh) -> None:
    """Keeps this rank's shard of the experts, and gives every MoE layer a dispatcher that reaches the others."""
    parallel = config.parallel
    if parallel.expert == 1:
        return
    model_config = config.model
    shape = BufferShape(
        tokens=parallel.micro_batch_size * config.training.sequence_length,
        width=model_config.hidden_size,
        experts_per_token=model_config.num_experts_per_tok,
        dtype=model.compute_dtype or torch.float32,
        in_groups=model_config.topk_group < model_config.n_group,
    )
    dispatcher = select_dispatcher(
        parallel.expert_back_end,
        model_config.n_routed_experts,
        mesh.group("expert"),
        shape,
        device,
        fp8=_fp8_dispatch(model, config, device) if parallel.dispatch_precision == "fp8" else None,
        ranks_per_node=mesh.ranks_per_node,
    )
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.experts.keep_shard(mesh.expert_rank, parallel.expert)
            module.dispatcher = dispatcher


def _fp8_dispatch(model: DeepSeekV3, config: RunConfig, device: torch.device) -> Fp8Dispatch:
    """How tokens travel in FP8. Experts that compute in FP8 receive them as they arrive."""
    dtype, width = model.compute_dtype or torch.float32, config.model.hidden_size
    quantize = FP8_QUANTIZE.select(Target(device, dtype, (width,))).run
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    return Fp8Dispatch(
        quantize,
        power_of_two=config.parallel.fp8_scales == "power_of_two",
        hands_over=all(module.run_experts is not run_experts for module in experts),
    )


def apply_activation_checkpointing(model: DeepSeekV3, mode: Literal["none", "selective", "full"]) -> None:
    """Recomputes parts of the forward pass in the backward pass, and keeps only the inputs of these parts.

    `full` recomputes whole layers; `selective` recomputes the feed-forward networks, which free the most memory for
    the time that it takes to recompute them.
    """
    if mode == "full":
        model.run_layer = _recompute
    elif mode == "selective":
        for layer in model.model.layers:
            if isinstance(layer, DecoderLayer):
                layer.run_feed_forward = _recompute


def _recompute(module: nn.Module, *inputs: Any) -> Any:
    """Calls a module now and again in the backward pass, and keeps only its inputs in between."""
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def _compiles(model: DeepSeekV3, config: RunConfig, device: torch.device) -> bool:
    """Whether to compile the layers; `auto` compiles on CUDA if no layer breaks the graph.

    Raises ConfigError if the config asks for it and the experts cannot be compiled.
    """
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    can_compile = all(module.grouped_linear is not reference_grouped_linear for module in experts)
    wanted = config.parallel.compile
    if wanted is True and not can_compile:
        raise ConfigError(
            "parallel.compile = true: the experts run as a loop here, which cannot be compiled whole; that takes "
            "CUDA, bfloat16, and hidden_size and moe_intermediate_size in multiples of 8; "
            "use --set parallel.compile=auto"
        )
    return can_compile and (device.type == "cuda" if wanted == "auto" else wanted)


def _compile_layers(layers: Sequence[nn.Module], parallel: ParallelConfig) -> None:
    """Compiles each decoder layer as one graph if possible; layers of one kind share the compiled code.

    With selective recomputation the feed-forward network is compiled by itself: inside one graph the compiler would
    keep rows of the experts that should be recomputed. With expert parallelism only the parts around the exchange
    are compiled, because the exchange reads the number of rows from the device.
    """
    from deepseek_v3.training.parallel.weight_gradients_last import WEIGHT_GRADIENTS_LAST  # slow to import

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VARIANTS)
    options: dict[str, Any] = {"fullgraph": True, "options": {"post_grad_custom_post_pass": WEIGHT_GRADIENTS_LAST}}
    static = {**options, "dynamic": False}
    for layer in layers:
        if not isinstance(layer, DecoderLayer):
            continue
        moe = layer.mlp if isinstance(layer.mlp, MixtureOfExperts) else None
        has_exchange = moe is not None and parallel.expert > 1
        if parallel.recomputation != "selective" and not has_exchange:
            layer.compile(**static)
            continue
        _compile_method(layer, "attend", static)
        if moe is None or not has_exchange:
            layer.mlp.compile(**static)
            continue
        _compile_method(moe, "route", static)
        if moe.experts.run_experts is run_experts:  # nothing but operators in FP8, which leave nothing to compile
            moe.experts.compile(**options, dynamic=True)
        if moe.config.n_shared_experts and moe.shared_experts.run_hidden is run_hidden:
            _compile_method(moe.shared_experts, "hidden", static)


def _compile_method(module: nn.Module, name: str, options: dict[str, Any]) -> None:
    setattr(module, name, torch.compile(getattr(module, name), **options))


@torch.no_grad()
def _initialize(model: DeepSeekV3, config: RunConfig, mesh: ParallelMesh) -> None:
    """Sets this rank's shard of every parameter to the values that `model.init` gives it in the whole model."""
    shards, std, seed = local_shards(model, mesh), config.model.initializer_range, config.training.seed
    for name, parameter in model.named_parameters():
        shard, values = shards[name], local(parameter)
        for rows, initial in initial_values(name, shard.shape, shard.rows, std, seed, values.device):
            values[rows].copy_(shard.of_rows(initial))
    reset_buffers(model)
