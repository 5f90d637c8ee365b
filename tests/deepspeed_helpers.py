"""Training a few steps with DeepSpeed, with everything that has to be the same as in one process."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import torch

import parallel_helpers
from deepseek_v3.training.parallel.ranks import arrange
from deepseek_v3.training.schedule import TokenPlan


def train(steps: int, stage: int, micro_batch_size: int) -> dict[str, Any]:
    """Losses, norms, loads and biases of every step, and gradients of the first, on two ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.utils import logger, safe_get_full_fp32_param, safe_get_full_grad

    from deepseek_v3.training.parallel.deepspeed import DeepSpeed

    logger.setLevel(logging.WARNING)
    config = parallel_helpers.run_config(steps, {"data_shard": 2, "micro_batch_size": micro_batch_size})
    ranks = arrange(config.parallel, "cpu")
    settings = {
        "train_batch_size": parallel_helpers.SEQUENCES,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": config.training.optimizer.max_grad_norm,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = DeepSpeed(config, ranks, torch.device("cpu"), lambda _: None, settings)
    parameters = dict(engine.models[0].named_parameters())
    gradients: dict[str, Any] = {}
    take_step = engine._engine.step

    def keeping() -> None:
        if not gradients and engine._engine.is_gradient_accumulation_boundary():
            gradients.update({n: safe_get_full_grad(p).numpy().copy() for n, p in parameters.items()})
        take_step()

    engine._engine.step = keeping
    rows = []
    plan = TokenPlan(config)
    for number in range(1, steps + 1):
        step = plan.step(number)
        micro = plan.micro_batches(step, micro_batch_size, ranks.data_rank, 2)
        tokens = parallel_helpers.batches_of(config, number)
        batches = iter([tokens[start - step.first_sample :][:size] for start, size in micro])
        losses, norm = engine.run_step(batches, step)
        all_losses = engine.finish_step(losses, step)
        figures = [all_losses.total, all_losses.main, all_losses.prediction, all_losses.balance, norm]
        rows.append((np.array([float(f) for f in figures]), all_losses.counts_LE.numpy(), engine.biases().numpy()))
    weights = {name: safe_get_full_fp32_param(p).numpy().copy() for name, p in parameters.items()}
    held_out = engine.main_losses([parallel_helpers.batches_of(config, 99)[:1]]).numpy()
    return {"rows": rows, "gradients": gradients, "weights": weights, "held_out": held_out}
