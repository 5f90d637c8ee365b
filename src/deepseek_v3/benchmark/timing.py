"""How long an operation takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

_WARM_UPS, _CALLS = 5, 30
_CPU_CALLS = 3
_QUEUE_CYCLES = 40_000_000  # about 20 ms, in which the host queues all calls, so that no call waits for it


def median_seconds(run: Callable[[int], object], device: torch.device) -> float:
    """The median time of `run(call)` over many calls, after others that compile and tune.

    `call` counts from 0; an operation that fits a cache uses it to read another copy of its inputs in each call. On
    a GPU the time is that between two events of the stream, without the time in which the host launches.
    """
    if device.type != "cuda":
        run(0)
        return median(_cpu_seconds(run, call) for call in range(1, 1 + _CPU_CALLS))
    for call in range(_WARM_UPS):
        run(call)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_QUEUE_CYCLES)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_CALLS + 1)]
    marks[0].record()
    for call, mark in enumerate(marks[1:], start=_WARM_UPS):
        run(call)
        mark.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in pairwise(marks)) / 1e3


def _cpu_seconds(run: Callable[[int], object], call: int) -> float:
    start = time.perf_counter()
    run(call)
    return time.perf_counter() - start
