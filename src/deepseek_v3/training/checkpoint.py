"""What a run needs to go on as if it had never stopped.

FOLDED: The checkpoints of a run as it makes and uses them: files of one process, folders of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from deepseek_v3.config.train_config import CheckpointConfig, RunConfig
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.model.pretrained import checkpoint_config, model_entries, split_entries
from deepseek_v3.model.saved_entries import RunEntries, check_entries
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.resume_rules import ALLOW, check_changes
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.checkpointing.checks import (
    SAME_CONFIG_ADVICE,
    TensorInfo,
    mismatches,
    non_finite,
    non_finite_summary,
    raise_problems,
    tensor_infos,
    unexpected_tensors,
)
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, load_checkpoint
from deepseek_v3.utils.checkpointing.errors import REPAIR
from deepseek_v3.utils.checkpointing.reader import open_checkpoint
from deepseek_v3.utils.checkpointing.sharded import ShardedWriter, load_sharded, newest_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.distributed.collectives import checkpoint_group, run_on_all_ranks
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_logger

_CUDA_RANDOM_BYTES = 16  # a seed and an offset
_RANDOM = "random."  # what the names of random states begin with, among a checkpoint's tensors


class RunProgress(NamedTuple):
    """How far a run has come: its last step, how many steps it has skipped, and how many of these came last."""

    step: int
    skipped: int = 0
    skipped_in_a_row: int = 0


def train_state(
    engine: Engine, config: RunConfig, shards: TokenShards, step: int, tokens: int, skipped_in_a_row: int = 0
) -> dict[str, Any]:
    """The entries of a checkpoint: the model's own, then progress, optimizer, random state and data identity.

    Data order and schedules need no entry: they are functions of the config and the step.
    """
    return {
        **model_entries(engine.models[0], config, shards.load_tokenizer().to_json()),
        **engine.state(),
        "step": step,
        "tokens": tokens,
        "skipped_in_a_row": skipped_in_a_row,
        "random": _random_state(),
        "corpus": _identity(shards),
    }


def load_train_state(
    path: Path,
    group: ProcessGroup | None,
    engine: Engine,
    config: RunConfig,
    plan: TrainingSchedule,
    shards: TokenShards,
    *,
    verify: bool = True,
    allow_changed_data: bool = False,
) -> RunProgress:
    """Puts a checkpoint's state in place, on all ranks of `group` together, and returns how far its run had come.

    `verify=False` skips the checksums of one that has just been verified.
    Raises CheckpointError, before anything is changed, where it is damaged, of another model or tokenizer, and,
    unless `allow_changed_data`, where other samples would come next or the loss would mean something else. Then
    steps keep their numbers, and the samples and schedules are those that the config gives to these steps.
    Raises it too, once the state is in place, where any of it is NaN or infinite.
    """
    if group is None:
        found, plain = split_entries(load_checkpoint(path, verify=verify), path)
        _check(plain, path, config, plan, shards, allow_changed_data)
        places = engine.places()
        random = _fill(flatten(places)[0], found, path)
    else:
        contents = run_on_all_ranks(group, lambda: open_checkpoint(path))
        plain = contents.plain
        run_on_all_ranks(group, lambda: _check(plain, path, config, plan, shards, allow_changed_data))
        places = engine.places()
        tensors, random = flatten(places)[0], _random_places(contents.tensors)
        converted = {
            name: torch.empty_like(tensors[name], dtype=info.dtype)
            for name, info in _expected(tensors, contents.tensors).items()
            if info.dtype != tensors[name].dtype
        }
        load_sharded(path, {**tensors, **converted, **random}, group, verify=verify)
        for name, values in converted.items():
            tensors[name].copy_(values)
    _restore_random_state(random, path)
    if bad := non_finite(flatten(places)[0], group):
        raise CheckpointError(
            f"{path}: {non_finite_summary(bad)}; its training had diverged, so resume an earlier checkpoint"
        )
    step, taken = plain["step"], plain["optimizer"]["num_steps"]
    engine.loaded(places, taken)
    return RunProgress(step, step - taken, plain.get("skipped_in_a_row", 0))


def _expected(tensors: dict[str, Tensor], found: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What a checkpoint has to say of this run's tensors; moments of any floating type are converted."""
    expected = tensor_infos(tensors)
    for name, info in expected.items():
        if name.startswith("optimizer.") and name in found and found[name].dtype.is_floating_point:
            expected[name] = info._replace(dtype=found[name].dtype)
    return expected


