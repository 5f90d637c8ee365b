"""The checkpoints of a run as it makes and uses them: files of one process, folders of several."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from deepseek_v3.config.train_config import CheckpointConfig
from deepseek_v3.training.parallel.ranks import Ranks
from deepseek_v3.utils.checkpointing import CheckpointDirectory
from deepseek_v3.utils.checkpoints.loading import newest_checkpoint
from deepseek_v3.utils.checkpoints.ranks import checkpoint_group, together
from deepseek_v3.utils.checkpoints.saving import ShardedWriter
from deepseek_v3.utils.logging import get_logger


class RunCheckpoints:
    """For a `with` block around the training, at whose end every checkpoint is complete.

    All ranks call everything together. Several ranks write a checkpoint while training goes on, one at a time.
    """

    def __init__(self, config: CheckpointConfig, ranks: Ranks) -> None:
        self.directory = CheckpointDirectory(config.directory, config.keep)
        self.group = None if ranks.is_alone else checkpoint_group()
        self._writer = None if ranks.is_alone else ShardedWriter(self.directory, self.group, _tell_saved)

    def __enter__(self) -> RunCheckpoints:
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
            resume = "latest" if together(self.group, self.directory.steps) else None
        if resume is None:
            together(self.group, self.directory.refuse_if_used)
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
