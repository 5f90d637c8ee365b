"""The section `parallel` of a run: how it is laid out over ranks, and which models and batches a layout takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deepseek_v3.config.base import PositiveInt, Section
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.utils.numbers import divisors

# Sizes of a growing batch that are looked at one by one.
_MOST_SIZES = 100_000
# Beyond these the lists of a step's micro-batches and of the ways to divide ranks take too long.
Degree = Annotated[PositiveInt, Field(le=2**20)]
BatchSize = Annotated[PositiveInt, Field(le=2**24)]


# One forward, one backward (Narayanan et al. 2019), and schedules that leave fewer gaps because each rank has two
# stages: interleaved (Narayanan et al. 2021), zero bubble (Qi et al. 2023), and the order of steps of the report's
# DualPipe, cut in half; torch does not overlap its computation with the exchange.
PipelineSchedule = Literal["1f1b", "interleaved", "zero_bubble", "dualpipe_v"]


class ParallelConfig(Section):
    """How the work meets the hardware; nothing here changes what is computed, only rounding.

    The data is split over `data_replicate` × `data_shard` ranks: groups of `data_shard` ranks share out one copy
    of weights, gradients and moments, and there are `data_replicate` such copies. Of these ranks, each `expert`
    consecutive ones share out the experts. `pipeline` cuts the layers into stages, each on ranks of its own. With
    `layout: auto` the planner chooses all of these for the processes that are started, and `micro_batch_size` and
    `recomputation` with them.

    `zero_stage` says how long a rank holds what others own (Rajbhandari et al. 2020): weights only while their
    layer runs (3), from its forward to its backward pass (2), or weights and gradients for the whole step (1).
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
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    recomputation: Literal["none", "selective", "full"] = "none"
    compile: Literal["auto", True, False] = "auto"

    @property
    def data_ranks(self) -> int:
        """Ranks that see different samples of a step."""
        return self.data_replicate * self.data_shard

    @property
    def world_size(self) -> int:
        """Number of ranks, one per GPU."""
        return self.data_ranks * self.pipeline

    @property
    def expert_shard(self) -> int:
        """Ranks that share out one copy of the same experts."""
        return max(1, self.data_shard // self.expert)

    @property
    def expert_replicate(self) -> int:
        """Copies of each expert."""
        return self.data_ranks // (self.expert * self.expert_shard)

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages on each rank."""
        return 1 if self.pipeline == 1 or self.pipeline_schedule == "1f1b" else 2


def check_batch(name: str, size: int, parallel: ParallelConfig) -> None:
    """Raises ValueError where a batch of `size` sequences, the field `name`, does not divide over the layout."""
    micro, ranks = parallel.micro_batch_size, parallel.data_ranks
    if size % (micro * ranks):
        over_ranks = f" × {ranks} data-parallel ranks" if ranks > 1 else ""
        raise ValueError(f"{name} = {size} is not a multiple of parallel.micro_batch_size = {micro}{over_ranks}")


def pipeline_problem(parallel: ParallelConfig, model: ModelConfig, batches: range) -> str | None:
    """Why a pipeline cannot take the layers of a model or batches of these sizes; None where it can.

    The batches are multiples of a micro-batch on each of the ranks with different data.
    """
    stages, kind = parallel.pipeline, parallel.pipeline_schedule
    if stages == 1:
        return None
    if stages * parallel.stages_per_rank > model.num_hidden_layers:
        return _too_many_stages(parallel, model.num_hidden_layers)
    together = parallel.micro_batch_size * parallel.data_ranks
    at_least = {"1f1b": stages, "dualpipe_v": 2 * stages}.get(kind, 1)
    if batches[0] < at_least * together:
        count, needed = batches[0] // together, f"{at_least}; lower parallel.micro_batch_size, or raise the batch"
        return _unsuited(batches[0], count, kind, needed)
    if kind == "interleaved" and len(batches) > _MOST_SIZES:
        return f"a batch of {len(batches):,} sizes; set a larger training.batch_ramp.increment"
    for batch in batches if kind == "interleaved" else ():
        count = batch // together
        if count % max(1, count // stages):
            return _unsuited(batch, count, kind, f"a multiple of parallel.pipeline = {stages}; change the batch")
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


def _unsuited(batch: int, count: int, schedule: str, needed: str) -> str:
    return (
        f"a batch of {batch} is {count} micro-batches for each pipeline, and "
        f"parallel.pipeline_schedule = {schedule} needs {needed}"
    )


def check_degrees(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Raises ValueError where the degrees of a layout do not divide each other or the experts of the model."""
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
            "other, so that a copy of the experts lies inside whole copies of the rest; nearest expert degree that "
            f"does: {_nearest_divisor(parallel.data_shard, expert)}"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, of two equally near the smaller."""
    return min(divisors(number), key=lambda divisor: abs(divisor - wanted))
