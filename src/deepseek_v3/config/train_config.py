"""A run: the sections `model`, `training`, `parallel`, `data`, `checkpoint` and `logging` of a YAML file.

Defaults are the recipe of the DeepSeek-V3 technical report (§4.2), its phases scaled to the run's own budget.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError, model_validator

from deepseek_v3.config.base import (
    Fraction,
    Integer,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Real,
    Section,
)
from deepseek_v3.config.data_config import AnyPath, DataConfig
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.utils.numbers import MOST_TOKENS, divisors
from deepseek_v3.utils.printing import value_text

# Sizes of a growing batch that are looked at one by one.
_MOST_SIZES = 100_000
# Beyond these the lists of a step's micro-batches and of the ways to divide ranks take too long.
Degree = Annotated[PositiveInt, Field(le=2**20)]
BatchSize = Annotated[PositiveInt, Field(le=2**24)]


def _check_budget(value: object) -> int | str:
    if isinstance(value, str) and re.fullmatch(r"\d{1,7}(\.\d{1,20})?x", value, re.ASCII) and float(value[:-1]) > 0:
        return value
    try:
        return _TOKENS.validate_python(value)
    except ValidationError:
        raise ValueError(
            f"found {value_text(value)}: expected a number of tokens from 1 to 1e18, such as 3.8e9 or 10B, or a "
            "multiple of the active parameters such as 20x"
        ) from None


Budget = Annotated[int | str, PlainValidator(_check_budget, json_schema_input_type=int | str)]

_TOKENS = TypeAdapter[int](Annotated[PositiveInt, Field(le=MOST_TOKENS)], config={"strict": True})

# The report's 14.8T tokens are the unit in which it dates every change of the recipe.
_REPORT_TOKENS = 14.8e12


_SIGNIFICANT_BITS = {"bfloat16": 8, "float32": 24}
_LARGEST_MOMENT_ERROR = 0.1


class OptimizerConfig(Section):
    """AdamW. Weight decay acts on matrices only; moments are kept in bfloat16 as in the report (§3.3.2).

    In each step a moment moves by (1 - β) of its distance to the gradient. Rounding to b significant bits undoes a
    move below 2^-b of the moment, so the moment stops up to 2^-b / (1 - β) of itself away from where it belongs:
    with bfloat16 8% at β = 0.95, and for good at 0.999. β is refused where that is more than 10%.
    """

    learning_rate: PositiveFloat
    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Real, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[PositiveFloat, Field(ge=1e-30)] = 1e-8  # 0 in float32 would divide gradients of 0 by 0
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: PositiveFloat = 1.0
    moments: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _moments_can_follow(self) -> OptimizerConfig:
        smallest_move = 2.0 ** -_SIGNIFICANT_BITS[self.moments]
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            error = smallest_move / (1 - beta)
            if error > _LARGEST_MOMENT_ERROR:
                way_out = "set moments: float32, or lower it" if self.moments == "bfloat16" else "lower it"
                raise ValueError(
                    f"{name} = {beta} with moments in {self.moments}, whose rounding would keep a moment up to "
                    f"{error:.0%} of itself from its true value; expected {name} at most "
                    f"{1 - smallest_move / _LARGEST_MOMENT_ERROR:.7g} and so {_LARGEST_MOMENT_ERROR:.0%}: {way_out}"
                )
        return self

    @property
    def moment_bytes(self) -> int:
        """Bytes of one number of a moment."""
        return 2 if self.moments == "bfloat16" else 4


class ScheduleConfig(Section):
    """Learning rate over the run. `deepseek_v3` has the report's own phases and takes only the warm-up."""

    kind: Literal["deepseek_v3", "cosine", "wsd"] = "deepseek_v3"
    warmup_steps: NonNegativeInt = 2000
    decay_fraction: Annotated[Real, Field(gt=0, le=1)] = 0.2  # wsd: the share of the budget that decays
    final_ratio: Fraction = 0.1  # cosine and wsd: last over highest learning rate


class BatchRampConfig(Section):
    """The global batch grows linearly from `initial` sequences over the first `fraction` of the budget.

    It grows in steps of `increment` sequences, which divide over all ranks and micro-batches, so that it is the
    same under every layout; null is what divides the first and the last batch.
    """

    initial: BatchSize
    increment: BatchSize | None = None
    fraction: Annotated[Real, Field(gt=0, le=1)] = 469e9 / _REPORT_TOKENS


class PredictionConfig(Section):
    """Weight λ of the multi-token prediction loss, and the share of the budget after which it drops."""

    weight: NonNegativeFloat = 0.3
    final_weight: NonNegativeFloat = 0.1
    switch_at: Fraction = 10e12 / _REPORT_TOKENS


class BalanceConfig(Section):
    """Load balance of the experts: the bias moves by ±γ per step, then rests; α weighs the sequence loss."""

    bias_update_speed: NonNegativeFloat = 1e-3
    bias_update_until: Fraction = 14.3e12 / _REPORT_TOKENS
    sequence_loss_weight: NonNegativeFloat = 1e-4


