"""Memory, speed and price of accelerators: published figures, or the user's own from a YAML file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from deepseek_v3.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from deepseek_v3.config.loading import load_section
from deepseek_v3.utils.errors import ConfigError

# Beyond these bounds, quotients of a device's figures overflow or underflow a float.
MAX_RATE = 1e9
Rate = Annotated[PositiveFloat, Field(ge=1e-6, le=MAX_RATE)]


class Device(Section):
    """One accelerator, or one CPU host.

    `memory_gib` is what the driver reports. Rates are dense, without sparsity, in 10¹² operations or 10⁹ bytes per
    second; `fp8_tflops` is None for a device that FP8 training does not run on. `link_gb_per_s` and
    `network_gb_per_s` are the bandwidth of one device, in one direction, to others of its node and to other nodes.
    `dollars_per_hour` is the rent of one device.
    """

    name: str
    memory_gib: Rate
    bfloat16_tflops: Rate | None = None
    fp8_tflops: Rate | None = None
    float32_tflops: Rate
    memory_gb_per_s: Rate
    link_gb_per_s: Rate
    network_gb_per_s: Rate = 50.0  # one 400 Gb/s adapter per device
    devices_per_node: PositiveInt = 8
    dollars_per_hour: Annotated[NonNegativeFloat, Field(le=MAX_RATE)]
    is_cpu: bool = False
    source: str = Field(min_length=1)

    @property
    def memory_bytes(self) -> float:
        """Memory in bytes."""
        return self.memory_gib * 2**30

    def peak(self, width: int) -> float:
        """Operations per second of matrix products, for numbers of `width` = 1, 2 or 4 bytes.

        A width for which the device has no rate takes that of the next wider one.
        """
        narrow = self.bfloat16_tflops or self.float32_tflops
        return {1: self.fp8_tflops or narrow, 2: narrow, 4: self.float32_tflops}[width] * 1e12


# Sources of the rates, by the first word of a card's name.
_PUBLICATIONS = {
    "B200": "NVIDIA DGX B200 data sheet, an eighth of it",
    "H200": "NVIDIA H200 Tensor Core GPU data sheet",
    "H100": "NVIDIA H100 Tensor Core GPU data sheet",
    "H800": "NVIDIA H100 Tensor Core GPU data sheet",
    "A100": "NVIDIA A100 Tensor Core GPU data sheet",
    "L40S": "NVIDIA L40S data sheet",
    "RTX 5090": "NVIDIA RTX Blackwell GPU architecture white paper",
    "RTX 4090": "NVIDIA Ada GPU architecture white paper",
    "RTX 3090": "NVIDIA Ampere GA102 GPU architecture white paper",
}


def _nvidia(
    name: str,
    memory_gib: float,
    fp8: float | None,
    bfloat16: float,
    float32: float,
    memory: float,
    link: float,
    rent: float,
) -> Device:
    publication = next(title for card, title in _PUBLICATIONS.items() if name.startswith(card))
    return Device(
        name=name,
        memory_gib=memory_gib,
        fp8_tflops=fp8,
        bfloat16_tflops=bfloat16,
        float32_tflops=float32,
        memory_gb_per_s=memory,
        link_gb_per_s=link,
        network_gb_per_s=50.0 if link > 64 else 12.5,
        dollars_per_hour=rent,
        source=f"{publication}; rent: middle of on-demand offers in mid-2026",
    )


# Name, GiB, dense FP8, bfloat16, float32 TFLOP/s, memory, link (NVLink per direction, else PCIe) GB/s, $ an hour.
# A device with NVLink is assumed to have a network of 400 Gb/s, any other one of 100 Gb/s.
# The float32 rate is that without TF32, torch's default. On consumer cards the bfloat16 rate is that with float32
# accumulation. FP8 training needs compute capability 9.0 and more shared memory than GeForce cards have.
# `find_device` returns the first match, so a longer name comes before a name that it contains.
_DEVICES = (
    _nvidia("B200", 179.0, 4500, 2250, 75, 7700, 900, 5.00),
    _nvidia("H200", 140.0, 1979, 989, 67, 4800, 450, 3.80),
    _nvidia("H100 PCIe", 79.6, 1513, 756, 51, 2000, 64, 2.50),
    _nvidia("H100 NVL", 93.0, 1671, 835, 60, 3900, 64, 2.70),
    _nvidia("H100", 79.2, 1979, 989, 67, 3350, 450, 3.00),
    _nvidia("H800", 79.2, 1979, 989, 67, 3350, 200, 2.00).model_copy(
        update={
            "source": "NVIDIA H100 Tensor Core GPU data sheet, with links of 200 GB/s; rent: DeepSeek-V3 report"
        }
    ),
    _nvidia("A100 40GB PCIe", 39.4, None, 312, 19.5, 1555, 32, 1.00),
    _nvidia("A100 80GB PCIe", 79.2, None, 312, 19.5, 1935, 32, 1.30),
    _nvidia("A100 40GB", 39.4, None, 312, 19.5, 1555, 300, 1.10),
    _nvidia("A100", 79.2, None, 312, 19.5, 2039, 300, 1.50),
    _nvidia("L40S", 44.4, None, 362, 91.6, 864, 32, 0.90),
    _nvidia("RTX 5090", 31.4, None, 209.5, 104.8, 1792, 64, 0.60),
    _nvidia("RTX 4090", 23.6, None, 165.2, 82.6, 1008, 32, 0.40),
    _nvidia("RTX 3090", 23.6, None, 71, 35.6, 936, 32, 0.20),
    Device(
        name="CPU",
        memory_gib=16.0,
        float32_tflops=0.2,
        memory_gb_per_s=40.0,
        link_gb_per_s=1.0,
        network_gb_per_s=1.0,
        devices_per_node=1,
        dollars_per_hour=0.10,
        is_cpu=True,
        source="two cores of a server CPU, 32 float32 operations a cycle each at 3.1 GHz",
    ),
)


def known_devices() -> tuple[Device, ...]:
    """All devices of the table."""
    return _DEVICES


def find_device(name: str, devices: tuple[Device, ...] = _DEVICES) -> Device | None:
    """The first device whose words all occur in `name`, such as the driver's name of a card; None if none fits."""
    return _known_device(name) if devices is _DEVICES else _first_named(name, devices)


