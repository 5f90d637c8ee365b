"""One model size on given devices: the layout, the tokens, the time, the money, the loss, and what is missing."""

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

# Without a limit of hours, longer than anybody waits.
_HOURS_OF_A_YEAR = 24 * 365
# Losses per token compare only between vocabularies alike; those of the laws had at least so many entries.
_LEAST_VOCABULARY = 32_000


@dataclass(frozen=True)
class Shortage:
    """A limit that a size breaks: `needed` of it at least (None: more than we looked for), `available` there."""

    limit: Literal["devices", "hours", "dollars", "tokens"]
    needed: float | None
    available: float
    reason: str


@dataclass(frozen=True)
class SizePlan:
    """A size as it would be trained.

    `given` is the config of the file `path`, `config` the same with layout and tokens filled in; `layout` and
    `cost` are None where no layout fits the memory. `memory`, `needed_bytes`: on the fullest device, of that layout
    or else of the leanest. `loss` is None where the laws say nothing: with a vocabulary only for trying out.
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
        """The size: the file's name without what all have in common."""
        return self.path.stem.removeprefix(PREFIX)

    @property
    def memory_parts(self) -> dict[str, float]:
        """Bytes by part on the fullest device, at its worst moment; together `needed_bytes`."""
        return {**self.memory.parts(), "allocator_and_driver": self.needed_bytes - self.memory.total}

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return not self.shortages

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not fit."""
        return tuple(shortage.reason for shortage in self.shortages)

    @property
    def total_parameters(self) -> int:
        """Of the main model."""
        return count_parameters(self.config.model).total

    @property
    def active_parameters(self) -> int:
        """That one token meets."""
        return count_active_parameters(self.config.model)

    @property
    def tokens(self) -> int:
        """The token budget of the run."""
        return budget_in_tokens(self.config)

    @property
    def steps(self) -> int:
        """Optimizer steps that spend it."""
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
    """Plans one size: the layout that is soonest done within the limits, and as many tokens as they allow."""
    layout = best_layout(config, request)
    planned = with_tokens(layout.config if layout else config, affordable_tokens(config, request, layout))
    has_loss = config.model.vocab_size >= _LEAST_VOCABULARY
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
    """What a size that fits the memory lacks."""
    found = []
    hours, budget = request.budget_hours, request.budget_dollars
    if hours is None and cost.hours > _HOURS_OF_A_YEAR:
        reason = (
            f"takes {three_figures(cost.hours)} hours, more than a year; --budget-hours allows as many as it names"
        )
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
    return (Shortage("tokens", least, request.tokens, f"needs {needed} tokens, {available} are there"),)


def _too_large(config: RunConfig, leanest: Layout, request: PlanRequest) -> tuple[Shortage, ...]:
    """What a size lacks that does not fit the memory."""
    device, devices = request.device, request.devices
    enough = fewest_devices(config, device, above=devices)
    instead = f"fits from {enough:,} on" if enough else f"does not fit on {max(MAX_DEVICES, devices):,} either"
    reason = (
        f"needs {gibibytes(leanest.needed_bytes)} GiB on each of {leanest.devices:,} × {device.name}, which has "
        f"{gibibytes(device.memory_bytes)}: the least of any layout; {instead}"
    )
    return (Shortage("devices", enough, devices, reason), *_too_few_tokens(config, request))
