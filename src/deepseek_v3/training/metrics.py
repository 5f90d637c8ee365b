"""Logs a run while it trains: log lines, metrics on disk, and the live display.

To add a metric of a step, add one entry to `step_metrics`: a name and a tensor on the device, 0-d, or one value per
MoE layer. All of a step's metrics come back from the device in one transfer, and go to metrics.jsonl,
TensorBoard and the trackers under that name. A value that is known on the host, such as a memory size, belongs in
`_StepReport`, because the next step may have been launched before a report is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.config.loading import config_to_yaml
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.mla.kv_compression import bytes_per_token, expanded_bytes_per_token, latent_format
from deepseek_v3.moe.balance import encode_load, load_metrics
from deepseek_v3.planning.counts import count_active_parameters, count_parameters
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.planning.hardware import peak_bfloat16_flops
from deepseek_v3.training.loss import Losses
from deepseek_v3.training.resume_rules import fields_of
from deepseek_v3.training.schedule import ScheduledStep, TrainingSchedule
from deepseek_v3.training.throughput import Throughput
from deepseek_v3.training.validation import ValidationLoss, validation_metrics, validation_texts
from deepseek_v3.utils.errors import DataError, error_chain
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.host_copy import HostCopy, Moment
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.monitoring import (
    MetricsWriter,
    device_memory_bytes,
    read_metrics,
    step_line,
    time_left,
)
from deepseek_v3.utils.progress import ProgressDisplay, ProgressLine
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.trackers.run_trackers import RunTrackers
from deepseek_v3.utils.trackers.tracker import Status, TrackedRun

StepMetrics = dict[str, float | list[float]]
_LOAD, _MOST_LOADS = "experts/load", 400  # records of it in a run: enough for the columns of a picture


def step_metrics(config: RunConfig, losses: Losses, gradient_norm: Tensor, biases_LE: Tensor) -> dict[str, Tensor]:
    """Returns the metrics of one step: losses in nats per token, the gradient norm, and the load of the experts.

    `biases_LE` (MoE layers, experts): the routing biases after the step. Metrics of the experts have one value per
    MoE layer, and `experts/load`, the tokens of each expert, has (layers, experts). All metrics stay on the device.
    """
    metrics = {"loss": losses.main, "gradient_norm": gradient_norm, _LOAD: losses.counts_LE}
    if config.model.num_nextn_predict_layers:
        metrics["mtp_loss"] = losses.mtp
    for name, value in zip(sorted(config.training.loss_terms), losses.terms_N, strict=True):
        metrics[f"loss_terms/{name}"] = value
    if len(biases_LE):
        metrics["balance_loss"] = losses.balance
        metrics |= {f"experts/{name}": values_L for name, values_L in load_metrics(losses.counts_LE).items()}
        metrics |= {"experts/bias_min": biases_LE.amin(-1), "experts/bias_max": biases_LE.amax(-1)}
    return metrics


_log = get_logger("Trainer")


class _StepReport:
    """The report of a step whose metrics are on their way from the device.

    It is made after the launch of that step and before the launch of the next one, which would change the memory.
    """

    def __init__(
        self, step: ScheduledStep, metrics: Mapping[str, Tensor], throughput: Throughput, memory_bytes: int
    ) -> None:
        self.step, self.memory_bytes = step, float(memory_bytes)
        self._shapes = {name: metric.shape for name, metric in metrics.items()}
        self._copy = HostCopy(torch.cat([metric.double().flatten() for metric in metrics.values()]))
        self.lap = throughput.lap(step.number, self._copy.arrival)

    def read(self) -> StepMetrics:
        """Waits for the metrics."""
        values = iter(self._copy.read())
        return {
            name: list(islice(values, shape.numel())) if shape else next(values)
            for name, shape in self._shapes.items()
        }


class _NoOutput:
    """Discards metrics, on ranks other than the one that writes them."""

    def write(self, step: int, values: object, more: object = None) -> None:
        """Does nothing."""

    def log_scalars(self, step: int, values: object) -> None:
        """Does nothing."""

    def log_text(self, step: int, name: str, text: str) -> None:
        """Does nothing."""

    def close(self, status: Status) -> None:
        """Does nothing."""

    def update(self, title: str, done: int, status: str) -> None:
        """Does nothing."""


class MetricsLogger:
    """Logs the metrics of one run; a context manager that holds its files, its trackers and the live display.

    `first_step`: the first step to be trained; metrics on disk from that step on are removed. Exactly one rank
    `writes` metrics and shows progress. `judge` is called with the step and the values of every record. Leaving the
    block tells the trackers how the run ended: it has finished after `log_end`, has failed after `fail` or with an
    error, and was stopped otherwise.
    """

    def __init__(
        self,
        config: RunConfig,
        schedule: TrainingSchedule,
        device: torch.device,
        compute_dtype: torch.dtype,
        first_step: int,
        writes: bool = True,
        judge: Callable[[int, Mapping[str, Any]], None] = lambda *_: None,
    ) -> None:
        self._config, self._schedule, self._device = config, schedule, device
        self._active = count_active_parameters(config.model)
        self._flops_per_token = training_flops_per_token(config.model, config.training.sequence_length)
        self._peak_flops = (
            peak_bfloat16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        )
        self._cache_metrics = _cache_bytes_per_token(config, compute_dtype)
        self._first_step, self._writes, self._judge = first_step, writes, judge
        interval = config.logging.interval_steps
        self._load_interval = interval * -(-schedule.total_steps // (interval * _MOST_LOADS))
        self._status = Status.STOPPED
        self._stack = ExitStack()
        self._report: _StepReport | None = None

    def __enter__(self) -> MetricsLogger:
        logging, done = self._config.logging, self._first_step - 1
        self._announce()
        self._writer: MetricsWriter | _NoOutput = _NoOutput()
        self._progress: ProgressLine | _NoOutput = _NoOutput()
        self._trackers: RunTrackers | _NoOutput = _NoOutput()
        self._stack.callback(lambda: self._trackers.close(self._status))
        if self._writes:
            self._writer = self._stack.enter_context(
                MetricsWriter(logging.directory, logging.tensorboard, resume_step=done or None)
            )
            total = self._schedule.total_steps
            display = self._stack.enter_context(ProgressDisplay(transient=False))
            self._progress = display.line(f"step {done}/{total}", total, done)
            self._trackers = RunTrackers(logging.trackers, _tracked_run(self._config), resumes=done > 0)
        self.throughput = Throughput(self._schedule, done, Moment(self._device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            interrupted = any(isinstance(cause, KeyboardInterrupt) for cause in error_chain(error))
            self._status = Status.STOPPED if interrupted else Status.FAILED
        self._stack.close()

    def fail(self) -> None:
        """Tells the trackers at once that the run has failed; any thread may call this."""
        self._status = Status.FAILED
        self._trackers.close(Status.FAILED)

    def start_report(self, step: ScheduledStep, metrics: Mapping[str, Tensor]) -> None:
        """Starts the report of a step, whose `metrics` are those of `step_metrics`; waits for nothing.

        The previous report must have been finished.
        """
        assert self._report is None
        self._report = _StepReport(step, metrics, self.throughput, device_memory_bytes(self._device))

    def finish_report(self, skipped: int) -> None:
        """Waits for the metrics of the report that was started, and logs it; does nothing if there is none.

        `skipped` counts the steps so far that were skipped.
        """
        if self._report is not None:
            report, metrics = self._report, self._report.read()
            self._report = None
            self._log_step(report, metrics, skipped)

    def _log_step(self, report: _StepReport, metrics: StepMetrics, skipped: int) -> None:
        step, memory, loss, norm = report.step, report.memory_bytes, metrics["loss"], metrics["gradient_norm"]
        counts = metrics.pop(_LOAD)
        assert isinstance(counts, list)
        assert isinstance(loss, float)
        assert isinstance(norm, float)
        tokens = self._schedule.tokens_after(step.number)
        steps_per_second, tokens_per_second = report.lap.rates()
        speed = self._speed(tokens_per_second)
        progress = {"tokens": tokens, "tokens_per_parameter": tokens / self._active}
        record: StepMetrics = {**progress, "learning_rate": step.learning_rate, **metrics, **speed}
        record |= {"memory_bytes": memory, "skipped_steps": skipped, **self._cache_metrics}
        self._write(step.number, record, self._time_and_load(step.number, counts))
        total = self._schedule.total_steps
        status = f"loss {loss:.4f} {tokens_per_second:,.0f} tokens/s"
        self._progress.update(f"step {step.number}/{total}", step.number, status)
        fields = [
            ("Left", time_left(total - step.number, steps_per_second)),
            ("Tokens/sec", f"{tokens_per_second:,.0f}"),
            ("Tokens/param", f"{tokens / self._active:.2f}"),
            ("Grad norm", f"{norm:.2f}"),
            ("Memory", f"{memory / 2**30:.2f} GiB"),
        ]
        fields += [("MFU", f"{speed['mfu']:.1%}")] if "mfu" in speed else []
        fields += [("MTP loss", f"{metrics['mtp_loss']:.4f}")] if "mtp_loss" in metrics else []
        fields += [("Skipped", f"{skipped}")] if skipped else []
        line = (step.number, total, loss, step.learning_rate, tokens, steps_per_second)
        _log.info(step_line(*line, *fields, total_tokens=self._schedule.total_tokens))

    def log_validation(self, step_number: int, validation: ValidationLoss, averaged: float | None = None) -> None:
        """Logs the validation loss after a step, and the `averaged` weights' in nats per token if there are any."""
        record = validation_metrics(validation) | ({} if averaged is None else {"ema_holdout_loss": averaged})
        self._write(step_number, {"tokens": self._schedule.tokens_after(step_number), **record}, _time())
        for text in validation_texts(step_number, validation):
            _log.info(text)

    def log_samples(self, step_number: int, texts: Sequence[str]) -> None:
        """Passes the model's texts, one per prompt of the config, to the trackers."""
        for number, text in enumerate(texts):
            self._trackers.log_text(step_number, f"samples/{number:02d}", text)

    def log_end(self, step_number: int, skipped: int) -> None:
        """Logs the tokens that the run has trained on and its budget, and warns if any steps were `skipped`."""
        self._status = Status.FINISHED
        tokens = self._schedule.tokens_after(step_number)
        _log.info(
            f"Finished: {tokens:,} tokens in {step_number:,} steps, {tokens / self._active:.2f} per active "
            f"parameter;\nthe budget was {self._schedule.total_tokens:,}"
        )
        if skipped:
            _log.warning(f"{skipped:,} of {step_number:,} steps were skipped; events.jsonl says why")

    def _write(self, step_number: int, record: StepMetrics, more: Mapping[str, float | str] | None = None) -> None:
        self._writer.write(step_number, record, more)
        self._trackers.log_scalars(step_number, record)
        self._judge(step_number, record)

    def _time_and_load(self, number: int, counts: list[float]) -> dict[str, float | str]:
        """The moment, and if it is due the load of every expert from its tokens, layer after layer."""
        due = number % self._load_interval == 0 or number in (1, self._schedule.total_steps)
        layers = len(counts) // self._config.model.n_routed_experts
        return {**_time(), _LOAD: encode_load(counts, layers)} if counts and due else _time()

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        speed = {"tokens_per_second": tokens_per_second}
        if self._peak_flops:
            peak = self._peak_flops * self._config.parallel.world_size
            speed["mfu"] = tokens_per_second * self._flops_per_token / peak
        return speed

    def _announce(self) -> None:
        counts, budget = count_parameters(self._config.model), self._schedule.total_tokens
        _log.info(
            f"Model: {counts.total:,} parameters, {self._active:,} active for a token,\n"
            f"{counts.prediction:,} more for multi-token prediction | Device: {self._device}"
        )
        _log.info(
            f"Budget: {budget:,} tokens, {budget / self._active:.1f} per active parameter,\n"
            f"in {self._schedule.total_steps:,} steps"
        )
        latent, expanded = self._cache_metrics.values()
        _log.info(
            f"Cache when generating: {latent:,.0f} bytes per token,\n"
            f"multi-head attention would need {expanded:,.0f}"
        )


