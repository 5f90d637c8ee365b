"""Measures decoding over a latent cache: each system is compared with float64 first, and only then timed.

A system is a back end of this project or a peer. Its inputs are its own, because the caches of peers differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from deepseek_v3.benchmark.ceilings import Ceilings, measure_ceilings
from deepseek_v3.benchmark.decode_cases import (
    CPU_SHAPES,
    LAYOUTS,
    RANK,
    ROPE,
    SCALE,
    SHAPES,
    Bind,
    DecodeError,
    DecodeInputs,
    DecodeShape,
    Outputs,
    Tolerance,
    checked_outputs,
    make_inputs,
)
from deepseek_v3.benchmark.environment import environment
from deepseek_v3.benchmark.ops_cases.case import Work, backends, rotated
from deepseek_v3.benchmark.timing import median_seconds
from deepseek_v3.ops.mla_decode import MLA_DECODE, MlaDecode
from deepseek_v3.ops.operation import Target
from deepseek_v3.utils.errors import UserError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import table, truncate

CACHES = tuple(LAYOUTS)  # bf16, fp8

# A back end may round the dequantized rows of an FP8 cache to bfloat16, besides weights and outputs. In an
# emulation of 1,024 tokens the largest error of an output then came within 9% of what a bfloat16 cache allows.
_TOLERANCES = {"bf16": Tolerance(), "fp8": Tolerance(output=(1.6e-3, 2.01 / 128))}

_LONGEST_REASON = 300
_log = get_logger("Bench")


@dataclass(frozen=True)
class DecodePeer:
    """Another system. `bind` by cache makes the call to time from inputs, or raises the reason why it cannot.

    `notes` by cache say what the reader of its figures must know. With the FP8 cache a peer has one scale for all,
    so queries and cache are 8-bit numbers, which `fp8_tolerance` allows for.
    """

    title: str
    bind: Mapping[str, Bind]
    fp8_tolerance: Tolerance
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeMeasurement:
    """One system at one shape: seconds, or why there are none. `error` is None if it could not run at all."""

    shape: DecodeShape
    cache: str
    system: str
    is_ours: bool
    work: Work
    floor_seconds: float
    is_bound_by_products: bool
    error: DecodeError | None
    tolerance: Tolerance
    seconds: float | None
    failed: str | None

    def as_json(self) -> dict[str, Any]:
        """Everything about it, and the rates that follow."""
        seconds = self.seconds
        return {
            **asdict(self.shape),
            "cache": self.cache,
            "system": self.system,
            "is_ours": self.is_ours,
            "error": None if self.error is None else self.error._asdict(),
            "allowed": asdict(self.tolerance),
            "operations": self.work.operations,
            "bytes": self.work.num_bytes,
            "floor_seconds": self.floor_seconds,
            "seconds": seconds,
            "tflops": None if seconds is None else self.work.operations / seconds / 1e12,
            "gb_per_s": None if seconds is None else self.work.num_bytes / seconds / 1e9,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class DecodeBenchmark:
    """All measurements of a run; `made_with` is the environment at its start."""

    device: torch.device
    ceilings: Ceilings
    made_with: dict[str, object]
    notes: Sequence[str] = ()
    measurements: list[DecodeMeasurement] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What is wrong with our own back ends; a peer that fails is only listed."""
        return [
            f"{each.shape}, {each.cache}, {each.system}: {each.failed}"
            for each in self.measurements
            if each.failed is not None and each.is_ours
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "command": "bench decode",
            **self.made_with,
            "ceilings": asdict(self.ceilings),
            "measurements": [each.as_json() for each in self.measurements],
        }

    def explanations(self) -> list[str]:
        """What the reader of the table must know."""
        reasons = {
            f"{each.system}, {each.cache}: no figures: {each.failed}": None
            for each in self.measurements
            if each.failed and not each.is_ours
        }
        return [self.ceilings.describe(self.device), *self.notes, *reasons]

    def table(self) -> list[str]:
        """The lines of a table with a row per shape, cache and system."""
        header = ["batch × context, heads, queries", "cache", "by", "error", "µs", "floor µs"]
        header += ["of the floor", "rate", "peer / ours"]
        rows = [
            [str(each.shape), each.cache, each.system, *_cells(each), self._beside_the_peer(each)]
            for each in self.measurements
        ]
        return [*table(header, rows, left=header[:3]), ""]

    def _beside_the_peer(self, ours: DecodeMeasurement) -> str:
        """The time of the fastest peer over that of one of our back ends: above 1, ours is faster."""
        times = [
            each.seconds
            for each in self.measurements
            if (each.shape, each.cache, each.is_ours) == (ours.shape, ours.cache, False) and each.seconds
        ]
        if not (ours.is_ours and ours.seconds and times):
            return "–"
        return f"{min(times) / ours.seconds:.2f}×"


