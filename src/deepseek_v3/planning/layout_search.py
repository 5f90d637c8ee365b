"""Searches the layouts (parallel degrees) of a run over some devices for the fastest one that fits their memory.

Results are cached, because the advisor asks for the same ones under every limit of a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from deepseek_v3.config.parallel_config import ParallelConfig, pipeline_problem
from deepseek_v3.config.train_config import RunConfig, batch_size_divisor, batch_sizes
from deepseek_v3.planning.counts import (
    count_float32_weights,
    owned_parameters,
    parameters_by_group,
    rank_parameters,
)
from deepseek_v3.planning.execution import Execution, resolve_execution
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.memory import MemoryEstimate, estimate_memory, needed_bytes
from deepseek_v3.planning.step_time import StepTime, estimate_step
from deepseek_v3.utils.numbers import divisors

MAX_DEVICES = 4096
_MAX_MICRO_BATCH = 32
_DEGREES = (1, 2, 4, 8, 16, 32, 64)
_RECOMPUTATION = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """A run with its `parallel` section filled in, the memory of its fullest rank, and the time of a step.

    `needed_bytes` is the memory that must be free on each device.
    """

    config: RunConfig
    execution: Execution
    memory: MemoryEstimate
    needed_bytes: float
    step: StepTime

    @property
    def devices(self) -> int:
        """Number of devices that the layout uses."""
        return self.config.parallel.world_size


def estimate_layout(config: RunConfig, device: Device) -> Layout:
    """Estimates memory and step time of a run under its own `parallel` section."""
    run = resolve_execution(device, config)
    memory = estimate_memory(config, run)
    return Layout(config, run, memory, needed_bytes(memory, device), estimate_step(config, run, device))


@lru_cache
def fastest_layout(config: RunConfig, device: Device, devices: int) -> Layout | None:
    """The layout over `devices` devices with the shortest step among those that fit; None if none fits.

    Of layouts whose step times agree to three digits, returns the one with the fewest weights per device. Uses
    fewer devices if the batch does not divide over all of them.
    """
    candidates = _candidates_with_room(config, device, devices)
    executed = [(candidate, resolve_execution(device, candidate)) for candidate in candidates]
    timed = [(estimate_step(candidate, run, device), candidate, run) for candidate, run in executed]
    for step, candidate, run in sorted(timed, key=_preference):
        memory = estimate_memory(candidate, run)
        needed = needed_bytes(memory, device)
        if needed <= device.memory_bytes:
            return Layout(candidate, run, memory, needed, step)
    return None


def _preference(timed: tuple[StepTime, RunConfig, Execution]) -> tuple[float, float, float]:
    step, config, _ = timed
    return float(f"{step.total:.3g}"), rank_parameters(config).owned, step.total


@lru_cache
def min_memory_layout(config: RunConfig, device: Device, devices: int) -> Layout:
    """The layout over `devices` devices that needs the least memory per device."""
    candidates = _candidates_on_most_devices(config, device, devices)
    return estimate_layout(min(candidates, key=lambda candidate: _needed(candidate, device)), device)


def fewest_devices(config: RunConfig, device: Device, above: int = 0) -> int | None:
    """The smallest number of devices, a power of two greater than `above`, on which some layout fits.

    None if none fits on up to `MAX_DEVICES` devices.
    """
    powers = (2**power for power in range(MAX_DEVICES.bit_length()))
    return next((number for number in powers if number > above and fits_on(config, device, number)), None)


@lru_cache
def fits_on(config: RunConfig, device: Device, devices: int) -> bool:
    """Whether any layout over `devices` devices fits their memory."""
    candidates = _candidates_with_room(config, device, devices)
    smallest_first = sorted(candidates, key=lambda candidate: candidate.parallel.micro_batch_size)
    return any(_needed(candidate, device) <= device.memory_bytes for candidate in smallest_first)


def _needed(config: RunConfig, device: Device) -> float:
    return needed_bytes(estimate_memory(config, resolve_execution(device, config)), device)


def _candidates_with_room(config: RunConfig, device: Device, devices: int) -> list[RunConfig]:
    """The layouts whose weights, gradients and moments fit: a quick test that removes most candidates."""
    routed, in_layers, outside = parameters_by_group(config.model)
    whole = count_float32_weights(config.model)
    width = 4 + 4 + config.training.optimizer.state_bytes

    def states(parallel: ParallelConfig) -> float:
        return width * owned_parameters(parallel, routed, whole, in_layers + outside - whole) / parallel.pipeline

    candidates = _candidates_on_most_devices(config, device, devices)
    return [candidate for candidate in candidates if states(candidate.parallel) <= device.memory_bytes]


def _candidates_on_most_devices(config: RunConfig, device: Device, devices: int) -> list[RunConfig]:
    """The layouts over the largest number of devices, at most `devices`, for which there is any layout."""
    # The number of ranks per pipeline stage divides the batch.
    numbers = {degree * ranks for degree in _DEGREES for ranks in divisors(batch_size_divisor(config.training))}
    for used in sorted((number for number in numbers if number <= devices), reverse=True):
        if runs := list(_candidates(config, device, used)):
            return runs
    raise AssertionError("every batch runs on one device")


def _candidates(config: RunConfig, device: Device, devices: int) -> Iterator[RunConfig]:
    """Every layout over exactly `devices` devices that the model and the batch allow."""
    model, batch, batches = config.model, batch_size_divisor(config.training), batch_sizes(config.training)
    for pipeline in _DEGREES:
        if devices % pipeline or pipeline > model.num_hidden_layers:
            continue
        ranks = devices // pipeline
        if batch % ranks:
            continue
        largest = min(batch // ranks, _MAX_MICRO_BATCH)
        micro_batches = [size for size in range(1, largest + 1) if batch // ranks % size == 0]
        for shard, expert, micro, recomputation in product(
            _shards(ranks, device), _DEGREES, micro_batches, _RECOMPUTATION
        ):
            if ranks % expert or model.n_routed_experts % expert:
                continue
            if max(shard, expert) % min(shard, expert):
                continue
            candidate = _with_parallel(config, ranks // shard, shard, expert, pipeline, micro, recomputation)
            if pipeline_problem(candidate.parallel, model, batches) is None:
                yield candidate


def _shards(ranks: int, device: Device) -> list[int]:
    """Sharding degrees: a replica per rank, per node, or over all ranks."""
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
