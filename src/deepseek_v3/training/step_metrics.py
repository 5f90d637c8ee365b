"""The figures of one step, gathered on the device and read back in one transfer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.moe.balance import load_metrics
from deepseek_v3.training.loss import Losses

Figures = dict[str, float | list[float]]


def step_figures(config: ModelConfig, losses: Losses, gradient_norm: Tensor, biases_LE: Tensor) -> Figures:
    """Losses in nats per token, gradient norm, and for each figure of the experts a list over mixture layers.

    `biases_LE` (layers, experts): the routing biases after the step.
    """
    figures = {"loss": losses.main, "gradient_norm": gradient_norm}
    if config.num_nextn_predict_layers:
        figures["mtp_loss"] = losses.prediction
    if len(biases_LE):
        figures["balance_loss"] = losses.balance
        figures |= {f"experts/{name}": values_L for name, values_L in load_metrics(losses.counts_LE).items()}
        figures |= {"experts/bias_min": biases_LE.amin(-1), "experts/bias_max": biases_LE.amax(-1)}
    return _to_host(figures)


def _to_host(figures: Mapping[str, Tensor]) -> Figures:
    values = torch.cat([figure.double().flatten() for figure in figures.values()]).tolist()
    host: Figures = {}
    for name, figure in figures.items():
        own, values = values[: figure.numel()], values[figure.numel() :]
        host[name] = own if figure.ndim else own[0]
    return host
