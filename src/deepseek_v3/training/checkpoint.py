"""The checkpoints of a run: their contents, how they are written, and how a run resumes from one.

One process writes a file, several ranks write a folder of shards; the contents are the same nested dict (its model
part is described in `model.pretrained`):

    optimizer          num_steps, exp_avg {name: tensor}, exp_avg_sq {name: tensor}; with averaged weights also ema
    random             the states of torch's random generators, uint8
    corpus             checksums of the tokenizer and of the training tokens
    skipped_in_a_row   steps without an update just before this checkpoint
    recent_steps       what the next steps are judged by: `window` and `limits` of `anomalies.RecentSteps`

The order of the data and all schedules are functions of the config and the step, so they need no entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed import ProcessGroup

from deepseek_v3.config.train_config import CheckpointConfig, RunConfig
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.model.pretrained import (
    Entries,
    ModelEntries,
    Natural,
    Tensors,
    check_entries,
    checkpoint_config,
    model_entries,
)
from deepseek_v3.training.anomalies import RecentSteps
from deepseek_v3.training.optimizer import AVERAGE
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.resume_rules import ALLOW, check_changes
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.checkpointing.checks import TensorInfo, non_finite, non_finite_summary
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory
from deepseek_v3.utils.checkpointing.errors import REPAIR
from deepseek_v3.utils.checkpointing.reader import open_checkpoint
from deepseek_v3.utils.checkpointing.sharded import (
    ShardedWriter,
    load_sharded,
    newest_checkpoint,
    verify_checkpoint,
)
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.distributed.collectives import checkpoint_group, run_on_all_ranks
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_logger

_CUDA_RANDOM_BYTES = 16  # the size of a CUDA generator's state: a seed and an offset
_AVERAGES = f"optimizer.{AVERAGE}."  # the prefix of the averaged weights
_RANDOM = "random."  # the prefix of the random states among a checkpoint's tensors


class OptimizerEntries(Entries):
    """The optimizer's part of a checkpoint."""

    num_steps: Natural
    exp_avg: Tensors
    exp_avg_sq: Tensors
    ema: Tensors | None = None


class RunEntries(ModelEntries):
    """The entries that resuming a run needs."""

    optimizer: OptimizerEntries
    random: Tensors
    corpus: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _no_more_updates_than_steps(self) -> RunEntries:
        if self.optimizer.num_steps > self.step:
            raise ValueError(f"optimizer.num_steps is {self.optimizer.num_steps}, more than step {self.step}")
        return self


class RunProgress(NamedTuple):
    """The last step of a run, and what the next ones are judged by."""

    step: int
    recent: RecentSteps


