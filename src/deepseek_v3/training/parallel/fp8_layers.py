"""Gives the layers that compute in FP8 their products (DeepSeek-V3 report, §3.3).

Which layers these are says `planning/fp8_choice.py`, for the trainer and the planner alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.experts import FeedForward, RoutedExperts, run_experts, run_hidden
from deepseek_v3.moe.fp8_experts import run_fp8_experts
from deepseek_v3.moe.fp8_feed_forward import fp8_hidden, fp8_output
from deepseek_v3.ops.fp8 import FP8_QUANTIZE
from deepseek_v3.ops.fp8.linear import Fp8Recipe, fp8_linear
from deepseek_v3.ops.fp8_gemm import FP8_GEMM
from deepseek_v3.ops.layers import Linear
from deepseek_v3.ops.operation import Target, copyable
from deepseek_v3.planning.fp8_choice import LayerSize, layer_sizes, reason_against
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger


@dataclass(frozen=True)
class Fp8Layer:
    """A layer that can compute in FP8; `name` is that of its module in a decoder layer."""

    name: str
    module: nn.Module
    size: LayerSize

    def __str__(self) -> str:
        return f"{self.name} {'×'.join(str(width) for width in self.size.widths)}"


def compute_in_fp8(model: DeepSeekV3, config: RunConfig, device: torch.device, reshards_weights: bool) -> None:
    """Gives every layer that `parallel.precision` names its products in FP8.

    `reshards_weights`: the weights of other ranks are gathered for each pass, and freed in between. Logs which
    layers compute in FP8, and why the others do not. Raises ConfigError for `fp8` on a GPU that cannot run it, and
    for layers that are to be compiled where FP8 runs by the reference: torch 2.11 compiles its plain operations to
    code whose gradients are zero.
    """
    precision, log = config.parallel.precision, get_logger("Plan")
    if precision not in ("fp8", "auto"):
        return
    chosen, passed_over = _choose(list(fp8_layers(model, config)), precision, _name_of(device))
    if precision == "auto" and not chosen:
        if device.type == "cuda":
            log.info(f"no layer in FP8: {'; '.join(passed_over)}")
        return
    try:
        recipe = _recipe(model, config, device, reshards_weights)
    except ConfigError as error:
        if precision == "fp8":
            raise
        log.info(f"no layer in FP8: {error}")
        return
    for layer in chosen:
        _set_products(layer.name, layer.module, recipe)
    names = ", ".join(dict.fromkeys(str(layer) for layer in chosen)) or "none"
    reasons = [f"not in FP8, {reason}: {', '.join(others)}" for reason, others in passed_over.items()]
    log.info("\n".join([f"layers in FP8: {names}", *reasons]))


def has_fp8(module: nn.Module) -> bool:
    """Whether a layer of a module computes in FP8."""
    return any(
        (isinstance(layer, Linear) and getattr(layer.product, "func", None) is fp8_linear)
        or (isinstance(layer, FeedForward) and layer.run_hidden is not run_hidden)
        or (isinstance(layer, RoutedExperts) and layer.run_experts is not run_experts)
        for layer in module.modules()
    )


def fp8_layers(model: DeepSeekV3, config: RunConfig) -> Iterator[Fp8Layer]:
    """Every layer of the model that could compute in FP8, in order."""
    sizes = layer_sizes(config)
    for path, module in model.model.layers.named_modules():
        name = ".".join(part for part in path.split(".") if not part.isdigit())
        if name in sizes and isinstance(module, (Linear, FeedForward, RoutedExperts)):
            yield Fp8Layer(name, module, sizes[name])


def _choose(
    layers: list[Fp8Layer], precision: Literal["fp8", "auto"], device_name: str
) -> tuple[list[Fp8Layer], dict[str, dict[str, None]]]:
    """The layers to compute in FP8, and the names of the others by the reason."""
    chosen: list[Fp8Layer] = []
    passed_over: dict[str, dict[str, None]] = {}  # each a set that keeps its order
    for layer in layers:
        reason = reason_against(layer.size, precision, device_name)
        if reason is None:
            chosen.append(layer)
        else:
            passed_over.setdefault(reason, {})[str(layer)] = None
    return chosen, passed_over


def _recipe(model: DeepSeekV3, config: RunConfig, device: torch.device, reshards_weights: bool) -> Fp8Recipe:
    target = Target(device, model.compute_dtype or torch.float32)
    quantize, gemm = FP8_QUANTIZE.select(target), FP8_GEMM.select(target)
    if "reference" in (quantize.backend, gemm.backend):
        if device.type == "cuda":
            raise ConfigError(f"parallel.precision = fp8: {quantize}, {gemm}; use --set parallel.precision=bf16")
        if config.parallel.compile is True:
            raise ConfigError(
                "parallel.compile = true: FP8 runs by its reference here, which cannot be compiled; "
                "use --set parallel.compile=auto"
            )
    scales = config.parallel.fp8_scales
    slow = "; this device has no kernels for FP8 and takes the slow reference" if device.type != "cuda" else ""
    get_logger("Plan").info(f"FP8 with {scales.replace('_', ' ')} scales, {quantize}, {gemm}{slow}")
    functions = copyable(quantize.run), copyable(gemm.run)
    return Fp8Recipe(*functions, scales == "power_of_two", keeps_weights=not reshards_weights)


def _set_products(name: str, module: nn.Module, recipe: Fp8Recipe) -> None:
    """Sets the products of a layer.

    Attention keeps its output for its own backward pass, so the projection of that output keeps no copy of it.
    """
    if isinstance(module, Linear):
        module.product = partial(fp8_linear, recipe=recipe, keeps_input=name.endswith("o_proj"))
    elif isinstance(module, FeedForward):
        module.run_hidden = partial(fp8_hidden, recipe=recipe)
        module.run_output = partial(fp8_output, recipe=recipe)
    elif isinstance(module, RoutedExperts):
        module.run_experts = partial(run_fp8_experts, recipe=recipe)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
