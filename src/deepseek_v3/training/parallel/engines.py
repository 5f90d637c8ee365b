"""The engine that suits a layout."""

from __future__ import annotations

import torch

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.batches import Documents
from deepseek_v3.training.parallel.data_parallel import DataParallel
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.pipeline import Pipelined
from deepseek_v3.training.parallel.ranks import Ranks


def engine_for(config: RunConfig, ranks: Ranks, device: torch.device, documents: Documents) -> Engine:
    """Builds the model and what trains it on the ranks of the layout."""
    engine = Pipelined if config.parallel.pipeline > 1 else DataParallel
    return engine(config, ranks, device, documents)
