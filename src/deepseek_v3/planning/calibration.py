"""Factors of the step-time and memory models, fitted to measured steps by `benchmarks/calibrate_planner.py`.

`calibration.json` holds one fit for each kind of device that was measured, by its name in the planner's table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from deepseek_v3.planning.execution import Execution
from deepseek_v3.planning.hardware import Device, find_device

CALIBRATION_FILE = Path(__file__).with_name("calibration.json")
_KINDS = ("bfloat16", "float32")


@dataclass(frozen=True)
class Rates:
    """Measured time of each kind of work over its time at peak rate, and fixed seconds per layer and step.

    `assumed` names the factors that no measured step of the device exercised; they are those of another kind of
    work or of another device.
    """

    matrices: float
    experts: float
    expert_bytes: float
    attention: float
    masked_attention: float  # by another kernel, which keeps attention inside each document
    activations: float
    logits: float
    weights: float
    fp8_matrices: float
    fp8_experts: float
    quantization: float
    seconds_per_layer: float
    seconds_per_step: float
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """One fit of all factors.

    `device`: its name in the planner's table. `fitted_on`: the driver's name of the card, and versions. `bfloat16`:
    rates of compiled layers; `float32`: rates of eager layers. `allocator_overhead`: memory that torch's allocator
    reserves beyond the allocated bytes, as a share of these. `context_bytes`: memory of the CUDA context and the
    libraries on a GPU.
    """

    device: str
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

    @property
    def has_measured_fp8(self) -> bool:
        """Whether steps in FP8 were measured, on this device or on the one whose factors it takes."""
        return not {"fp8_matrices", "fp8_experts", "quantization"} & {*self.bfloat16.assumed}

    def fits(self, device: Device) -> bool:
        """Whether the factors were measured on a device of the same rates, so that nothing is scaled."""
        return self.distance(device) == 0

    def distance(self, device: Device) -> float:
        """How far the published rates of the fitted device are from those of `device`, on a logarithmic scale."""
        own = find_device(self.device)
        if own is None:
            raise ValueError(f"{CALIBRATION_FILE.name}: {self.device!r} is not in the planner's table of devices")
        peaks = math.log(device.peak(2) / own.peak(2))
        return math.hypot(peaks, math.log(device.memory_gb_per_s / own.memory_gb_per_s))


@lru_cache
def calibration(device: Device) -> Calibration:
    """The fit of this kind of device, or else of the one whose published rates are nearest."""
    return nearest_fit(read_fits(), device)


def nearest_fit(fits: Sequence[Calibration], device: Device) -> Calibration:
    """Of some fits, at least one, that of the device whose published rates are nearest to those of `device`."""
    return min(fits, key=lambda fit: fit.distance(device))


@cache
def read_fits() -> tuple[Calibration, ...]:
    """All fits in `calibration.json`."""
    fits = json.loads(CALIBRATION_FILE.read_text(encoding="utf-8"))
    return tuple(_fit(fields) for fields in fits)


def _fit(fields: dict[str, Any]) -> Calibration:
    rates = {kind: Rates(**{**fields[kind], "assumed": tuple(fields[kind]["assumed"])}) for kind in _KINDS}
    return Calibration(**{**fields, **rates})
