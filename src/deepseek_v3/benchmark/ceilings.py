"""The rates that this device reaches at best, measured: the floors of all other figures are computed from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deepseek_v3.benchmark.timing import median_seconds
from deepseek_v3.ops.fp8 import E4M3

_SIZE, _BYTES = 8192, 2**32
_CPU_SIZE, _CPU_BYTES = 512, 2**24


@dataclass(frozen=True)
class Ceilings:
    """10¹² operations per second of a square product in bfloat16 and in e4m3, and 10⁹ bytes per second of a copy.

    A copied byte counts twice, because it is read and written. `fp8_tflops` is None where the device cannot
    multiply 8-bit numbers.
    """

    bf16_tflops: float
    fp8_tflops: float | None
    copy_gb_per_s: float

    def product_seconds(self, operations: float, in_fp8: bool) -> float:
        """The least time of matrix products."""
        rate = self.fp8_tflops if in_fp8 and self.fp8_tflops is not None else self.bf16_tflops
        return operations / (1e12 * rate)

    def copy_seconds(self, num_bytes: float) -> float:
        """The least time, in seconds, to move `num_bytes`, read and written bytes added, at the copy rate."""
        return num_bytes / (1e9 * self.copy_gb_per_s)

    def describe(self, device: torch.device) -> str:
        """A sentence for the reader of a table."""
        if device.type == "cpu":
            return "These are figures of a CPU: they show that the command works, and mean nothing else."
        fp8 = "" if self.fp8_tflops is None else f", e4m3 {self.fp8_tflops:,.0f} TFLOP/s"
        return (
            f"Floors: a product of {_SIZE:,} × {_SIZE:,} reaches bf16 {self.bf16_tflops:,.0f} TFLOP/s{fp8} on this "
            f"device, a copy {self.copy_gb_per_s:,.0f} GB/s (read and write)."
        )


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measures a product of random 8192 × 8192 matrices, in both types, and a copy of 4 GiB; less on a CPU."""
    size, num_bytes = (_SIZE, _BYTES) if device.type == "cuda" else (_CPU_SIZE, _CPU_BYTES)
    one, other = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    product = median_seconds(lambda _: one @ other.T, device)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda _: target.copy_(source), device)
    operations = 2.0 * size**3
    return Ceilings(
        bf16_tflops=operations / product / 1e12,
        fp8_tflops=_fp8_tflops(one.to(E4M3), other.to(E4M3), operations, device),
        copy_gb_per_s=2 * num_bytes / copy / 1e9,
    )


def _fp8_tflops(one: torch.Tensor, other: torch.Tensor, operations: float, device: torch.device) -> float | None:
    """The rate of the library's fastest product, with one scale per matrix; None without 8-bit units."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    scale, kind = torch.ones((), device=device), F.ScalingType.TensorWise

    def run(_: int) -> torch.Tensor:
        return F.scaled_mm(one, other.T, scale, kind, scale, kind, use_fast_accum=True)

    return operations / median_seconds(run, device) / 1e12
