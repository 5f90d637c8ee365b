"""What a run tells while it trains: log lines, metrics on disk, and the live display.

FOLDED: The figures of one step, gathered on the device and read back in one transfer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from deepseek_v3.config.loading import config_to_yaml
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.mla.kv_compression import expanded_width, latent_width
from deepseek_v3.moe.balance import load_metrics
from deepseek_v3.planning.counts import count_active_parameters, count_parameters
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.planning.hardware import peak_bfloat16_flops
from deepseek_v3.training.loss import Losses
from deepseek_v3.training.loss_curve import has_losses, plot_losses
from deepseek_v3.training.schedule import ScheduledStep, TrainingSchedule
from deepseek_v3.training.validation import ValidationLoss
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.monitoring import (
    MetricsWriter,
    device_memory_bytes,
    read_metrics,
    step_line,
    time_left,
)
from deepseek_v3.utils.progress import ProgressDisplay, ProgressLine

StepMetrics = dict[str, float | list[float]]


def step_metrics(config: ModelConfig, losses: Losses, gradient_norm: Tensor, biases_LE: Tensor) -> StepMetrics:
    """Losses in nats per token, gradient norm, and for each figure of the experts a list over mixture layers.

    `biases_LE` (layers, experts): the routing biases after the step.
    """
    figures = {"loss": losses.main, "gradient_norm": gradient_norm}
    if config.num_nextn_predict_layers:
        figures["mtp_loss"] = losses.mtp
    if len(biases_LE):
        figures["balance_loss"] = losses.balance
        figures |= {f"experts/{name}": values_L for name, values_L in load_metrics(losses.counts_LE).items()}
        figures |= {"experts/bias_min": biases_LE.amin(-1), "experts/bias_max": biases_LE.amax(-1)}
    return _to_host(figures)


def _to_host(figures: Mapping[str, Tensor]) -> StepMetrics:
    values = torch.cat([figure.double().flatten() for figure in figures.values()]).tolist()
    host: StepMetrics = {}
    for name, figure in figures.items():
        own, values = values[: figure.numel()], values[figure.numel() :]
        host[name] = own if figure.ndim else own[0]
    return host


_log = get_logger("Trainer")


class Throughput:
    """Steps and tokens per second since the last reading; time spent inside `paused` does not count."""

    def __init__(self, plan: TrainingSchedule, step_number: int) -> None:
        self._plan, self._step_number = plan, step_number
        self._since = time.perf_counter()

    def read(self, step_number: int) -> tuple[float, float]:
        """Steps per second and tokens per second up to the end of step `step_number`."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        steps = step_number - self._step_number
        tokens = self._plan.tokens_after(step_number) - self._plan.tokens_after(self._step_number)
        self._since, self._step_number = now, step_number
        return steps / seconds, tokens / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time until exit."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


class _Nowhere:
    """Takes what other ranks write already."""

    def write(self, step: int, values: object) -> None:
        """Drops it."""

    def update(self, title: str, done: int, status: str) -> None:
        """Drops it."""


