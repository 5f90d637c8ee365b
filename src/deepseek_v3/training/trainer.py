"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.mixture import MixtureLoader
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.training.anomalies import Anomaly, AnomalyMonitor
from deepseek_v3.training.checkpoint import CheckpointManager
from deepseek_v3.training.data import DocumentIds, open_tokens, open_tokens_on_all_ranks, token_batches
from deepseek_v3.training.events import EventLog, environment, samples_of
from deepseek_v3.training.metrics import MetricsLogger, step_metrics
from deepseek_v3.training.parallel.build import build_engine
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.engine import StepResult
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.profiling import ProfiledSteps, StepProfiler
from deepseek_v3.training.run_state import RunState
from deepseek_v3.training.run_warnings import RunAlarms, log_epochs, warn_of_unusual_settings
from deepseek_v3.training.samples import SampleWriter
from deepseek_v3.training.schedule import ScheduledStep, TrainingSchedule
from deepseek_v3.training.signals import GracefulStop
from deepseek_v3.training.validation import MixtureValidator, ValidationLoss
from deepseek_v3.training.warm_start import WarmStart
from deepseek_v3.utils.distributed.collectives import run_on_all_ranks
from deepseek_v3.utils.errors import DataError, TrainingError
from deepseek_v3.utils.fault_points import reach
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.trackers.select_trackers import check_trackers