def _time() -> dict[str, float | str]:
    return {"time": round(time.time(), 3)}


def _tracked_run(config: RunConfig) -> TrackedRun:
    """What the trackers are told of the run. A run without a name is called as its folder, with the time."""
    logging = config.logging
    folder = logging.directory.resolve()
    fields = {
        name: value if value is None or isinstance(value, (bool, int, float)) else redact(str(value))
        for name, value in fields_of(RunConfig, config)
    }
    default_name = f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return TrackedRun(folder, logging.project, logging.run_name, default_name, fields)


def write_config(config: RunConfig) -> None:
    """Writes the resolved config to the run's config.yaml. Raises DataError if it cannot be written."""
    path = config.logging.directory / "config.yaml"
    try:
        with atomic_write(path) as partial:
            partial.write_text(config_to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}; choose another folder with --set logging.directory=..."
        ) from error


def plot_run(folder: Path, baselines: Mapping[str, float] | None = None) -> None:
    """Draws the run's losses to loss.png in its folder, with `baselines` as for `plot_losses`.

    A failure is only logged, because the run is complete without the picture.
    """
    from deepseek_v3.training.loss_curve import has_losses, plot_losses  # matplotlib is not needed before

    path = folder / "loss.png"
    try:
        records = read_metrics(folder / "metrics.jsonl")
        if has_losses(records):
            plot_losses(records, path, baselines)
        else:
            _log.info(f"{path}: not drawn: {folder / 'metrics.jsonl'} holds no loss")
    except (DataError, OSError) as error:
        _log.warning(f"{path}: cannot be drawn: {error}")


def _cache_bytes_per_token(config: RunConfig, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per token of the latent cache in generation, and of multi-head attention's cache, over all layers."""
    layout = latent_format(config.model, dtype)
    return {
        "cache/latent_bytes_per_token": float(bytes_per_token(config.model, layout)),
        "cache/multi_head_bytes_per_token": float(expanded_bytes_per_token(config.model, layout)),
    }
