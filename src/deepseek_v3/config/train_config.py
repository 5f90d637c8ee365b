"""A run: the sections `model`, `training`, `parallel`, `data`, `checkpoint` and `logging` of a YAML file.

Defaults are the recipe of the DeepSeek-V3 technical report (§4.2), its phases scaled to the run's own budget.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError, ValidationInfo, model_validator

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
from deepseek_v3.config.data_config import DataConfig, LocalPath
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.parallel_config import (
    BatchSize,
    ParallelConfig,
    check_batch,
    check_degrees,
    pipeline_problem,
)
from deepseek_v3.utils.numbers import MAX_TOKENS
from deepseek_v3.utils.text import format_value


def _check_budget(value: object) -> int | str:
    if isinstance(value, str) and re.fullmatch(r"\d{1,7}(\.\d{1,20})?x", value, re.ASCII) and float(value[:-1]) > 0:
        return value
    try:
        return _TOKENS.validate_python(value)
    except ValidationError:
        raise ValueError(
            f"found {format_value(value)}: expected a number of tokens from 1 to 1e18, such as 3.8e9 or 10B, or a "
            "multiple of the active parameters such as 20x"
        ) from None


Budget = Annotated[int | str, PlainValidator(_check_budget, json_schema_input_type=int | str)]

_TOKENS = TypeAdapter[int](Annotated[PositiveInt, Field(le=MAX_TOKENS)], config={"strict": True})

# The report's 14.8T tokens are the unit in which it dates every change of the recipe.
_REPORT_TOKENS = 14.8e12


# The context in which pydantic validates a config that has trained already.
STORED = {"stored": True}

_SIGNIFICANT_BITS = {"bfloat16": 8, "float32": 24}
_LARGEST_MOMENT_ERROR = 0.1


class OptimizerConfig(Section):
    """AdamW. Weight decay acts on matrices only; moments are kept in bfloat16 as in the report (§3.3.2).

    In each step a moment moves by (1 - β) of its distance to the gradient. Rounding to b significant bits undoes a
    move below 2^-b of the moment, so the moment stops up to 2^-b / (1 - β) of itself away from where it belongs:
    with bfloat16 8% at β = 0.95, and for good at 0.999. β is refused where that is more than 10%, but not in the
    config that a checkpoint stores: its model may be used, and resumed with other moments.
    """

    learning_rate: PositiveFloat
    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Real, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[PositiveFloat, Field(ge=1e-30)] = 1e-8  # 0 in float32 would divide gradients of 0 by 0
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: PositiveFloat = 1.0
    moments: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _moments_can_follow(self, info: ValidationInfo) -> OptimizerConfig:
        if info.context == STORED:
            return self
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


class CheckpointConfig(Section):
    """Where checkpoints go, how often (0: only at the end), and how many of the newest are kept."""

    directory: LocalPath = Path("checkpoints")
    interval_steps: NonNegativeInt = 1000
    keep: PositiveInt = 3


class SamplesConfig(Section):
    """Texts that the model writes every `interval_steps` steps, one for each prompt. For runs of one process."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    interval_steps: PositiveInt = 500
    max_new_tokens: PositiveInt = 60


class LoggingConfig(Section):
    """Where the run writes its resolved config and metrics, how often it prints, and what it writes as samples."""

    directory: LocalPath
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

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches that each data-parallel rank runs in a step of the full batch."""
        return self.training.global_batch_size // (self.parallel.micro_batch_size * self.parallel.data_ranks)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step of the full batch."""
        return self.training.global_batch_size * self.training.sequence_length

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
            check_degrees(self.parallel, model)
            for name, size in sizes.items():
                check_batch(name, size, self.parallel)
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


def batch_sizes(training: TrainingConfig) -> range:
    """Sequences of a step: every size that the batch has in the course of a run, ascending."""
    last, ramp = training.global_batch_size, training.batch_ramp
    if ramp is None:
        return range(last, last + 1)
    return range(ramp.initial, last + 1, ramp.increment or math.gcd(ramp.initial, last))


def batch_size_divisor(training: TrainingConfig) -> int:
    """Sequences that the batch of every step is a multiple of: the most that a layout can always take at once."""
    sizes = batch_sizes(training)
    return math.gcd(sizes[0], sizes[-1], sizes.step if len(sizes) > 1 else 0)
