"""What given devices can train within a budget: every size planned, and one recommended.

FOLDED: The command that starts a planned run.
"""

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


@dataclass(frozen=True)
class Advice:
    """All sizes, smallest first, the recommended one if any fits, and why it is that one or none."""

    request: PlanRequest
    rows: tuple[SizePlan, ...]
    recommended: SizePlan | None
    reason: str


def advise(request: PlanRequest, configs: Mapping[Path, RunConfig]) -> Advice:
    """Plans every config on the request's devices and recommends by its objective.

    A size without an expected loss is for trying out and recommended only where no other fits.
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
            f"only {recommended.name} fits, which is for trying out{_nearest([row for row in rows if row.loss])}"
        )
    else:
        reason = _praise(len(serious), request)
    return Advice(request, rows, recommended, reason)


def sources() -> dict[str, str]:
    """Where the figures come from, and what they leave out."""
    return {
        "loss": f"{SOURCE.split(';')[0].removeprefix('loss: ')}; the bar spans these laws",
        "memory and time": f"fitted on {calibration().fitted_on}; other devices are scaled by their published "
        "rates. Several devices: from two H200 of one host; networks between hosts have not been measured",
    }


def _rank(row: SizePlan, request: PlanRequest) -> tuple[float, int]:
    """Smaller is better; among equals the larger size."""
    hours = row.cost.hours if row.cost else math.inf
    values = {"fit": 0.0, "fastest": hours, "best-loss": row.loss.value if row.loss else math.inf}
    return values[request.objective], -row.total_parameters


def _praise(number: int, request: PlanRequest) -> str:
    best = {"fit": "the largest", "fastest": "the soonest trained", "best-loss": "the lowest in expected loss"}
    if number == 1:
        return "the only size that fits and is not for trying out"
    return f"{best[request.objective]} of the {number} sizes that fit and are not for trying out"


def _nearest(rows: Sequence[SizePlan]) -> str:
    """What the least change would be that lets a size fit: more budget or tokens, or else more devices."""
    nearest = min(rows, key=_distance, default=None)
    return f"; nearest is {nearest.name}: it {'; it '.join(nearest.reasons)}" if nearest else ""


def _distance(row: SizePlan) -> tuple[float, float]:
    """Devices that it needs, and how often over the limit it is that it breaks most."""
    devices = next((s.needed or math.inf for s in row.shortages if s.limit == "devices"), 0)
    others = (s.needed / s.available for s in row.shortages if s.limit != "devices" and s.needed is not None)
    return devices, max(others, default=1)


ESTIMATE_ONLY = "what several devices take has been computed, not measured; the plan is an estimate"

_LAUNCHER = Path("src/training/train.py")
_CHECKOUT = Path(__file__).parents[4]


def launch_command(plan: SizePlan, devices_per_node: int) -> str:
    """The words to type, with an override for each field in which the plan differs from the size's file."""
    devices = plan.config.parallel.world_size
    launcher = next((path for path in (_LAUNCHER, _CHECKOUT / _LAUNCHER) if path.is_file()), None)
    words = ["python"] if devices == 1 else ["torchrun", *_processes(devices, devices_per_node)]
    words += [str(launcher)] if launcher else ["-m", "deepseek_v3", "train"]
    words += ["--config", short_config_name(plan.path)]
    words += [word for override in overrides(plan.given, plan.config) for word in ("--set", override)]
    return shlex.join(words)


def overrides(given: RunConfig, planned: RunConfig) -> list[str]:
    """`section.field=value` for each planned field that differs; `load_config` makes of them the planned config."""
    before, after = given.parallel.model_dump(), planned.parallel.model_dump()
    changed = [f"parallel.{name}={value}" for name, value in after.items() if value != before[name]]
    if planned.training.total_tokens != given.training.total_tokens:
        changed.append(f"training.total_tokens={planned.training.total_tokens}")
    return changed


def _processes(devices: int, devices_per_node: int) -> list[str]:
    """As many processes on each node as divide them evenly."""
    on_node = next(number for number in range(min(devices, devices_per_node), 0, -1) if devices % number == 0)
    nodes = devices // on_node
    return [f"--nproc_per_node={on_node}", *([f"--nnodes={nodes}"] if nodes > 1 else [])]
