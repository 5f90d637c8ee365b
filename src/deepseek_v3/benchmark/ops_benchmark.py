"""Measures operations: each is compared with its reference first, and only then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch

from deepseek_v3.benchmark.ceilings import Ceilings, measure_ceilings
from deepseek_v3.benchmark.environment import environment
from deepseek_v3.benchmark.ops_cases.case import Case, relative_error
from deepseek_v3.benchmark.ops_cases.others import (
    loss_cases,
    optimizer_cases,
    permute_cases,
    router_cases,
    swiglu_cases,
    top_k_cases,
)
from deepseek_v3.benchmark.ops_cases.products import fp8_cases, grouped_cases
from deepseek_v3.benchmark.ops_cases.quantizers import quantizer_cases
from deepseek_v3.benchmark.timing import median_seconds
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import table, truncate

# The operations by name, and their cases on a device.
OPERATIONS: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "grouped_gemm": grouped_cases,
    "fp8_gemm": fp8_cases,
    "fp8_quantize": quantizer_cases,
    "router_gemm": router_cases,
    "top_k": top_k_cases,
    "moe_permute": permute_cases,
    "swiglu": swiglu_cases,
    "cross_entropy": loss_cases,
    "optimizer": optimizer_cases,
}
PEERS = ("DeepGEMM", "F.scaled_mm", "bf16")  # systems of the cases that are not ours

_LONGEST_REASON = 300
_log = get_logger("Bench")


@dataclass(frozen=True)
class Measurement:
    """One system on one case: seconds, or why there are none. `error` is None if it could not run at all."""

    operation: str
    function: str
    size: str
    system: str
    error: float | None
    bound: float
    seconds: float | None
    floor_seconds: float
    tflops: float | None
    failed: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is a back end of this project."""
        return self.system not in PEERS


@dataclass(frozen=True)
class OpsBenchmark:
    """All measurements of a run; `made_with` is the environment at its start."""

    device: torch.device
    ceilings: Ceilings
    made_with: dict[str, object]
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What is wrong with our own back ends; a peer that fails is only listed."""
        return [
            f"{each.operation} {each.function} {each.size}, {each.system}: {each.failed}"
            for each in self.measurements
            if each.failed is not None and each.is_ours
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "command": "bench ops",
            **self.made_with,
            "ceilings": asdict(self.ceilings),
            "operations": [asdict(each) for each in self.measurements],
        }

    def explanations(self) -> list[str]:
        """What the reader of the table must know."""
        missing = {each.system: each.failed for each in self.measurements if each.failed and not each.is_ours}
        return [
            self.ceilings.describe(self.device),
            *(f"{system}: no figures: {reason}" for system, reason in missing.items()),
        ]

    def table(self) -> list[str]:
        """The lines of a table with a row per system and case."""
        header = ["operation", "size", "by", "error", "µs", "floor µs", "of the floor", "TFLOP/s"]
        rows = [
            [f"{each.operation} {each.function}", each.size, each.system, *_cells(each)]
            for each in self.measurements
        ]
        return [*table(header, rows, left=header[:3]), ""]


def _cells(each: Measurement) -> list[str]:
    error = "–" if each.error is None else f"{each.error:.1e}"
    if each.seconds is None:
        return [error, "–", f"{1e6 * each.floor_seconds:,.1f}", "–", "–"]
    return [
        error,
        f"{1e6 * each.seconds:,.1f}",
        f"{1e6 * each.floor_seconds:,.1f}",
        f"{each.floor_seconds / each.seconds:.0%}",
        "–" if each.tflops is None else f"{each.tflops:,.0f}",
    ]


def measure_operations(
    names: Sequence[str],
    device: torch.device,
    commit: str | None = None,
    keep: Callable[[OpsBenchmark], None] = lambda _: None,
) -> OpsBenchmark:
    """Checks and times every back end and peer of these operations that can run on the device.

    `keep` receives the result after each case, so that it outlives the rest.
    """
    _log.info("Measuring what this device can reach: a product of each type, a copy")
    result = OpsBenchmark(device, measure_ceilings(device), environment("torch", "triton", commit=commit))
    with torch.no_grad():
        for case in chain.from_iterable(OPERATIONS[name](device) for name in names):
            _log.info(f"{case.operation} {case.function}, {case.size}")
            result.measurements.extend(_measure(case, device, result.ceilings))
            keep(result)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return result


def _measure(case: Case, device: torch.device, ceilings: Ceilings) -> Iterator[Measurement]:
    work = case.work
    products = ceilings.product_seconds(work.operations, work.in_fp8) if work.operations else 0.0
    floor = max(products, ceilings.copy_seconds(work.num_bytes))
    torch.manual_seed(0)
    try:
        prepared = case.prepare(device)
        expected = prepared.comparable(prepared.expected())
    except Exception as problem:  # noqa: BLE001 -- the other cases can still be measured
        case_of = (case.operation, case.function, case.size, "reference")
        yield Measurement(*case_of, None, 0.0, None, floor, None, _reason(problem))
        return
    for system, run in prepared.systems.items():
        error, seconds, failed = None, None, None
        try:
            if isinstance(run, str):
                failed = run
            elif (error := relative_error(prepared.comparable(run(0)), expected)) <= prepared.bound:
                seconds = median_seconds(run, device)
            else:
                failed = f"its relative error is {error:.2e}, expected at most {prepared.bound:g}"
        except Exception as problem:  # noqa: BLE001 -- whatever a back end or a peer may raise
            failed = _reason(problem)
        tflops = work.operations / seconds / 1e12 if seconds and work.operations else None
        names = (case.operation, case.function, case.size, system)
        yield Measurement(*names, error, prepared.bound, seconds, floor, tflops, failed)


def _reason(problem: Exception) -> str:
    """An error in one line; its traceback is in the log, if that shows it."""
    _log.debug("The operation failed", exc_info=problem)
    return truncate(" ".join(f"{type(problem).__name__}: {problem}".split()), _LONGEST_REASON)
