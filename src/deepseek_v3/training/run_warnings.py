"""Warns, at the start of a run, of settings that are allowed but rarely intended."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_v3.config.data_config import CorpusConfig
from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.data.tokens.source import RunTokens, WeightedSource
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value

MOST_EPOCHS = 4  # repeated text trains nearly as well as fresh text up to here (Muennighoff et al. 2023, §6)
LEAST_OF_VOCABULARY, PADDING = 0.9, 128  # rounding a vocabulary up for speed leaves fewer ids unused


def log_epochs(config: RunConfig, plan: TrainingSchedule, tokens: RunTokens) -> None:
    """Logs the share of each named source of a run, and how many times the run reads it."""
    length = config.training.sequence_length
    for part in tokens.parts:
        if part.name:
            get_logger("Data").info(
                f"Source {part.name}: {float(part.share):.2%} of the samples, {_epochs(plan, part, length):.2f} "
                f"epochs over\nthe {_available(part, length):,} training tokens of {part.source.name}"
            )


def warn_of_unusual_settings(config: RunConfig, plan: TrainingSchedule, tokens: RunTokens) -> None:
    """Logs one warning for each unusual setting of a run whose tokens are open."""
    length = config.training.sequence_length
    found = [_repetition(plan, part, length) for part in tokens.parts]
    found += [_never_read(plan, part, length) for part in tokens.parts]
    found += [_warm_up(config, plan), _vocabulary(config, tokens), *_without_effect(config.parallel)]
    if config.data.corpus is not None and isinstance(tokens, TokenShards):
        found.append(_built_otherwise(config.data.corpus, tokens))
    for warning in found:
        if warning is not None:
            get_logger("Trainer").warning(warning)


def _available(part: WeightedSource, sequence_length: int) -> int:
    """The training tokens of a source that one epoch reads."""
    return (part.source.num_tokens("train") - 1) // sequence_length * sequence_length


def _never_read(plan: TrainingSchedule, part: WeightedSource, sequence_length: int) -> str | None:
    samples = plan.total_tokens // sequence_length * part.share
    if samples >= 1 or not part.name:
        return None
    return (
        f"the weight of source {part.name} gives it less than one of the samples of this run, so it may never be "
        "read; raise its weight, or remove it"
    )


def _epochs(plan: TrainingSchedule, part: WeightedSource, sequence_length: int) -> float:
    """How many times the run reads a source."""
    return float(plan.total_tokens * part.share / max(1, _available(part, sequence_length)))


def _repetition(plan: TrainingSchedule, part: WeightedSource, sequence_length: int) -> str | None:
    epochs = _epochs(plan, part, sequence_length)
    if epochs <= MOST_EPOCHS:
        return None
    tokens = f"the {_available(part, sequence_length):,} training tokens of {part.source.name}"
    most = f"text repeated more than {MOST_EPOCHS} times teaches little; add text"
    if part.name:
        return (
            f"the source {part.name} is read {epochs:.1f} times in this run, all of {tokens}, and {most} to it, or "
            "lower its weight or training.total_tokens"
        )
    return (
        f"the budget of {plan.total_tokens:,} tokens is {epochs:.1f} epochs over {tokens}, and {most}, or lower "
        "training.total_tokens"
    )


def _warm_up(config: RunConfig, plan: TrainingSchedule) -> str | None:
    steps = config.training.schedule.warmup_steps
    if steps < plan.total_steps:
        return None
    return (
        f"training.schedule.warmup_steps = {steps:,} leaves nothing of the run of {plan.total_steps:,} steps: the "
        f"learning rate reaches {min(1.0, plan.total_steps / steps):.0%} of training.optimizer.learning_rate at "
        "most; lower warmup_steps, or raise training.total_tokens"
    )


def _vocabulary(config: RunConfig, tokens: RunTokens) -> str | None:
    known, rows = tokens.vocab_size, config.model.vocab_size
    if known >= LEAST_OF_VOCABULARY * rows or rows - known < PADDING:
        return None
    return (
        f"the tokenizer of {tokens.name} has {known:,} ids and model.vocab_size is {rows:,}: {rows - known:,} "
        "rows of the embedding and of the head are never used; set model.vocab_size to null, which follows the "
        "tokenizer, or use a larger tokenizer"
    )


def _without_effect(parallel: ParallelConfig) -> Iterator[str]:
    """Options of fewer bits in a layout or precision that has no use for them."""
    dispatches = parallel.dispatch_precision == "fp8" and parallel.expert > 1
    if parallel.gradient_reduction != "fp32" and parallel.data_ranks == 1:
        yield (
            f"parallel.gradient_reduction = {parallel.gradient_reduction} changes nothing: with one data-parallel "
            "rank, gradients are not sent"
        )
    if parallel.dispatch_precision == "fp8" and not dispatches:
        yield "parallel.dispatch_precision = fp8 changes nothing: with parallel.expert = 1, tokens are not sent"
    if parallel.fp8_scales != "float32" and parallel.precision in ("bf16", "fp32") and not dispatches:
        yield (
            f"parallel.fp8_scales = {parallel.fp8_scales} changes nothing: this run computes and sends nothing in "
            "FP8; --set parallel.precision=fp8 does"
        )


def _built_otherwise(corpus: CorpusConfig, shards: TokenShards) -> str | None:
    options = shards.index.options
    asked = {name: getattr(corpus, name) for name in ("source", "holdout", "fim_rate", "seed")}
    different = [
        f"{name} = {format_value(getattr(options, name))} where data.corpus says {format_value(value)}"
        for name, value in asked.items()
        if value is not None and value != getattr(options, name)
    ]
    if not different:
        return None
    return (
        f"{shards.directory} exists and is used as it was built, with {'; '.join(different)}; "
        "remove it to build it anew, or choose another data.path"
    )