def _fill(tensors: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Copies what a checkpoint holds into the tensors of a run in one process; returns its random states."""
    saved = tensor_infos(found)
    random = _random_places(saved)
    expected = {**_expected(tensors, saved), **tensor_infos(random)}
    raise_problems(
        path,
        [*mismatches(saved, expected), *unexpected_tensors(sorted(saved.keys() - expected.keys()))],
        SAME_CONFIG_ADVICE,
    )
    for name, tensor in tensors.items():
        tensor.detach().copy_(found[name])
    return {name: found[name] for name in random}


def _check(
    saved: dict[str, Any],
    path: Path,
    config: RunConfig,
    plan: TrainingSchedule,
    shards: TokenShards,
    allow_changed_data: bool,
) -> None:
    """Raises CheckpointError where a checkpoint's plain values are not of this run."""
    before = checkpoint_config(saved, path)
    check_entries(RunEntries, saved, path)
    check_changes(before, config, path, allow_changed_data)
    _check_same_steps(saved, plan, path, allow_changed_data)
    (tokenizer, *train), (own_tokenizer, *own_train) = saved["corpus"], _identity(shards)
    if tokenizer != own_tokenizer:
        raise CheckpointError(
            f"{path}: was trained on the ids of another tokenizer than that of {shards.directory}; point data.path "
            "to shards of its own tokenizer, such as `dsv3 tokenize --tokenizer` writes"
        )
    if train != own_train and not allow_changed_data:
        raise CheckpointError(
            f"{path}: was trained on other tokens than those in {shards.directory}; a resumed run must continue "
            f"the same data, so point data.path to them, or {ALLOW}"
        )
    if train != own_train:
        get_logger("Trainer").warning(f"{path} was trained on other tokens than those in {shards.directory}")


def _identity(shards: TokenShards) -> list[str]:
    """What tells one corpus from another: the checksums of its tokenizer and of its training shards."""
    return [shards.index.tokenizer_sha256, *(shard.sha256 for shard in shards.index.train)]


def _check_same_steps(state: dict[str, Any], plan: TrainingSchedule, path: Path, allow_changed_data: bool) -> None:
    """The data goes on where it stopped only if the plan has used as many tokens by this step."""
    step, tokens = state["step"], state["tokens"]
    if step <= plan.total_steps and (tokens == plan.tokens_after(step) or allow_changed_data):
        return
    if step > plan.total_steps and (tokens >= plan.total_tokens or allow_changed_data):
        raise CheckpointError(
            f"{path}: had trained on {tokens:,} tokens, and this run's budget of {plan.total_tokens:,} ends with "
            f"step {plan.total_steps:,}, before the checkpoint's step {step:,}; raise training.total_tokens to "
            "go on"
        )
    here = f"ends at {plan.tokens_after(step):,}" if step <= plan.total_steps else "is beyond the end"
    raise CheckpointError(
        f"{path}: had trained on {tokens:,} tokens after step {step:,}, and by this config that step {here}: "
        "samples would be skipped or seen twice. Keep training.global_batch_size, training.sequence_length, "
        f"training.batch_ramp and, with a ramp, training.total_tokens as they were, or {ALLOW}"
    )


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _random_places(found: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Room for the random states of a checkpoint: that of the CPU, and of a GPU where it was saved on one."""
    places = {f"{_RANDOM}cpu": torch.empty_like(torch.get_rng_state())}
    if f"{_RANDOM}cuda" in found:
        places[f"{_RANDOM}cuda"] = torch.empty(_CUDA_RANDOM_BYTES, dtype=torch.uint8)
    return places


def _restore_random_state(state: dict[str, Tensor], path: Path) -> None:
    try:
        torch.set_rng_state(state[f"{_RANDOM}cpu"])
        if f"{_RANDOM}cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state[f"{_RANDOM}cuda"])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: 'random' is no state of a random generator: {reason}; {REPAIR}") from None


class CheckpointManager:
    """For a `with` block around the training, at whose end every checkpoint is complete.

    All ranks call everything together. Several ranks write a checkpoint while training goes on, one at a time.
    """

    def __init__(self, config: CheckpointConfig, mesh: ParallelMesh) -> None:
        self.directory = CheckpointDirectory(config.directory, config.keep)
        self.group = None if mesh.is_alone else checkpoint_group()
        self._writer = None if mesh.is_alone else ShardedWriter(self.directory, self.group, _tell_saved)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def start(self, resume: str | None) -> Path | None:
        """What to continue: a checkpoint's path, the newest good one for `latest`, None for a fresh start.

        `auto` is `latest` where there is any, else a fresh start. Raises CheckpointError where there is nothing to
        continue, or where a fresh start would write among the checkpoints of another run.
        """
        if resume == "auto":
            resume = "latest" if run_on_all_ranks(self.group, self.directory.steps) else None
        if resume is None:
            run_on_all_ranks(self.group, self.directory.refuse_if_used)
            return None
        return newest_checkpoint(self.directory, self.group) if resume == "latest" else Path(resume)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Saves, or begins to, the checkpoint of a step, and logs each one that is complete.

        Raises the CheckpointError of this one or the last.
        """
        if self._writer is not None:
            return self._writer.save(step, state).path
        path = self.directory.save(step, state)
        _tell_saved(path)
        return path

    def finish(self) -> None:
        """Waits, from another thread, for a checkpoint that is being written."""
        if self._writer is not None:
            self._writer.finish()


def _tell_saved(path: Path) -> None:
    get_logger("Trainer").info(f"Saved {path}")