_BUILDING = timedelta(days=1)  # for tokenizing a large corpus


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: `finished` is false if a signal stopped it; `validation` is its last measurement."""

    finished: bool
    step: int
    tokens: int
    checkpoint: Path
    validation: ValidationLoss | None


class Trainer:
    """Trains on one rank of a run, from its config to its last checkpoint; without a `mesh` it is the only rank.

    `step_begins` is called with the number of every step. With `deepspeed`, its settings, DeepSpeed runs the steps.

    `resume` is a checkpoint, `latest`, or `auto`: the latest if there is one. With `allow_changed_data` the run may
    continue with other samples or another loss than the checkpoint's run, as `resume_rules` says. A run that does
    not resume takes its weights from `init`, if that is given, as `WarmStart` says. `profile` names steps,
    `3` or `10-12`; rank 0 writes their trace and table to `profile/` in the run's folder.

    Raises a UserError, before it overwrites any file, if the config, the tokens, the checkpoint, the weights or
    `profile` cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        resume: str | None = None,
        mesh: ParallelMesh | None = None,
        step_begins: Callable[[int], None] | None = None,
        deepspeed: DeepSpeedFile | None = None,
        *,
        allow_changed_data: bool = False,
        init: Path | None = None,
        profile: str | None = None,
    ) -> None:
        check_trackers(config.logging.trackers)
        profiled = None if profile is None else ProfiledSteps.parse(profile)
        self.config, self.device = config, device
        self._runs_ahead = device.type == "cuda"  # the host launches steps while the device works on earlier ones
        self.mesh = mesh or ParallelMesh(config.parallel)
        self._step_begins = step_begins
        self.plan = TrainingSchedule(config)
        self.checkpoints = CheckpointManager(config.checkpoint, self.mesh)
        start = self.checkpoints.find_start(resume)
        # A second gloo group, because the background writer may be using the checkpoint group at the same time.
        self._group = None if self.mesh.is_alone else dist.new_group(backend="gloo")
        weights = WarmStart(init, config, self._group) if init is not None and start is None else None
        self.tokens = open_tokens(config) if self.mesh.is_alone else self._open_tokens_on_all_ranks()
        self.loader = MixtureLoader(
            self.tokens, sequence_length=config.training.sequence_length, seed=config.training.seed
        )
        if weights is not None:
            weights.check_tokenizer(self.tokens.load_tokenizer())
        log_epochs(config, self.plan, self.tokens)
        warn_of_unusual_settings(config, self.plan, self.tokens)
        torch.manual_seed(config.training.seed)
        self.validator = run_on_all_ranks(self._group, self._make_validator)
        documents = DocumentIds(self.tokens, config.data.mask_documents)
        self.engine = build_engine(config, self.mesh, device, documents, deepspeed)
        self._steps_done = 0
        samples = config.logging.samples
        self._samples = (
            SampleWriter(samples, self.engine.models[0], self.tokens.load_tokenizer()) if samples else None
        )
        self.anomalies = AnomalyMonitor(config.training, self._record)
        self.state = RunState(
            config,
            self.plan,
            self.tokens,
            self.engine,
            self.anomalies,
            self.checkpoints,
            self._group,
            allow_changed_data,
        )
        self._events = EventLog(config.logging.directory, self.mesh.rank == 0)
        self._validation: ValidationLoss | None = None
        self._failure: DataError | None = None
        self._reporter: MetricsLogger | None = None
        if start is not None:
            self._steps_done = self.state.resume(start, is_named=resume not in ("latest", "auto"))
        elif weights is not None:
            weights.load(self.engine)
        self._profiler = StepProfiler(
            profiled if self.mesh.rank == 0 else None,
            config.logging.directory / "profile",
            device,
            self._steps_done + 1,
            self.plan.total_steps,
        )

    def _open_tokens_on_all_ranks(self) -> RunTokens:
        """Opens the tokens with a long timeout, because rank 0 may have to tokenize the corpus first."""
        return open_tokens_on_all_ranks(self.config, dist.new_group(backend="gloo", timeout=_BUILDING))

    def _make_validator(self) -> MixtureValidator:
        share = (self.mesh.data_rank, self.mesh.parallel.data_ranks)
        return MixtureValidator(self.tokens, self.config, self.config.training.evaluation.tokens, *share)

    def batches(self) -> Generator[Iterator[Tensor]]:
        """Yields the micro-batches of each step, from the next step on, as `Engine.run_step` takes them."""
        return token_batches(lambda samples: self.loader.batch(*samples), self._micro_batches(), self.device)

    def run(self, stop: GracefulStop | None = None) -> TrainingResult:
        """Trains to the end of the token budget, or until a signal requests a stop; then saves a last checkpoint.

        Without `stop`, this method restores the previous signal handlers after the last checkpoint; with `stop`,
        the caller's `with` block does. Raises DataError if tokens cannot be read, after it has saved the steps so
        far, and TrainingError if the training has diverged.
        """
        if stop is None:
            with GracefulStop(self.mesh.size) as own:
                return self.run(own)
        batches = self.batches()
        dtype = self.engine.models[0].compute_dtype or torch.float32
        writes = self.mesh.rank == 0
        judge = RunAlarms(self.config, self.plan, self._events.write).add
        reporter = MetricsLogger(self.config, self.plan, self.device, dtype, self._steps_done + 1, writes, judge)
        self._reporter = reporter
        self._events.begin(self._steps_done, environment(self.device, self.config.parallel))
        stop.install()
        with reporter:
            with self.checkpoints, closing(batches), self._profiler, self._last_report(reporter):
                stopping = self._run_steps(batches, reporter, stop)
                if self._steps_done == self.plan.total_steps and self._failure is None:
                    reporter.log_end(self._steps_done, self.anomalies.total)
            if stopping:
                run_on_all_ranks(self._group, self._raise_failure)
        return self._result()

    def _run_steps(self, batches: Iterator[Iterator[Tensor]], reporter: MetricsLogger, stop: GracefulStop) -> bool:
        """Runs steps up to the last one, or until a signal or lost tokens stop the run; returns whether they do."""
        stopping = False
        tokens = run_on_all_ranks(self._group, lambda: next(batches, None))
        while self._steps_done < self.plan.total_steps and not stopping:
            assert tokens is not None
            step = self.plan.step(self._steps_done + 1)
            if self._step_begins:
                self._step_begins(step.number)
            with self._profiler.step(step.number):
                result = self._train_step(step, tokens)
                reach("step")
                self._steps_done = step.number
                tokens = self._next(batches, stop)
                stopping = stop.should_stop()
            self._after_step(step, result, reporter, stop, stopping)
            stopping = stopping or self._failure is not None
        return stopping

    def abort(self) -> None:
        """Waits for the checkpoint that is being written, and ends the trackers: the watchdog ends the process."""
        self.checkpoints.finish()
        if self._reporter is not None:
            self._reporter.fail()

    def _next(self, batches: Iterator[Iterator[Tensor]], stop: GracefulStop) -> Iterator[Tensor] | None:
        """Reads the tokens of the next step; None at the end of the run. Requests a stop if they cannot be read."""
        try:
            return next(batches, None)
        except DataError as error:
            self._failure = error
            stop.request_after_failure()
            return None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise DataError(
                f"{self._failure}. The run stopped after step {self._steps_done} and saved {self.state.last}; "
                "continue with --resume latest when the tokens can be read again"
            )

    def _train_step(self, step: ScheduledStep, batches: Iterator[Tensor]) -> StepResult:
        """Runs one optimizer step; its results stay on the device."""
        return self.engine.run_step(batches, step, self.anomalies.limits)

    def _after_step(
        self, step: ScheduledStep, result: StepResult, reporter: MetricsLogger, stop: GracefulStop, stopping: bool
    ) -> None:
        """Validates, logs and saves, each if it is due after this step; saves finite weights and moments only.

        After a spike that has been read, restores the last checkpoint first, if the config says so.

        The device has this step to work on while the host waits for the previous one and writes its report. The
        host waits for this step only if it has other work to do before the next one, or after the first step.
        """
        config, number = self.config, step.number
        last = number == self.plan.total_steps
        saves = last or stopping or _is_due(number, config.checkpoint.interval_steps)
        measures = last or _is_due(number, config.training.evaluation.interval_steps)
        samples = self._samples if self._samples is not None and self._samples.is_due(number) else None
        reports = saves or number == 1 or _is_due(number, config.logging.interval_steps)
        others = measures or saves or samples is not None
        self._finish_step(reporter)
        self.anomalies.add(number, result)
        if reports:
            self._start_report(step, result, reporter)
        if others or number == 1 or not self._runs_ahead or self.anomalies.wants_rollback:
            self._finish_step(reporter)
        if self.anomalies.wants_rollback:
            self._roll_back(number)
        with reporter.throughput.paused(), self._profiler.between_steps(others):
            if measures:
                self._measure(number, reporter)
            if samples is not None:
                reporter.log_samples(number, samples.write(number))
            if self._failure is not None and not reports:
                self._start_report(step, result, reporter)
                self._finish_step(reporter)
            if saves or self._failure is not None:
                state = self.state.finite_state(number)
                with stop.saving(last or stopping):
                    self.state.save(number, state)

    def _start_report(self, step: ScheduledStep, result: StepResult, reporter: MetricsLogger) -> None:
        biases_LE = self.engine.routing_biases()
        reporter.start_report(step, step_metrics(self.config, result.losses, result.norm, biases_LE))

    def _finish_step(self, reporter: MetricsLogger) -> None:
        """Waits for the last step; warns of an anomaly, and writes its report if one was started."""
        self.anomalies.read()
        reporter.finish_report(self.anomalies.total)

    @contextmanager
    def _last_report(self, reporter: MetricsLogger) -> Iterator[None]:
        """If an error ends the block, writes the report that was started; that error is the one to raise."""
        try:
            yield
        except BaseException as error:
            with suppress(Exception):
                self.anomalies.read()
            with suppress(Exception):
                reporter.finish_report(self.anomalies.total)
            self._events.write("failure", self._steps_done, error=redact(f"{type(error).__name__}: {error}"))
            raise
        self._events.write("end", self._steps_done, finished=self._steps_done == self.plan.total_steps)

    def _record(self, anomaly: Anomaly) -> None:
        """Writes an anomaly to the run's events, with the samples of its step."""
        if self._events.writes:
            fields = anomaly._asdict() | {"limits": anomaly.limits._asdict()}
            samples = samples_of(self.plan.step(anomaly.step), self.loader, self.tokens)
            self._events.write("anomaly", fields.pop("step"), **fields, samples=samples)

    def _roll_back(self, number: int) -> None:
        restored = self.state.roll_back(number)
        if restored is not None:
            self._events.write("rollback", number, to_step=restored)

    def _measure(self, number: int, reporter: MetricsLogger) -> None:
        """Measures the held-out loss. If the split cannot be read, all ranks save a checkpoint and end the run."""
        config = self.config
        with_drafts = config.training.evaluation.mtp_acceptance and config.model.num_nextn_predict_layers > 0
        try:
            self._validation, averaged = self._validate(with_drafts), None
            if self.engine.optimizer.has_averages:
                with self.engine.averaged_weights():
                    averaged = self._validate().loss
        except DataError as error:
            self._failure = error
        else:
            reporter.log_validation(number, self._validation, averaged)
            if not math.isfinite(self._validation.loss):
                self.state.finite_state(number)  # raises its own error if the weights are to blame
                raise TrainingError(
                    f"held-out loss after step {number}: {self._validation.loss}, with weights that are finite. "
                    f"{self.state.advice()}"
                )

    def _validate(self, with_drafts: bool = False) -> ValidationLoss:
        evaluate = partial(self.engine.evaluate, with_drafts=with_drafts)
        return self.validator.measure(evaluate, self.device, self.mesh.sum_over_ranks, self._group)

    def _micro_batches(self) -> Iterator[list[tuple[int, int]]]:
        parallel = self.config.parallel
        for number in range(self._steps_done + 1, self.plan.total_steps + 1):
            yield self.plan.micro_batches(
                self.plan.step(number), parallel.micro_batch_size, self.mesh.data_rank, parallel.data_ranks
            )

    def _result(self) -> TrainingResult:
        if self.state.last is None:
            raise TrainingError("no step was taken and nothing saved")
        return TrainingResult(
            finished=self._steps_done >= self.plan.total_steps,
            step=self._steps_done,
            tokens=self.plan.tokens_after(min(self._steps_done, self.plan.total_steps)),
            checkpoint=self.state.last,
            validation=self._validation,
        )


def _is_due(step_number: int, interval: int) -> bool:
    return interval > 0 and step_number % interval == 0
