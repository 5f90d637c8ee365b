"""Which fields of the config a resumed run may change: one rule for every field, the same on every layout."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, get_origin

from deepseek_v3.config.base import Section
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value


class Rule(Enum):
    """The effect of resuming with another value of a field."""

    REFUSED = "another model, which the checkpoint's weights do not fit"
    DATA = "changes which samples come next, or what the loss means: refused unless changed data are allowed"
    LOGGED = "changes the recipe or how it runs: allowed, and logged"
    FREE = "changes nothing of the training: allowed"


RULES: dict[str, Rule] = {
    "model": Rule.REFUSED,  # every other field of it
    "model.use_fp8_kv": Rule.FREE,  # the cache of generated samples
    "training.seed": Rule.DATA,
    "training.total_tokens": Rule.LOGGED,
    "training.deliberate_overtraining": Rule.FREE,
    "training.sequence_length": Rule.DATA,
    "training.global_batch_size": Rule.DATA,
    "training.batch_ramp.initial": Rule.DATA,
    "training.batch_ramp.increment": Rule.DATA,
    "training.batch_ramp.fraction": Rule.DATA,
    "training.optimizer.learning_rate": Rule.LOGGED,
    "training.optimizer.beta1": Rule.LOGGED,
    "training.optimizer.beta2": Rule.LOGGED,
    "training.optimizer.eps": Rule.LOGGED,
    "training.optimizer.weight_decay": Rule.LOGGED,
    "training.optimizer.max_grad_norm": Rule.LOGGED,
    "training.optimizer.moments": Rule.LOGGED,
    "training.optimizer.ema_decay": Rule.LOGGED,
    "training.schedule.kind": Rule.LOGGED,
    "training.schedule.warmup_steps": Rule.LOGGED,
    "training.schedule.decay_fraction": Rule.LOGGED,
    "training.schedule.final_ratio": Rule.LOGGED,
    "training.prediction.weight": Rule.LOGGED,
    "training.prediction.final_weight": Rule.LOGGED,
    "training.prediction.switch_at": Rule.LOGGED,
    "training.balance.bias_update_speed": Rule.LOGGED,
    "training.balance.bias_update_until": Rule.LOGGED,
    "training.balance.sequence_loss_weight": Rule.LOGGED,
    "training.evaluation.interval_steps": Rule.LOGGED,
    "training.evaluation.tokens": Rule.LOGGED,
    "training.evaluation.mtp_acceptance": Rule.FREE,
    "training.max_skipped_steps": Rule.LOGGED,
    "training.spikes.action": Rule.LOGGED,
    "training.spikes.window": Rule.LOGGED,
    "training.spikes.loss_threshold": Rule.LOGGED,
    "training.spikes.norm_threshold": Rule.LOGGED,
    "training.spikes.max_rollbacks": Rule.LOGGED,
    "training.loss_terms": Rule.LOGGED,
    "parallel.layout": Rule.FREE,  # the degrees that it leads to are compared themselves
    "parallel.data_replicate": Rule.LOGGED,
    "parallel.data_shard": Rule.LOGGED,
    "parallel.expert": Rule.LOGGED,
    "parallel.pipeline": Rule.LOGGED,
    "parallel.zero_stage": Rule.LOGGED,
    "parallel.pipeline_schedule": Rule.LOGGED,
    "parallel.expert_back_end": Rule.LOGGED,
    "parallel.dispatch_precision": Rule.LOGGED,
    "parallel.micro_batch_size": Rule.LOGGED,
    "parallel.precision": Rule.LOGGED,
    "parallel.fp8_scales": Rule.LOGGED,
    "parallel.gradient_reduction": Rule.LOGGED,
    "parallel.recomputation": Rule.LOGGED,
    "parallel.compile": Rule.LOGGED,
    "data.path": Rule.FREE,  # the checksums of its contents are compared instead
    "data.tokenizer": Rule.FREE,  # likewise
    "data.holdout": Rule.DATA,
    "data.holdout_path": Rule.LOGGED,
    "data.sources.name": Rule.LOGGED,
    "data.sources.weight": Rule.DATA,
    "data.sources.path": Rule.FREE,  # as data.path
    "data.sources.tokenizer": Rule.FREE,
    "data.sources.holdout": Rule.DATA,
    "data.sources.holdout_path": Rule.LOGGED,
    "data.corpus.source": Rule.FREE,
    "data.corpus.vocab_size": Rule.LOGGED,
    "data.corpus.holdout": Rule.LOGGED,
    "data.corpus.fim_rate": Rule.LOGGED,
    "data.corpus.seed": Rule.LOGGED,
    "data.mask_documents": Rule.DATA,
    "data.verify_checksums": Rule.FREE,
    "checkpoint.directory": Rule.FREE,
    "checkpoint.interval_steps": Rule.FREE,
    "checkpoint.keep": Rule.FREE,
    "checkpoint.keep_every_steps": Rule.FREE,
    "logging.directory": Rule.FREE,
    "logging.interval_steps": Rule.FREE,
    "logging.tensorboard": Rule.FREE,
    "logging.trackers": Rule.FREE,
    "logging.project": Rule.FREE,
    "logging.run_name": Rule.FREE,
    "logging.samples.prompts": Rule.FREE,
    "logging.samples.interval_steps": Rule.FREE,
    "logging.samples.max_new_tokens": Rule.FREE,
}


def rule_of(field: str) -> Rule:
    """The rule of a dotted field. Raises KeyError for a field without a rule."""
    return RULES["model"] if field.startswith("model.") and field not in RULES else RULES[field]


def check_changes(saved: RunConfig, current: RunConfig, path: Path, allow_changed_data: bool) -> None:
    """Compares the `saved` config of the checkpoint at `path` with the `current` config of the resuming run.

    Logs the changes in one line. Raises CheckpointError, with the fields and both values, for another model, and
    for changes of the data unless `allow_changed_data` is set.
    """
    if different := changes_of(saved, current, Rule.REFUSED):
        raise CheckpointError(f"{path}: is of another model: {different}; resume with the values before ->")
    if (different := changes_of(saved, current, Rule.DATA)) and not allow_changed_data:
        raise CheckpointError(
            f"{path}: this config changes which samples come next, or what the loss means: {different}; "
            f"resume with the values before ->, or {ALLOW}"
        )
    if different := changes_of(saved, current, Rule.DATA, Rule.LOGGED):
        get_logger("Trainer").warning(f"the config differs from the checkpoint's: {different}")


def changes_of(saved: RunConfig, current: RunConfig, *rules: Rule) -> str:
    """The fields with one of these rules that differ between two configs: `field: before -> after; …`."""
    pairs = zip(fields_of(RunConfig, saved), fields_of(RunConfig, current), strict=True)
    return "; ".join(
        f"{field}: {format_value(before)} -> {format_value(after)}"
        for (field, before), (_, after) in pairs
        if before != after and rule_of(field) in rules
    )


ALLOW = "change them on purpose by --allow-changed-data (allow_changed_data=True)"


def fields_of(section: type[Section], values: Section | None, prefix: str = "") -> list[tuple[str, Any]]:
    """Lists every field of a section and its subsections by dotted name, with its value; None if absent.

    A field of a list of sections has the list of its values as its value.
    """
    found: list[tuple[str, Any]] = []
    for name, field in section.model_fields.items():
        value = None if values is None else getattr(values, name)
        inner = section.subsection(name)
        if inner is None:
            found.append((prefix + name, value))
        elif get_origin(field.annotation) is tuple:
            columns = [(each, [getattr(row, each) for row in value or ()]) for each in inner.model_fields]
            found += [(f"{prefix}{name}.{each}", column) for each, column in columns]
        else:
            found += fields_of(inner, value, f"{prefix}{name}.")
    return found
