"""What somebody has, and what they want of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.quantities import dollars, figures
from deepseek_v3.utils.errors import ConfigError

OBJECTIVES = {
    "best-loss": "the lowest expected loss",
    "fastest": "the size that is trained soonest, on its least tokens",
    "fit": "the largest size",
}


@dataclass(frozen=True)
class PlanRequest:
    """Devices, limits (None: none) and the objective, one of `OBJECTIVES`. `tokens` is how many there are.

    Raises ConfigError for numbers and objectives that cannot be meant.
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
        """Whether there is a budget, or only so many tokens."""
        return any(limit is not None for limit in (self.budget_hours, self.budget_dollars, self.tokens))

    @property
    def budgets(self) -> list[str]:
        """Hours and dollars, as they are read, where there is a limit of them."""
        hours, rent = self.budget_hours, self.budget_dollars
        shown = (None if hours is None else f"{figures(hours)} hours", None if rent is None else dollars(rent))
        return [budget for budget in shown if budget]

    def seconds(self, devices: int) -> float:
        """How long so many of the devices may train: until the hours or the dollars are used up."""
        hours = math.inf if self.budget_hours is None else self.budget_hours
        rent = devices * self.device.dollars_per_hour
        if self.budget_dollars is not None and rent > 0:
            hours = min(hours, self.budget_dollars / rent)
        return 3600 * hours
