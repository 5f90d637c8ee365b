"""The options of `dsv3 plan`, and the request that they make: devices, limits and an objective."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from deepseek_v3.planning.hardware import (
    MAX_RATE,
    Device,
    device_with_memory,
    find_device,
    known_devices,
    load_device,
)
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.numbers import MAX_TOKENS, parse_count
from deepseek_v3.utils.text import dollars, three_figures

OBJECTIVES = {
    "best-loss": "the lowest expected loss",
    "fastest": "the shortest training, on the fewest tokens",
    "fit": "the largest size",
}


_DEFAULT_GPU = "H100"
_DEFAULT_GPUS = 8


@dataclass(frozen=True)
class PlanRequest:
    """Devices, limits (None: no limit) and the objective, one of `OBJECTIVES`; `tokens` is the size of the corpus.

    Raises ConfigError for an impossible number or an unknown objective.
    """

    device: Device
    devices: int
    budget_hours: float | None = None
    budget_dollars: float | None = None
    tokens: int | None = None
    objective: str = "best-loss"

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ConfigError(f"--gpus {self.devices}: expected at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"--tokens {self.tokens}: expected at least 1")
        for name, budget in (("hours", self.budget_hours), ("dollars", self.budget_dollars)):
            if budget is not None and not (math.isfinite(budget) and budget > 0):
                raise ConfigError(f"--budget-{name} {budget:g}: expected a number above 0, or no such option")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"--objective {self.objective}: expected {', '.join(OBJECTIVES)}")

    @property
    def limited(self) -> bool:
        """Whether hours, dollars or tokens are limited."""
        return any(limit is not None for limit in (self.budget_hours, self.budget_dollars, self.tokens))

    @property
    def budgets(self) -> list[str]:
        """The limits of hours and dollars as text."""
        hours, rent = self.budget_hours, self.budget_dollars
        shown = (
            None if hours is None else f"{three_figures(hours)} hours",
            None if rent is None else dollars(rent),
        )
        return [budget for budget in shown if budget]

    def seconds(self, devices: int) -> float:
        """How long `devices` devices may train: until hours or dollars are used up; infinite without limits."""
        hours = math.inf if self.budget_hours is None else self.budget_hours
        rent = devices * self.device.dollars_per_hour
        if self.budget_dollars is not None and rent > 0:
            hours = min(hours, self.budget_dollars / rent)
        return 3600 * hours


@dataclass(frozen=True)
class PlanOptions:
    """The options of the command line, None if not given; at most one of three options names the device."""

    gpus: int | None = None
    gpu: str | None = None
    gpu_memory: float | None = None
    hardware: Path | None = None
    price: float | None = None
    budget_hours: float | None = None
    budget_dollars: float | None = None
    tokens: str | None = None
    objective: str | None = None

    def request(self) -> PlanRequest:
        """The request of these options. Raises ConfigError with the option for an invalid value."""
        device = self._device()
        usual = 1 if device.is_cpu else _DEFAULT_GPUS
        return PlanRequest(
            device=device,
            devices=usual if self.gpus is None else self.gpus,
            budget_hours=self.budget_hours,
            budget_dollars=self.budget_dollars,
            tokens=None if self.tokens is None else parse_tokens(self.tokens),
            **({} if self.objective is None else {"objective": self.objective}),
        )

    def command(self) -> str:
        """The command with these options, which makes the same plan without questions."""
        given = {name.replace("_", "-"): value for name, value in vars(self).items() if value is not None}
        words = [word for name, value in given.items() for word in (f"--{name}", _typed(value))]
        return shlex.join(["dsv3", "plan", *words])

    def _device(self) -> Device:
        ways = {"--gpu": self.gpu, "--gpu-memory": self.gpu_memory, "--hardware": self.hardware}
        given = [f"{name} {_typed(value)}" for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: expected one way to name the device, not several")
        if self.hardware is not None:
            device = load_device(self.hardware)
        elif self.gpu_memory is not None:
            device = device_with_memory(_positive("--gpu-memory", self.gpu_memory))
        else:
            device = known_device(_DEFAULT_GPU if self.gpu is None else self.gpu)
        if self.price is None:
            return device
        if not 0 <= self.price <= MAX_RATE:
            raise ConfigError(f"--price {self.price:g}: expected dollars per hour of one device, from 0 to 1e9")
        return device.model_copy(update={"dollars_per_hour": self.price})


def known_device(name: str) -> Device:
    """The device of that name. Raises ConfigError with the known names if there is none."""
    device = find_device(name)
    if device is None:
        known = ", ".join(device.name for device in known_devices())
        raise ConfigError(
            f"--gpu {name}: unknown device; known are {known}; describe others in a file for --hardware"
        )
    return device


def parse_tokens(text: str) -> int:
    """The number of `--tokens`. Raises ConfigError unless it is a whole number from 1 to 10¹⁸."""
    try:
        tokens = parse_count(text)
    except ValueError:
        tokens = 0
    if not 1 <= tokens <= MAX_TOKENS:
        raise ConfigError(f"--tokens {text}: expected a whole number from 1 to 1e18, such as 3.8e9, 10B or 1.5T")
    return tokens


def _positive(name: str, number: float) -> float:
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name} {number:g}: expected a number above 0")
    return number


def _typed(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
