"""Where the checkout and its result files are, and the first fields of a result file."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek_v3.benchmark.environment import cpu_name, environment
from deepseek_v3.utils.distributed.launch import ALONE, World, select_device
from deepseek_v3.utils.errors import ConfigError

__all__ = ["RESULTS", "ROOT", "cpu_name", "environment", "select_gpu"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def select_gpu(world: World = ALONE) -> torch.device:
    """This process's GPU. Raises ConfigError where torch finds none: what it measures is not on a CPU."""
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark measures a GPU, and torch finds no CUDA device here")
    return select_device("cuda", world)