def _cells(each: DecodeMeasurement) -> list[str]:
    error = "–" if each.error is None else f"{each.error.cosine:.1e}"
    floor = f"{1e6 * each.floor_seconds:,.1f}"
    if each.seconds is None:
        return [error, "–", floor, "–", "–"]
    if each.is_bound_by_products:
        rate = f"{each.work.operations / each.seconds / 1e12:,.1f} TFLOP/s"
    else:
        rate = f"{each.work.num_bytes / each.seconds / 1e9:,.0f} GB/s"
    return [error, f"{1e6 * each.seconds:,.1f}", floor, f"{each.floor_seconds / each.seconds:.0%}", rate]


@dataclass(frozen=True)
class _System:
    """Who decodes: `inputs` makes a shape's inputs, ragged or not, and `bind` the call from them."""

    name: str
    is_ours: bool
    work: Work
    inputs: Callable[[bool], DecodeInputs]
    bind: Bind
    tolerance: Tolerance


def measure_decoding(
    caches: Sequence[str],
    peers: Sequence[DecodePeer],
    device: torch.device,
    commit: str | None = None,
    keep: Callable[[DecodeBenchmark], None] = lambda _: None,
) -> DecodeBenchmark:
    """Checks and times every back end that can run on the device, and the peers, at every shape.

    `keep` receives the result after each shape, so that it outlives the rest.
    """
    _log.info("Measuring what this device can reach: a product of each type, a copy")
    notes = [f"{peer.title}, {each}: {peer.notes[each]}" for peer in peers for each in caches if each in peer.notes]
    made_with = environment("torch", "triton", commit=commit)
    result = DecodeBenchmark(device, measure_ceilings(device), made_with, notes)
    with torch.no_grad():
        for cache in caches:
            for shape in SHAPES if device.type == "cuda" else CPU_SHAPES:
                _log.info(f"{shape}, {cache}")
                for system in _systems(shape, cache, peers, device):
                    result.measurements.append(_measure(shape, cache, system, device, result.ceilings))
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                keep(result)
    return result


def _systems(
    shape: DecodeShape, cache: str, peers: Sequence[DecodePeer], device: torch.device
) -> Iterator[_System]:
    layout, in_fp8 = LAYOUTS[cache], cache == "fp8"
    work = shape.work(layout.row_bytes, 2, in_fp8)
    inputs = partial(make_inputs, shape, layout, device)
    for name, backend in backends(MLA_DECODE, Target(device, torch.bfloat16, (RANK, ROPE))):
        yield _System(name, True, work, inputs, partial(_bind, backend), _TOLERANCES[cache])
    width = 1 if in_fp8 else 2
    for peer in peers:
        yield _System(
            peer.title,
            False,
            shape.work(width * (RANK + ROPE), width, in_fp8),
            partial(make_inputs, shape, LAYOUTS["bf16"], device, rounded=in_fp8),
            peer.bind[cache],
            peer.fp8_tolerance if in_fp8 else Tolerance(),
        )


def _bind(backend: MlaDecode, inputs: DecodeInputs) -> Callable[[], Outputs]:
    return lambda: backend.mla_decode(*inputs, SCALE)


def _measure(
    shape: DecodeShape, cache: str, system: _System, device: torch.device, ceilings: Ceilings
) -> DecodeMeasurement:
    work = system.work
    products = ceilings.product_seconds(work.operations, work.in_fp8)
    moved = ceilings.copy_seconds(work.num_bytes)
    error, seconds, failed = None, None, None
    torch.manual_seed(0)
    try:
        for is_ragged in (True, False):
            inputs = system.inputs(is_ragged)
            error = _worst(error, _error(inputs, system))
        failed = system.tolerance.problem(error) if error is not None else None
        if failed is None:
            calls = rotated(device, lambda: system.bind(system.inputs(False)), work.num_bytes)
            seconds = median_seconds(lambda call: calls(call)(), device)
    except Exception as problem:  # noqa: BLE001 -- whatever a back end or a peer may raise
        error, failed = None, _reason(problem)
    bounds = max(products, moved), products >= moved
    case = (shape, cache, system.name, system.is_ours, work)
    return DecodeMeasurement(*case, *bounds, error, system.tolerance, seconds, failed)


def _error(inputs: DecodeInputs, system: _System) -> DecodeError:
    found, expected = checked_outputs(inputs, system.bind(inputs)())
    return system.tolerance.measure(found, expected)


def _worst(one: DecodeError | None, other: DecodeError) -> DecodeError:
    return other if one is None else DecodeError(*map(max, one, other))


def _reason(problem: Exception) -> str:
    """An error in one line; its traceback is in the log, if that shows it."""
    _log.debug("Decoding failed", exc_info=problem)
    text = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
    return truncate(" ".join(text.split()), _LONGEST_REASON)
