"""How a run is laid out, and on how many tokens, so that it keeps to the limits of a request; and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.chinchilla import MAX_RATIO, TARGET_RATIO, Verdict, check_compliance
from deepseek_v3.planning.counts import count_active_parameters
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.planning.layout_search import Layout, fastest_layout
from deepseek_v3.planning.token_budget import budget_in_tokens, planned_tokens

# By what factor fewer devices can at most have less work in all than the part of a step that is work says: their
# experts are loaded more evenly.
_MOST_SAVED = 1.25
# A budget is met up to the rounding of floating-point numbers.
ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class RunCost:
    """What a whole run takes; `mfu` is the model's operations per second over the devices' peak."""

    hours: float
    device_hours: float
    dollars: float
    mfu: float


def run_cost(layout: Layout, request: PlanRequest) -> RunCost:
    """What a whole run takes; steps whose batch still grows count by their share of a full one."""
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
    """The layout that is soonest done among those within the limits; where none is, the one nearest to them.

    Fewer devices than there are can be sooner, where they wait for each other, or cheaper, so fewer are tried
    where most of a step is no work, and where somewhat better use of them can bring the run within its budget.
    """
    best: Layout | None = None
    devices = request.devices
    while devices:
        layout = fastest_layout(config, request.device, devices)
        if layout is None or (best and _rank(layout, request) > _rank(best, request)):
            break
        best = layout
        work = _work_share(layout)
        if work > 0.5 and not 1 < _overrun(layout, request) < _MOST_SAVED / work:
            break
        devices = _fewer(config, layout.devices)
    return best


def _rank(layout: Layout, request: PlanRequest) -> tuple[float, float]:
    """How far over its limits a plan is, then how long a step takes, to six digits: equal ones shall be equal."""
    return max(1.0, _overrun(layout, request)), float(f"{layout.step.total:.6g}")


def _overrun(layout: Layout, request: PlanRequest) -> float:
    """Time that the least tokens take, over the time that the limits allow."""
    least = replace(layout, config=with_tokens(layout.config, token_range(layout.config)[0]))
    return 3600 * run_cost(least, request).hours / (request.seconds(layout.devices) * ROUNDING)


def _work_share(layout: Layout) -> float:
    """The share of a step that is work of which fewer devices would each have more."""
    step = layout.step
    return (step.matrices + step.experts + step.attention + step.elementwise) / step.total


def _fewer(config: RunConfig, devices: int) -> int:
    """The next smaller number to try: half, or more where the batch divides over more."""
    divisors = (n for n in range(devices - 1, 0, -1) if config.training.global_batch_size % n == 0)
    return max(devices // 2, next(divisors, 0))


def token_range(config: RunConfig) -> tuple[int, int, int]:
    """Fewest tokens, those that the file asks for, and most: 20 to 26 per active parameter, or as is meant."""
    verdict, own = check_compliance("", config).verdict, budget_in_tokens(config)
    if verdict is Verdict.DELIBERATELY_OVERTRAINED:
        return own, own, own
    active = count_active_parameters(config.model)
    least = TARGET_RATIO * active
    return least, own if verdict is Verdict.COMPLIES else least, MAX_RATIO * active


def affordable_tokens(config: RunConfig, request: PlanRequest, layout: Layout | None) -> int:
    """The file's own number without limits, else as many as they allow; the fewest if the soonest is wanted."""
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
    """The same run on so many tokens, and the very same where these are its own."""
    if tokens == budget_in_tokens(config):
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"total_tokens": tokens})})
