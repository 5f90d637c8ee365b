"""What the environment says about this process: its device, and whether it is one of several."""

from __future__ import annotations

import os

import torch

from deepseek_v3.utils.errors import ConfigError


def select_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU where there is none. Raises ConfigError for a missing one."""
    # Read at CUDA's first allocation: segments that grow leave fewer holes than segments of fixed sizes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def refuse_several_processes() -> None:
    """Raises ConfigError under a launcher that started several processes, which would all train the same."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError(f"WORLD_SIZE = {world}: training runs in one process; start it without a launcher")
