"""From a config to a model that is ready to train, in one ordered list of steps.

FOLDED: Less memory for more work: running parts of the forward pass again in the backward pass (Chen et al. 2016).
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
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.moe.select_dispatcher import select_dispatcher
from deepseek_v3.ops.grouped_gemm import reference_grouped_linear
from deepseek_v3.training.optimizer import local
from deepseek_v3.training.parallel.fsdp import apply_fsdp
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.sharding import local_shards
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger


def apply_activation_checkpointing(model: DeepSeekV3, what: Literal["none", "selective", "full"]) -> None:
    """Runs whole layers again (`full`), or of each layer what keeps most for its time: the feed-forward network."""
    if what == "full":
        model.run_layer = _recomputing
    elif what == "selective":
        for layer in model.model.layers:
            if isinstance(layer, DecoderLayer):
                layer.run_feed_forward = _recomputing


def _recomputing(module: nn.Module, *inputs: Any) -> Any:
    """Runs a module now and once more in the backward pass, keeping only its inputs between."""
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


# Layer kinds (dense, mixture, prediction) × with and without gradient, and room for masks.
_COMPILED_VARIANTS = 16

Root = TypeVar("Root", bound=nn.Module)


def build_model(
    config: RunConfig,
    device: torch.device,
    mesh: ParallelMesh,
    wrap: Callable[[DeepSeekV3], Root],
    keep: Callable[[DeepSeekV3], Sequence[int]] | None = None,
) -> Root:
    """Builds this rank's part of the model on `device`, initialised from the run's seed; weights are float32."""
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
    """The module that is called and the model in it, ready to train on `device` but without any memory yet.

    `wrap` makes the module that is called of the model. `keep` takes away what other stages of a pipeline have and
    returns the numbers of the layers that are left.
    """
    with torch.device("meta"):
        model = DeepSeekV3(config.model)
    layers = range(len(model.model.layers)) if keep is None else keep(model)
    model.compute_dtype = compute_dtype(config.parallel.precision, device)
    backends = select_backends(model, device)
    get_logger("Plan").info(f"{model.compute_dtype} compute, float32 weights, back ends\n{backends}")
    _shard_experts(model, config, device, mesh)
    apply_activation_checkpointing(model, config.parallel.recomputation)
    if _compiles(model, config, device):
        _compile_layers(_layers(model, layers), config.parallel)
    root = wrap(model)
    apply_fsdp(root, model, mesh, layers)
    return root, model


def _shard_experts(model: DeepSeekV3, config: RunConfig, device: torch.device, mesh: ParallelMesh) -> None:
    """Leaves each rank its share of the experts, and gives the layers a dispatcher that reaches the others."""
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
        precision=parallel.dispatch_precision,
        ranks_per_node=mesh.ranks_per_node,
    )
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.experts.keep_shard(mesh.expert_rank, parallel.expert)
            module.dispatcher = dispatcher


@torch.no_grad()
def _initialize(model: DeepSeekV3, config: RunConfig, mesh: ParallelMesh) -> None:
    """As `model/init.py` does, for what this rank holds."""
    pieces, std, seed = local_shards(model, mesh), config.model.initializer_range, config.training.seed
    for name, parameter in model.named_parameters():
        piece, held = pieces[name], local(parameter)
        for place, values in initial_values(name, piece.shape, piece.rows, std, seed, held.device):
            held[place].copy_(piece.of_rows(values))
    reset_buffers(model)


def _layers(model: DeepSeekV3, numbers: Sequence[int]) -> list[DecoderLayer]:
    layers = [model.model.layers[number] for number in numbers]
    return [layer for layer in layers if isinstance(layer, DecoderLayer)]


def _compiles(model: DeepSeekV3, config: RunConfig, device: torch.device) -> bool:
    """Whether layers are compiled: as the config says, or by default where CUDA runs them without a break."""
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    in_one_piece = all(module.grouped_linear is not reference_grouped_linear for module in experts)
    wanted = config.parallel.compile
    if wanted is True and not in_one_piece:
        raise ConfigError(
            "parallel.compile = true: the experts run as a loop here, which cannot be compiled whole; that takes "
            "CUDA, bfloat16, and hidden_size and moe_intermediate_size in multiples of 8; "
            "use --set parallel.compile=auto"
        )
    return in_one_piece and (device.type == "cuda" if wanted == "auto" else wanted)


def _compile_layers(layers: Sequence[DecoderLayer], parallel: ParallelConfig) -> None:
    """Compiles each layer whole where it can be; layers of one kind share the compiled code.

    Where the feed-forward network runs again in the backward pass it is compiled by itself: within one graph the
    compiler keeps rows of experts that should be made anew. Around experts on other ranks only parts are compiled,
    because rows that travel are counted on the way.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VARIANTS)
    for layer in layers:
        mixture = layer.mlp if isinstance(layer.mlp, MixtureOfExperts) else None
        apart = mixture is not None and parallel.expert > 1
        if parallel.recomputation != "selective" and not apart:
            layer.compile(fullgraph=True, dynamic=False)
            continue
        _compile_method(layer, "attend")
        if mixture is None or not apart:
            layer.mlp.compile(fullgraph=True, dynamic=False)
            continue
        _compile_method(mixture, "route")
        mixture.experts.compile(fullgraph=True, dynamic=True)
        if mixture.config.n_shared_experts:
            _compile_method(mixture.shared_experts, "hidden")


def _compile_method(module: nn.Module, name: str) -> None:
    setattr(module, name, torch.compile(getattr(module, name), fullgraph=True, dynamic=False))
