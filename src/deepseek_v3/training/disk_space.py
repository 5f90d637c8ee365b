"""Checks, before a run begins, that the disk has room for its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_parameters
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory
from deepseek_v3.utils.errors import PlanError
from deepseek_v3.utils.logging import get_logger

_MASTER_WEIGHT_BYTES = 4
_BYTES_OF_AN_ID = 128  # of tokenizer.json, at most
_OTHER_BYTES = 2**16  # the config, random states, tensor names and padding


def check_disk(config: RunConfig, resume: str | None, force: bool) -> None:
    """Raises PlanError if the run's checkpoints do not fit on the disk; with `force` it only logs a warning.

    The checkpoint folder must exist.
    """
    directory = config.checkpoint.directory
    free = shutil.disk_usage(directory).free
    keep, every = config.checkpoint.keep, config.checkpoint.keep_every_steps
    there = CheckpointDirectory(directory, keep)
    last = max(there.steps(), default=0) if resume in ("latest", "auto") else 0
    saves = _saves_after(last, config)
    if not saves:
        return
    steps = sorted({*there.steps(), *saves})
    present, size = sum(map(_size_of, there.newest_first())), checkpoint_bytes(config)

    def needed(keep: int) -> int:
        """The most additional bytes: the complete checkpoints that are kept, and the one that is being written."""
        for_ever = {step for step in steps[:-1] if every and step % every == 0}
        return max(size, (len(for_ever.union(steps[:-1][-keep:])) + 1) * size - present)

    if needed(keep) <= free:
        return
    fitting = next((fewer for fewer in range(keep - 1, 0, -1) if needed(fewer) <= free), None)
    instead = "" if fitting is None else f"set checkpoint.keep={fitting}, which needs {_gb(needed(fitting))}, or "
    problem = (
        f"{directory}: the next checkpoints need {_gb(needed(keep))} and {_gb(free)} are free: each takes "
        f"{_gb(size)}, checkpoint.keep = {keep} are kept{_and_those_of(every)}, and one more is being written; "
        f"{instead}make room, or "
        "choose another folder with --set checkpoint.directory=..."
    )
    if not force:
        raise PlanError(f"{problem}; --force starts it as it is")
    get_logger("Plan").warning(f"started by --force although {problem}")


def checkpoint_bytes(config: RunConfig) -> int:
    """Estimates the bytes of one checkpoint: float32 weights, optimizer state, the tokenizer, and little else."""
    per_parameter = _MASTER_WEIGHT_BYTES + config.training.optimizer.state_bytes
    others = _BYTES_OF_AN_ID * config.model.vocab_size + _OTHER_BYTES
    return count_parameters(config.model).with_prediction * per_parameter + others


def _saves_after(step: int, config: RunConfig) -> list[int]:
    """The steps whose checkpoints a run writes after `step`, if no signal stops it."""
    total, interval = TrainingSchedule(config).total_steps, config.checkpoint.interval_steps
    if step >= total:
        return []
    first = (step // interval + 1) * interval if interval else total
    return [*range(first, total, interval or 1), total]


def _and_those_of(every: int) -> str:
    return f" and those of every {every:,} steps" if every else ""


def _size_of(path: Path) -> int:
    """The bytes of a checkpoint; 0 if its files cannot be read."""
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    except OSError:
        return 0


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
