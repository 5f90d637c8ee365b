"""A run: the sections `model`, `training`, `parallel`, `data`, `checkpoint` and `logging` of a YAML file.

Defaults are the recipe of the DeepSeek-V3 technical report (§4.2), its phases scaled to the run's own budget.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from deepseek_v3.config.base import (
    Fraction,
    Integer,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Real,
    Section,
    TokenCount,
)
from deepseek_v3.config.data_config import DataConfig, LocalPath
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.optimizer_config import OptimizerConfig
from deepseek_v3.config.parallel_config import (
    BatchSize,
    ParallelConfig,
    check_batch,
    check_degrees,
    pipeline_problem,
)
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


NonEmpty = Annotated[str, Field(min_length=1)]
Budget = Annotated[int | str, PlainValidator(_check_budget, json_schema_input_type=int | str)]

_TOKENS = TypeAdapter[int](TokenCount, config={"strict": True})

# The report trains on 14.8T tokens and gives each change of the recipe as a number of tokens.
_REPORT_TOKENS = 14.8e12


class ScheduleConfig(Section):
    """Learning rate schedule. `deepseek_v3` has the phases of the report and uses only `warmup_steps`."""

    kind: Literal["deepseek_v3", "cosine", "wsd"] = "deepseek_v3"
    warmup_steps: NonNegativeInt = 2000
    decay_fraction: Annotated[Real, Field(gt=0, le=1)] = 0.2  # wsd: share of the budget in the decay phase
    final_ratio: Fraction = 0.1  # cosine and wsd: final over peak learning rate


class BatchRampConfig(Section):
    """The global batch grows linearly from `initial` sequences over the first `fraction` of the budget.

    It grows by `increment` sequences at a time. `increment` must divide over all ranks and micro-batches, so that
    the ramp is the same under every layout; null is the greatest common divisor of the first and the last batch
    size.
    """

    initial: BatchSize
    increment: BatchSize | None = None
    fraction: Annotated[Real, Field(gt=0, le=1)] = 469e9 / _REPORT_TOKENS


class PredictionConfig(Section):
    """Weight λ of the multi-token prediction loss, which becomes `final_weight` at `switch_at` of the budget."""

    weight: NonNegativeFloat = 0.3
    final_weight: NonNegativeFloat = 0.1
    switch_at: Fraction = 10e12 / _REPORT_TOKENS


class BalanceConfig(Section):
    """Load balancing of the experts (report, §2.1.2).

    The routing bias moves by ±`bias_update_speed` (γ) per step until `bias_update_until` of the budget. α is the
    weight of the sequence-wise balance loss.
    """

    bias_update_speed: NonNegativeFloat = 1e-3
    bias_update_until: Fraction = 14.3e12 / _REPORT_TOKENS
    sequence_loss_weight: NonNegativeFloat = 1e-4


class EvaluationConfig(Section):
    """Validation: every `interval_steps` steps (0: only at the end), on `tokens` held-out tokens.

    `mtp_acceptance`: a model with multi-token prediction also counts the drafts that greedy decoding would accept.
    """

    interval_steps: NonNegativeInt = 500
    tokens: PositiveInt = 262_144
    mtp_acceptance: bool = True


class SpikeConfig(Section):
    """What follows a spike: a step whose loss or gradient norm is far above those of the steps before it.

    Far above is more than median + threshold · 1.4826 · MAD of the last `window` steps that were not skipped (MAD:
    the median of the absolute distances from the median; 1.4826 · MAD is the standard deviation of normal noise,
    and counts as at least 1% of the median). Until there are `window` steps, nothing is a spike.

    `warn` reports it; `skip` also skips the step, as one that is not finite; `rollback` also restores the last
    checkpoint, so that all steps since then are skipped. More than `max_rollbacks` rollbacks to the same checkpoint
    end the run.
    """

    action: Literal["ignore", "warn", "skip", "rollback"] = "warn"
    window: Annotated[Integer, Field(ge=4, le=10_000)] = 128
    loss_threshold: PositiveFloat = 8.0
    norm_threshold: PositiveFloat = 20.0
    max_rollbacks: NonNegativeInt = 3


class TrainingConfig(Section):
    """The training recipe.

    `total_tokens` is a number of tokens, or a multiple such as `20x`: 20 tokens per active parameter.
    `deliberate_overtraining` accepts a budget above 26 tokens per active parameter; it does not change training.

    A step whose loss or gradient is not finite is skipped, and so may be a spike. The run stops after more than
    `max_skipped_steps` consecutive skipped steps.
    `loss_terms` gives the weight of each loss term that another package adds (see `training/loss_terms.py`).
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
    spikes: SpikeConfig = SpikeConfig()
    loss_terms: dict[str, Real] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _leave_out_empty_loss_terms(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return fields if self.loss_terms else {k: v for k, v in fields.items() if k != "loss_terms"}

    def __hash__(self) -> int:  # pydantic's own cannot hash a dict
        return hash((*({**dict(self), "loss_terms": tuple(self.loss_terms.items())}).values(),))


class CheckpointConfig(Section):
    """Checkpoints: one every `interval_steps` steps (0: only at the end); the newest `keep` are kept.

    Those of multiples of `keep_every_steps` are kept for ever; 0: none.
    """

    directory: LocalPath = Path("checkpoints")
    interval_steps: NonNegativeInt = 1000
    keep: PositiveInt = 3
    keep_every_steps: NonNegativeInt = 0

    @model_validator(mode="after")
    def _keeps_what_is_saved(self) -> CheckpointConfig:
        if self.keep_every_steps and (not self.interval_steps or self.keep_every_steps % self.interval_steps):
            raise ValueError(
                f"keep_every_steps = {self.keep_every_steps}: expected a multiple of interval_steps = "
                f"{self.interval_steps}, because other steps are not saved"
            )
        return self


class SamplesConfig(Section):
    """Sample texts: one completion per prompt every `interval_steps` steps, in runs of one process."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    interval_steps: PositiveInt = 500
    max_new_tokens: PositiveInt = 60


class LoggingConfig(Section):
    """The directory of resolved config and metrics, the interval of log lines, trackers, and sample texts.

    `trackers`: where metrics go beside metrics.jsonl and TensorBoard, by the names of `utils/trackers`. `project`
    and `run_name`: what the run is called there; null: as the tracker's environment variables say.
    """

    directory: LocalPath
    interval_steps: PositiveInt = 10
    tensorboard: bool = True
    trackers: tuple[NonEmpty, ...] = ()
    project: NonEmpty | None = None
    run_name: NonEmpty | None = None
    samples: SamplesConfig | None = None

    @model_validator(mode="after")
    def _each_tracker_once(self) -> LoggingConfig:
        if repeated := sorted({name for name in self.trackers if self.trackers.count(name) > 1}):
            raise ValueError(f"trackers names {', '.join(repeated)} more than once; name each tracker once")
        return self


class RunConfig(Section):
    """One training run: all of its sections, and the quantities that follow from them."""

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
        if self.parallel.layout == "given":  # with `auto` the planner's degrees replace these
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
    """The increment by its field's name, if it is set. Raises ValueError if it does not divide both batch sizes."""
    if ramp.increment is None:
        return {}
    for name, size in (("training.batch_ramp.initial", ramp.initial), ("training.global_batch_size", last)):
        if size % ramp.increment:
            raise ValueError(
                f"{name} = {size} is not a multiple of training.batch_ramp.increment = {ramp.increment}"
            )
    return {"training.batch_ramp.increment": ramp.increment}


def batch_sizes(training: TrainingConfig) -> range:
    """Every batch size of a run, in sequences per step, ascending."""
    last, ramp = training.global_batch_size, training.batch_ramp
    if ramp is None:
        return range(last, last + 1)
    return range(ramp.initial, last + 1, ramp.increment or math.gcd(ramp.initial, last))


def batch_size_divisor(training: TrainingConfig) -> int:
    """The greatest common divisor of all batch sizes of a run, in sequences."""
    sizes = batch_sizes(training)
    return math.gcd(sizes[0], sizes[-1], sizes.step if len(sizes) > 1 else 0)
