"""The factors of the step-time and memory models, fitted to measured steps by benchmarks/calibrate_planner.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CALIBRATION_FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Rates:
    """Time of each kind of work over what the device's peak would need, and fixed seconds besides."""

    matrices: float
    experts: float
    expert_bytes: float
    attention: float
    activations: float
    logits: float
    weights: float
    seconds_per_layer: float
    seconds_per_step: float


@dataclass(frozen=True)
class Calibration:
    """`fitted_on`: device and versions. `allocator_overhead`: share by which the allocator holds more than it gave
    out. `context_bytes`: what driver and libraries keep on a GPU."""

    fitted_on: str
    bfloat16: Rates
    float32: Rates
    allocator_overhead: float
    context_bytes: float

    def rates(self, width: int) -> Rates:
        """Those for activations of 2 or 4 bytes."""
        return self.bfloat16 if width == 2 else self.float32


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