class EvaluationConfig(Section):
    """How often, in steps (0: only at the end), and on how many held-out tokens the loss is measured."""

    interval_steps: NonNegativeInt = 500
    tokens: PositiveInt = 262_144


class TrainingConfig(Section):
    """The recipe. `total_tokens` is a number of tokens, or like `20x`: that many per active parameter.

    `deliberate_overtraining` marks a budget above 26 tokens per active parameter as meant; it changes no step.

    A step whose loss or gradient is not finite is skipped; more than `max_skipped_steps` in a row stop the run.
    """

    seed: NonNegativeInt = 0
    total_tokens: Budget
    deliberate_overtraining: bool = False
    sequence_length: Annotated[Integer, Field(ge=2)]
    global_batch_size: BatchSize
    batch_ramp: BatchRampConfig | None = None
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    prediction: PredictionConfig = PredictionConfig()
    balance: BalanceConfig = BalanceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_skipped_steps: NonNegativeInt = 3


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


class CheckpointConfig(Section):
    """Where checkpoints go, how often (0: only at the end), and how many of the newest are kept."""

    directory: AnyPath = Path("checkpoints")
    interval_steps: NonNegativeInt = 1000
    keep: PositiveInt = 3


class SamplesConfig(Section):
    """Texts that the model writes every `interval_steps` steps, one for each prompt. For runs of one process."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    interval_steps: PositiveInt = 500
    max_new_tokens: PositiveInt = 60


class LoggingConfig(Section):
    """Where the run writes its resolved config and metrics, how often it prints, and what it writes as samples."""

    directory: AnyPath
    interval_steps: PositiveInt = 10
    tensorboard: bool = True
    samples: SamplesConfig | None = None


class RunConfig(Section):
    """One training run, whole."""

    model: ModelConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        training, model = self.training, self.model
        if training.sequence_length > model.max_position_embeddings:
            raise ValueError(
                f"training.sequence_length = {training.sequence_length} is more than "
                f"model.max_position_embeddings = {model.max_position_embeddings}"
            )
        if training.sequence_length <= model.num_nextn_predict_layers:
            raise ValueError(
                f"training.sequence_length = {training.sequence_length} leaves nothing to predict at depth "
                f"model.num_nextn_predict_layers = {model.num_nextn_predict_layers}"
            )
        if training.batch_ramp and training.batch_ramp.initial > training.global_batch_size:
            raise ValueError(
                f"training.batch_ramp.initial = {training.batch_ramp.initial} is more than "
                f"training.global_batch_size = {training.global_batch_size}"
            )
        sizes = {"training.global_batch_size": training.global_batch_size}
        if training.batch_ramp:
            sizes["training.batch_ramp.initial"] = training.batch_ramp.initial
            sizes |= _increment(training.batch_ramp, training.global_batch_size)
        if self.parallel.layout == "given":  # the planner's degrees, which replace these, divide everything
            _check_ranks(self.parallel, model)
            for name, size in sizes.items():
                _check_batch(name, size, self.parallel)
            if problem := pipeline_problem(self.parallel, model, batch_sizes(training)):
                raise ValueError(problem)
        corpus = self.data.corpus
        if corpus and corpus.vocab_size > model.vocab_size:
            raise ValueError(
                f"data.corpus.vocab_size = {corpus.vocab_size} is more than model.vocab_size = {model.vocab_size}"
            )
        return self


def _increment(ramp: BatchRampConfig, last: int) -> dict[str, int]:
    """The increment as a size to check, where one is given. Raises ValueError where the batch cannot grow by it."""
    if ramp.increment is None:
        return {}
    for name, size in (("training.batch_ramp.initial", ramp.initial), ("training.global_batch_size", last)):
        if size % ramp.increment:
            raise ValueError(
                f"{name} = {size} is not a multiple of training.batch_ramp.increment = {ramp.increment}"
            )
    return {"training.batch_ramp.increment": ramp.increment}


def _check_batch(name: str, size: int, parallel: ParallelConfig) -> None:
    micro, ranks = parallel.micro_batch_size, parallel.data_ranks
    if size % (micro * ranks):
        over_ranks = f" × {ranks} data-parallel ranks" if ranks > 1 else ""
        raise ValueError(f"{name} = {size} is not a multiple of parallel.micro_batch_size = {micro}{over_ranks}")


def batch_sizes(training: TrainingConfig) -> range:
    """Sequences of a step: every size that the batch has in the course of a run, ascending."""
    last, ramp = training.global_batch_size, training.batch_ramp
    if ramp is None:
        return range(last, last + 1)
    return range(ramp.initial, last + 1, ramp.increment or math.gcd(ramp.initial, last))


def batch_unit(training: TrainingConfig) -> int:
    """Sequences that the batch of every step is a multiple of: the most that a layout can always take at once."""
    sizes = batch_sizes(training)
    return math.gcd(sizes[0], sizes[-1], sizes.step if len(sizes) > 1 else 0)


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


def _check_ranks(parallel: ParallelConfig, model: ModelConfig) -> None:
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
