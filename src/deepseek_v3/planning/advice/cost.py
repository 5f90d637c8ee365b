"""Cost of a run, and the layout and number of tokens that keep it within the limits of a request."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.chinchilla import MAX_RATIO, TARGET_RATIO, Verdict, check_compliance
from deepseek_v3.planning.counts import count_active_parameters
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.planning.layout_search import Layout, fastest_layout
from deepseek_v3.planning.token_budget import budget_in_tokens, planned_tokens

# Largest factor by which fewer devices can reduce the total work, because their experts are loaded more evenly.
_MAX_SAVING = 1.25
# A cost may exceed a budget by the rounding error of floating-point numbers.
ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class RunCost:
    """Time and rent of a whole run; `mfu` is the model's operations per second over the devices' peak."""

    hours: float
    device_hours: float
    dollars: float
    mfu: float


def run_cost(layout: Layout, request: PlanRequest) -> RunCost:
    """Cost of a whole run; a step of the batch ramp costs its share of a step of the full batch."""
    config, device = layout.config, request.device
    batch = config.tokens_per_step
    hours = planned_tokens(config) / batch * layout.step.total / 3600
    operations = batch * training_flops_per_token(config.model, config.training.sequence_length)
    peak = layout.devices * device.peak(layout.execution.width)
    return RunCost(
        hours=hours,
        device_hours=hours * layout.devices,
        dollars=hours * layout.devices * device.dollars_per_hour,
        mfu=operations / (layout.step.total * peak),
    )


def best_layout(config: RunConfig, request: PlanRequest) -> Layout | None:
    """The fastest layout within the limits; if there is none, the one that exceeds them least.

    Fewer devices cost less, and can be faster if devices wait for each other. So fewer are tried if less than half
    of a step is work, or if slightly better utilisation can bring the run within its budget.
    """
    best: Layout | None = None
    devices = request.devices
    while devices:
        layout = fastest_layout(config, request.device, devices)
        if layout is None or (best and _rank(layout, request) > _rank(best, request)):
            break
        best = layout
        work = _work_share(layout)
        if work > 0.5 and not 1 < _overrun(layout, request) < _MAX_SAVING / work:
            break
        devices = _fewer(config, layout.devices)
    return best


def _rank(layout: Layout, request: PlanRequest) -> tuple[float, float]:
    """Sort key: the factor by which a plan exceeds its limits, then its step time, rounded to keep ties."""
    return max(1.0, _overrun(layout, request)), float(f"{layout.step.total:.6g}")


def _overrun(layout: Layout, request: PlanRequest) -> float:
    """Time to train on the fewest tokens, over the time that the limits allow."""
    least = replace(layout, config=with_tokens(layout.config, token_range(layout.config)[0]))
    return 3600 * run_cost(least, request).hours / (request.seconds(layout.devices) * ROUNDING)


def _work_share(layout: Layout) -> float:
    """The share of a step in work that is divided over the devices."""
    step = layout.step
    return (step.matrices + step.experts + step.attention + step.elementwise) / step.total


def _fewer(config: RunConfig, devices: int) -> int:
    """The next smaller number of devices to try: half, or a larger one that divides the batch."""
    divisors = (n for n in range(devices - 1, 0, -1) if config.training.global_batch_size % n == 0)
    return max(devices // 2, next(divisors, 0))


def token_range(config: RunConfig) -> tuple[int, int, int]:
    """Minimum, default and maximum tokens: 20 to 26 per active parameter, or only the file's deliberate budget."""
    verdict, own = check_compliance("", config).verdict, budget_in_tokens(config)
    if verdict is Verdict.DELIBERATELY_OVERTRAINED:
        return own, own, own
    active = count_active_parameters(config.model)
    least = TARGET_RATIO * active
    return least, own if verdict is Verdict.COMPLIES else least, MAX_RATIO * active


def affordable_tokens(config: RunConfig, request: PlanRequest, layout: Layout | None) -> int:
    """The tokens to plan with: the file's number without limits, else as many as the limits allow.

    The objective `fastest` takes the minimum.
    """
    least, own, most = token_range(config)
    if request.objective == "fastest":
        return least
    if layout is None or not request.limited:
        return own
    batch, ramp = config.tokens_per_step, config.training.batch_ramp
    steps = int(min(request.seconds(layout.devices) * ROUNDING / layout.step.total, most / batch + 2))
    affordable = (steps - 1 if ramp else steps) * batch  # with a ramp a run overshoots by up to a step
    there = most if request.tokens is None else request.tokens
    return max(least, min(most, affordable, there))


def with_tokens(config: RunConfig, tokens: int) -> RunConfig:
    """The same run with a budget of `tokens`; the config itself if that is its budget already."""
    if tokens == budget_in_tokens(config):
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"total_tokens": tokens})})
