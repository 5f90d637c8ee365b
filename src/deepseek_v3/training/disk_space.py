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
    there = CheckpointDirectory(directory, config.checkpoint.keep)
    last = max(there.steps(), default=0) if resume in ("latest", "auto") else 0
    saves = _saves_after(last, config)
    if saves == 0:
        return
    paths = there.newest_first()
    present, size = sum(map(_size_of, paths)), checkpoint_bytes(config)

    def needed(keep: int) -> int:
        """The most additional bytes: `keep` complete checkpoints, and the one that is being written."""
        return max(size, min(keep + 1, len(paths) + saves) * size - present)

    keep = config.checkpoint.keep
    if needed(keep) <= free:
        return
    fitting = next((fewer for fewer in range(keep - 1, 0, -1) if needed(fewer) <= free), None)
    instead = "" if fitting is None else f"set checkpoint.keep={fitting}, which needs {_gb(needed(fitting))}, or "
    problem = (
        f"{directory}: the next checkpoints need {_gb(needed(keep))} and {_gb(free)} are free: each takes "
        f"{_gb(size)}, checkpoint.keep = {keep} are kept, and one more is being written; {instead}make room, or "
        "choose another folder with --set checkpoint.directory=..."
    )
    if not force:
        raise PlanError(f"{problem}; --force starts it as it is")
    get_logger("Plan").warning(f"started by --force although {problem}")


def checkpoint_bytes(config: RunConfig) -> int:
    """Estimates the bytes of one checkpoint: float32 weights, two moments, the tokenizer, and little else."""
    per_parameter = _MASTER_WEIGHT_BYTES + 2 * config.training.optimizer.moment_bytes
    others = _BYTES_OF_AN_ID * config.model.vocab_size + _OTHER_BYTES
    return count_parameters(config.model).with_prediction * per_parameter + others


def _saves_after(step: int, config: RunConfig) -> int:
    """The number of checkpoints that a run writes after `step`, if no signal stops it."""
    total, interval = TrainingSchedule(config).total_steps, config.checkpoint.interval_steps
    if step >= total:
        return 0
    at_intervals = (total - 1) // interval - step // interval if interval else 0
    return max(0, at_intervals) + 1


def _size_of(path: Path) -> int:
    """The bytes of a checkpoint; 0 if its files cannot be read."""
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    except OSError:
        return 0


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
