"""The plan of one model size on given devices: layout, tokens, cost, expected loss, and broken limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from deepseek_v3.config.loading import PREFIX
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.cost import (
    ROUNDING,
    RunCost,
    affordable_tokens,
    best_layout,
    run_cost,
    token_range,
    with_tokens,
)
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.counts import count_active_parameters, count_parameters
from deepseek_v3.planning.layout_search import MAX_DEVICES, Layout, fewest_devices, min_memory_layout
from deepseek_v3.planning.memory import MemoryEstimate
from deepseek_v3.planning.scaling_laws import ExpectedLoss, expected_loss, training_compute
from deepseek_v3.planning.token_budget import budget_in_tokens, planned_steps
from deepseek_v3.utils.text import dollars, format_count, format_distinct, gibibytes, three_figures

# Without a limit of hours, a run that takes longer than a year does not fit.
_HOURS_OF_A_YEAR = 24 * 365
# Losses per token are comparable only between similar vocabularies; the laws used at least this many entries.
_MIN_VOCABULARY = 32_000


@dataclass(frozen=True)
class Shortage:
    """A limit that a size breaks: the amount needed (None: more than was searched) and the amount available."""

    limit: Literal["devices", "hours", "dollars", "tokens"]
    needed: float | None
    available: float
    reason: str


@dataclass(frozen=True)
class SizePlan:
    """The plan of one size.

    `given` is the config of the file `path`, `config` the same with layout and tokens filled in. `layout` and
    `cost` are None if no layout fits the memory. `memory` and `needed_bytes` are those of the fullest device, in
    that layout or else in the one that needs the least memory. `loss` is None if the vocabulary is too small for
    the laws.
    """

    path: Path
    given: RunConfig
    config: RunConfig
    layout: Layout | None
    memory: MemoryEstimate
    needed_bytes: float
    cost: RunCost | None
    loss: ExpectedLoss | None
    shortages: tuple[Shortage, ...]

    @property
    def name(self) -> str:
        """The name of the size: the file's name without the common prefix."""
        return self.path.stem.removeprefix(PREFIX)

    @property
    def memory_parts(self) -> dict[str, float]:
        """Bytes by part on the fullest device at its peak; they add up to `needed_bytes`."""
        return {**self.memory.parts(), "allocator_and_driver": self.needed_bytes - self.memory.total}

    @property
    def fits(self) -> bool:
        """Whether the size breaks no limit."""
        return not self.shortages

    @property
    def reasons(self) -> tuple[str, ...]:
        """One reason for each limit that the size breaks."""
        return tuple(shortage.reason for shortage in self.shortages)

    @property
    def total_parameters(self) -> int:
        """Parameters of the main model."""
        return count_parameters(self.config.model).total

    @property
    def active_parameters(self) -> int:
        """Active parameters of the main model."""
        return count_active_parameters(self.config.model)

    @property
    def tokens(self) -> int:
        """The token budget of the run."""
        return budget_in_tokens(self.config)

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return planned_steps(self.config)

    @property
    def ratio(self) -> float:
        """Tokens per active parameter."""
        return self.tokens / self.active_parameters

    @property
    def compute(self) -> float:
        """Operations: 6 × active parameters × tokens."""
        return training_compute(self.config.model, self.tokens)


def plan_size(path: Path, config: RunConfig, request: PlanRequest) -> SizePlan:
    """Plans one size: its fastest layout within the limits, and as many tokens as they allow."""
    layout = best_layout(config, request)
    planned = with_tokens(layout.config if layout else config, affordable_tokens(config, request, layout))
    has_loss = config.model.vocab_size >= _MIN_VOCABULARY
    layout = replace(layout, config=planned) if layout else None
    least = layout or min_memory_layout(config, request.device, request.devices)
    cost = run_cost(layout, request) if layout else None
    return SizePlan(
        path=path,
        given=config,
        config=planned,
        layout=layout,
        memory=least.memory,
        needed_bytes=least.needed_bytes,
        cost=cost,
        loss=expected_loss(config.model, budget_in_tokens(planned)) if has_loss else None,
        shortages=_shortages(planned, cost, request) if cost else _too_large(config, least, request),
    )


def _shortages(config: RunConfig, cost: RunCost, request: PlanRequest) -> tuple[Shortage, ...]:
    """The limits that a size breaks, if a layout of it fits the memory."""
    found = []
    hours, budget = request.budget_hours, request.budget_dollars
    if hours is None and cost.hours > _HOURS_OF_A_YEAR:
        reason = f"takes {three_figures(cost.hours)} hours, more than a year; --budget-hours allows more"
        found.append(Shortage("hours", cost.hours, _HOURS_OF_A_YEAR, reason))
    elif hours is not None and cost.hours > hours * ROUNDING:
        takes, limit = format_distinct(cost.hours, hours, three_figures)
        found.append(Shortage("hours", cost.hours, hours, f"takes {takes} hours, the budget is {limit}"))
    if budget is not None and cost.dollars > budget * ROUNDING:
        costs, limit = format_distinct(cost.dollars, budget, dollars)
        found.append(Shortage("dollars", cost.dollars, budget, f"costs {costs}, the budget is {limit}"))
    return (*found, *_too_few_tokens(config, request))


def _too_few_tokens(config: RunConfig, request: PlanRequest) -> tuple[Shortage, ...]:
    least = token_range(config)[0]
    if request.tokens is None or request.tokens >= least:
        return ()
    needed, available = format_distinct(least, request.tokens, format_count)
    return (Shortage("tokens", least, request.tokens, f"needs {needed} tokens, the corpus has {available}"),)


def _too_large(config: RunConfig, smallest: Layout, request: PlanRequest) -> tuple[Shortage, ...]:
    """The limits that a size breaks, if all its layouts exceed the memory."""
    device, devices = request.device, request.devices
    enough = fewest_devices(config, device, above=devices)
    instead = f"fits from {enough:,} on" if enough else f"does not fit on {max(MAX_DEVICES, devices):,} either"
    reason = (
        f"needs {gibibytes(smallest.needed_bytes)} GiB on each of {smallest.devices:,} × {device.name}, which has "
        f"{gibibytes(device.memory_bytes)}: the least of any layout; {instead}"
    )
    return (Shortage("devices", enough, devices, reason), *_too_few_tokens(config, request))
