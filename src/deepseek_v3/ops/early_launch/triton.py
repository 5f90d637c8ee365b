"""Launching a kernel before the one before it has ended, so that it is there when its inputs are.

On Hopper and newer GPUs (programmatic dependent launch). A kernel that is launched so has to call `wait` before it
reads or writes anything that another kernel writes or reads. Weights and the like are no such thing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def early(device: torch.device) -> dict[str, Any]:
    """The arguments of a launch on a device: `EARLY`, which the kernel passes to `wait`, and what Triton needs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def wait(EARLY: tl.constexpr):
    """Lets the next kernel be launched, and waits for all kernels before this one."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
