"""The command that starts a planned run."""

from __future__ import annotations

import shlex
from pathlib import Path

from deepseek_v3.config.shipped import shown_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.size_plans import SizePlan

ESTIMATE_ONLY = "what several devices take has been computed, not measured; the plan is an estimate"

_LAUNCHER = Path("src/training/train.py")
_CHECKOUT = Path(__file__).parents[4]


def launch_command(plan: SizePlan, devices_per_node: int) -> str:
    """The words to type, with an override for each field in which the plan differs from the size's file."""
    devices = plan.config.parallel.world_size
    launcher = next((path for path in (_LAUNCHER, _CHECKOUT / _LAUNCHER) if path.is_file()), None)
    words = ["python"] if devices == 1 else ["torchrun", *_processes(devices, devices_per_node)]
    words += [str(launcher)] if launcher else ["-m", "deepseek_v3", "train"]
    words += ["--config", shown_config(plan.path)]
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