def train_state(
    engine: Engine, config: RunConfig, source: RunTokens, step: int, tokens: int, recent: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the contents of a checkpoint after `step`; sharded tensors are DTensors.

    `recent` holds the entries of `AnomalyMonitor.state`.
    """
    return {
        **model_entries(engine.models[0].state_dict(), config, source.load_tokenizer()),
        **engine.state(),
        "step": step,
        "tokens": tokens,
        **recent,
        "random": _random_state(),
        "corpus": source.identity,
    }


def load_train_state(
    path: Path,
    group: ProcessGroup | None,
    engine: Engine,
    config: RunConfig,
    schedule: TrainingSchedule,
    source: RunTokens,
    *,
    verify: bool = True,
    allow_changed_data: bool = False,
) -> RunProgress:
    """Loads the checkpoint at `path`, a file or a folder, into the run, and returns the saved run's progress.

    All ranks of `group` must call this; a group of None is one process. `verify=False` skips the checksums of a
    checkpoint that has just been verified. Moments of another floating point dtype are converted. Averages of the
    weights that the checkpoint lacks begin as its weights, and averages that the run does not keep are not read.

    Raises CheckpointError, before anything is changed, if the checkpoint is damaged, has another format, or belongs
    to another model or tokenizer, and if the run would continue with other samples or another loss.
    `allow_changed_data` permits the latter: steps keep their numbers, and their samples and schedules follow from
    the current config. Raises CheckpointError after loading if a random state cannot be restored, or if a loaded
    tensor holds NaN or infinity.
    """
    if verify:
        verify_checkpoint(path, group)
    reader = run_on_all_ranks(group, lambda: open_checkpoint(path))
    plain = reader.plain
    run_on_all_ranks(group, lambda: _check(plain, path, config, schedule, source, allow_changed_data))
    state = engine.state_to_load()
    tensors, random = flatten(state)[0], _empty_random_state(reader.tensors)
    converted = {
        name: torch.empty_like(tensor, dtype=reader.tensors[name].dtype)
        for name, tensor in tensors.items()
        if _needs_conversion(name, tensor, reader.tensors)
    }
    found = any(name.startswith(_AVERAGES) for name in reader.tensors)
    wanted = {name: tensor for name, tensor in tensors.items() if found or not name.startswith(_AVERAGES)}
    ignored = "" if engine.optimizer.has_averages else _AVERAGES
    load_sharded(path, {**wanted, **converted, **random}, group, verify=False, ignored=ignored)
    for name, values in converted.items():
        tensors[name].copy_(values)
    _restore_random_state(random, path)
    if bad := non_finite(flatten(state)[0], group):
        raise CheckpointError(
            f"{path}: {non_finite_summary(bad)}; its training had diverged, so resume an earlier checkpoint"
        )
    step, num_updates = plain["step"], plain["optimizer"]["num_steps"]
    engine.finish_loading(state, num_updates)
    if not found:
        engine.optimizer.restart_averages()
    return RunProgress(step, RecentSteps.from_checkpoint(plain, step - num_updates))


def _needs_conversion(name: str, tensor: Tensor, found: Mapping[str, TensorInfo]) -> bool:
    """Whether a moment is stored in a floating point dtype other than the run's."""
    if not name.startswith("optimizer.") or name not in found:
        return False
    return found[name].dtype.is_floating_point and found[name].dtype != tensor.dtype


def _check(
    saved: dict[str, Any],
    path: Path,
    config: RunConfig,
    schedule: TrainingSchedule,
    source: RunTokens,
    allow_changed_data: bool,
) -> None:
    """Raises CheckpointError if a checkpoint's plain values do not fit this run."""
    before = checkpoint_config(saved, path)
    if saved.get("optimizer") is None:
        raise CheckpointError(
            f"{path}: holds a model without an optimizer, expected the checkpoint of a run; start a new run from "
            "its weights with --init"
        )
    check_entries(RunEntries, saved, path)
    check_changes(before, config, path, allow_changed_data)
    _check_same_steps(saved, schedule, path, allow_changed_data)
    (tokenizer, *train), (own_tokenizer, *own_train) = saved["corpus"], source.identity
    if tokenizer != own_tokenizer:
        raise CheckpointError(
            f"{path}: was trained on the ids of another tokenizer than that of {source.name}; point data.path "
            "to tokens of its own tokenizer, such as `dsv3 tokenize --tokenizer` writes"
        )
    if train != own_train and not allow_changed_data:
        raise CheckpointError(
            f"{path}: was trained on other tokens than those in {source.name}; a resumed run must continue "
            f"the same data, so point data.path to them, or {ALLOW}"
        )
    if train != own_train:
        get_logger("Trainer").warning(f"{path} was trained on other tokens than those in {source.name}")


def _check_same_steps(
    state: dict[str, Any], schedule: TrainingSchedule, path: Path, allow_changed_data: bool
) -> None:
    """Raises CheckpointError unless the schedule has used as many tokens by this step as the checkpoint's run.

    `allow_changed_data` permits another number of tokens, but not a step beyond the end of the schedule.
    """
    step, tokens = state["step"], state["tokens"]
    if step <= schedule.total_steps and (tokens == schedule.tokens_after(step) or allow_changed_data):
        return
    if step > schedule.total_steps and (tokens >= schedule.total_tokens or allow_changed_data):
        raise CheckpointError(
            f"{path}: had trained on {tokens:,} tokens, and this run's budget of {schedule.total_tokens:,} ends "
            f"with step {schedule.total_steps:,}, before the checkpoint's step {step:,}; raise "
            "training.total_tokens to continue"
        )
    here = f"ends at {schedule.tokens_after(step):,}" if step <= schedule.total_steps else "is beyond the end"
    raise CheckpointError(
        f"{path}: had trained on {tokens:,} tokens after step {step:,}, and by this config that step {here}: "
        "samples would be skipped or seen twice. Keep training.global_batch_size, training.sequence_length, "
        f"training.batch_ramp and, with a ramp, training.total_tokens as they were, or {ALLOW}"
    )


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _empty_random_state(found: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Returns empty tensors for the random states of a checkpoint: the CPU's, and the GPU's if the file has it."""
    state = {f"{_RANDOM}cpu": torch.empty_like(torch.get_rng_state())}
    if f"{_RANDOM}cuda" in found:
        state[f"{_RANDOM}cuda"] = torch.empty(_CUDA_RANDOM_BYTES, dtype=torch.uint8)
    return state


def _restore_random_state(state: dict[str, Tensor], path: Path) -> None:
    try:
        torch.set_rng_state(state[f"{_RANDOM}cpu"])
        if f"{_RANDOM}cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state[f"{_RANDOM}cuda"])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: 'random' is not a generator's state: {reason}; {REPAIR}") from None


class CheckpointManager:
    """Writes the checkpoints of a run; as a context manager, it waits on exit until every checkpoint is complete.

    All ranks must call every method. Several ranks write in the background while training continues, one checkpoint
    at a time; a single process writes before `save` returns.
    """

    def __init__(self, config: CheckpointConfig, mesh: ParallelMesh) -> None:
        self.directory = CheckpointDirectory(config.directory, config.keep, config.keep_every_steps)
        self.group = None if mesh.is_alone else checkpoint_group()
        self._writer = None if mesh.is_alone else ShardedWriter(self.directory, self.group, _log_saved)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def find_start(self, resume: str | None) -> Path | None:
        """Returns the checkpoint to resume; None for a new run.

        `resume` is the path of a checkpoint, `latest` for the newest undamaged one, `auto` for `latest` if there is
        any checkpoint and a new run otherwise, or None for a new run. Raises CheckpointError if `latest` finds no
        checkpoint, or if a new run would write into a folder that holds the checkpoints of another run.
        """
        if resume == "auto":
            resume = "latest" if run_on_all_ranks(self.group, self.directory.steps) else None
        if resume is None:
            run_on_all_ranks(self.group, self.directory.refuse_if_used)
            return None
        return newest_checkpoint(self.directory, self.group) if resume == "latest" else Path(resume)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Saves `state` as the checkpoint of `step` and returns its path; logs the path once it is complete.

        With several ranks the checkpoint may still be incomplete on return. Raises CheckpointError if this
        checkpoint, or the previous one that was written in the background, cannot be saved.
        """
        if self._writer is not None:
            return self._writer.save(step, state).path
        path = self.directory.save(step, state)
        _log_saved(path)
        return path

    def finish(self) -> None:
        """Waits until the checkpoint being written is complete or has failed; the watchdog's thread calls this."""
        if self._writer is not None:
            self._writer.finish()


def _log_saved(path: Path) -> None:
    get_logger("Trainer").info(f"Saved {path}")
