"""The factors of the step-time and memory models, fitted to measured steps by benchmarks/calibrate_planner.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from deepseek_v3.planning.execution import Execution

CALIBRATION_FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Rates:
    """Time of each kind of work over what the device's peak would need, and fixed seconds besides."""

    matrices: float
    experts: float
    expert_bytes: float
    attention: float
    masked_attention: float  # where a mask parts documents, by another kernel
    activations: float
    logits: float
    weights: float
    seconds_per_layer: float
    seconds_per_step: float


@dataclass(frozen=True)
class Calibration:
    """`fitted_on`: device and versions. `bfloat16`: of compiled layers; `float32`: of layers that are not.

    `allocator_overhead`: share by which the allocator holds more than it gave out. `context_bytes`: what driver and
    libraries keep on a GPU.
    """

    fitted_on: str
    bfloat16: Rates
    float32: Rates
    allocator_overhead: float
    context_bytes: float

    def rates(self, run: Execution) -> Rates:
        """Those for layers run so; bfloat16 without the compiler has its products and the other's activations."""
        if run.width == 4:
            return self.float32
        return self.bfloat16 if run.compiled else replace(self.bfloat16, activations=self.float32.activations)


@cache
def calibration() -> Calibration:
    """The fit that ships with this version."""
    fitted = json.loads(CALIBRATION_FILE.read_text(encoding="utf-8"))
    return Calibration(
        fitted_on=fitted["fitted_on"],
        bfloat16=Rates(**fitted["bfloat16"]),
        float32=Rates(**fitted["float32"]),
        allocator_overhead=fitted["allocator_overhead"],
        context_bytes=fitted["context_bytes"],
    )
