"""Reads a DeepSpeed JSON file, fills in the fields that the run decides, and refuses fields that contradict it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepseek_v3.config.errors import describe_errors
from deepseek_v3.config.loading import find_config
from deepseek_v3.config.text_files import read_json_object
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger

_AUTO = "auto"
_STAGES = (1, 2, 3)
_SECTIONS = ("bf16", "data_types", "zero_optimization")  # sections whose fields `filled` sets
# Sections that the file must not enable, and why: the run's config decides them, or runs do not support them.
_REFUSED = {
    "optimizer": "the optimizer is training.optimizer",
    "scheduler": "the schedule is training.schedule",
    "fp16": "parallel.precision is bf16, fp8 or fp32",
    "amp": "parallel.precision is bf16, fp8 or fp32",
    "torch_autocast": "parallel.precision is bf16, fp8 or fp32",
    "curriculum_learning": "the order of the data is the run's",
    "data_efficiency": "the order of the data is the run's",
}


class DeepSpeedFile:
    """The settings of one DeepSpeed file; the value `auto` leaves a field to the run or to DeepSpeed.

    Raises ConfigError, naming file and field, if the file cannot be read or asks for what runs do not support.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = _read(path)
        for section, reason in _REFUSED.items():
            found = self.settings.get(section)
            if found and not (isinstance(found, dict) and found.get("enabled") is False):
                raise ConfigError(f"{path}: {section}: {reason}; remove this section")
        for section in _SECTIONS:
            found = self.settings.get(section, {})
            if not isinstance(found, dict) and found != _AUTO:
                raise ConfigError(f"{path}: {section} = {json.dumps(found)}: expected an object: {{...}}")
        self.stage = self._stage()

    def resolve_layout(self, config: RunConfig, processes: int) -> RunConfig:
        """Returns the run's config with `processes` data-parallel ranks, whatever degrees it gives.

        Raises ConfigError if the batch does not divide over them, if `parallel.compile` is true at stage 3, or if
        the config asks for gradients in fewer bits, which DeepSpeed would add in those.
        """
        given = config.parallel
        if given.gradient_reduction != "fp32":
            raise ConfigError(
                f"parallel.gradient_reduction = {given.gradient_reduction} needs FSDP: DeepSpeed would also add "
                "gradients in fewer bits; use --set parallel.gradient_reduction=fp32, or train without --deepspeed"
            )
        if self.stage == 3 and given.compile is True:
            raise ConfigError(
                f"{self.path}: zero_optimization.stage = 3 gathers weights inside layers, which then cannot be "
                "compiled whole; use --set parallel.compile=auto, or stage 1 or 2"
            )
        changes: dict[str, Any] = dict.fromkeys(("data_replicate", "expert", "pipeline"), 1)
        changes |= {"layout": "given", "data_shard": processes, "zero_stage": self.stage}
        if self.stage == 3:
            changes["compile"] = False
        parallel = given.model_copy(update=changes)
        if (given.expert, given.pipeline) != (1, 1):
            get_logger("Plan").info(
                f"DeepSpeed runs data parallelism over {processes} processes, in place of parallel.expert = "
                f"{given.expert} and parallel.pipeline = {given.pipeline}"
            )
        try:
            return RunConfig(**{**dict(config), "parallel": parallel})
        except ValidationError as error:
            raise ConfigError(describe_errors(error, RunConfig, {(): f"over {processes} processes"})) from None

    def filled(self, config: RunConfig, is_bfloat16: bool) -> dict[str, Any]:
        """Returns DeepSpeed's settings for a resolved run. Raises ConfigError if fields contradict the run."""
        settings = _without_auto(self.settings)
        for field, (value, origin) in _decided(config, is_bfloat16).items():
            section, name = _section_of(settings, field)
            if section.setdefault(name, value) != value:
                raise ConfigError(
                    f"{self.path}: {field} = {json.dumps(section[name])}, and the run's {origin} makes it "
                    f'{json.dumps(value)}; write "auto", or change one of the two'
                )
        for field, value in _defaults(is_bfloat16).items():
            section, name = _section_of(settings, field)
            section.setdefault(name, value)
        return settings

    def _stage(self) -> int:
        section = _without_auto(self.settings).get("zero_optimization", {})
        found = section.get("stage", 3)
        if isinstance(found, bool) or found not in _STAGES:
            raise ConfigError(f"{self.path}: zero_optimization.stage = {json.dumps(found)}: expected 1, 2 or 3")
        return int(found)


def _decided(config: RunConfig, is_bfloat16: bool) -> dict[str, tuple[Any, str]]:
    """The fields that the run decides: each with its value, and the part of the run that it follows from."""
    batch, micro = config.training.global_batch_size, config.parallel.micro_batch_size
    ranks = config.parallel.data_ranks
    return {
        "train_batch_size": (batch, f"training.global_batch_size = {batch}"),
        "train_micro_batch_size_per_gpu": (micro, f"parallel.micro_batch_size = {micro}"),
        "gradient_accumulation_steps": (
            batch // (micro * ranks),
            f"batch of {batch} in micro-batches of {micro} on {ranks} ranks",
        ),
        "gradient_clipping": (
            config.training.optimizer.max_grad_norm,
            f"training.optimizer.max_grad_norm = {config.training.optimizer.max_grad_norm}",
        ),
        "bf16.enabled": (is_bfloat16, f"parallel.precision = {config.parallel.precision} on this device"),
        "zero_optimization.stage": (config.parallel.zero_stage, f"ZeRO stage {config.parallel.zero_stage}"),
        "zero_allow_untested_optimizer": (True, "optimizer"),
        "zero_force_ds_cpu_optimizer": (False, "optimizer"),
    }


def _defaults(is_bfloat16: bool) -> dict[str, Any]:
    """Defaults that a file may override; gradients are summed in float32, as under every other layout."""
    sums = {"communication_data_type": "fp32", "data_types.grad_accum_dtype": "fp32"} if is_bfloat16 else {}
    return {"steps_per_print": 2**31 - 1, **sums}


def _read(path: Path) -> dict[str, Any]:
    path = find_config(path)
    if not os.path.exists(path):  # noqa: PTH110 -- False too for names that no file can have
        raise ConfigError(f"{path}: there is no such file; configs/deepspeed_config.json is one to start from")
    return read_json_object(path)


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy without the fields whose value is `auto`."""
    return dict(_kept(settings))


def _kept(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if value != _AUTO:
            yield name, _without_auto(value) if isinstance(value, dict) else value


def _section_of(settings: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """Returns the section of a dotted field, which is created if it is missing, and the field's name in it."""
    section, _, name = field.rpartition(".")
    return (settings.setdefault(section, {}) if section else settings), name
