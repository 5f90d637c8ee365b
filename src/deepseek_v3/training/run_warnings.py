"""Warns of what a run seldom means to do: at its start of its settings, and while it trains of its figures."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

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

LEAST_MEAN_LOAD = 8  # tokens of an expert in a step; with fewer, one may be left out by chance
WIDEST_BIASES = 1.0  # between two biases of a layer: the scores that they are added to lie between 0 and 1
RECENT_SPEEDS, FIRST_SPEEDS, LEAST_SPEED, LEAST_SECONDS = 20, 10, 0.5, 2.0  # shorter intervals are mostly noise
RECENT_LOSSES, MOST_RISE = 5, 1.0  # in records, and in nats per token
MOST_HELD_OUT_RISE, MOST_GAP_RISE = 0.05, 0.1  # nats per token; the held-out text is always the same

ADVICE = {
    "dead expert": "raise training.balance.bias_update_speed or sequence_loss_weight; if the expert stays dead, "
    "resume a checkpoint from before",
    "collapsed entropy": "raise training.balance.bias_update_speed, lower training.optimizer.learning_rate, and "
    "resume a checkpoint from before",
    "runaway routing bias": "lower training.balance.bias_update_speed, and look for one source of data that few "
    "experts take",
    "throughput drop": "look for a slow host, disk or neighbour, and for a GPU that lowers its clock; "
    "--profile 3 shows where the time goes",
    "divergence": "lower training.optimizer.learning_rate or lengthen training.schedule.warmup_steps, and resume a "
    "checkpoint from before; training.spikes.action=rollback does so by itself",
    "held-out gap": "the run learns its text by heart: add text, lower training.total_tokens, or stop here",
}


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


class RunAlarms:
    """Judges every record of metrics.jsonl as it is written, so that an alarm comes within one logging interval.

    An alarm is logged with its meaning and with what to try, and `record(event, step, kind, meaning, advice)` adds
    it to the run's events. It comes again only after its cause had gone. Dead experts and collapsed entropy count
    after the warm-up of the learning rate, because routers start at random. Nothing here changes the run.
    """

    def __init__(
        self, config: RunConfig, plan: TrainingSchedule, record: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        self._config, self._plan, self._record = config, plan, record
        self._speeds: deque[float] = deque(maxlen=RECENT_SPEEDS)
        self._losses: deque[float] = deque(maxlen=RECENT_LOSSES)
        self._lowest_loss = math.inf
        self._best_held_out = (math.inf, math.inf)  # the lowest held-out loss, and its gap to the training loss
        self._tokens = 0
        self._present: set[str] = set()

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Judges the record of a step or of a validation; figures that it lacks are not judged."""
        found: dict[str, str | None] = {}
        if "loss" in record:
            found |= {"throughput drop": self._slower(record), "divergence": self._diverged(record["loss"])}
        if "experts/entropy" in record:
            found["runaway routing bias"] = _runaway_bias(record)
            if step > self._config.training.schedule.warmup_steps:
                found |= {"dead expert": self._dead(step, record), "collapsed entropy": self._collapsed(record)}
        if "holdout_loss" in record:
            found["held-out gap"] = self._gap(record["holdout_loss"])
        for kind, meaning in found.items():
            if meaning is not None and kind not in self._present:
                get_logger("Trainer").warning(f"step {step}: {kind}: {meaning}; {ADVICE[kind]}")
                self._record("alarm", step, kind=kind, meaning=meaning, advice=ADVICE[kind])
        self._present |= {kind for kind, meaning in found.items() if meaning is not None}
        self._present -= {kind for kind, meaning in found.items() if meaning is None}

    def _dead(self, step: int, record: Mapping[str, Any]) -> str | None:
        model, samples = self._config.model, self._plan.step(step).num_samples
        tokens = samples * self._config.training.sequence_length
        mean = tokens * model.num_experts_per_tok / model.n_routed_experts
        dead = [round((1 - used) * model.n_routed_experts) for used in record["experts/utilisation"]]
        if not any(dead) or mean < LEAST_MEAN_LOAD:
            return None
        layer = dead.index(max(dead))
        return (
            f"{dead[layer]} of {model.n_routed_experts} experts of MoE layer {layer + 1} received no token in this "
            f"step, where the mean is {mean:,.0f}"
        )

    def _collapsed(self, record: Mapping[str, Any]) -> str | None:
        model, lowest = self._config.model, min(record["experts/entropy"])
        one_choice = math.log(model.num_experts_per_tok) / math.log(max(model.n_routed_experts, 2))
        limit = (1 + one_choice) / 2
        if lowest >= limit or one_choice == 1:
            return None
        layer = record["experts/entropy"].index(lowest) + 1
        return (
            f"the load of MoE layer {layer} has {lowest:.3f} of the entropy of an even load, and {one_choice:.3f} "
            "if all tokens go to the same experts"
        )

    def _slower(self, record: Mapping[str, Any]) -> str | None:
        speed, tokens = record["tokens_per_second"], record["tokens"] - self._tokens
        self._tokens = record["tokens"]
        usual = median(self._speeds) if len(self._speeds) >= FIRST_SPEEDS else 0.0
        self._speeds.append(speed)
        if speed >= LEAST_SPEED * usual or tokens < LEAST_SECONDS * speed:
            return None
        return f"{speed:,.0f} tokens per second, and {usual:,.0f} in the median of the reports before"

    def _diverged(self, loss: float) -> str | None:
        before = self._lowest_loss
        if not math.isfinite(loss):
            return None  # a step that is skipped, or ends the run
        self._losses.append(loss)
        if len(self._losses) == RECENT_LOSSES:
            self._lowest_loss = min(before, median(self._losses))
        if loss <= before + MOST_RISE:
            return None
        return f"the loss is {loss:.3f} nats per token, and has been {before:.3f}"

    def _gap(self, held_out: float) -> str | None:
        if len(self._losses) < RECENT_LOSSES or not math.isfinite(held_out):
            return None
        gap = held_out - median(self._losses)
        self._best_held_out = lowest, smallest = min(self._best_held_out, (held_out, gap))
        if held_out <= lowest + MOST_HELD_OUT_RISE or gap <= smallest + MOST_GAP_RISE:
            return None
        return (
            f"the held-out loss has risen from {lowest:.3f} to {held_out:.3f} nats per token, and its gap to the "
            f"training loss from {smallest:.3f} to {gap:.3f}"
        )


def _runaway_bias(record: Mapping[str, Any]) -> str | None:
    widths = [high - low for low, high in zip(record["experts/bias_min"], record["experts/bias_max"], strict=True)]
    if max(widths) <= WIDEST_BIASES:
        return None
    layer = widths.index(max(widths)) + 1
    return (
        f"the routing biases of MoE layer {layer} are {max(widths):.2f} apart, more than any two scores, so that "
        "they decide alone"
    )
