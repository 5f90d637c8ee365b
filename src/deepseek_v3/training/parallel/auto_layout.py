"""Resolves the layout of a run for the processes that were started: as configured, or chosen by the planner."""

from __future__ import annotations

from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.layout_search import fastest_layout, min_memory_layout
from deepseek_v3.utils.errors import ConfigError, PlanError
from deepseek_v3.utils.logging import get_logger

_GIB = 2**30
_CHOSEN = ("data_replicate", "data_shard", "expert", "pipeline", "micro_batch_size", "recomputation")


def resolve_layout(config: RunConfig, processes: int, device: Device) -> RunConfig:
    """The config with a layout for `processes` processes, each with one `device`.

    Raises ConfigError if the configured degrees need another number of processes, and PlanError if `auto`
    finds no layout for exactly this number that fits the memory of the device.
    """
    if config.parallel.layout == "auto":
        return _chosen(config, processes, device)
    if config.parallel.world_size != processes:
        raise ConfigError(_mismatch(config.parallel, processes))
    return config


def _chosen(config: RunConfig, processes: int, device: Device) -> RunConfig:
    layout = fastest_layout(config, device, processes)
    if layout is None:
        least = min_memory_layout(config, device, processes).needed_bytes / _GIB
        raise PlanError(
            f"parallel.layout = auto: no layout over {processes} × {device.name} fits: the leanest needs "
            f"{least:.1f} GiB on each, of {device.memory_gib:.1f}; start more processes, or take a smaller model"
        )
    if layout.devices != processes:
        raise PlanError(
            f"parallel.layout = auto: the batch of {config.training.global_batch_size} does not divide over "
            f"{processes} processes; start {layout.devices}, or change training.global_batch_size"
        )
    chosen = layout.config.parallel.model_copy(update={"layout": "given"})
    parts = sorted(layout.step.parts().items(), key=lambda part: -part[1])[:3]
    get_logger("Plan").info(
        f"layout for {processes} × {device.name}: {_degrees_text(chosen)}; of all that fit it has the shortest "
        f"step, {layout.step.total:.2f} s ({', '.join(f'{name} {seconds:.2f}' for name, seconds in parts)}), "
        f"and needs {layout.needed_bytes / _GIB:.1f} GiB"
    )
    return config.model_copy(update={"parallel": chosen})


def _degrees_text(parallel: ParallelConfig) -> str:
    return ", ".join(f"{name} {getattr(parallel, name)}" for name in _CHOSEN)


def _mismatch(parallel: ParallelConfig, processes: int) -> str:
    """An error message: the product of the degrees, and the nearest change that fits the processes."""
    others = parallel.data_replicate * parallel.pipeline
    shard = processes // others if processes % others == 0 else None
    if shard and max(shard, parallel.expert) % min(shard, parallel.expert) == 0:
        advice = f"--set parallel.data_shard={shard} fits, or let the planner choose: --set parallel.layout=auto"
    else:
        advice = "let the planner choose: --set parallel.layout=auto"
    return (
        f"parallel: data_replicate {parallel.data_replicate} × data_shard {parallel.data_shard} × pipeline "
        f"{parallel.pipeline} = {parallel.world_size} ranks, and {processes} "
        f"{'process was' if processes == 1 else 'processes were'} started; {advice}"
    )
