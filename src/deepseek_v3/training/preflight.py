"""Checks, before anything is allocated, that the run fits in the memory of the device."""

from __future__ import annotations

import torch

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.memory_check import require_memory
from deepseek_v3.utils.errors import PlanError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.machine import usable_memory

_GIB = 2**30


def check_memory(config: RunConfig, described: Device, force: bool = False) -> None:
    """Raises PlanError for a plan that does not fit in the device's memory; with `force` it is only a warning."""
    try:
        require_memory(config, described)
    except PlanError as error:
        if not force:
            raise PlanError(f"{error}; --force starts it as it is") from None
        get_logger("Plan").warning(f"started by --force although {error}")


def describe_device(device: torch.device, local_ranks: int = 1) -> Device:
    """Describes a device of this machine for the planner, with the memory that is free on it now.

    On a CPU, each of the host's `local_ranks` ranks gets an equal part of the memory. A GPU that the planner does
    not know is described as an A100 with its own memory, and with FP8 if its compute capability has it.
    """
    if device.type == "cpu":
        cpu = find_device("CPU")
        assert cpu is not None
        return cpu.model_copy(update={"memory_gib": usable_memory() / _GIB / local_ranks})
    name = torch.cuda.get_device_name(device)
    found = find_device(name)
    known = found or find_device("A100")
    assert known is not None
    free, _ = torch.cuda.mem_get_info(device)
    changes: dict[str, object] = {"name": name}
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        changes["bfloat16_tflops"] = None
    elif found is None and capability >= (9, 0) and known.bfloat16_tflops:
        changes["fp8_tflops"] = 2 * known.bfloat16_tflops
    described = known.model_copy(update=changes)
    # The planner adds the memory of the context, which is taken already.
    taken = calibration(described).context_bytes
    return described.model_copy(update={"memory_gib": (free + taken) / _GIB})
