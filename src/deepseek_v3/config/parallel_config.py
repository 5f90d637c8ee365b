"""The `parallel` section of a run: the parallel degrees, and the rules between degrees, model and batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deepseek_v3.config.base import PositiveInt, Section
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.utils.numbers import divisors

# The largest number of batch sizes of a ramp that are checked one by one.
_MAX_BATCH_SIZES = 100_000
# Limits beyond which listing the micro-batches of a step and the divisors of a world size takes too long.
Degree = Annotated[PositiveInt, Field(le=2**20)]
BatchSize = Annotated[PositiveInt, Field(le=2**24)]


# 1f1b is one forward, one backward (Narayanan et al. 2019). The others have two stages per rank and smaller
# bubbles: interleaved (Narayanan et al. 2021), zero bubble (Qi et al. 2023), and DualPipeV, the V-shaped half of
# the report's DualPipe; torch does not overlap its computation with the expert exchange.
PipelineSchedule = Literal["1f1b", "interleaved", "zero_bubble", "dualpipe_v"]


def _present_spelling(precision: Any) -> Any:
    """Reads how older files and checkpoints spell a precision."""
    older = {"bfloat16": "bf16", "float32": "fp32"}
    return older.get(precision, precision) if isinstance(precision, str) else precision


Precision = Literal["auto", "bf16", "fp8", "fp32"]


class ParallelConfig(Section):
    """The parallel degrees and how each rank executes its part; results differ between layouts only by rounding.

    `data_replicate` × `data_shard` ranks read different data. Each group of `data_shard` ranks shards one replica
    of weights, gradients and moments. `expert` consecutive data ranks shard the experts. `pipeline` cuts the layers
    into stages on different ranks. With `layout: auto` the planner chooses these degrees, `micro_batch_size` and
    `recomputation` for the world size of the run.

    `zero_stage` (Rajbhandari et al. 2020) is how long a rank holds the shards of other ranks: weights only while
    their layer runs (3), weights from its forward to its backward pass (2), or weights and gradients for a whole
    step (1).

    `gradient_reduction` is the type in which gradients travel between data-parallel ranks. They are always summed
    in float32. Gradients of routers and norms, which every rank holds whole, travel in float32.

    `precision` is what layers compute in. `fp8` multiplies in 8 bits in every layer whose widths allow it, and in
    bf16 in the others. `auto` is bf16, or fp32 on devices without it, with FP8 in the layers that were measured to
    be faster with it. `fp8_scales` says whether the scale of a block of 8-bit numbers is any float32 or a power of
    two.
    """

    layout: Literal["given", "auto"] = "given"
    data_replicate: Degree = 1
    data_shard: Degree = 1
    expert: Degree = 1
    pipeline: Degree = 1
    zero_stage: Literal[1, 2, 3] = 3
    pipeline_schedule: PipelineSchedule = "1f1b"
    expert_back_end: Literal["auto", "torch", "deepep"] = "auto"
    dispatch_precision: Literal["activations", "fp8"] = "activations"
    micro_batch_size: BatchSize = 1
    precision: Annotated[Precision, BeforeValidator(_present_spelling)] = "auto"
    fp8_scales: Literal["float32", "power_of_two"] = "float32"
    gradient_reduction: Literal["fp32", "bf16", "fp8"] = "fp32"
    recomputation: Literal["none", "selective", "full"] = "none"
    compile: Literal["auto", True, False] = "auto"

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different samples of a step."""
        return self.data_replicate * self.data_shard

    @property
    def world_size(self) -> int:
        """Number of ranks, one per GPU."""
        return self.data_ranks * self.pipeline

    @property
    def expert_shard(self) -> int:
        """Number of ranks that shard one replica of the same experts."""
        return max(1, self.data_shard // self.expert)

    @property
    def expert_replicate(self) -> int:
        """Number of replicas of each expert."""
        return self.data_ranks // (self.expert * self.expert_shard)

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages on each rank."""
        return 1 if self.pipeline == 1 or self.pipeline_schedule == "1f1b" else 2


def check_batch(name: str, size: int, parallel: ParallelConfig) -> None:
    """Raises ValueError if `size` sequences (the field `name`) do not divide over ranks and micro-batches."""
    micro, ranks = parallel.micro_batch_size, parallel.data_ranks
    if size % (micro * ranks):
        over_ranks = f" × {ranks} data-parallel ranks" if ranks > 1 else ""
        raise ValueError(f"{name} = {size} is not a multiple of parallel.micro_batch_size = {micro}{over_ranks}")


def pipeline_problem(parallel: ParallelConfig, model: ModelConfig, batches: range) -> str | None:
    """Why a pipeline cannot run the layers of a model or batches of these sizes; None if it can.

    The batch sizes are multiples of micro_batch_size × data_ranks.
    """
    stages, kind = parallel.pipeline, parallel.pipeline_schedule
    if stages == 1:
        return None
    if stages * parallel.stages_per_rank > model.num_hidden_layers:
        return _too_many_stages(parallel, model.num_hidden_layers)
    per_micro_batch = parallel.micro_batch_size * parallel.data_ranks
    at_least = {"1f1b": stages, "dualpipe_v": 2 * stages}.get(kind, 1)
    if batches[0] < at_least * per_micro_batch:
        needed = f"{at_least}; lower parallel.micro_batch_size, or raise the batch"
        return _schedule_problem(batches[0], batches[0] // per_micro_batch, kind, needed)
    if kind == "interleaved" and len(batches) > _MAX_BATCH_SIZES:
        return f"a batch of {len(batches):,} sizes; set a larger training.batch_ramp.increment"
    for batch in batches if kind == "interleaved" else ():
        count = batch // per_micro_batch
        if count % max(1, count // stages):
            needed = f"a multiple of parallel.pipeline = {stages}; change the batch"
            return _schedule_problem(batch, count, kind, needed)
    return None


def _too_many_stages(parallel: ParallelConfig, layers: int) -> str:
    on_each, advice = "", f"--set parallel.pipeline={max(1, layers // parallel.stages_per_rank)}"
    if parallel.stages_per_rank > 1:
        on_each = f" × {parallel.stages_per_rank} stages on each"
        if parallel.pipeline <= layers:
            advice += " or --set parallel.pipeline_schedule=1f1b"
    return (
        f"parallel.pipeline = {parallel.pipeline}{on_each} is more than the {layers} layers of the main model; "
        f"use {advice}"
    )


def _schedule_problem(batch: int, count: int, schedule: str, needed: str) -> str:
    return (
        f"a batch of {batch} is {count} micro-batches for each pipeline, and "
        f"parallel.pipeline_schedule = {schedule} needs {needed}"
    )


def check_degrees(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Raises ValueError if the expert degree does not divide the experts, the data ranks, or the sharding."""
    expert, experts, ranks = parallel.expert, model.n_routed_experts, parallel.data_ranks
    if experts % expert:
        raise ValueError(
            f"parallel.expert = {expert} does not divide model.n_routed_experts = {experts}; "
            f"nearest that does: {_nearest_divisor(experts, expert)}"
        )
    if ranks % expert:
        raise ValueError(
            f"parallel.expert = {expert} does not divide the {ranks} data-parallel ranks "
            f"(data_replicate × data_shard); nearest that does: {_nearest_divisor(ranks, expert)}"
        )
    larger, smaller = max(parallel.data_shard, expert), min(parallel.data_shard, expert)
    if larger % smaller:
        raise ValueError(
            f"parallel.expert = {expert} and parallel.data_shard = {parallel.data_shard}: one must divide the "
            "other, so that the ranks of one copy of the experts hold whole copies of the other weights; nearest "
            f"expert degree that does: {_nearest_divisor(parallel.data_shard, expert)}"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; of two equally near ones the smaller."""
    return min(divisors(number), key=lambda divisor: abs(divisor - wanted))
