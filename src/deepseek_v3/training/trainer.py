"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.moe.balance import routers_of, update_biases
from deepseek_v3.training.batches import document_numbers, open_tokens, token_batches
from deepseek_v3.training.holdout import HeldOutEvaluation, HeldOutLoss
from deepseek_v3.training.interruption import StopRequest
from deepseek_v3.training.loss import Losses, training_losses
from deepseek_v3.training.optimizer import AdamW
from deepseek_v3.training.parallel.plan import prepare_model
from deepseek_v3.training.reporting import Reporter
from deepseek_v3.training.run_state import restore_run, run_state
from deepseek_v3.training.schedule import Step, TokenPlan
from deepseek_v3.training.step_metrics import step_figures
from deepseek_v3.utils.checkpointing import CheckpointDirectory, load_checkpoint
from deepseek_v3.utils.errors import TrainingError
from deepseek_v3.utils.logging import get_logger


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: `finished` is false where a signal stopped it; `held_out` is its last measurement."""

    finished: bool
    step: int
    tokens: int
    checkpoint: Path
    held_out: HeldOutLoss | None


class Trainer:
    """One run on one device, from its config to its last checkpoint.

    `resume` is a checkpoint file or `latest`. Raises a UserError, with no earlier file overwritten, where the
    config, the tokens or the checkpoint cannot be used.
    """

    def __init__(self, config: RunConfig, device: torch.device, resume: str | None = None) -> None:
        self.config, self.device = config, device
        self.plan = TokenPlan(config)
        self.checkpoints = CheckpointDirectory(config.checkpoint.directory, config.checkpoint.keep)
        if resume is None:
            self.checkpoints.refuse_if_used()
        self.shards = open_tokens(config)
        self.loader = TokenLoader(
            self.shards, sequence_length=config.training.sequence_length, seed=config.training.seed
        )
        torch.manual_seed(config.training.seed)
        self.evaluation = HeldOutEvaluation(self.shards, config, config.training.evaluation.tokens)
        self.model = prepare_model(config, device)
        self.routers = routers_of(self.model)
        self.optimizer = AdamW(self.model.parameters(), config.training.optimizer)
        self._steps_done = 0
        self._checkpoint: Path | None = None
        self._held_out: HeldOutLoss | None = None
        if resume is not None:
            self._restore(resume)

    def run(self) -> TrainingResult:
        """Trains to the end of the token budget, or until a signal asks to stop; either way saves last."""
        batches = token_batches(self.loader, self._micro_batches(), self.device)
        dtype = self.model.compute_dtype or torch.float32
        reporter = Reporter(self.config, self.plan, self.device, dtype, self._steps_done + 1)
        with closing(batches), reporter, StopRequest() as stop:
            stopping = False
            while self._steps_done < self.plan.total_steps and not stopping:
                step = self.plan.step(self._steps_done + 1)
                losses, norm = self._train_step(step, batches)
                self._steps_done = step.number
                stopping = stop.requested
                self._after_step(step, losses, norm, reporter, stopping)
            if self._steps_done == self.plan.total_steps:
                reporter.report_end(self._steps_done)
        return self._result()

    def _train_step(self, step: Step, batches: Iterator[Tensor]) -> tuple[Losses, Tensor]:
        """One optimizer step; returns mean losses with summed expert loads, and the gradient norm."""
        alpha = self.config.training.balance.sequence_loss_weight
        num_micro_batches = step.num_samples // self.config.parallel.micro_batch_size
        parts: list[Losses] = []
        for _ in range(num_micro_batches):
            tokens_BX = next(batches)
            documents_BS = self._documents(tokens_BX)
            losses = training_losses(self.model, tokens_BX, step.prediction_weight, alpha, documents_BS)
            (losses.total / num_micro_batches).backward()
            parts.append(losses._replace(total=losses.total.detach()))
        norm = self.optimizer.step(step.learning_rate)
        self.optimizer.zero_grad()
        whole = _combined(parts)
        if self.routers:
            update_biases(self.routers, whole.counts_LE, step.bias_update_speed)
        return whole, norm

    def _after_step(self, step: Step, losses: Losses, norm: Tensor, reporter: Reporter, stopping: bool) -> None:
        """Reports, measures and saves where any of it is due; what is saved has been seen to be finite."""
        config, number = self.config, step.number
        last = number == self.plan.total_steps
        saves = last or stopping or _is_due(number, config.checkpoint.interval_steps)
        if saves or number == 1 or _is_due(number, config.logging.interval_steps):
            reporter.report_step(step, step_figures(config.model, losses, norm, self.routers))
        with reporter.clock.paused():
            if last or _is_due(number, config.training.evaluation.interval_steps):
                self._held_out = self.evaluation.measure(self.model, self.device)
                reporter.report_held_out(number, self._held_out)
            if saves:
                tokens = self.plan.tokens_after(number)
                state = run_state(self.model, self.optimizer, config, self.shards, number, tokens)
                self._checkpoint = self.checkpoints.save(number, state)
                reporter.report_checkpoint(self._checkpoint)

    def _micro_batches(self) -> Iterator[tuple[int, int]]:
        for number in range(self._steps_done + 1, self.plan.total_steps + 1):
            yield from self.plan.micro_batches(self.plan.step(number), self.config.parallel.micro_batch_size)

    def _documents(self, tokens_BX: Tensor) -> Tensor | None:
        if not self.config.data.mask_documents:
            return None
        return document_numbers(tokens_BX[:, :-1], self.shards.index.end_of_text)

    def _restore(self, resume: str) -> None:
        if resume == "latest":
            path, state = self.checkpoints.latest()
        else:
            path = Path(resume)
            state = load_checkpoint(path)
        self._steps_done = restore_run(state, path, self.model, self.optimizer, self.config, self.plan, self.shards)
        self._checkpoint = path
        log = get_logger("Trainer")
        log.info(f"Resuming {path} after step {self._steps_done}")
        later = [step for step in self.checkpoints.steps() if step > self._steps_done]
        if later and resume != "latest":
            log.warning(
                f"{self.checkpoints.path} also holds later checkpoints, up to step {later[-1]}; until this run "
                "passes them, --resume latest means those"
            )

    def _result(self) -> TrainingResult:
        if self._checkpoint is None:
            raise TrainingError("no step was taken and nothing saved")
        return TrainingResult(
            finished=self._steps_done >= self.plan.total_steps,
            step=self._steps_done,
            tokens=self.plan.tokens_after(min(self._steps_done, self.plan.total_steps)),
            checkpoint=self._checkpoint,
            held_out=self._held_out,
        )


def _is_due(step_number: int, interval: int) -> bool:
    return interval > 0 and step_number % interval == 0


def _combined(parts: list[Losses]) -> Losses:
    """Means of the losses of equal micro-batches, and the sums of their expert loads."""
    total, main, prediction, balance, counts = (torch.stack(values) for values in zip(*parts, strict=True))
    return Losses(total.mean(), main.mean(), prediction.mean(), balance.mean(), counts.sum(0))
