"""Saves the state of a run, resumes it, and rolls it back to its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.training.anomalies import AnomalyMonitor
from deepseek_v3.training.checkpoint import CheckpointManager, RunProgress, load_train_state, train_state
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.checkpointing.checks import non_finite, non_finite_summary
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import TrainingError
from deepseek_v3.utils.logging import get_logger


class RunState:
    """The state of a run and its checkpoints; all ranks call every method.

    `last` is the checkpoint that was saved or restored last; None before the first. `group`, of gloo, compares
    tensors over the ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: TrainingSchedule,
        tokens: RunTokens,
        engine: Engine,
        anomalies: AnomalyMonitor,
        checkpoints: CheckpointManager,
        group: ProcessGroup | None,
        allow_changed_data: bool = False,
    ) -> None:
        self.last: Path | None = None
        self._config, self._plan, self._tokens = config, plan, tokens
        self._engine, self._anomalies, self._checkpoints = engine, anomalies, checkpoints
        self._group, self._allow_changed_data = group, allow_changed_data
        self._rollbacks = 0  # to `last`

    def resume(self, path: Path, is_named: bool) -> int:
        """Loads the checkpoint that a run resumes, and returns its step. `is_named`: the user gave its path."""
        progress = self._load(path, verify=is_named)
        self._anomalies.restore(progress.recent)
        self.last = path
        log = get_logger("Trainer")
        log.info(f"Resuming {path} after step {progress.step}")
        directory = self._checkpoints.directory
        later = [step for step in directory.steps() if step > progress.step]
        if later and is_named:
            log.warning(
                f"{directory.path} also holds later checkpoints, up to step {later[-1]}; until this run "
                "passes them, --resume latest means those"
            )
        return progress.step

    def roll_back(self, number: int) -> int | None:
        """Restores the last checkpoint after step `number`; returns its step, or None if there is none yet.

        Weights, moments, biases and the window of recent steps are then those of the checkpoint. The steps since
        then count as skipped: the order of the data and the schedule continue after step `number`. Raises
        TrainingError after more rollbacks to one checkpoint than `training.spikes.max_rollbacks`.
        """
        log = get_logger("Trainer")
        self._anomalies.wants_rollback = False
        if self.last is None:
            log.warning(f"step {number}: there is no checkpoint to roll back to yet, so only the spike was skipped")
            return None
        self._rollbacks += 1
        most = self._config.training.spikes.max_rollbacks
        if self._rollbacks > most:
            raise TrainingError(
                f"step {number}: a spike again after {most} rollbacks to {self.last}, and "
                f"training.spikes.max_rollbacks = {most}. The run stops; its last checkpoint is intact. Lower "
                "training.optimizer.learning_rate, or remove the text that events.jsonl in the run's folder names, "
                "and resume an earlier checkpoint"
            )
        self._checkpoints.finish()
        progress = self._load(self.last, verify=True)
        skipped = progress.recent.total + number - progress.step
        self._anomalies.restore(progress.recent._replace(total=skipped))
        log.warning(
            f"step {number}: rolled back to {self.last}; the {number - progress.step} steps after step "
            f"{progress.step} count as skipped, and training continues with the samples of step {number + 1}"
        )
        return progress.step

    def finite_state(self, number: int) -> dict[str, Any]:
        """Returns the contents of a checkpoint. Raises TrainingError on all ranks if a tensor is not finite."""
        tokens = self._plan.tokens_after(number)
        state = train_state(self._engine, self._config, self._tokens, number, tokens, self._anomalies.state())
        bad = non_finite(flatten(state)[0], self._group)
        if bad:
            raise TrainingError(f"step {number}: after the update {non_finite_summary(bad)}. {self.advice()}")
        return state

    def save(self, number: int, state: dict[str, Any]) -> None:
        """Saves what `finite_state` returned."""
        self.last = self._checkpoints.save(number, state)
        self._rollbacks = 0

    def advice(self) -> str:
        """What a run says that stops because of its weights."""
        last = f"the last checkpoint is {self.last}" if self.last else "there is no checkpoint yet"
        return (
            f"The run stops and saves nothing; {last}. Lower training.optimizer.learning_rate, or lengthen "
            "training.schedule.warmup_steps"
        )

    def _load(self, path: Path, verify: bool) -> RunProgress:
        return load_train_state(
            path,
            self._checkpoints.group,
            self._engine,
            self._config,
            self._plan,
            self._tokens,
            verify=verify,
            allow_changed_data=self._allow_changed_data,
        )
