"""Checks that a run fits the memory of its device, and suggests the smallest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from deepseek_v3.config.train_config import RunConfig, batch_size_divisor
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.layout_search import estimate_layout, fastest_layout, fewest_devices, min_memory_layout
from deepseek_v3.utils.errors import PlanError
from deepseek_v3.utils.numbers import divisors
from deepseek_v3.utils.text import humanize

_GIB = 2**30


def require_memory(config: RunConfig, device: Device) -> None:
    """Raises PlanError, with the parts and a suggestion, if one rank needs more than the device's memory."""
    layout = estimate_layout(config, device)
    if layout.needed_bytes <= device.memory_bytes:
        return
    parts = ", ".join(
        f"{humanize(name)} {size / _GIB:.1f}" for name, size in layout.memory.parts().items() if size >= 0.05 * _GIB
    )
    raise PlanError(
        f"this run needs {layout.needed_bytes / _GIB:.1f} GiB on {device.name}, which has {device.memory_gib:.1f} "
        f"GiB free: {parts}, and the overhead of allocator and driver. {suggest_fix(config, device)}"
    )


def suggest_fix(config: RunConfig, device: Device) -> str:
    """Suggests the fewest overrides that make the run fit, or else the number of devices that it needs.

    Of equally many overrides, it suggests those with the shortest step.
    """
    fitting = [
        (changes, layout)
        for changes, changed in _smaller(config)
        if (layout := estimate_layout(changed, device)).needed_bytes <= device.memory_bytes
    ]
    if fitting:
        changes, layout = min(fitting, key=lambda found: (len(found[0]), found[1].step.total))
        settings = " ".join(f"--set {field}={value}" for field, value in changes.items())
        return f"It fits with {settings} ({layout.needed_bytes / _GIB:.1f} GiB)"
    least = min_memory_layout(config, device, devices=1).needed_bytes / _GIB
    enough = None if device.is_cpu else fewest_devices(config, device)
    several = fastest_layout(config, device, enough) if enough else None
    if several is None:
        return f"One device needs at least {least:.1f} GiB; take a smaller model"
    return (
        f"One device needs at least {least:.1f} GiB; it takes {several.devices} of this kind "
        f"({several.needed_bytes / _GIB:.1f} GiB on each), or a smaller model"
    )


def _smaller(config: RunConfig) -> Iterator[tuple[dict[str, object], RunConfig]]:
    """Configs of the same run that need less memory, each with its changed fields; the steps stay the same."""
    parallel, optimizer = config.parallel, config.training.optimizer
    of_each_rank = batch_size_divisor(config.training) // parallel.data_ranks
    micro_batches = [size for size in divisors(of_each_rank) if size <= parallel.micro_batch_size]
    for micro, recomputation, moments in product(
        micro_batches, {parallel.recomputation, "selective", "full"}, {optimizer.moments, "bfloat16"}
    ):
        wanted: dict[str, tuple[object, object]] = {
            "parallel.micro_batch_size": (micro, parallel.micro_batch_size),
            "parallel.recomputation": (recomputation, parallel.recomputation),
            "training.optimizer.moments": (moments, optimizer.moments),
        }
        changes = {field: new for field, (new, old) in wanted.items() if new != old}
        changed = config.model_copy(
            update={
                "parallel": parallel.model_copy(update={"micro_batch_size": micro, "recomputation": recomputation}),
                "training": config.training.model_copy(
                    update={"optimizer": optimizer.model_copy(update={"moments": moments})}
                ),
            }
        )
        yield changes, changed
