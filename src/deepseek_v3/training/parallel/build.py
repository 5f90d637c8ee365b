"""The engine that suits a layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.data import Documents
from deepseek_v3.training.parallel.data_parallel import DataParallel
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.mesh import Ranks
from deepseek_v3.training.parallel.pipeline_parallel import Pipelined
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.lazily import imported


def engine_for(
    config: RunConfig,
    ranks: Ranks,
    device: torch.device,
    documents: Documents,
    deepspeed: DeepSpeedFile | None = None,
) -> Engine:
    """Builds the model and what trains it on the ranks of the layout; by DeepSpeed where there is a file for it.

    Raises ConfigError where DeepSpeed is not installed, or cannot do what its file says.
    """
    if deepspeed is not None:
        return _deepspeed()(config, ranks, device, documents, deepspeed)
    engine = Pipelined if config.parallel.pipeline > 1 else DataParallel
    return engine(config, ranks, device, documents)


def _deepspeed() -> Callable[..., Engine]:
    try:
        return imported("deepseek_v3.training.parallel.deepspeed_engine:DeepSpeed")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--deepspeed: {error.name} is not installed; run pip install 'deepseek_v3[deepspeed]'"
        ) from None
