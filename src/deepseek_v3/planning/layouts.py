"""How a run can be laid out over devices, and which layout is the fastest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from deepseek_v3.config.train_config import ParallelConfig, RunConfig
from deepseek_v3.planning.execution import execution_on
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.memory import MemoryEstimate, estimate_memory, needed_bytes
from deepseek_v3.planning.timing import StepTime, estimate_step

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_DEGREES = (1, 2, 4, 8, 16, 32, 64)
_RECOMPUTATION = ("none", "full")


@dataclass(frozen=True)
class Layout:
    """A run with its `parallel` section filled in, and what it costs: memory of the fullest rank, time of a step.

    `needed_bytes` is what each device must have free.
    """

    config: RunConfig
    memory: MemoryEstimate
    needed_bytes: float
    step: StepTime

    @property
    def devices(self) -> int:
        """How many it runs on."""
        return self.config.parallel.world_size


def measure_layout(config: RunConfig, device: Device) -> Layout:
    """Memory and time of a run as its `parallel` section lays it out."""
    run = execution_on(device, config)
    memory = estimate_memory(config, run)
    return Layout(config, memory, needed_bytes(memory, device), estimate_step(config, run, device))


def fastest_layout(config: RunConfig, device: Device, devices: int) -> Layout | None:
    """The layout over so many devices with the shortest step among those that fit; None where none does.

    Where the batch does not divide over all of them, the most devices over which it does.
    """
    layouts = _on_most_devices(config, device, devices)
    fitting = [layout for layout in layouts if layout.needed_bytes <= device.memory_bytes]
    return min(fitting, key=lambda layout: layout.step.total, default=None)


def leanest_layout(config: RunConfig, device: Device, devices: int) -> Layout:
    """The layout over so many devices that needs the least memory."""
    return min(_on_most_devices(config, device, devices), key=lambda layout: layout.needed_bytes)


def _on_most_devices(config: RunConfig, device: Device, devices: int) -> list[Layout]:
    for used in range(devices, 0, -1):
        layouts = [measure_layout(candidate, device) for candidate in _candidates(config, device, used)]
        if layouts:
            return layouts
    raise AssertionError("one device takes any batch")


def _candidates(config: RunConfig, device: Device, devices: int) -> Iterator[RunConfig]:
    """Every layout on exactly so many devices that the model and the batch divide into."""
    model, batch = config.model, config.training.global_batch_size
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    for pipeline in _DEGREES:
        if devices % pipeline or pipeline > layers:
            continue
        ranks = devices // pipeline
        for shard, expert, micro, recomputation in product(
            _shards(ranks, device), _DEGREES, _MICRO_BATCHES, _RECOMPUTATION
        ):
            if batch % (micro * ranks) or ranks % expert or model.n_routed_experts % expert:
                continue
            yield _with_parallel(config, ranks // shard, shard, expert, pipeline, micro, recomputation)


def _shards(ranks: int, device: Device) -> list[int]:
    """Whole copies on every rank, one copy to each node, or one copy over all ranks."""
    node = device.devices_per_node
    return sorted({1, ranks, node if ranks % node == 0 else 1})


def _with_parallel(
    config: RunConfig, replicate: int, shard: int, expert: int, pipeline: int, micro: int, recomputation: str
) -> RunConfig:
    changes = {
        "data_replicate": replicate,
        "data_shard": shard,
        "expert": expert,
        "pipeline": pipeline,
        "micro_batch_size": micro,
        "recomputation": recomputation,
    }
    parallel: ParallelConfig = config.parallel.model_copy(update=changes)
    return config.model_copy(update={"parallel": parallel})
