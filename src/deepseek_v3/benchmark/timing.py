"""How long an operation takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

_WARM_UPS, _CALLS = 5, 30
_CPU_CALLS = 3
_CYCLES = 2e9  # of a GPU in a second, about
_QUEUE_SECONDS = (
    0.02,
    0.2,
)  # the least and the most in which the host queues all calls, so that no call waits for it


def median_seconds(
    run: Callable[[int], object], device: torch.device, before: Callable[[], object] = lambda: None
) -> float:
    """The median time of `run(call)` over many calls, after others that compile and tune.

    `call` counts from 0; an operation that fits a cache uses it to read another copy of its inputs in each call, or
    `before`, which is called before each timed call and not timed, replaces what the cache holds. On a GPU the time
    is that between two events of the stream, without the time in which the host launches.
    """
    if device.type != "cuda":
        run(0)
        return median(_cpu_seconds(run, call, before) for call in range(1, 1 + _CPU_CALLS))
    for call in range(_WARM_UPS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run(call)
        launch = time.perf_counter() - begin  # of the last call, after those that compile
    torch.cuda.synchronize(device)
    least, most = _QUEUE_SECONDS
    torch.cuda._sleep(int(_CYCLES * min(max(least, 2 * _CALLS * launch), most)))
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(_CALLS)] for _ in range(2))
    for call, (start, end) in enumerate(zip(starts, ends, strict=True), start=_WARM_UPS):
        before()
        start.record()
        run(call)
        end.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) / 1e3


def _cpu_seconds(run: Callable[[int], object], call: int, before: Callable[[], object]) -> float:
    before()
    start = time.perf_counter()
    run(call)
    return time.perf_counter() - start