class MetricsLogger:
    """Reports one run; a context manager that holds the metrics files and the terminal's live display.

    `first_step` is the first step to be trained; a resumed run drops metrics from there on. Of the ranks of a job
    one `writes` metrics and shows progress; what the others log is left to their log levels.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: TrainingSchedule,
        device: torch.device,
        compute_dtype: torch.dtype,
        first_step: int,
        writes: bool = True,
    ) -> None:
        self._config, self._plan, self._device = config, plan, device
        self._active = count_active_parameters(config.model)
        self._flops_per_token = training_flops_per_token(config.model, config.training.sequence_length)
        self._peak_flops = (
            peak_bfloat16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        )
        self._cache_figures = _cache_bytes_per_token(config, compute_dtype)
        self._first_step, self._writes = first_step, writes
        self._stack = ExitStack()

    def __enter__(self) -> MetricsLogger:
        logging, done = self._config.logging, self._first_step - 1
        self._announce()
        self._writer: MetricsWriter | _Nowhere = _Nowhere()
        self._progress: ProgressLine | _Nowhere = _Nowhere()
        if self._writes:
            self._writer = self._stack.enter_context(
                MetricsWriter(logging.directory, logging.tensorboard, resume_step=done or None)
            )
            total = self._plan.total_steps
            display = self._stack.enter_context(ProgressDisplay(transient=False))
            self._progress = display.line(f"step {done}/{total}", total, done)
        self.clock = Throughput(self._plan, done)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def log_step(self, step: ScheduledStep, figures: StepMetrics, skipped: int) -> None:
        """Logs a step, and how many up to this one were `skipped` because they were not finite."""
        loss, norm = figures["loss"], figures["gradient_norm"]
        assert isinstance(loss, float)
        assert isinstance(norm, float)
        tokens = self._plan.tokens_after(step.number)
        steps_per_second, tokens_per_second = self.clock.read(step.number)
        speed = self._speed(tokens_per_second)
        memory = float(device_memory_bytes(self._device))
        progress = {"tokens": tokens, "tokens_per_parameter": tokens / self._active}
        record = {**progress, "learning_rate": step.learning_rate, **figures, **speed, "memory_bytes": memory}
        self._writer.write(step.number, {**record, "skipped_steps": skipped, **self._cache_figures})
        total = self._plan.total_steps
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
        fields += [("MTP loss", f"{figures['mtp_loss']:.4f}")] if "mtp_loss" in figures else []
        fields += [("Skipped", f"{skipped}")] if skipped else []
        figures_of_step = (step.number, total, loss, step.learning_rate, tokens, steps_per_second)
        _log.info(step_line(*figures_of_step, *fields, total_tokens=self._plan.total_tokens))

    def log_validation(self, step_number: int, held_out: ValidationLoss) -> None:
        """Logs a measurement on the hold-out split."""
        record = {"holdout_loss": held_out.loss, "holdout_bits_per_byte": held_out.bits_per_byte}
        self._writer.write(step_number, {"tokens": self._plan.tokens_after(step_number), **record})
        _log.info(
            f"Held-out loss after step {step_number}: {held_out.loss:.4f} nats per token,\n"
            f"{held_out.bits_per_byte:.4f} bits per byte"
        )

    def log_end(self, step_number: int, skipped: int) -> None:
        """Logs what the whole run trained on, beside its budget; warns where steps were `skipped`."""
        tokens = self._plan.tokens_after(step_number)
        _log.info(
            f"Finished: {tokens:,} tokens in {step_number:,} steps, {tokens / self._active:.2f} per active "
            f"parameter;\nthe budget was {self._plan.total_tokens:,}"
        )
        if skipped:
            _log.warning(f"{skipped:,} of {step_number:,} steps were skipped, because they were not finite")

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        speed = {"tokens_per_second": tokens_per_second}
        if self._peak_flops:
            peak = self._peak_flops * self._config.parallel.world_size
            speed["mfu"] = tokens_per_second * self._flops_per_token / peak
        return speed

    def _announce(self) -> None:
        counts, budget = count_parameters(self._config.model), self._plan.total_tokens
        _log.info(
            f"Model: {counts.total:,} parameters, {self._active:,} active for a token,\n"
            f"{counts.prediction:,} more for multi-token prediction | Device: {self._device}"
        )
        _log.info(
            f"Budget: {budget:,} tokens, {budget / self._active:.1f} per active parameter,\n"
            f"in {self._plan.total_steps:,} steps"
        )
        latent, expanded = self._cache_figures.values()
        _log.info(
            f"Cache when generating: {latent:,.0f} bytes per token,\n"
            f"multi-head attention would need {expanded:,.0f}"
        )


def write_config(config: RunConfig) -> None:
    """Writes the resolved config to the run's folder. Raises DataError where that cannot be written."""
    path = config.logging.directory / "config.yaml"
    try:
        with atomic_write(path) as partial:
            partial.write_text(config_to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}; choose another folder with --set logging.directory=..."
        ) from error


def plot_run(folder: Path, baselines: Mapping[str, float] | None = None) -> None:
    """Draws the run's losses, with `baselines` as `plot_losses` does, to loss.png in its folder.

    What stands in the way is logged: the run is complete without a picture.
    """
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
    """Bytes cached per token over all layers in generation: ours, and multi-head attention's."""
    per_number = config.model.num_hidden_layers * dtype.itemsize
    return {
        "cache/latent_bytes_per_token": float(per_number * latent_width(config.model)),
        "cache/multi_head_bytes_per_token": float(per_number * expanded_width(config.model)),
    }
