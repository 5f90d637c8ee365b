"""From a config to a model that is ready to train, in one ordered list of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.back_ends import choose_back_ends
from deepseek_v3.model.init import initialize
from deepseek_v3.model.precision import compute_dtype
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.grouped_gemm import reference_grouped_linear
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger

# Layer kinds (dense, mixture, prediction) × with and without gradient, and room for masks.
_COMPILED_VARIANTS = 16


def prepare_model(config: RunConfig, device: torch.device) -> DeepSeekV3:
    """Builds the model on `device`, initialised from the run's seed; weights are float32."""
    with torch.device("meta"):
        model = DeepSeekV3(config.model)
    model.compute_dtype = compute_dtype(config.parallel.precision, device)
    back_ends = choose_back_ends(model, device)
    get_logger("Plan").info(f"{model.compute_dtype} compute, float32 weights | back ends: {back_ends}")
    if config.parallel.recomputation == "full":
        model.run_layer = _recomputing
    if _compiles(model, config, device):
        _compile_layers(model)
    model.to_empty(device=device)
    initialize(model, config.model.initializer_range, config.training.seed)
    return model.train()


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


def _recomputing(layer: nn.Module, *inputs: Any) -> Any:
    """Runs a layer now and once more in the backward pass, keeping only its inputs between."""
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


def _compile_layers(model: DeepSeekV3) -> None:
    """Compiles each layer whole; layers of one kind share the compiled code."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VARIANTS)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False)
