"""What a model computes with: the back end of every operation, the dtype, and the memory of its device."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from deepseek_v3.config.parallel_config import Precision
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.operation import Op, Operation, Select, Target
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.machine import free_memory


@runtime_checkable
class _HasBackends(Protocol):
    """A module that runs operations."""

    def select_backends(self, select: Select) -> None:
        """Sets the back end of each of its operations to what `select` returns for its widths."""


def select_backends(model: DeepSeekV3, device: torch.device) -> str:
    """Gives every module the fastest back ends that can run on `device` in the model's `compute_dtype`.

    Returns a text for a log: the selected back ends, and why faster ones cannot run.
    """
    dtype = model.compute_dtype or torch.float32
    selected: dict[str, None] = {}  # a set that keeps its order

    def select(operation: Operation[Op], *widths: int) -> Op:
        selection = operation.select(Target(device, dtype, widths))
        if len(operation.backends) > 1:
            selected[str(selection)] = None
        return selection.run

    for module in model.modules():
        if isinstance(module, _HasBackends):
            module.select_backends(select)
    return ", ".join(selected)


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of activations; with `auto` and `fp8`, bfloat16 on GPUs that multiply it natively, else float32.

    Raises ConfigError for bf16 on a GPU that does not multiply it natively.
    """
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "bf16" and device.type == "cuda" and not native:
        raise ConfigError(
            f"parallel.precision = bf16: {torch.cuda.get_device_name(device)} has no bfloat16 units; "
            "use --set parallel.precision=fp32"
        )
    if precision in ("auto", "fp8"):
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def free_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that new tensors may take."""
    if device.type != "cuda":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