@cache
def _known_device(name: str) -> Device | None:
    """The device of the table; the search for a layout asks for the same ones thousands of times."""
    return _first_named(name, _DEVICES)


def _first_named(name: str, devices: tuple[Device, ...]) -> Device | None:
    words = name.lower().replace("-", " ").split()
    return next((device for device in devices if all(word in words for word in device.name.lower().split())), None)


def device_with_memory(gigabytes: float) -> Device:
    """The usual device that is sold with this memory: 80 GB is an H100, 24 GB an RTX 4090.

    Raises ConfigError, listing the known sizes, if none is within 5%.
    """
    usual = {sold: find_device(name) for sold, name in _SOLD_AS.items()}
    nearest = min(usual, key=lambda sold: abs(sold - gigabytes))
    device = usual[nearest]
    if device is None or not abs(nearest - gigabytes) <= 0.05 * nearest:  # also refuses NaN
        raise ConfigError(
            f"--gpu-memory {gigabytes:g}: no known GPU has that much; known are "
            f"{', '.join(f'{sold} ({name})' for sold, name in _SOLD_AS.items())}; "
            "name one with --gpu, or describe yours in a file for --hardware"
        )
    return device


_SOLD_AS = {24: "RTX 4090", 32: "RTX 5090", 40: "A100 40GB", 48: "L40S", 80: "H100", 141: "H200", 192: "B200"}


def load_device(path: str | Path) -> Device:
    """A device from a YAML file with the fields of `Device`.

    Raises ConfigError with one line per problem: file, line, field, problem.
    """
    return load_section(Device, path)


def peak_bfloat16_flops(device_name: str) -> float | None:
    """Peak bfloat16 operations per second of a card by its driver's name; None for an unknown card."""
    device = find_device(device_name)
    return device.peak(2) if device and device.bfloat16_tflops else None
