"""Builds the engine for a layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.data import DocumentIds
from deepseek_v3.training.parallel.data_parallel import DataParallelEngine
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.optional import missing_library


def build_engine(
    config: RunConfig,
    mesh: ParallelMesh,
    device: torch.device,
    documents: DocumentIds,
    deepspeed: DeepSpeedFile | None = None,
) -> Engine:
    """Builds the model and its engine for the layout in `config`; DeepSpeed's engine if `deepspeed` is given.

    Raises ConfigError if DeepSpeed is not installed, refuses its settings, or is to average the weights.
    """
    if deepspeed is not None:
        if config.training.optimizer.ema_decay is not None:
            raise ConfigError(
                f"training.optimizer.ema_decay = {config.training.optimizer.ema_decay}: DeepSpeed keeps no average "
                "of the weights, expected null; use parallel.zero_stage without --deepspeed, or set it to null"
            )
        return _deepspeed()(config, mesh, device, documents, deepspeed)
    if config.parallel.pipeline == 1:
        return DataParallelEngine(config, mesh, device, documents)
    from deepseek_v3.training.parallel.pipeline_parallel import PipelineEngine  # loads slowly; few runs need it

    return PipelineEngine(config, mesh, device, documents)


def _deepspeed() -> Callable[..., Engine]:
    try:
        from deepseek_v3.training.parallel.deepspeed_engine import DeepSpeedEngine
    except ModuleNotFoundError as error:
        raise ConfigError(f"{missing_library('--deepspeed', 'deepspeed')} ({error})") from None
    return DeepSpeedEngine
