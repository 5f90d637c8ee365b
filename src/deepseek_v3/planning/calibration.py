"""Factors of the step-time and memory models, fitted to measured steps by `benchmarks/calibrate_planner.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from deepseek_v3.planning.execution import Execution

CALIBRATION_FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Rates:
    """Measured time of each kind of work over its time at peak rate, and fixed seconds per layer and step."""

    matrices: float
    experts: float
    expert_bytes: float
    attention: float
    masked_attention: float  # by another kernel, which keeps attention inside each document
    activations: float
    logits: float
    weights: float
    seconds_per_layer: float
    seconds_per_step: float


@dataclass(frozen=True)
class Calibration:
    """One fit of all factors.

    `fitted_on`: device and versions. `bfloat16`: rates of compiled layers; `float32`: rates of eager layers.
    `allocator_overhead`: memory that torch's allocator reserves beyond the allocated bytes, as a share of these.
    `context_bytes`: memory of the CUDA context and the libraries on a GPU.
    """

    fitted_on: str
    bfloat16: Rates
    float32: Rates
    allocator_overhead: float
    context_bytes: float

    def rates(self, run: Execution) -> Rates:
        """The rates for this execution; eager bfloat16 takes those of activations from float32."""
        if run.width == 4:
            return self.float32
        return self.bfloat16 if run.compiled else replace(self.bfloat16, activations=self.float32.activations)


@cache
def calibration() -> Calibration:
    """The fit in `calibration.json`."""
    fitted = json.loads(CALIBRATION_FILE.read_text(encoding="utf-8"))
    return Calibration(
        fitted_on=fitted["fitted_on"],
        bfloat16=Rates(**fitted["bfloat16"]),
        float32=Rates(**fitted["float32"]),
        allocator_overhead=fitted["allocator_overhead"],
        context_bytes=fitted["context_bytes"],
    )
