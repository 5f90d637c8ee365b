"""Plans every model size on given devices within a budget, and recommends one with the command to start it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_v3.config.loading import short_config_name
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.advice.size_plan import SizePlan, plan_size
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.planning.scaling_laws import SOURCE
from deepseek_v3.utils.command_line import override_options

ESTIMATE_ONLY = "the time on several devices is computed, not measured; the plan is an estimate"

LOSS_SOURCE = f"{SOURCE.split(';')[0].removeprefix('loss: ')}; the bar spans these laws"

_LAUNCHER = Path("src/training/train.py")
_CHECKOUT = Path(__file__).parents[4]


@dataclass(frozen=True)
class Advice:
    """The plans of all sizes, smallest first; the recommended one, None if none fits; and the reason.

    `overrides` are those that the configs were read with, each `section.field=value`.
    """

    request: PlanRequest
    rows: tuple[SizePlan, ...]
    recommended: SizePlan | None
    reason: str
    overrides: tuple[str, ...] = ()


def advise(request: PlanRequest, configs: Mapping[Path, RunConfig], given: Sequence[str] = ()) -> Advice:
    """Plans every config on the request's devices and recommends one by its objective.

    `given`: the overrides that the configs were read with, which the command that starts a plan repeats.
    A size without an expected loss is meant for trials; it is recommended only if no other size fits.
    """
    plans = [plan_size(path, config, request) for path, config in configs.items()]
    rows = tuple(sorted(plans, key=lambda row: row.total_parameters))
    fitting = [row for row in rows if row.fits]
    serious = [row for row in fitting if row.loss]
    recommended = min(serious or fitting, key=lambda row: _rank(row, request), default=None)
    if recommended is None:
        reason = f"nothing fits{_nearest(rows)}"
    elif recommended.loss is None:
        reason = (
            f"only {recommended.name} fits, which is only for trials{_nearest([row for row in rows if row.loss])}"
        )
    else:
        reason = _reason(len(serious), request)
    return Advice(request, rows, recommended, reason, tuple(given))


def sources(advice: Advice) -> dict[str, str]:
    """The sources of the figures, and what they do not cover."""
    device = advice.request.device
    fit = calibration(device)
    scaled = "" if fit.fits(device) else f"; scaled to {device.name} by its published rates"
    found = {
        "loss": LOSS_SOURCE,
        "memory and time": f"fitted on {fit.fitted_on}{scaled}. Several devices: from two H200 of one host; "
        "networks between hosts have not been measured",
    }
    if not fit.has_measured_fp8 and any(row.layout and row.layout.execution.fp8 for row in advice.rows):
        found["FP8"] = "not measured; its products take the published rate with the factors of bfloat16"
    return found


def _rank(row: SizePlan, request: PlanRequest) -> tuple[float, int]:
    """Sort key of the recommendation: the smallest is the best; of equal ones the larger size."""
    hours = row.cost.hours if row.cost else math.inf
    values = {"fit": 0.0, "fastest": hours, "best-loss": row.loss.value if row.loss else math.inf}
    return values[request.objective], -row.total_parameters


def _reason(number: int, request: PlanRequest) -> str:
    best = {
        "fit": "the largest",
        "fastest": "the fastest to train",
        "best-loss": "the one with the lowest expected loss",
    }
    if number == 1:
        return "the only fitting size that is not just for trials"
    return f"{best[request.objective]} of the {number} sizes that fit and are not just for trials"


def _nearest(rows: Sequence[SizePlan]) -> str:
    """Names the size that needs the smallest change to fit: more budget or tokens, or else more devices."""
    nearest = min(rows, key=_distance, default=None)
    return f"; nearest is {nearest.name}: it {'; it '.join(nearest.reasons)}" if nearest else ""


def _distance(row: SizePlan) -> tuple[float, float]:
    """Sort key of the smallest change: the devices that a size needs, 0 if it has enough; then its worst excess."""
    devices = next((s.needed or math.inf for s in row.shortages if s.limit == "devices"), 0)
    others = (s.needed / s.available for s in row.shortages if s.limit != "devices" and s.needed is not None)
    return devices, max(others, default=1)


def launch_command(plan: SizePlan, devices_per_node: int, given: Sequence[str] = ()) -> str:
    """The shell command that starts a plan, with an override for each field that differs from the size's file.

    `given`: the overrides that its config was read with.
    """
    devices = plan.config.parallel.world_size
    launcher = next((path for path in (_LAUNCHER, _CHECKOUT / _LAUNCHER) if path.is_file()), None)
    words = ["python"] if devices == 1 else ["torchrun", *_processes(devices, devices_per_node)]
    words += [str(launcher)] if launcher else ["-m", "deepseek_v3", "train"]
    words += ["--config", short_config_name(plan.path)]
    planned = overrides(plan.given, plan.config)
    fields = {_field(override) for override in planned}
    kept = [override for override in given if _field(override) not in fields]
    words += override_options([*kept, *planned])
    return shlex.join(words)


def overrides(given: RunConfig, planned: RunConfig) -> list[str]:
    """`section.field=value` for each field of the plan that differs from the given config."""
    before, after = given.parallel.model_dump(), planned.parallel.model_dump()
    changed = [f"parallel.{name}={value}" for name, value in after.items() if value != before[name]]
    if planned.training.total_tokens != given.training.total_tokens:
        changed.append(f"training.total_tokens={planned.training.total_tokens}")
    return changed


def _field(override: str) -> str:
    return override.partition("=")[0].strip()


def _processes(devices: int, devices_per_node: int) -> list[str]:
    """torchrun's options: the most processes per node that divide the devices evenly."""
    on_node = next(number for number in range(min(devices, devices_per_node), 0, -1) if devices % number == 0)
    nodes = devices // on_node
    return [f"--nproc_per_node={on_node}", *([f"--nnodes={nodes}"] if nodes > 1 else [])]
