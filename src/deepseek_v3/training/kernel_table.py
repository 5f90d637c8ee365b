"""Sums what a trace of torch.profiler recorded: by kernel, by kind of work, and the time in which a GPU was idle.

On a GPU the unit is the kernel, copies included. On a CPU it is the operator, whose time does not include that of
the operators that it calls.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from torch.autograd import DeviceType  # type: ignore[attr-defined]  # public, but not said to be so
from torch.autograd.profiler_util import FunctionEvent

from deepseek_v3.utils.text import table, truncate

# Kinds of work by what a name in lower case contains; the first that matches.
_KINDS = {
    "communication": "nccl|gloo|c10d|nvshmem|deep_?ep|record_param_comms",
    "optimizer": "adam|multi_tensor|_squares_kernel|^optimizer",
    "attention": "cudnn|sdpa|fmha|flash|^aten::.*scaled_dot_product",
    # What the compiler names after several operations is none of ours.
    "FP8 products": r"^(?!triton_).*fp8\w*product",
    "quantization": "^(?!triton_).*(fp8|quantize)",
    "experts": "group",
    "matrix products": (
        "nvjet|gemm|cutlass|xmma|cublas|^aten::_?(mm|bmm|addmm|baddbmm|scaled_mm|mv|addmv|dot|linear|matmul)_?$"
    ),
    # Elementwise operations and reductions are here because reading and writing their tensors takes their time.
    "memory movement": (
        "memcpy|memset|copy|elementwise|reduce|softmax|index|gather|scatter|norm|^triton_|_kernel$"
        "|^aten::(to|cat|clone|contiguous|stack|fill|zero|zeros|ones|where|sum|mean|add|sub|rsub|mul|div"
        "|neg|exp|log|pow|sqrt|rsqrt|sigmoid|silu|silu_backward|sigmoid_backward|lerp|addcmul|addcdiv)_?$"
    ),
}
OTHER = "other"
_ROWS, _LONGEST_NAME = 30, 60


@dataclass(frozen=True)
class Work:
    """All calls of one kernel or operator, or of one kind of them. `microseconds` is the sum over the calls."""

    name: str
    kind: str
    calls: int
    microseconds: float


@cache
def kind_of(name: str) -> str:
    """The kind of work of a kernel or operator, by its name: a key of `_KINDS`, or `OTHER`."""
    return next((kind for kind, names in _KINDS.items() if re.search(names, name.lower())), OTHER)


def kernels_in(events: Iterable[FunctionEvent]) -> list[FunctionEvent]:
    """The kernels and copies that ran on a GPU, without the annotations that the trace repeats there."""
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def sum_kernels(kernels: Iterable[FunctionEvent]) -> list[Work]:
    """Kernels by name, the longest first."""
    return _sums((kernel.name, kind_of(kernel.name), kernel.time_range.elapsed_us()) for kernel in kernels)


def sum_operators(events: Iterable[FunctionEvent]) -> list[Work]:
    """Operators of the CPU by name, the longest first. All that an optimizer's step calls is of its kind."""
    return _sums(
        (event.name, _kind_of_operator(event), event.self_cpu_time_total)
        for event in events
        if event.device_type == DeviceType.CPU and not event.is_user_annotation
    )


def sum_kinds(works: Iterable[Work]) -> list[Work]:
    """The sums of all works of each kind, the longest first."""
    sums: dict[str, Work] = {}
    for work in works:
        earlier = sums.get(work.kind, Work(work.kind, work.kind, 0, 0.0))
        calls, microseconds = earlier.calls + work.calls, earlier.microseconds + work.microseconds
        sums[work.kind] = Work(work.kind, work.kind, calls, microseconds)
    return sorted(sums.values(), key=lambda work: -work.microseconds)


def _sums(calls: Iterable[tuple[str, str, float]]) -> list[Work]:
    sums: dict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, kind, microseconds in calls:
        number, total = sums[name, kind]
        sums[name, kind] = number + 1, total + microseconds
    works = [Work(*key, *values) for key, values in sums.items()]
    return sorted(works, key=lambda work: -work.microseconds)


def _kind_of_operator(event: FunctionEvent) -> str:
    parent = event.cpu_parent
    while parent is not None:
        if parent.is_user_annotation and kind_of(parent.name) == "optimizer":
            return "optimizer"
        parent = parent.cpu_parent
    return kind_of(event.name)


def busy_microseconds(kernels: Iterable[FunctionEvent]) -> float:
    """The time in which at least one of these kernels ran, which may overlap."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted((kernel.time_range.start, kernel.time_range.end) for kernel in kernels):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def work_tables(works: Sequence[Work], microseconds: float, noun: str) -> list[str]:
    """The lines of two tables, of the kinds of work and of the longest works, as shares of `microseconds`."""
    columns = ["total ms", "share", "calls", "mean us"]
    kinds = [[work.kind, *_figures(work, microseconds)] for work in sum_kinds(works)]
    longest = [
        [work.kind, *_figures(work, microseconds), truncate(work.name, _LONGEST_NAME)] for work in works[:_ROWS]
    ]
    return [
        *table(["kind", *columns], kinds),
        "",
        *(line.rstrip() for line in table(["kind", *columns, noun], longest, left=[noun])),
    ]


def _figures(work: Work, microseconds: float) -> list[str]:
    return [
        f"{work.microseconds / 1e3:,.2f}",
        f"{work.microseconds / microseconds:.1%}",
        f"{work.calls:,}",
        f"{work.microseconds / work.calls:,.1f}",
    ]
